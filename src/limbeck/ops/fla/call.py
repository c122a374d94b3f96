"""A call of an operator, apart from what computes it, and the backend that the process requests.

    call = OperatorCall("scalar_decay", "chunked", {"q": q, "k": k, "v": v, "log_decay": g, "state": None}, segments)
    call.truncate().cast_inputs(torch.bfloat16)        # a small one of the same kind
    with use_backend("torch"): ...                     # "fla": a call that no kernel takes is an error; or "auto"

The backend is set by a run's recipe or by LIMBECK_BACKEND. Legend: limbeck.ops, and M slots, W window.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError

BACKENDS = ("auto", "torch", "fla")
# Of the process and not of the thread, because backward passes run in threads of their own. Each entry is a list, so
# that it can be told from an equal one; the last entry counts.
_backends: list[list[str]] = [[os.environ.get("LIMBECK_BACKEND", "auto")]]


def requested_backend() -> str:
    """Return the backend in force, "auto" by default."""
    return _backends[-1][0]


def check_backend() -> None:
    """Raise a LimbeckError where LIMBECK_BACKEND names no backend."""
    if (backend := requested_backend()) not in BACKENDS:
        raise LimbeckError(f"the backend is '{backend}'", expected=" | ".join(BACKENDS), hint="LIMBECK_BACKEND=auto")


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Request a backend for the whole process inside a `with` block; "auto" leaves it to LIMBECK_BACKEND.

    Raises:
        LimbeckError: no such backend.
    """
    entry = [backend if backend != "auto" else os.environ.get("LIMBECK_BACKEND", "auto")]
    _backends.append(entry)
    try:
        check_backend()
        yield
    finally:  # not always the last entry: another thread may have added one since
        del _backends[next(i for i, other in enumerate(_backends) if other is entry)]


TORCH_FORMS: dict[tuple[str, str], Callable[..., tuple[Tensor, ...]]] = {}  # by operator and form
STATES = ("state", "keys", "values")  # what is carried from call to call
ROUNDED = ("q", "k", "v", "a", "b", "write", "x", "weight")  # what a kernel takes in low precision; the rest is float32


@dataclasses.dataclass(frozen=True)
class OperatorCall:
    """Operator, form, tensors by name in the operator's own order (None for absent ones), and document numbers."""

    operator: str
    form: str
    tensors: Mapping[str, Tensor | None]
    segments: Tensor | None = None

    @property
    def main_input(self) -> Tensor:
        """Return q, or the convolution's x."""
        return self["q" if "q" in self.tensors else "x"]

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        assert tensor is not None
        return tensor

    def has(self, name: str) -> bool:
        return self.tensors.get(name) is not None

    @property
    def state_names(self) -> tuple[str, ...]:
        """Return the names of the operator's states, whether they are given or not."""
        return tuple(name for name in STATES if name in self.tensors)

    @property
    def dim_sizes(self) -> dict[str, int]:
        """Return the sizes of K and V, and of M where there are slots; of W for the convolution."""
        if "x" in self.tensors:
            return {"W": self["weight"].shape[0]}
        slots = {"M": self["write"].shape[-1]} if "write" in self.tensors else {}
        return {"K": self["q"].shape[-1], "V": self["v"].shape[-1], **slots}

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype that a kernel would compute in: autocast's where that is on, else that of v or x."""
        kind = self.main_input.device.type
        if torch.is_autocast_enabled(kind):
            return torch.get_autocast_dtype(kind)
        return (self["v"] if "v" in self.tensors else self.main_input).dtype

    @property
    def needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in self.tensors.values())

    def has_valid_shapes(self) -> bool:
        """Tell whether the shapes fit together: a kernel would read past their ends."""
        first, tensors = self.main_input, {name: t for name, t in self.tensors.items() if t is not None}
        if self.segments is not None and self.segments.shape != first.shape[:2]:
            return False
        expected: dict[str, tuple[int, ...]]
        if "x" in tensors:
            window, channels = tensors["weight"].shape[0], first.shape[2:]
            expected = {"x": first.shape, "weight": (window, *channels), "state": (len(first), window - 1, *channels)}
            return all(t.shape == expected[name] for name, t in tensors.items())
        if any(t.dim() != 4 for name, t in tensors.items() if name in ("q", "k", "v", "write")):
            return False
        batch, time, heads, key = first.shape
        value, slots = tensors["v"].shape[3], self.dim_sizes.get("M", key)
        if any(heads % tensors[name].shape[2] for name in ("k", "v")):
            return False
        expected = {
            **dict.fromkeys(("q", "a", "b"), (batch, time, heads, key)),
            "k": (batch, time, tensors["k"].shape[2], key),
            "v": (batch, time, tensors["v"].shape[2], value),
            "beta": (batch, time, heads),
            "write": (batch, time, heads, slots),
            "state": (batch, heads, key, value),
            "keys": (batch, heads, key, slots),
            "values": (batch, heads, slots, value),
        }
        decays = {1: (heads,), 3: (batch, time, heads), 4: (batch, time, heads, slots)}
        if "log_decay" in tensors and tensors.pop("log_decay").shape != decays.get(self["log_decay"].dim()):
            return False
        return all(t.shape == expected[name] for name, t in tensors.items())

    def map_tensors(self, change: Callable[[str, Tensor], Tensor]) -> "OperatorCall":
        """Return the call with `change(name, tensor)` for every tensor; document numbers stay."""
        tensors = {name: None if t is None else change(name, t) for name, t in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors)

    def cast_inputs(self, dtype: torch.dtype) -> "OperatorCall":
        """Return the call with what kernels round in `dtype`, gates and states in float32 (float64 for float64)."""
        rest = torch.promote_types(dtype, torch.float32)
        return self.map_tensors(lambda name, t: t.to(dtype if name in ROUNDED else rest))

    def as_leaves(self) -> "OperatorCall":
        """Return the call with copies of its tensors that are leaves and require gradients."""
        return self.map_tensors(lambda name, t: t.detach().clone().requires_grad_())

    def with_repeated_kv(self) -> "OperatorCall":
        """Return the call with grouped keys and values repeated for all heads."""
        if "q" not in self.tensors:
            return self
        heads = self["q"].shape[2]

        def repeat(name: str, t: Tensor) -> Tensor:
            return t.repeat_interleave(heads // t.shape[2], 2) if name in ("k", "v") and t.shape[2] != heads else t

        return self.map_tensors(repeat)

    def truncate(self, time: int = 256, heads: int = 2) -> "OperatorCall":
        """Return the first tokens and heads of the first row: enough to see whether a kernel is right."""
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
        """Compute the call by the operator in torch."""
        with use_backend("torch"):  # because operators are made of others
            return TORCH_FORMS[self.operator, self.form](**self.tensors, segments=self.segments)

    def describe(self) -> str:
        """Describe widths and kinds of its tensors: what one check of a kernel is valid for."""
        parts = [f"{letter}{size}" for letter, size in self.dim_sizes.items()]
        if "log_decay" in self.tensors:
            kinds = {1: "constant", 3: "scalar", 4: "vector"}
            parts.append(kinds.get(self["log_decay"].dim(), "unknown") if self.has("log_decay") else "no decay")
        parts += ["state"] if any(self.has(name) for name in self.state_names) else []
        return " ".join(parts + (["documents"] if self.segments is not None else []))
