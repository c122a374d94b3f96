"""Which backend computes an operator's call: a kernel where one takes it and was found right, else torch.

    @accelerated("scalar_decay")
    def chunked(q, k, v, log_decay=None, *, state=None, segments=None): ...     # in torch

    list_dispatched_calls()                      # what ran, and why

Every kind of call is logged once (logger limbeck.ops.fla) and kept for the run's manifest.
"""

import functools
import importlib.util
import inspect
import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.ops.fla.adapters import KernelAdapter
from limbeck.ops.fla.call import TORCH_FORMS, OperatorCall, check_backend, requested_backend
from limbeck.ops.fla.catalogue import find_adapter
from limbeck.ops.fla.verify import KernelCheck, get_cached_check, verify_kernel, verify_kernel_once

P = ParamSpec("P")
R = TypeVar("R")

KERNEL_DEVICES = {"cuda"}  # where kernels run
MOST = 4096  # kinds of call to remember

logger = logging.getLogger("limbeck.ops.fla")
_used: dict[tuple[str, ...], dict[str, str | None]] = {}
_decided: dict[tuple[Any, ...], KernelAdapter | None] = {}


def accelerated(operator: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorates an operator's form in torch: calls that a kernel takes go there. `__wrapped__` is the form in torch."""

    def decorate(form: Callable[P, R]) -> Callable[P, R]:
        TORCH_FORMS[operator, form.__name__] = cast(Any, form)
        parameters = inspect.signature(form).parameters
        absent = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
        names = tuple(parameters)

        @functools.wraps(form)
        def dispatched(*args: P.args, **kwargs: P.kwargs) -> R:
            first = cast(Tensor, args[0] if args else next(iter(kwargs.values())))
            asked = requested_backend()
            if asked == "torch" or (asked == "auto" and first.device.type not in KERNEL_DEVICES):
                return form(*args, **kwargs)
            if form.__name__ == "recurrent" and torch.compiler.is_compiling():
                return form(*args, **kwargs)  # a step's graph is better kept whole
            given = {**dict.fromkeys(names), **absent, **dict(zip(names, args)), **kwargs}
            taken = _offer(operator, form.__name__, given)
            return form(*args, **kwargs) if taken is None else cast(R, taken)

        return dispatched

    return decorate


@torch.compiler.disable
def _offer(operator: str, form: str, given: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """What a kernel makes of the call, or None where torch has to."""
    segments, _ = given.pop("segments", None), given.pop("chunk", None)
    call = OperatorCall(operator, form, given, segments)
    kind = _kind(call)
    if kind not in _decided:
        adapter, reason = find_adapter(call), unsupported_reason(call)
        if reason is None and adapter is not None:
            if (
                call.main_input.is_cuda
                and torch.cuda.is_current_stream_capturing()
                and get_cached_check(adapter, call) is None
            ):
                return None  # a graph cannot hold a check; nothing is decided
            verdict = verify_kernel_once(adapter, call)
            reason = None if verdict.ok else f"{adapter.kernel} is wrong here: {verdict.reason}"
        _note(call, reason)
        if reason is not None and requested_backend() == "fla":
            raise _declined(call, reason)
        if len(_decided) >= MOST:
            _decided.clear()
        _decided[kind] = adapter if reason is None else None
    taken = _decided[kind]
    return None if taken is None else taken.run(call)


def _kind(call: OperatorCall) -> tuple[Any, ...]:
    """All that a decision depends on; quickly told, since a step of decoding asks a hundred times."""
    tensors = (None if t is None else (t.shape, t.dtype, t.device, t.requires_grad) for t in call.tensors.values())
    return (
        call.operator,
        call.form,
        *tensors,
        None if call.segments is None else call.segments.shape,
        call.dtype,
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        requested_backend(),
    )


def unsupported_reason(call: OperatorCall) -> str | None:
    """Why no kernel takes the call, or None where one does: what can be told without running anything."""
    check_backend()
    if (kind := call.main_input.device.type) not in KERNEL_DEVICES:
        return f"its tensors are on {kind}"
    if why := unavailable_reason():
        return why
    if not call.has_valid_shapes():
        return "its shapes do not fit together"  # torch says which
    if torch.are_deterministic_algorithms_enabled():
        return "the same bits are asked for, and kernels choose their block sizes by trying"
    adapter = find_adapter(call)
    return "no kernel does this" if adapter is None else adapter.unsupported_reason(call)


@functools.cache
def unavailable_reason() -> str | None:
    """What keeps every kernel from running on this machine, or None."""
    if "cpu" not in KERNEL_DEVICES and not torch.cuda.is_available():
        return "no CUDA device"
    for module, package in (("triton", "triton"), ("fla", "fla-core")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is missing: pip install 'limbeck[cuda]'"
    return None


def run_call(call: OperatorCall, backend: str) -> tuple[Tensor, ...]:
    """Outputs and states of a call by "torch", or by "fla" without a check.

    Raises:
        LimbeckError: no kernel takes the call.
    """
    if backend == "torch":
        return call.run_torch()
    if (reason := unsupported_reason(call)) is not None:
        raise _declined(call, reason)
    adapter = find_adapter(call)
    assert adapter is not None
    return adapter.run(call)


def verify_call(call: OperatorCall) -> KernelCheck:
    """Both backends on the whole call, compared; where no kernel takes it, that reason."""
    reason = unsupported_reason(call)
    adapter = find_adapter(call)
    return verify_kernel(adapter, call) if reason is None and adapter is not None else KernelCheck(False, reason)


def list_dispatched_calls() -> list[dict[str, str | None]]:
    """Every kind of call so far: operator, form, shape, dtype, backend, kernel, reason (why torch), in order."""
    return list(_used.values())


def summarize_dispatch() -> list[dict[str, str | None]]:
    """`list_dispatched_calls`, or where no call could have gone to a kernel one line that says so."""
    if _used:
        return list_dispatched_calls()
    reason = (
        "asked for"
        if requested_backend() == "torch"
        else unavailable_reason() or "no operator was called with tensors on CUDA"
    )
    return [{"operator": "all", "backend": "torch", "reason": reason}]


def clear_dispatch_log() -> None:
    """Empties `list_dispatched_calls`; every kind of call is decided and noted again."""
    _used.clear()
    _decided.clear()


def _note(call: OperatorCall, reason: str | None) -> None:
    adapter = find_adapter(call)
    dtype = str(call.dtype).removeprefix("torch.")
    backend = "torch" if reason else "fla"
    key = (call.operator, call.form, call.describe(), dtype, backend, reason or "")
    if key in _used:
        return
    kernel = adapter.kernel if adapter is not None and not reason else None
    names = ("operator", "form", "shape", "dtype", "backend", "kernel", "reason")
    _used[key] = dict(zip(names, (*key[:5], kernel, reason)))
    say = logger.warning if reason and "is wrong here" in reason else logger.info
    say("%s %s [%s, %s]: %s", call.operator, call.form, call.describe(), dtype, kernel or f"torch ({reason})")


def _declined(call: OperatorCall, reason: str) -> LimbeckError:
    return LimbeckError(
        f"backend is fla, and no kernel takes {call.operator} {call.form} [{call.describe()}]: {reason}",
        expected="a call that one takes (docs/kernels.md)",
        hint="backend: auto",
    )
