"""Check that a kernel is right on this machine: its outputs and gradients against the operator in torch in float32.

    check = verify_kernel(adapter, make_sample_call(adapter))       # .ok, .reason, .errors, .bounds
    check = verify_kernel_once(adapter, call)       # on the first tokens of a call, once per shape and machine

An error is the norm of the difference over that of the reference. Bounds are those of the dtype: one rounding of
bfloat16 is 0.2 to 0.4 percent, a kernel rounds a few times on the way, and gates' gradients are differences of large
sums.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import LimbeckError, summarize_error
from limbeck.core.storage import atomic_write_text, cache_root
from limbeck.ops.fla.adapters import KernelAdapter
from limbeck.ops.fla.call import OperatorCall

BOUNDS = {torch.float32: 5e-3, torch.float16: 5e-3, torch.bfloat16: 1.5e-2, torch.float64: 1e-9}  # float32: as TF32
GRADIENT_FACTOR, GATE_FACTOR = 2.0, 4.0  # by how much the bounds of gradients, and of gates' gradients, are wider
GATES = ("log_decay", "beta", "write")
MAX_TOKENS = 256  # of the piece that is checked: several chunks, and little work

_KERNEL_CHECKS: dict[str, "KernelCheck"] = {}


@dataclass(frozen=True)
class KernelCheck:
    """Result of a check; errors and bounds by the name of an output ("o", "state") or a gradient ("dq")."""

    ok: bool
    reason: str | None = None
    errors: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)


def verify_kernel_once(adapter: KernelAdapter, call: OperatorCall) -> KernelCheck:
    """Return the cached check of calls of this kind, or check the first tokens of this one and cache the result."""
    check = get_cached_check(adapter, call)
    if check is None:
        check, key = verify_kernel(adapter, call.truncate(MAX_TOKENS)), _cache_key(adapter, call)
        _KERNEL_CHECKS[key] = check
        # The disk may be full or the folder not writable: then the next process checks again.
        with contextlib.suppress(OSError, LimbeckError):
            atomic_write_text(_cache_file(key), json.dumps(asdict(check), indent=1) + "\n")
    return check


def get_cached_check(adapter: KernelAdapter, call: OperatorCall) -> KernelCheck | None:
    """Return the check of calls of this kind from this process or from the cache folder, None if there is none."""
    key = _cache_key(adapter, call)
    if key not in _KERNEL_CHECKS and (path := _cache_file(key)).exists():
        try:
            _KERNEL_CHECKS[key] = KernelCheck(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, OSError):  # truncated, or of another version
            path.unlink(missing_ok=True)
    return _KERNEL_CHECKS.get(key)


def verify_kernel(adapter: KernelAdapter, call: OperatorCall) -> KernelCheck:
    """Run the call by the kernel and by torch, and compare. An error that the kernel raises fails the check."""
    # A thread of its own has no autocast, no hooks on saved tensors (checkpointing), no inference mode and no tracing.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        call = call.cast_inputs(call.dtype).map_tensors(lambda name, t: t.detach())
        return thread.submit(_compare, adapter, call).result()


def _compare(adapter: KernelAdapter, call: OperatorCall) -> KernelCheck:
    try:
        if call.main_input.device.type == "cuda":
            torch.cuda.set_device(call.main_input.device)
            torch.cuda.synchronize()
        reference = call.map_tensors(lambda name, t: t.to(torch.promote_types(t.dtype, torch.float32)))
        expected = _run_with_gradients(reference.as_leaves(), lambda c: c.run_torch(), adapter.supports_backward)
        actual = _run_with_gradients(call.as_leaves(), adapter.run, adapter.supports_backward)
        errors = {name: _relative_error(actual[name], expected[name]) for name in expected}
    except Exception as error:  # of any kind, a compiler's or a driver's: this kernel must not be used
        return KernelCheck(False, f"{type(error).__name__}: {summarize_error(error)}")
    bounds = {name: BOUNDS[call.dtype] * _bound_factor(name) for name in errors}
    wrong = [
        f"{name} is off by {error:.1e} (bound {bounds[name]:.1e})"
        for name, error in errors.items()
        if not error <= bounds[name]  # written so that NaN is wrong too
    ]
    return KernelCheck(not wrong, "compared with torch, " + ", ".join(wrong) if wrong else None, errors, bounds)


def _run_with_gradients(
    call: OperatorCall, run: Callable[[OperatorCall], tuple[Tensor, ...]], gradient: bool
) -> dict[str, Tensor]:
    """Run a call: outputs, states and, where `gradient`, gradients of a random projection, by name."""
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


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    expected, actual = expected.double(), actual.double()
    floor = 1e-5 * expected.numel() ** 0.5  # for what is zero by nature, such as the gradient of a lone token's decay
    return float((actual - expected).norm() / expected.norm().clamp_min(floor))


def _bound_factor(name: str) -> float:
    if not name.startswith("d"):
        return 1.0
    return GATE_FACTOR if name[1:] in GATES else GRADIENT_FACTOR


def _cache_key(adapter: KernelAdapter, call: OperatorCall) -> str:
    # Kernels choose block sizes by widths, dtype and, for short sequences, by the length.
    length = min(1 << (call.main_input.shape[1] - 1).bit_length(), MAX_TOKENS)
    return f"{adapter.name} {call.describe()} T{length} {str(call.dtype).removeprefix('torch.')}"


def _cache_file(key: str) -> Path:
    name = hashlib.sha256(f"{_describe_machine()} {key}".encode()).hexdigest()[:24]
    return cache_root() / "kernels" / f"{name}.json"


@functools.cache
def _describe_machine() -> str:
    """Return what a check depends on besides the call: versions of the packages and the GPU."""

    def version(name: str) -> str:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return "none"

    versions = [f"{name} {version(name)}" for name in ("limbeck", "torch", "triton", "fla-core")]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return ", ".join([*versions, device])


def make_sample_call(
    adapter: KernelAdapter,
    *,
    batch: int = 1,
    time: int = 256,
    heads: int = 4,
    key: int = 64,
    value: int = 64,
    slots: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    device: str | torch.device = "cuda",
    seed: int = 0,
    state: bool = False,
    documents: int = 1,
) -> OperatorCall:
    """Make a call for an adapter with random tensors in the ranges that the mixers give.

    Keys of delta rules have unit length, decays have half-lives from one token to 512.

    Args:
        state: give an incoming state.
        documents: number of documents packed in each row, of about equal lengths.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def log_decay(*shape: int) -> Tensor:
        return -math.log(2) / 512 ** uniform(*shape)

    # The order of the draws is fixed: tests and benchmarks compare calls of one seed.
    operator = adapter.operator
    tensors: dict[str, Tensor | None]
    if operator == "convolution":
        tensors = {"x": normal(batch, time, heads, key), "weight": normal(4, heads, key)}
        state_shapes = {"state": (batch, 3, heads, key)}
    else:
        q, k = normal(batch, time, heads, key), normal(batch, time, heads, key)
        k = F.normalize(k, dim=-1) if operator in ("delta_rule", "diagonal_plus_rank_one") else k
        tensors = {"q": q * key**-0.5, "k": k, "v": normal(batch, time, heads, value)}
        if operator == "delta_rule":
            tensors["beta"] = uniform(batch, time, heads)
        if operator == "diagonal_plus_rank_one":
            tensors |= {"a": -k, "b": k * uniform(batch, time, heads, key)}
        if operator == "slot_attention":
            decay = log_decay(batch, time, heads, slots)
            tensors |= {"write": -torch.expm1(decay), "log_decay": decay}
        elif adapter.decay_kind is not None:
            tensors["log_decay"] = log_decay(batch, time, heads, *([key] if adapter.decay_kind == "vector" else []))
        else:
            tensors["log_decay"] = None
        state_shapes = {"state": (batch, heads, key, value)}
        if operator == "slot_attention":
            state_shapes = {"keys": (batch, heads, key, slots), "values": (batch, heads, slots, value)}
    tensors |= {name: normal(*shape) if state else None for name, shape in state_shapes.items()}
    segments = None
    if documents > 1:
        segments = (torch.arange(time) * documents // time).expand(batch, -1).contiguous().to(device)
    call = OperatorCall(operator, adapter.form, tensors, segments)
    return call.map_tensors(lambda name, t: t.to(device)).cast_inputs(dtype)
