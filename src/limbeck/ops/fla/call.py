"""Which backend is asked for: the process's setting, from a run's recipe or LIMBECK_BACKEND.

with use_backend("torch"):        # or "fla": a call that would not go to a kernel is an error; or "auto"
    requested_backend()

A call of an operator, apart from what computes it: its tensors by name, and what is done to them on the way.

    call = OperatorCall("scalar_decay", "chunked", {"q": q, "k": k, "v": v, "log_decay": g, "state": None}, segments)
    call.truncate().cast_inputs(torch.bfloat16)        # a small one of the same kind
    make_sample_call(adapter, batch=1, time=256, heads=4, key=64, value=64, dtype=torch.bfloat16, device="cuda")

Shapes as in `limbeck.ops`: B batch, T time, H heads, K key width, V value width, M slots, W window.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.errors import LimbeckError

BACKENDS = ("auto", "torch", "fla")
# Of the process, not the thread: backward passes have their own. The last that asked and is still inside is heard.
_inside: list[list[str]] = [[os.environ.get("LIMBECK_BACKEND", "auto")]]


def requested_backend() -> str:
    """The setting as it is, "auto" unless something else was asked for."""
    return _inside[-1][0]


def check_backend() -> None:
    """Raises LimbeckError where LIMBECK_BACKEND names no backend."""
    if (asked := requested_backend()) not in BACKENDS:
        raise LimbeckError(f"the backend is '{asked}'", expected=" | ".join(BACKENDS), hint="LIMBECK_BACKEND=auto")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """That backend inside, for the whole process; "auto" leaves LIMBECK_BACKEND its say.

    Raises:
        LimbeckError: no such backend.
    """
    mine = [backend if backend != "auto" else os.environ.get("LIMBECK_BACKEND", "auto")]
    _inside.append(mine)
    try:
        check_backend()
        yield
    finally:  # not the last one, where another thread came in since
        del _inside[next(i for i, one in enumerate(_inside) if one is mine)]


if TYPE_CHECKING:
    from limbeck.ops.fla.adapters import KernelAdapter

TORCH_FORMS: dict[tuple[str, str], Callable[..., tuple[Tensor, ...]]] = {}  # the torch form of each operator and form
STATES = ("state", "keys", "values")  # what is carried from call to call
ROUNDED = ("q", "k", "v", "a", "b", "write", "x", "weight")  # what a kernel takes in low precision; the rest is float32


@dataclasses.dataclass(frozen=True)
class OperatorCall:
    """Operator, form, tensors in the operator's own order with None for what is absent, and document numbers."""

    operator: str
    form: str
    tensors: Mapping[str, Tensor | None]
    segments: Tensor | None = None

    @property
    def main_input(self) -> Tensor:
        """q, or the convolution's x."""
        return self["q" if "q" in self.tensors else "x"]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        assert tensor is not None
        return tensor

    def has(self, name: str) -> bool:
        return self.tensors.get(name) is not None

    @property
    def state_names(self) -> tuple[str, ...]:
        """Names of the operator's states, whether there are any or not."""
        return tuple(name for name in STATES if name in self.tensors)

    @property
    def dim_sizes(self) -> dict[str, int]:
        """K and V, and M where there are slots; W for the convolution."""
        if "x" in self.tensors:
            return {"W": self["weight"].shape[0]}
        slots = {"M": self["write"].shape[-1]} if "write" in self.tensors else {}
        return {"K": self["q"].shape[-1], "V": self["v"].shape[-1], **slots}

    @property
    def dtype(self) -> torch.dtype:
        """What a kernel would compute in: autocast's dtype where that is on, else that of v or x."""
        kind = self.main_input.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return (self["v"] if "v" in self.tensors else self.main_input).dtype

    @property
    def needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.tensors.values())

    def has_valid_shapes(self) -> bool:
        """Do the shapes fit together? A kernel would read past their ends; the operators in torch say what is wrong."""
        first, given = self.main_input, {name: t for name, t in self.tensors.items() if t is not None}
        if self.segments is not None and self.segments.shape != first.shape[:2]:
            return False
        wanted: dict[str, tuple[int, ...]]
        if "x" in given:
            window, channels = given["weight"].shape[0], first.shape[2:]
            wanted = {"x": first.shape, "weight": (window, *channels), "state": (len(first), window - 1, *channels)}
            return all(t.shape == wanted[name] for name, t in given.items())
        if any(t.dim() != 4 for name, t in given.items() if name in ("q", "k", "v", "write")):
            return False
        batch, time, heads, key = first.shape
        value, slots = given["v"].shape[3], self.dim_sizes.get("M", key)
        if any(heads % given[name].shape[2] for name in ("k", "v")):
            return False
        wanted = {
            **dict.fromkeys(("q", "a", "b"), (batch, time, heads, key)),
            "k": (batch, time, given["k"].shape[2], key),
            "v": (batch, time, given["v"].shape[2], value),
            "beta": (batch, time, heads),
            "write": (batch, time, heads, slots),
            "state": (batch, heads, key, value),
            "keys": (batch, heads, key, slots),
            "values": (batch, heads, slots, value),
        }
        decays = {1: (heads,), 3: (batch, time, heads), 4: (batch, time, heads, slots)}
        if "log_decay" in given and given.pop("log_decay").shape != decays.get(self["log_decay"].dim()):
            return False
        return all(t.shape == wanted[name] for name, t in given.items())

    def map_tensors(self, change: Callable[[str, Tensor], Tensor]) -> "OperatorCall":
        """With every tensor changed; document numbers stay."""
        tensors = {name: None if t is None else change(name, t) for name, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def cast_inputs(self, dtype: torch.dtype) -> "OperatorCall":
        """With what kernels take in low precision as `dtype`, gates and states as float32 (float64 beside that)."""
        rest = torch.promote_types(dtype, torch.float32)
        return self.map_tensors(lambda name, t: t.to(dtype if name in ROUNDED else rest))

    def as_leaves(self) -> "OperatorCall":
        """With tensors of its own that take gradients."""
        return self.map_tensors(lambda name, t: t.detach().clone().requires_grad_())

    def with_repeated_kv(self) -> "OperatorCall":
        """With grouped keys and values repeated for all heads."""
        if "q" not in self.tensors:
            return self
        heads = self["q"].shape[2]

        def widen(name: str, t: Tensor) -> Tensor:
            return t.repeat_interleave(heads // t.shape[2], 2) if name in ("k", "v") and t.shape[2] != heads else t

        return self.map_tensors(widen)

    def truncate(self, time: int = 256, heads: int = 2) -> "OperatorCall":
        """The first tokens and heads of the first row: enough to see whether a kernel is right."""
        call = self.with_repeated_kv()

        def cut(name: str, t: Tensor) -> Tensor:
            if "x" in self.tensors:  # the convolution has no heads to choose from
                return t if name == "weight" else t[:1, :time]
            if name in STATES:
                return t[:1, :heads]
            return t[:heads] if t.dim() == 1 else t[:1, :time, :heads]

        segments = None if self.segments is None else self.segments[:1, :time]
        return dataclasses.replace(call.map_tensors(cut), segments=segments)

    def run_torch(self) -> tuple[Tensor, ...]:
        """What the operator in torch makes of it."""
        with use_backend("torch"):  # operators are made of others
            return TORCH_FORMS[self.operator, self.form](**self.tensors, segments=self.segments)

    def describe(self) -> str:
        """Widths and kinds of its tensors: what one check of a kernel stands for."""
        parts = [f"{letter}{size}" for letter, size in self.dim_sizes.items()]
        if "log_decay" in self.tensors:
            kinds = {1: "constant", 3: "scalar", 4: "vector"}
            parts.append(kinds.get(self["log_decay"].dim(), "unknown") if self.has("log_decay") else "no decay")
        parts += ["state"] if any(self.has(name) for name in self.state_names) else []
        return " ".join(parts + (["documents"] if self.segments is not None else []))


def make_sample_call(
    adapter: "KernelAdapter",
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
    """A call for that adapter with random tensors in the ranges that the mixers give: unit keys for delta rules, decays
    with half-lives from one token to 512.

    Args:
        state: with an incoming state. documents: packed in each row, of about equal lengths.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    def log_decay(*shape: int) -> Tensor:
        return -math.log(2) / 512 ** uniform(*shape)

    if adapter.operator == "convolution":
        given = {"x": normal(batch, time, heads, key), "weight": normal(4, heads, key)}
        carried = {"state": (batch, 3, heads, key)}
    else:
        unit = adapter.operator in ("delta_rule", "diagonal_plus_rank_one")
        q, k = normal(batch, time, heads, key), normal(batch, time, heads, key)
        given = {"q": q * key**-0.5, "k": F.normalize(k, dim=-1) if unit else k, "v": normal(batch, time, heads, value)}
        if adapter.operator == "delta_rule":
            given["beta"] = uniform(batch, time, heads)
        if adapter.operator == "diagonal_plus_rank_one":
            given |= {"a": -given["k"], "b": given["k"] * uniform(batch, time, heads, key)}
        if adapter.operator == "slot_attention":
            decay = log_decay(batch, time, heads, slots)
            given |= {"write": -torch.expm1(decay), "log_decay": decay}
        elif adapter.decay_kind is not None:
            given["log_decay"] = log_decay(batch, time, heads, *([key] if adapter.decay_kind == "vector" else []))
        carried = {"state": (batch, heads, key, value)}
        if adapter.operator == "slot_attention":
            carried = {"keys": (batch, heads, key, slots), "values": (batch, heads, slots, value)}
    order = ["log_decay"] if "log_decay" not in given and adapter.operator != "convolution" else []
    tensors: dict[str, Tensor | None] = {**given, **dict.fromkeys(order)}
    tensors |= {name: normal(*shape) if state else None for name, shape in carried.items()}
    segments = None
    if documents > 1:
        segments = (torch.arange(time) * documents // time).expand(batch, -1).contiguous().to(device)
    call = OperatorCall(adapter.operator, adapter.form, tensors, segments)
    return call.map_tensors(lambda name, t: t.to(device)).cast_inputs(dtype)
