"""Kernels of flash-linear-attention for the operators on CUDA, used where they take a call and give right results.

    fla.unavailable_reason()                               # why none can run on this machine, or None
    with fla.use_backend("torch"): ...                     # or "fla", or "auto"
    call = fla.make_sample_call(fla.KERNEL_ADAPTERS[0], batch=1, time=256, heads=4)
    fla.unsupported_reason(call); fla.verify_call(call); fla.run_call(call.as_leaves(), "fla")

Reading order: call.py (an operator's call), adapters.py (to a kernel's call and back), catalogue.py (the table of
kernels), verify.py (is a kernel right here?), dispatch.py (which backend computes a call). Operators get here by the
decorator `accelerated`, which registers their forms in torch; nothing here imports an operator.
docs/reference/kernels.md has the table of kernels and of what they do not support.
"""

from limbeck.ops.fla.adapters import KernelAdapter
from limbeck.ops.fla.call import OperatorCall, use_backend
from limbeck.ops.fla.catalogue import KERNEL_ADAPTERS
from limbeck.ops.fla.dispatch import (
    accelerated,
    clear_dispatch_log,
    list_dispatched_calls,
    run_call,
    summarize_dispatch,
    unavailable_reason,
    unsupported_reason,
    verify_call,
)
from limbeck.ops.fla.verify import KernelCheck, make_sample_call

__all__ = [
    "KERNEL_ADAPTERS",
    "KernelAdapter",
    "KernelCheck",
    "OperatorCall",
    "accelerated",
    "clear_dispatch_log",
    "list_dispatched_calls",
    "make_sample_call",
    "run_call",
    "summarize_dispatch",
    "unavailable_reason",
    "unsupported_reason",
    "use_backend",
    "verify_call",
]
