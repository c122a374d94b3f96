"""Other people's reference code as oracles: how it is loaded, run in float64 and compared with ours.

    peer = fla("gla/naive.py", "naive_recurrent_gla")
    agree(lambda x: vector_decay.chunked(x.q, x.k, x.v, x.g), lambda x: peer(x.q * 5**0.5, x.k, x.v, x.g), x)

flash-linear-attention (MIT, the dev extra's fla-core) cannot be imported without Triton, so single definitions are read
out of its installed files. Nothing of it stands in this repository.
"""

import ast
import contextlib
import importlib.util
import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import einops
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limbeck import mixers
from limbeck.mixers import HeadShape

EXACT = 1e-10  # float64 on both sides
ROOT = 5**0.5  # √K of the samples

forms = pytest.mark.parametrize("form", ["recurrent", "chunked"])
strengths = pytest.mark.parametrize("strength", [0.02, 1.0, 50.0])  # of the decays: our routes through a chunk differ


class Widened(ModuleType):
    """torch with float64 where reference code asks for float32."""

    float = float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


WIDE = Widened("torch")


def fla_folder() -> Path:
    """Where the dev extra put flash-linear-attention; found without importing it."""
    spec = importlib.util.find_spec("fla")
    assert spec is not None, "fla-core is missing, the oracle of half of these tests: pip install -e '.[dev]'"
    return Path(next(iter(spec.submodule_search_locations)))


def fla(file: str, *names: str, folder: str = "ops"):
    """Definitions of that name in one of fla's files, without their decorators and in float64; the first is returned,
    the others are what it needs. A file or name that this version lacks skips the test."""
    path = fla_folder() / folder / file
    if not path.exists():
        pytest.skip(f"this version of fla-core has no {folder}/{file}")
    found = {node.name: node for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")}
    if missing := [name for name in names if name not in found]:
        pytest.skip(f"{folder}/{file} of this version of fla-core has no {', '.join(missing)}")
    for name in names:
        found[name].decorator_list = []
    scope = {"torch": WIDE, "nn": nn, "F": F, "math": math, "rearrange": einops.rearrange, "repeat": einops.repeat}
    exec(compile(ast.Module([found[name] for name in names], []), str(path), "exec"), scope)
    definition = scope[names[0]]
    return definition if isinstance(definition, type) else in_float64(definition)


def modeling(family: str) -> ModuleType:
    """transformers' code of a model family; a version of transformers without it skips the test."""
    return pytest.importorskip(f"transformers.models.{family}.modeling_{family}")


def transformers_function(family: str, name: str) -> Callable:
    """A function of that code in plain torch, whatever kernels are installed, in float64."""
    module = modeling(family)
    if not hasattr(module, name):
        pytest.skip(f"{module.__name__} of this version of transformers has no {name}")
    return in_float64(inspect.unwrap(getattr(module, name)))


def in_float64(function: Callable) -> Callable:
    """`function` with every float32 in it float64."""
    module = inspect.getmodule(function)

    def run(*args, **kwargs):
        with float64(*[module] if module else []):
            return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def float64(*modules: ModuleType) -> Iterator[None]:
    """Inside, float32 is float64 in these modules' code, and what they take from kernel packages is plain torch."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        for module in modules:
            patch.setattr(module, "torch", WIDE)
            for name, value in list(vars(module).items()):
                if inspect.isfunction(value) and inspect.unwrap(value) is not value:
                    patch.setattr(module, name, inspect.unwrap(value))
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)


class Samples:
    """Random float64 tensors that need gradients, by name: what both sides are given."""

    def __init__(
        self, names="q k v", *, batch=2, length=37, heads=4, groups=None, key=5, value=3, hidden=12, seed=0, unit=True
    ):
        make = torch.Generator().manual_seed(seed)
        groups = groups or heads

        def random(*shape):
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        def wish(name):
            shape = {"q": (heads, key), "k": (groups, key), "v": (groups, value), "b": (heads,), "g": (heads,)}
            shape |= {"w": (heads, key), "u": (heads, key), "r": (heads, key), "x": (hidden,)}
            if name == "state":
                return random(batch, heads, key, value)
            x = random(batch, length, *shape[name])
            if name == "k" and unit:
                return F.normalize(x, dim=-1)
            if name == "b":  # write strengths up to 2
                return 2 * x.sigmoid()
            return -(2 * x - 1).exp() if name in "gw" else x  # log decays from nearly none to a near reset

        self.heads, self.key, self.value, self.length = heads, key, value, length
        self.leaves = {name: wish(name).requires_grad_() for name in names.split()}

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self.__dict__["leaves"][name]
        except KeyError:
            raise AttributeError(name) from None


def agree(ours: Callable, theirs: Callable, x: Samples | SimpleNamespace, tolerance: float = EXACT, grads: bool = True):
    """Asserts that both return the same tensors (None on either side is not compared) and have the same gradients of
    everything in `x.leaves` for one random weighting of these tensors. Returns the largest error."""
    found, wanted = (listed(side(x)) for side in (ours, theirs))
    pairs = [(a, b) for a, b in zip(found, wanted, strict=False) if a is not None and b is not None]
    assert pairs
    errors = {f"output {n}": close(a, b, tolerance, f"output {n}") for n, (a, b) in enumerate(pairs)}
    if grads:
        weights = [torch.randn(a.shape, generator=torch.Generator().manual_seed(7), dtype=a.dtype) for a, _ in pairs]
        ours_d, theirs_d = (
            torch.autograd.grad(
                sum((y * w).sum() for y, w in zip(side, weights, strict=True)), [*x.leaves.values()], allow_unused=True
            )
            for side in zip(*pairs, strict=True)
        )
        for name, a, b in zip(x.leaves, ours_d, theirs_d, strict=True):
            zero = torch.zeros_like(x.leaves[name])
            a, b = (zero if d is None else d for d in (a, b))
            errors[name] = close(a, b, tolerance, f"gradient of {name}")
    return max(errors.values())


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> float:
    assert a.isfinite().all(), what
    scale = max(1.0, float(b.detach().abs().max()))  # gradients of gates sum over many tokens
    torch.testing.assert_close(a, b, atol=tolerance * scale, rtol=tolerance, msg=lambda text: f"{what}: {text}")
    return float((a - b).detach().abs().max()) / scale


def listed(result) -> list:
    return list(result) if isinstance(result, tuple | list) else [result]


def swapped(*tensors: Tensor) -> tuple[Tensor, ...]:
    """[B, T, H, ...] <-> [B, H, T, ...]."""
    return tuple(x.transpose(1, 2) for x in tensors)


def run(op: ModuleType, form: str, *args, **options) -> tuple[Tensor, Tensor]:
    """One of our operators in one of its forms, several chunks of it where it has any."""
    return getattr(op, form)(*args, **options, **({"chunk": 16} if form == "chunked" else {}))


def mixer_case(name: str, options: dict | None = None, *, preset="default", groups=2, scale=None, **sizes):
    """A mixer in float64 whose parameters are all random, so that nothing hides behind its start, and samples of q, k,
    v and x that share its leaves."""
    x = Samples("q k v x", groups=groups, unit=False, **{"key": 6, "value": 4, "length": 21, **sizes})
    shape = HeadShape(12, 4, groups, x.key, x.value, scale=scale or x.key**-0.5)
    mixer = randomised(mixers.build(name, shape, options, preset))
    x.leaves |= dict(mixer.named_parameters())
    return mixer, x


def randomised(module: nn.Module, seed: int = 1) -> nn.Module:
    """The module in float64 with other parameters."""
    make = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.7 * torch.randn(parameter.shape, generator=make, dtype=torch.float64))
    return module


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    return F.linear(x, layer.weight, layer.bias)


def heads(x: Tensor, h: int = 4) -> Tensor:
    """[..., h·D] -> [..., h, D]."""
    return x.unflatten(-1, (h, -1))


def wide(x: Tensor, h: int = 4) -> Tensor:
    """Grouped heads repeated."""
    return x.repeat_interleave(h // x.shape[2], 2)
