"""From an operator's call to a kernel's and back: names, widths, documents and states.

    reason = adapter.unsupported_reason(call)         # None: it takes the call
    o, state = adapter.run(call)

An adapter never changes what an operator means. Grouped heads are repeated, scales are 1 because the caller has scaled
q, norms and gates are the mixers', padded tokens come as the no-ops that they are for every operator (nothing written,
nothing decays), documents as offsets into one long row, and states are [B, H, K, V] in float32 on both sides.

Packed documents as the kernels take them: all rows of a batch end to end, with the place where each document begins.

    packed = Sequences.from_segments(segments)
    q = packed.flatten(q)                              # [B, T, ...] -> [1, B·T, ...]
    o, states = kernel(q, ..., packed.cu_seqlens, packed.scatter_states(state))
    packed.unflatten(o), packed.gather_states(states)         # [B, T, ...] and [B, ...]

Shapes: B batch, T time, N documents of the whole batch.
"""

import functools
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.ops.fla.call import OperatorCall


@dataclass(frozen=True)
class VarlenLayout:
    """cu_seqlens: [N + 1] where documents begin, and the end; first, last: [B] the documents of a row's ends; continues_state: [B]
    does a row's first document go on from the incoming state?"""

    cu_seqlens: Tensor
    first: Tensor
    last: Tensor
    continues_state: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_segments(cls, segments: Tensor) -> "VarlenLayout":
        """The documents of segments [B, T]. Found once for all layers that are given the same tensor: how many there
        are has to be known on the host."""
        known = getattr(segments, "_limbeck_sequences", None)
        if known is not None:
            return known
        ends = getattr(
            segments, "limbeck_cu_seqlens", None
        )  # on the host (limbeck.data.packing): nothing is waited for
        if ends is not None:
            rows = torch.arange(segments.shape[0] + 1) * segments.shape[1]
            place = torch.searchsorted(ends.long(), rows)  # every row begins a document
            offsets, first, last = (
                x.to(segments.device, non_blocking=True) for x in (ends.long(), place[:-1], place[1:] - 1)
            )
            packed = cls(offsets, first, last, segments[:, 0] == 0, (segments.shape[0], segments.shape[1]))
            segments._limbeck_sequences = packed  # type: ignore[attr-defined]
            return packed
        begins = torch.ones_like(segments, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        offsets = begins.flatten().nonzero().squeeze(1)
        last = begins.sum(1).cumsum(0) - 1
        packed = cls(
            cu_seqlens=torch.cat([offsets, offsets.new_full((1,), begins.numel())]),
            first=torch.cat([last.new_zeros(1), last[:-1] + 1]),
            last=last,
            continues_state=segments[:, 0] == 0,
            shape=(segments.shape[0], segments.shape[1]),
        )
        segments._limbeck_sequences = packed  # type: ignore[attr-defined]
        return packed

    def flatten(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, B·T, ...]."""
        return x.flatten(0, 1).unsqueeze(0)

    def unflatten(self, x: Tensor) -> Tensor:
        """[1, B·T, ...] -> [B, T, ...]."""
        return x.squeeze(0).unflatten(0, self.shape)

    def scatter_states(self, state: Tensor | None) -> Tensor | None:
        """States [B, ...] of the rows -> [N, ...] of the documents, zeros where one begins."""
        if state is None:
            return None
        kept = state * self.continues_state.view(-1, *(1,) * (state.dim() - 1))
        return state.new_zeros(len(self.cu_seqlens) - 1, *state.shape[1:]).index_copy(0, self.first, kept)

    def gather_states(self, states: Tensor) -> Tensor:
        """States [N, ...] of the documents -> [B, ...], that of each row's last."""
        return states.index_select(0, self.last)


HALF_DTYPES = (torch.bfloat16, torch.float16)
# What the last dimensions of each tensor are, for padding: K key width, V value width, M slots.
DIM_LETTERS = {
    **dict.fromkeys(("q", "k", "a", "b"), "K"),
    "v": "V",
    "write": "M",
    "state": "KV",
    "keys": "KM",
    "values": "MV",
}


@functools.cache
def import_kernel(path: str) -> Callable[..., Any]:
    """The function of that dotted name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class KernelAdapter:
    """One kernel and the calls that it serves.

    name: of the adapter. operator, form: what it stands in for. kernel: dotted name of the function. argument_names: the
    operator's tensors by the kernel's argument. decay_kind: the kind that it is for, None for none, "any" for all. used_by:
    mixers. dtypes: that it takes. allows_tf32: float32 too, where TF32 is allowed. max_dims: limits of K, V and M. aligned_dims:
    widths that are padded to multiples of 16, which matrix units and loads of 16 bytes want. supports_backward, supports_varlen: does
    it have them?
    """

    name: str
    operator: str
    form: str
    kernel: str
    argument_names: Mapping[str, str]
    used_by: str
    decay_kind: str | None = None
    dtypes: tuple[torch.dtype, ...] = HALF_DTYPES
    allows_tf32: bool = False
    max_dims: Mapping[str, int] = field(default_factory=dict)
    aligned_dims: str = ""
    supports_backward: bool = True
    supports_varlen: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def matches(self, call: OperatorCall) -> bool:
        """Is it for this kind of call?"""
        if (call.operator, call.form) != (self.operator, self.form):
            return False
        if self.decay_kind == "any" or "log_decay" not in call.tensors:
            return True
        dims = call["log_decay"].dim() if call.has("log_decay") else 0
        return dims in {None: (0,), "scalar": (1, 3), "vector": (4,), "scalar or none": (0, 1, 3)}[self.decay_kind]

    def unsupported_reason(self, call: OperatorCall) -> str | None:
        """Why it does not take the call, or None: what can be told without looking at values."""
        dtype = call.dtype
        if dtype == torch.float32 and self.allows_tf32:
            if torch.get_float32_matmul_precision() == "highest":
                return "float32 without TF32: the kernel's products would be TF32 (tf32: true allows it)"
        elif dtype not in self.dtypes:
            return f"{_short(dtype)} is not among its dtypes ({', '.join(map(_short, self.dtypes))})"
        if not self.supports_backward and call.needs_gradient:
            return "a gradient is wanted, and it has none"
        if call.segments is not None and not self.supports_varlen:
            return "packed documents"
        if call.main_input.shape[1] == 0:
            return "no tokens"
        for letter, size in call.dim_sizes.items():
            if size > self.max_dims.get(letter, size):
                return f"{letter} = {size} is wider than {self.max_dims[letter]}"
            if letter == "M" and self.aligned_dims and size % 16:  # more slots would take part in the softmax
                return f"M = {size} is no multiple of 16"
        return None

    def run(self, call: OperatorCall) -> tuple[Tensor, ...]:
        """Outputs and states as the operator returns them."""
        given, widths = call.with_repeated_kv().cast_inputs(call.dtype), call.dim_sizes
        grown = {w: size + -size % 16 if w in self.aligned_dims else size for w, size in widths.items()}
        tensors = {name: None if t is None else self._padded(name, t, grown) for name, t in given.tensors.items()}
        packed = None
        states: list[Tensor | None] = [tensors.pop(name) for name in call.state_names]
        if call.segments is not None:
            packed = VarlenLayout.from_segments(call.segments)
            tensors = {n: t if t is None or t.dim() == 1 else packed.flatten(t) for n, t in tensors.items()}
            states = [packed.scatter_states(state) for state in states]
        o, *last = self._call(tensors, states, packed)
        if packed is not None:
            o, last = packed.unflatten(o), [packed.gather_states(state) for state in last]
        ends = [
            state[:, :, : widths[DIM_LETTERS[name][0]], : widths[DIM_LETTERS[name][1]]]
            for name, state in zip(call.state_names, last)
        ]
        return o[..., : widths["V"]].to(call["v"].dtype), *ends

    def _padded(self, name: str, t: Tensor, grown: Mapping[str, int]) -> Tensor:
        letters = DIM_LETTERS.get(name, "K" if name == "log_decay" and t.dim() == 4 and "M" not in grown else "")
        more = [grown[w] - size for w, size in zip(letters, t.shape[t.dim() - len(letters) :])]
        return F.pad(t, [p for extra in reversed(more) for p in (0, extra)]) if any(more) else t

    def _call(
        self, tensors: dict[str, Tensor | None], states: list[Tensor | None], packed: VarlenLayout | None
    ) -> tuple[Tensor, ...]:
        """The kernel itself, with its own names; without autocast, since the dtypes are chosen."""
        decay = tensors.get("log_decay")
        given: dict[str, Any] = {self.argument_names[n]: t for n, t in tensors.items() if n in self.argument_names}
        if decay is not None and decay.dim() == 1:
            if "constant" in self.argument_names and not decay.requires_grad:
                given[self.argument_names["constant"]] = decay
                given.pop(self.argument_names["log_decay"])
            else:
                given[self.argument_names["log_decay"]] = decay.expand(*next(iter(given.values())).shape[:3])
        several = len(states) > 1
        if packed is not None:
            given["cu_seqlens"] = packed.cu_seqlens
        given["initial_state"] = (None if states[0] is None else tuple(states)) if several else states[0]
        with torch.autocast(next(iter(given.values())).device.type, enabled=False):
            o, last = import_kernel(self.kernel)(**given, scale=1.0, output_final_state=True, **self.options)
        return (o, *last) if several else (o, last)


@dataclass(frozen=True)
class ConvolutionAdapter(KernelAdapter):
    """The short convolution, whose kernel has the window's weights in the other order and a state of W inputs."""

    def unsupported_reason(self, call: OperatorCall) -> str | None:
        if call["x"].shape[1] == 1:
            return "one token: as little work for torch"
        return super().unsupported_reason(call)

    def run(self, call: OperatorCall) -> tuple[Tensor, ...]:
        given = call.cast_inputs(call.dtype)
        x, weight = given["x"].flatten(2), given["weight"].flatten(1)
        width, channels = weight.shape[0], call["x"].shape[2:]
        empty = x.new_zeros(len(x), width - 1, x.shape[-1])
        state = given["state"].flatten(2).to(x.dtype) if given.has("state") else empty
        packed = None if call.segments is None else VarlenLayout.from_segments(call.segments)
        incoming: Tensor | None = F.pad(state, (0, 0, 1, 0)).mT  # [B, channels, W]; no window sees the oldest
        if packed is not None:
            x, incoming = packed.flatten(x), packed.scatter_states(incoming)
        assert incoming is not None
        with torch.autocast(x.device.type, enabled=False):
            y, last = import_kernel(self.kernel)(
                x=x,
                weight=weight.flip(0).T.contiguous(),
                initial_state=incoming.contiguous(),
                output_final_state=True,
                backend="triton",
                **({} if packed is None else {"cu_seqlens": packed.cu_seqlens}),
            )
        if packed is not None:
            y, last = packed.unflatten(y), packed.gather_states(last)
        return y.unflatten(2, channels), last.mT[:, 1:].unflatten(2, channels).to(call["x"].dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
