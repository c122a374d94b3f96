"""Is a kernel right on this machine? Outputs and gradients beside the operator in torch, in float32 on the same inputs.

    verdict = check(adapter, call)          # .ok, .reason, .errors, .bounds
    verdict = known(adapter, call)          # of a small piece of the call, and only once for each shape and machine

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

from limbeck.errors import LimbeckError, sentences
from limbeck.kernels.adapters import Adapter
from limbeck.kernels.calls import Call

BOUNDS = {torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 1.5e-2, torch.float64: 1e-9}  # float32: TF32
GRADIENT, GATE = 2.0, 4.0  # how much more gradients may differ, and those of gates
GATES = ("log_decay", "beta", "write")
LONGEST = 256  # tokens of a piece: several chunks, and little work


@dataclass(frozen=True)
class Verdict:
    """What a check found; errors and bounds by the name of an output ("o", "state") or a gradient ("dq")."""

    ok: bool
    reason: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)


def check(adapter: Adapter, call: Call) -> Verdict:
    """Runs both. What the kernel raises is a verdict, not an error."""
    # A thread of its own: no autocast, no hooks on saved tensors (checkpointing), no inference mode, no tracing.
    with concurrent.futures.ThreadPoolExecutor(1) as own:
        return own.submit(_check, adapter, call.rounded(call.dtype).map(lambda name, t: t.detach())).result()


def _check(adapter: Adapter, call: Call) -> Verdict:
    dtype = call.dtype
    try:
        if call.first.device.type == "cuda":
            torch.cuda.set_device(call.first.device)
            torch.cuda.synchronize()
        reference = call.map(lambda name, t: t.to(torch.promote_types(t.dtype, torch.float32)))
        wanted = _results(reference.leaves(), lambda c: c.torch(), adapter.gradient)
        found = _results(call.leaves(), adapter.run, adapter.gradient)
        errors = {name: _distance(found[name], wanted[name]) for name in wanted}
    except Exception as error:  # a compiler's or driver's, of any kind: this kernel is not to be used
        return Verdict(False, f"{type(error).__name__}: {sentences(error)}")
    bounds = {name: BOUNDS[dtype] * _slack(name) for name in errors}
    wrong = [f"{name} is off by {error:.1e} (bound {bounds[name]:.1e})" for name, error in errors.items()]
    wrong = [text for text, name in zip(wrong, errors) if not errors[name] <= bounds[name]]  # NaN is wrong too
    return Verdict(not wrong, "beside torch " + ", ".join(wrong) if wrong else None, errors, bounds)


def _results(call: Call, run, gradient: bool) -> dict[str, Tensor]:
    """Outputs, states and gradients by name."""
    with torch.set_grad_enabled(gradient):
        outputs = run(call)
    results = dict(zip(("o", *call.states), outputs))
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

_VERDICTS: dict[str, Verdict] = {}


def known(adapter: Adapter, call: Call) -> Verdict | None:
    """The verdict on calls of this kind, from this process or from the cache folder; None where there is none yet."""
    key = _key(adapter, call)
    if key not in _VERDICTS and (path := _file(key)).exists():
        try:
            _VERDICTS[key] = Verdict(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError):  # cut short, or of another version
            path.unlink(missing_ok=True)
    return _VERDICTS.get(key)


def judge(adapter: Adapter, call: Call) -> Verdict:
    """`known`, or a check of a piece of the call, whose verdict is kept."""
    verdict = known(adapter, call)
    if verdict is None:
        from limbeck.data.cache import write_text  # late, as in `_file`

        verdict, key = check(adapter, call.piece(LONGEST)), _key(adapter, call)
        _VERDICTS[key] = verdict
        with contextlib.suppress(OSError, LimbeckError):  # no room, not our folder: the next process checks again
            write_text(_file(key), json.dumps(asdict(verdict), indent=1) + "\n")
    return verdict


def _key(adapter: Adapter, call: Call) -> str:
    # kernels choose blocks by widths, dtype and, in short sequences, by the length
    length = min(1 << (call.first.shape[1] - 1).bit_length(), LONGEST)
    return f"{adapter.name} {call.describe()} T{length} {str(call.dtype).removeprefix('torch.')}"


def _file(key: str) -> Path:
    from limbeck.data.cache import cache_root  # late: that room stands higher, and only its place is wanted

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
