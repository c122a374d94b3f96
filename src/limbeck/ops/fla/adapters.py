"""Translate an operator's call to a kernel's and back: names, widths, documents and states.

    reason = adapter.unsupported_reason(call)         # None: it takes the call
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

from limbeck.ops.fla.call import OperatorCall

HALF_DTYPES = (torch.bfloat16, torch.float16)
# The last dimensions of each tensor, for padding: K key width, V value width, M slots.
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
    """Import the function of that dotted name."""
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


@dataclass(frozen=True)
class KernelAdapter:
    """One kernel and the calls that it serves.

    Attributes:
        name: of the adapter.
        operator, form: what it stands in for.
        kernel: dotted name of the function.
        argument_names: the kernel's argument for each of the operator's tensors.
        used_by: the mixers that it serves.
        decay_kind: "scalar", "vector", "scalar or none", "any", or None for calls without a decay.
        dtypes: the dtypes that it takes.
        allows_tf32: takes float32 too, where TF32 is allowed.
        max_dims: limits of K, V and M.
        aligned_dims: widths to be padded to multiples of 16, for matrix units and for loads of 16 bytes.
        supports_backward, supports_varlen: whether it has gradients, and takes packed documents.
        options: further arguments of the kernel.
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
        """Tell whether it is for this kind of call."""
        if (call.operator, call.form) != (self.operator, self.form):
            return False
        if self.decay_kind == "any" or "log_decay" not in call.tensors:
            return True
        dims = call["log_decay"].dim() if call.has("log_decay") else 0
        return dims in {None: (0,), "scalar": (1, 3), "vector": (4,), "scalar or none": (0, 1, 3)}[self.decay_kind]

    def unsupported_reason(self, call: OperatorCall) -> str | None:
        """Return why it does not take the call, or None; shapes and dtypes decide, values do not."""
        dtype = call.dtype
        if dtype == torch.float32 and self.allows_tf32:
            if torch.get_float32_matmul_precision() == "highest":
                return "float32 without TF32, but the kernel would compute in TF32 (tf32: true allows it)"
        elif dtype not in self.dtypes:
            return f"the kernel does not support {_short(dtype)} (only {', '.join(map(_short, self.dtypes))})"
        if not self.supports_backward and call.needs_gradient:
            return "a gradient is needed, but the kernel has no backward"
        if call.segments is not None and not self.supports_varlen:
            return "the kernel does not support packed documents"
        if call.main_input.shape[1] == 0:
            return "the sequence is empty"
        for letter, size in call.dim_sizes.items():
            if size > self.max_dims.get(letter, size):
                return f"{letter} = {size} is more than the kernel's limit of {self.max_dims[letter]}"
            if letter == "M" and self.aligned_dims and size % 16:  # padded slots would take part in the softmax
                return f"M = {size} is not a multiple of 16"
        return None

    def run(self, call: OperatorCall) -> tuple[Tensor, ...]:
        """Run the kernel: outputs and states as the operator returns them."""
        inputs, widths = call.with_repeated_kv().cast_inputs(call.dtype), call.dim_sizes
        padded = {w: size + -size % 16 if w in self.aligned_dims else size for w, size in widths.items()}
        tensors = {name: None if t is None else self._pad(name, t, padded) for name, t in inputs.tensors.items()}
        layout = None
        states: list[Tensor | None] = [tensors.pop(name) for name in call.state_names]
        if call.segments is not None:
            layout = VarlenLayout.from_segments(call.segments)
            tensors = {n: t if t is None or t.dim() == 1 else layout.flatten(t) for n, t in tensors.items()}
            states = [layout.scatter_states(state) for state in states]
        o, *last = self._call_kernel(tensors, states, layout)
        if layout is not None:
            o, last = layout.unflatten(o), [layout.gather_states(state) for state in last]
        final_states = [
            state[:, :, : widths[DIM_LETTERS[name][0]], : widths[DIM_LETTERS[name][1]]]
            for name, state in zip(call.state_names, last)
        ]
        return o[..., : widths["V"]].to(call["v"].dtype), *final_states

    def _pad(self, name: str, t: Tensor, padded: Mapping[str, int]) -> Tensor:
        letters = DIM_LETTERS.get(name, "K" if name == "log_decay" and t.dim() == 4 and "M" not in padded else "")
        missing = [padded[w] - size for w, size in zip(letters, t.shape[t.dim() - len(letters) :])]
        return F.pad(t, [p for extra in reversed(missing) for p in (0, extra)]) if any(missing) else t

    def _call_kernel(
        self, tensors: dict[str, Tensor | None], states: list[Tensor | None], layout: "VarlenLayout | None"
    ) -> tuple[Tensor, ...]:
        decay = tensors.get("log_decay")
        arguments: dict[str, Any] = {self.argument_names[n]: t for n, t in tensors.items() if n in self.argument_names}
        if decay is not None and decay.dim() == 1:
            if "constant" in self.argument_names and not decay.requires_grad:
                arguments[self.argument_names["constant"]] = decay
                arguments.pop(self.argument_names["log_decay"])
            else:
                arguments[self.argument_names["log_decay"]] = decay.expand(*next(iter(arguments.values())).shape[:3])
        several = len(states) > 1
        if layout is not None:
            arguments["cu_seqlens"] = layout.cu_seqlens
        arguments["initial_state"] = (None if states[0] is None else tuple(states)) if several else states[0]
        # Without autocast, which would change the dtypes chosen here.
        with torch.autocast(next(iter(arguments.values())).device.type, enabled=False):
            o, last = import_kernel(self.kernel)(**arguments, scale=1.0, output_final_state=True, **self.options)
        return (o, *last) if several else (o, last)


@dataclass(frozen=True)
class ConvolutionAdapter(KernelAdapter):
    """Adapter of the short convolution, whose kernel has the weights in reverse order and a state of W inputs."""

    def unsupported_reason(self, call: OperatorCall) -> str | None:
        if call["x"].shape[1] == 1:
            return "the call has one token, which torch convolves as fast"
        return super().unsupported_reason(call)

    def run(self, call: OperatorCall) -> tuple[Tensor, ...]:
        inputs = call.cast_inputs(call.dtype)
        x, weight = inputs["x"].flatten(2), inputs["weight"].flatten(1)
        width, channels = weight.shape[0], call["x"].shape[2:]
        empty = x.new_zeros(len(x), width - 1, x.shape[-1])
        state = inputs["state"].flatten(2).to(x.dtype) if inputs.has("state") else empty
        layout = None if call.segments is None else VarlenLayout.from_segments(call.segments)
        incoming: Tensor | None = F.pad(state, (0, 0, 1, 0)).mT  # [B, channels, W]; no window sees the oldest
        if layout is not None:
            x, incoming = layout.flatten(x), layout.scatter_states(incoming)
        assert incoming is not None
        with torch.autocast(x.device.type, enabled=False):
            y, last = import_kernel(self.kernel)(
                x=x,
                weight=weight.flip(0).T.contiguous(),
                initial_state=incoming.contiguous(),
                output_final_state=True,
                backend="triton",
                **({} if layout is None else {"cu_seqlens": layout.cu_seqlens}),
            )
        if layout is not None:
            y, last = layout.unflatten(y), layout.gather_states(last)
        return y.unflatten(2, channels), last.mT[:, 1:].unflatten(2, channels).to(call["x"].dtype)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class VarlenLayout:
    """Packed documents as the kernels take them: all rows of a batch end to end, with the place where each begins.

        layout = VarlenLayout.from_segments(segments)
        q = layout.flatten(q)                                       # [B, T, ...] -> [1, B·T, ...]
        o, states = kernel(q, ..., layout.cu_seqlens, layout.scatter_states(state))
        layout.unflatten(o), layout.gather_states(states)           # [B, T, ...] and [B, ...]

    Attributes:
        cu_seqlens: [N + 1] where the N documents of the batch begin, and the end.
        first, last: [B] the documents at both ends of each row.
        continues_state: [B] whether a row's first document continues from the incoming state.
        shape: B and T.
    """

    cu_seqlens: Tensor
    first: Tensor
    last: Tensor
    continues_state: Tensor
    shape: tuple[int, int]

    @classmethod
    def from_segments(cls, segments: Tensor) -> "VarlenLayout":
        """Find the documents of segments [B, T], once for all layers that are given the same tensor."""
        layout = getattr(segments, "_limbeck_sequences", None)
        if layout is None:
            layout = cls(*_find_documents(segments), segments[:, 0] == 0, (segments.shape[0], segments.shape[1]))
            segments._limbeck_sequences = layout  # type: ignore[attr-defined]
        return layout

    def flatten(self, x: Tensor) -> Tensor:
        """Join the rows of x: [B, T, ...] -> [1, B·T, ...]."""
        return x.flatten(0, 1).unsqueeze(0)

    def unflatten(self, x: Tensor) -> Tensor:
        """Split x into rows: [1, B·T, ...] -> [B, T, ...]."""
        return x.squeeze(0).unflatten(0, self.shape)

    def scatter_states(self, state: Tensor | None) -> Tensor | None:
        """Hand the rows' states [B, ...] to their first documents: [N, ...], zeros where a document begins."""
        if state is None:
            return None
        continued = state * self.continues_state.view(-1, *(1,) * (state.dim() - 1))
        return state.new_zeros(len(self.cu_seqlens) - 1, *state.shape[1:]).index_copy(0, self.first, continued)

    def gather_states(self, states: Tensor) -> Tensor:
        """Select the state of each row's last document: [N, ...] -> [B, ...]."""
        return states.index_select(0, self.last)


def _find_documents(segments: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute cu_seqlens, first and last of `VarlenLayout`."""
    ends = getattr(segments, "limbeck_cu_seqlens", None)
    if ends is not None:
        # The host has the boundaries already (limbeck.data.packing), so that it need not wait for the device. Every row
        # begins a document.
        rows = torch.arange(segments.shape[0] + 1) * segments.shape[1]
        positions = torch.searchsorted(ends.long(), rows)
        on_device = (x.to(segments.device, non_blocking=True) for x in (ends.long(), positions[:-1], positions[1:] - 1))
        cu_seqlens, first, last = on_device
        return cu_seqlens, first, last
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    offsets = begins.flatten().nonzero().squeeze(1)
    last = begins.sum(1).cumsum(0) - 1
    cu_seqlens = torch.cat([offsets, offsets.new_full((1,), begins.numel())])
    return cu_seqlens, torch.cat([last.new_zeros(1), last[:-1] + 1]), last
