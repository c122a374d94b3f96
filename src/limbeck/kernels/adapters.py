"""From an operator's call to a kernel's and back: names, widths, documents and states.

    reason = adapter.declined(call)         # None: it takes the call
    o, state = adapter.run(call)

An adapter never changes what an operator means. Grouped heads are repeated, scales are 1 because the caller has scaled
q, norms and gates are the mixers', padded tokens come as the no-ops that they are for every operator (nothing written,
nothing decays), documents as offsets into one long row, and states are [B, H, K, V] in float32 on both sides.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.kernels.calls import Call
from limbeck.kernels.sequences import Sequences

HALF = (torch.bfloat16, torch.float16)
# What the last dimensions of each tensor are, for padding: K key width, V value width, M slots.
LAST = {
    **dict.fromkeys(("q", "k", "a", "b"), "K"),
    "v": "V",
    "write": "M",
    "state": "KV",
    "keys": "KM",
    "values": "MV",
}


@functools.cache
def kernel_function(path: str) -> Callable[..., Any]:
    """The function of that dotted name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class Adapter:
    """One kernel and the calls that it serves.

    name: of the adapter. operator, form: what it stands in for. kernel: dotted name of the function. names: the
    operator's tensors by the kernel's argument. decay: the kind that it is for, None for none, "any" for all. serves:
    mixers. dtypes: that it takes. tf32: float32 too, where TF32 is allowed. widest: limits of K, V and M. aligned:
    widths that are padded to multiples of 16, which matrix units and loads of 16 bytes want. gradient, documents: does
    it have them?
    """

    name: str
    operator: str
    form: str
    kernel: str
    names: Mapping[str, str]
    serves: str
    decay: str | None = None
    dtypes: tuple[torch.dtype, ...] = HALF
    tf32: bool = False
    widest: Mapping[str, int] = field(default_factory=dict)
    aligned: str = ""
    gradient: bool = True
    documents: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def fits(self, call: Call) -> bool:
        """Is it for this kind of call?"""
        if (call.operator, call.form) != (self.operator, self.form):
            return False
        if self.decay == "any" or "log_decay" not in call.tensors:
            return True
        dims = call["log_decay"].dim() if call.has("log_decay") else 0
        return dims in {None: (0,), "scalar": (1, 3), "vector": (4,), "scalar or none": (0, 1, 3)}[self.decay]

    def declined(self, call: Call) -> str | None:
        """Why it does not take the call, or None: what can be told without looking at values."""
        dtype = call.dtype
        if dtype == torch.float32 and self.tf32:
            if torch.get_float32_matmul_precision() == "highest":
                return "float32 without TF32: the kernel's products would be TF32 (tf32: true allows it)"
        elif dtype not in self.dtypes:
            return f"{_short(dtype)} is not among its dtypes ({', '.join(map(_short, self.dtypes))})"
        if not self.gradient and call.needs_gradient:
            return "a gradient is wanted, and it has none"
        if call.segments is not None and not self.documents:
            return "packed documents"
        if call.first.shape[1] == 0:
            return "no tokens"
        for letter, size in call.widths.items():
            if size > self.widest.get(letter, size):
                return f"{letter} = {size} is wider than {self.widest[letter]}"
            if letter == "M" and self.aligned and size % 16:  # more slots would take part in the softmax
                return f"M = {size} is no multiple of 16"
        return None

    def run(self, call: Call) -> tuple[Tensor, ...]:
        """Outputs and states as the operator returns them."""
        given, widths = call.widened().rounded(call.dtype), call.widths
        grown = {w: size + -size % 16 if w in self.aligned else size for w, size in widths.items()}
        tensors = {name: None if t is None else self._padded(name, t, grown) for name, t in given.tensors.items()}
        packed = None
        states: list[Tensor | None] = [tensors.pop(name) for name in call.states]
        if call.segments is not None:
            packed = Sequences.of(call.segments)
            tensors = {n: t if t is None or t.dim() == 1 else packed.flat(t) for n, t in tensors.items()}
            states = [packed.incoming(state) for state in states]
        o, *last = self._call(tensors, states, packed)
        if packed is not None:
            o, last = packed.rows(o), [packed.outgoing(state) for state in last]
        ends = [state[:, :, : widths[LAST[name][0]], : widths[LAST[name][1]]] for name, state in zip(call.states, last)]
        return o[..., : widths["V"]].to(call["v"].dtype), *ends

    def _padded(self, name: str, t: Tensor, grown: Mapping[str, int]) -> Tensor:
        letters = LAST.get(name, "K" if name == "log_decay" and t.dim() == 4 and "M" not in grown else "")
        more = [grown[w] - size for w, size in zip(letters, t.shape[t.dim() - len(letters) :])]
        return F.pad(t, [p for extra in reversed(more) for p in (0, extra)]) if any(more) else t

    def _call(
        self, tensors: dict[str, Tensor | None], states: list[Tensor | None], packed: Sequences | None
    ) -> tuple[Tensor, ...]:
        """The kernel itself, with its own names; without autocast, since the dtypes are chosen."""
        decay = tensors.get("log_decay")
        given: dict[str, Any] = {self.names[n]: t for n, t in tensors.items() if n in self.names}
        if decay is not None and decay.dim() == 1:
            if "constant" in self.names and not decay.requires_grad:
                given[self.names["constant"]] = decay
                given.pop(self.names["log_decay"])
            else:
                given[self.names["log_decay"]] = decay.expand(*next(iter(given.values())).shape[:3])
        several = len(states) > 1
        if packed is not None:
            given["cu_seqlens"] = packed.offsets
        given["initial_state"] = (None if states[0] is None else tuple(states)) if several else states[0]
        with torch.autocast(next(iter(given.values())).device.type, enabled=False):
            o, last = kernel_function(self.kernel)(**given, scale=1.0, output_final_state=True, **self.options)
        return (o, *last) if several else (o, last)


@dataclass(frozen=True)
class Convolution(Adapter):
    """The short convolution, whose kernel has the window's weights in the other order and a state of W inputs."""

    def declined(self, call: Call) -> str | None:
        if call["x"].shape[1] == 1:
            return "one token: as little work for torch"
        return super().declined(call)

    def run(self, call: Call) -> tuple[Tensor, ...]:
        given = call.rounded(call.dtype)
        x, weight = given["x"].flatten(2), given["weight"].flatten(1)
        width, channels = weight.shape[0], call["x"].shape[2:]
        empty = x.new_zeros(len(x), width - 1, x.shape[-1])
        state = given["state"].flatten(2).to(x.dtype) if given.has("state") else empty
        packed = None if call.segments is None else Sequences.of(call.segments)
        incoming: Tensor | None = F.pad(state, (0, 0, 1, 0)).mT  # [B, channels, W]; no window sees the oldest
        if packed is not None:
            x, incoming = packed.flat(x), packed.incoming(incoming)
        assert incoming is not None
        with torch.autocast(x.device.type, enabled=False):
            y, last = kernel_function(self.kernel)(
                x=x,
                weight=weight.flip(0).T.contiguous(),
                initial_state=incoming.contiguous(),
                output_final_state=True,
                backend="triton",
                **({} if packed is None else {"cu_seqlens": packed.offsets}),
            )
        if packed is not None:
            y, last = packed.rows(y), packed.outgoing(last)
        return y.unflatten(2, channels), last.mT[:, 1:].unflatten(2, channels).to(call["x"].dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
