"""Kernels for the operators on CUDA: flash-linear-attention's, where they are installed, take the call and are right.

    kernels.unavailable_reason()                                # why none can run here, or None
    with kernels.use_backend("torch"): ...                 # or "fla", or "auto"
    call = kernels.make_sample_call(kernels.KERNEL_ADAPTERS[0], batch=1, time=256, heads=4)
    kernels.unsupported_reason(call); kernels.verify_call(call); kernels.run_call(call.as_leaves(), "fla")

Operators call in here by `accelerated`; nothing in here imports one, they register their forms in torch. The table of
kernels and what they decline: docs/kernels.md.
"""

from limbeck.ops.fla.adapters import KernelAdapter
from limbeck.ops.fla.call import OperatorCall, make_sample_call, use_backend
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
from limbeck.ops.fla.verify import KernelCheck

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
