"""Kernels for the operators on CUDA: flash-linear-attention's, where they are installed, take the call and are right.

    kernels.missing()                                # why none can run here, or None
    with kernels.using("torch"): ...                 # or "fla", or "auto"
    call = kernels.sample(kernels.ADAPTERS[0], batch=1, time=256, heads=4)
    kernels.declined(call); kernels.check(call); kernels.run(call.leaves(), "fla")

Operators call in here by `accelerated`; nothing in here imports one, they register their forms in torch. The table of
kernels and what they decline: docs/kernels.md.
"""

from limbeck.kernels.adapters import Adapter
from limbeck.kernels.calls import Call, sample
from limbeck.kernels.catalogue import ADAPTERS
from limbeck.kernels.dispatch import accelerated, declined, forget, missing, report, run, used
from limbeck.kernels.dispatch import check_call as check
from limbeck.kernels.setting import using
from limbeck.kernels.verdicts import Verdict

__all__ = [
    "ADAPTERS",
    "Adapter",
    "Call",
    "Verdict",
    "accelerated",
    "check",
    "declined",
    "forget",
    "missing",
    "report",
    "run",
    "sample",
    "used",
    "using",
]
