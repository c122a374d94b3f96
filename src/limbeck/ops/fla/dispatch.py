"""Dispatch an operator's call: to a kernel where one takes it and has been verified on this machine, else to torch.

    @accelerated("scalar_decay")
    def chunked(q, k, v, log_decay=None, *, state=None, segments=None): ...     # in torch

    list_dispatched_calls()                      # what ran where, and why

Every kind of call is logged once (logger limbeck.ops.fla) and recorded for the run's manifest.
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
MAX_DECISIONS = 4096  # kinds of call to remember

WRONG = "gives wrong results on this machine"  # in a reason; such a call is logged as a warning

logger = logging.getLogger("limbeck.ops.fla")
_log: dict[tuple[str, ...], dict[str, str | None]] = {}  # for `list_dispatched_calls`
_decisions: dict[tuple[Any, ...], KernelAdapter | None] = {}  # by kind of call; None for torch


def accelerated(operator: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorate an operator's form in torch: calls that a kernel takes go there. `__wrapped__` is the form in torch."""

    def decorate(form: Callable[P, R]) -> Callable[P, R]:
        TORCH_FORMS[operator, form.__name__] = cast(Any, form)
        parameters = inspect.signature(form).parameters
        defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
        names = tuple(parameters)

        @functools.wraps(form)
        def dispatched(*args: P.args, **kwargs: P.kwargs) -> R:
            first = cast(Tensor, args[0] if args else next(iter(kwargs.values())))
            backend = requested_backend()
            if backend == "torch" or (backend == "auto" and first.device.type not in KERNEL_DEVICES):
                return form(*args, **kwargs)
            # A graph break would cost a decoding step more than a kernel saves.
            if form.__name__ == "recurrent" and torch.compiler.is_compiling():
                return form(*args, **kwargs)
            arguments = {**dict.fromkeys(names), **defaults, **dict(zip(names, args)), **kwargs}
            result = _try_kernel(operator, form.__name__, arguments)
            return form(*args, **kwargs) if result is None else cast(R, result)

        return dispatched

    return decorate


@torch.compiler.disable
def _try_kernel(operator: str, form: str, arguments: dict[str, Any]) -> tuple[Tensor, ...] | None:
    """Run the call by a kernel; None where torch has to."""
    segments, _ = arguments.pop("segments", None), arguments.pop("chunk", None)
    call = OperatorCall(operator, form, arguments, segments)
    kind = _kind(call)
    if kind not in _decisions:
        adapter, reason = find_adapter(call), unsupported_reason(call)
        if reason is None and adapter is not None:
            if (
                call.main_input.is_cuda
                and torch.cuda.is_current_stream_capturing()
                and get_cached_check(adapter, call) is None
            ):
                return None  # undecided: a CUDA graph cannot contain the check
            check = verify_kernel_once(adapter, call)
            reason = None if check.ok else f"{adapter.kernel} {WRONG}: {check.reason}"
        _record(call, reason)
        if reason is not None and requested_backend() == "fla":
            raise _unsupported_error(call, reason)
        if len(_decisions) >= MAX_DECISIONS:
            _decisions.clear()
        _decisions[kind] = adapter if reason is None else None
    decision = _decisions[kind]
    return None if decision is None else decision.run(call)


def _kind(call: OperatorCall) -> tuple[Any, ...]:
    """Return all that a decision depends on; cheap, because a decoding step needs it a hundred times."""
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
    """Return why no kernel takes the call, or None where one does, without running anything."""
    check_backend()
    if (kind := call.main_input.device.type) not in KERNEL_DEVICES:
        return f"its tensors are on {kind}"
    if why := unavailable_reason():
        return why
    if not call.has_valid_shapes():
        return "its shapes do not fit together"  # the operator in torch says which
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic results are required, but kernels autotune their block sizes"
    adapter = find_adapter(call)
    return "no kernel implements this" if adapter is None else adapter.unsupported_reason(call)


@functools.cache
def unavailable_reason() -> str | None:
    """Return why no kernel can run on this machine, or None."""
    if "cpu" not in KERNEL_DEVICES and not torch.cuda.is_available():
        return "no CUDA device"
    for module, package in (("triton", "triton"), ("fla", "fla-core")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed: pip install 'limbeck[cuda]'"
    return None


def run_call(call: OperatorCall, backend: str) -> tuple[Tensor, ...]:
    """Run a call by "torch", or by "fla" without verifying the kernel: outputs and states.

    Raises:
        LimbeckError: no kernel takes the call.
    """
    if backend == "torch":
        return call.run_torch()
    if (reason := unsupported_reason(call)) is not None:
        raise _unsupported_error(call, reason)
    adapter = find_adapter(call)
    assert adapter is not None
    return adapter.run(call)


def verify_call(call: OperatorCall) -> KernelCheck:
    """Run the whole call by both backends and compare; where no kernel takes it, the check fails for that reason."""
    reason = unsupported_reason(call)
    adapter = find_adapter(call)
    return verify_kernel(adapter, call) if reason is None and adapter is not None else KernelCheck(False, reason)


def list_dispatched_calls() -> list[dict[str, str | None]]:
    """List every kind of call so far: operator, form, shape, dtype, backend, kernel, and the reason for torch."""
    return list(_log.values())


def summarize_dispatch() -> list[dict[str, str | None]]:
    """Return `list_dispatched_calls`, or one entry that says why no call could go to a kernel."""
    if _log:
        return list_dispatched_calls()
    if requested_backend() == "torch":
        reason = "requested"
    else:
        reason = unavailable_reason() or "no operator was called with tensors on CUDA"
    return [{"operator": "all", "backend": "torch", "reason": reason}]


def clear_dispatch_log() -> None:
    """Forget all calls and decisions: every kind of call is decided and recorded anew."""
    _log.clear()
    _decisions.clear()


def _record(call: OperatorCall, reason: str | None) -> None:
    adapter = find_adapter(call)
    dtype = str(call.dtype).removeprefix("torch.")
    backend = "torch" if reason else "fla"
    key = (call.operator, call.form, call.describe(), dtype, backend, reason or "")
    if key in _log:
        return
    kernel = adapter.kernel if adapter is not None and not reason else None
    names = ("operator", "form", "shape", "dtype", "backend", "kernel", "reason")
    _log[key] = dict(zip(names, (*key[:5], kernel, reason)))
    log = logger.warning if reason and WRONG in reason else logger.info
    log("%s %s [%s, %s]: %s", call.operator, call.form, call.describe(), dtype, kernel or f"torch ({reason})")


def _unsupported_error(call: OperatorCall, reason: str) -> LimbeckError:
    return LimbeckError(
        f"backend is fla, but no kernel takes {call.operator} {call.form} [{call.describe()}]: {reason}",
        expected="a call listed in docs/reference/kernels.md",
        hint="backend: auto",
    )
