"""Is a kernel right on this machine? Outputs and gradients beside the operator in torch, in float32 on the same inputs.

    verdict = verify_kernel(adapter, call)          # .ok, .reason, .errors, .bounds
    verdict = get_cached_check(adapter, call)          # of a small piece of the call, and only once for each shape and machine

An error is the norm of the difference over that of the reference. Bounds are those of the dtype: one rounding of bf16
is 0.2 to 0.4 percent, a kernel rounds a few times on the way, and gates' gradients are differences of large sums.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.metadata
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError, summarize_error
from limbeck.ops.fla.adapters import KernelAdapter
from limbeck.ops.fla.call import OperatorCall

BOUNDS = {torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 1.5e-2, torch.float64: 1e-9}  # float32: TF32
GRADIENT, GATE = 2.0, 4.0  # how much more gradients may differ, and those of gates
GATES = ("log_decay", "beta", "write")
LONGEST = 256  # tokens of a piece: several chunks, and little work


@dataclass(frozen=True)
class KernelCheck:
    """What a check found; errors and bounds by the name of an output ("o", "state") or a gradient ("dq")."""

    ok: bool
    reason: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)


def verify_kernel(adapter: KernelAdapter, call: OperatorCall) -> KernelCheck:
    """Runs both. What the kernel raises is a verdict, not an error."""
    # A thread of its own: no autocast, no hooks on saved tensors (checkpointing), no inference mode, no tracing.
    with concurrent.futures.ThreadPoolExecutor(1) as own:
        return own.submit(
            _check, adapter, call.cast_inputs(call.dtype).map_tensors(lambda name, t: t.detach())
        ).result()


def _check(adapter: KernelAdapter, call: OperatorCall) -> KernelCheck:
    dtype = call.dtype
    try:
        if call.main_input.device.type == "cuda":
            torch.cuda.set_device(call.main_input.device)
            torch.cuda.synchronize()
        reference = call.map_tensors(lambda name, t: t.to(torch.promote_types(t.dtype, torch.float32)))
        wanted = _results(reference.as_leaves(), lambda c: c.run_torch(), adapter.supports_backward)
        found = _results(call.as_leaves(), adapter.run, adapter.supports_backward)
        errors = {name: _distance(found[name], wanted[name]) for name in wanted}
    except Exception as error:  # a compiler's or driver's, of any kind: this kernel is not to be used
        return KernelCheck(False, f"{type(error).__name__}: {summarize_error(error)}")
    bounds = {name: BOUNDS[dtype] * _slack(name) for name in errors}
    wrong = [f"{name} is off by {error:.1e} (bound {bounds[name]:.1e})" for name, error in errors.items()]
    wrong = [text for text, name in zip(wrong, errors) if not errors[name] <= bounds[name]]  # NaN is wrong too
    return KernelCheck(not wrong, "beside torch " + ", ".join(wrong) if wrong else None, errors, bounds)


def _results(call: OperatorCall, run, gradient: bool) -> dict[str, Tensor]:
    """Outputs, states and gradients by name."""
    with torch.set_grad_enabled(gradient):
        outputs = run(call)
    results = dict(zip(("o", *call.state_names), outputs))
    if gradient:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
        leaves = {name: t for name, t in call.tensors.items() if t is not None}
        loss = sum((out.float() * w.float()).sum() for out, w in zip(outputs, weights))
        grads = torch.autograd.grad(loss, list(leaves.values()))  # type: ignore[arg-type]
        results |= {f"d{name}": grad for name, grad in zip(leaves, grads)}
    return {name: t.detach() for name, t in results.items()}


def _distance(found: Tensor, wanted: Tensor) -> float:
    wanted, found = wanted.double(), found.double()
    floor = 1e-5 * wanted.numel() ** 0.5  # of what is zero by nature, such as the gradient of a lone token's decay
    return float((found - wanted).norm() / wanted.norm().clamp_min(floor))


def _slack(name: str) -> float:
    if not name.startswith("d"):
        return 1.0
    return GATE if name[1:] in GATES else GRADIENT


# ------------------------------------------------------------------ once for each shape and machine

_KERNEL_CHECKS: dict[str, KernelCheck] = {}


def get_cached_check(adapter: KernelAdapter, call: OperatorCall) -> KernelCheck | None:
    """The verdict on calls of this kind, from this process or from the cache folder; None where there is none yet."""
    key = _key(adapter, call)
    if key not in _KERNEL_CHECKS and (path := _file(key)).exists():
        try:
            _KERNEL_CHECKS[key] = KernelCheck(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError):  # cut short, or of another version
            path.unlink(missing_ok=True)
    return _KERNEL_CHECKS.get(key)


def verify_kernel_once(adapter: KernelAdapter, call: OperatorCall) -> KernelCheck:
    """`get_cached_check`, or a check of a piece of the call, whose verdict is kept."""
    verdict = get_cached_check(adapter, call)
    if verdict is None:
        from limbeck.core.storage import atomic_write_text  # late, as in `_file`

        verdict, key = verify_kernel(adapter, call.truncate(LONGEST)), _key(adapter, call)
        _KERNEL_CHECKS[key] = verdict
        with contextlib.suppress(OSError, LimbeckError):  # no room, not our folder: the next process checks again
            atomic_write_text(_file(key), json.dumps(asdict(verdict), indent=1) + "\n")
    return verdict


def _key(adapter: KernelAdapter, call: OperatorCall) -> str:
    # kernels choose blocks by widths, dtype and, in short sequences, by the length
    length = min(1 << (call.main_input.shape[1] - 1).bit_length(), LONGEST)
    return f"{adapter.name} {call.describe()} T{length} {str(call.dtype).removeprefix('torch.')}"


def _file(key: str) -> Path:
    from limbeck.core.storage import cache_root  # late: that room stands higher, and only its place is wanted

    name = hashlib.sha256(f"{_machine()} {key}".encode()).hexdigest()[:24]
    return cache_root() / "kernels" / f"{name}.json"


@functools.cache
def _machine() -> str:
    """What a verdict depends on beside the call."""
    versions = [f"{name} {_version(name)}" for name in ("limbeck", "torch", "triton", "fla-core")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return ", ".join([*versions, device])


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"
