"""A student as one function of tokens and states, for any batch and any number of tokens: what a graph is made from.

    step = StudentStep(student)                              # of a copy in float32; the student stays as it is
    step.states["past.0.memory"].shape                       # ("batch", 9, 64, 64)
    logits, *present = step(input_ids, attention_mask, *step.make_empty_states(batch=2))

All that a call has to know of the calls before it is among the states, positions included: a caller hands in what came
out, and zeros at the start. `attention_mask` is that of the call's tokens alone. Padding may stand anywhere.

Shapes: B batch, T tokens of a call, P tokens before them, H heads, G key/value heads, K width.
"""

import copy
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache, DynamicLayer

from limbeck.core.errors import LimbeckError
from limbeck.mixers import Tokens
from limbeck.models.attention import LIMBECK_EXPORT, register_attention, softmax_attention_forward
from limbeck.models.cache import RecurrentLayer, build_cache_kwargs
from limbeck.models.export.onnx_operators import mark_visible, substitute_operators
from limbeck.models.modeling import get_mixers
from limbeck.models.temporary import iterate_configs

POSITION, MASK = "past.position", "past.mask"
BATCH, PAST = "batch", "past"

_tokens: ContextVar[Tokens] = ContextVar("tokens of the running step")


@dataclass(frozen=True)
class StateTensor:
    """One tensor of the state between two calls."""

    shape: tuple[int | str, ...]  # "batch", "past" (tokens before, where the state grows), or a fixed size
    dtype: torch.dtype


class StudentStep(nn.Module):
    """See the module's docstring.

    Attributes:
        states: by name, in the order of the arguments and of the results after the logits.

    Raises:
        LimbeckError: the family keeps states of its own kind between two calls.
    """

    def __init__(self, student: Any) -> None:
        super().__init__()
        self.student = copy_in_float32(student)
        for config in iterate_configs(self.student.config):
            config._attn_implementation = LIMBECK_EXPORT
        for mixer in get_mixers(self.student).values():
            substitute_operators(mixer)
        self.states, self.owners = self._find_states()

    @property
    def has_mask(self) -> bool:
        """Whether layers keep softmax, whose keys need the mask of all tokens."""
        return MASK in self.states

    def forward(self, input_ids: Tensor, attention_mask: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        """Run the tokens of a call.

        Args:
            input_ids: [B, T] int64.
            attention_mask: [B, T] int64, 0 for padding.
            past: as in `states`.

        Returns:
            logits [B, T, vocabulary] and the states after the last token.
        """
        before = dict(zip(self.states, past))
        length, cache = before[MASK].shape[1] if self.has_mask else 0, DynamicCache()
        for index, owner in enumerate(self.owners):
            prefix = f"past.{index}."
            own = {name.removeprefix(prefix): z for name, z in before.items() if name.startswith(prefix)}
            cache.layers.append(_fill_layer(owner, own, length))
        mask = torch.cat([before[MASK], attention_mask], 1) if self.has_mask else attention_mask
        logits, cache = self._run(input_ids, attention_mask, mask, before[POSITION], cache)
        after = {POSITION: before[POSITION] + attention_mask.sum(1), MASK: mask, **_read_states(cache)}
        return logits, *(after[name] for name in self.states)

    def make_empty_states(self, batch: int) -> list[Tensor]:
        """Return the states before the first token: zeros."""
        sizes = {BATCH: batch, PAST: 0}
        return [
            torch.zeros([sizes[n] if isinstance(n, str) else n for n in s.shape], dtype=s.dtype)
            for s in self.states.values()
        ]

    def _run(
        self, input_ids: Tensor, attention_mask: Tensor, mask: Tensor, position: Tensor, cache: DynamicCache
    ) -> tuple[Tensor, DynamicCache]:
        """Run the student on a call's tokens; mask [B, P + T] is that of all."""
        visible = mark_visible(mask.bool(), input_ids.shape[1])
        positions = (position[:, None] + attention_mask.cumsum(1) - 1).clamp(min=0)
        token = _tokens.set(Tokens(attention_mask.bool()))
        try:
            output = self.student(
                input_ids,
                position_ids=positions,
                attention_mask=visible[:, None],
                **build_cache_kwargs(self.student, cache),
            )
        finally:
            _tokens.reset(token)
        return output.logits, cache

    def _find_states(self) -> tuple[dict[str, StateTensor], list[nn.Module | None]]:
        """Find the states by two passes of different lengths; what differs in size between them grows."""
        found = []
        for length in (3, 4):
            ids = torch.arange(2 * length).view(2, length) % self.student.get_input_embeddings().weight.shape[0]
            ones, cache = torch.ones_like(ids), DynamicCache()
            with torch.no_grad():
                self._run(ids, ones, ones, torch.zeros(2, dtype=torch.long), cache)
            _check_layers(cache)
            found.append(_read_states(cache))
        states = {POSITION: StateTensor((BATCH,), torch.long)}
        if any(type(layer) is DynamicLayer for layer in cache.layers):
            states[MASK] = StateTensor((BATCH, PAST), torch.long)
        for name, tensor in found[0].items():
            longer = found[1][name].shape
            shape = (BATCH, *(n if n == m else PAST for n, m in zip(tensor.shape[1:], longer[1:])))
            states[name] = StateTensor(shape, tensor.dtype)
        owners = [
            layer.owner() if isinstance(layer, RecurrentLayer) and layer.owner else None for layer in cache.layers
        ]
        return states, owners


def copy_in_float32(student: Any) -> Any:
    """Copy a student to the CPU in float32 and eval mode; weights that are so already are shared."""
    shared = {id(p): p for p in student.parameters() if p.dtype == torch.float32 and p.device.type == "cpu"}
    return copy.deepcopy(student, dict[int, Any](shared)).to("cpu", torch.float32).eval()


def _fill_layer(owner: nn.Module | None, state: dict[str, Tensor], length: Any) -> Any:
    """Make a cache layer with the given state after `length` tokens: of a mixer, or of softmax without an owner."""
    if owner is None:
        layer: Any = DynamicLayer()
        layer.keys, layer.values, layer.is_initialized = state["key"], state["value"], True
        layer.dtype, layer.device = layer.keys.dtype, layer.keys.device
        return layer
    layer = RecurrentLayer()
    layer.claim_for(owner)
    some = next(iter(state.values()))
    layer.lazy_initialization(some, some)
    layer.length = length
    calls: dict[int, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        call, _, rest = name.partition(".") if name[0].isdigit() else ("0", "", name)
        calls.setdefault(int(call), {})[rest] = tensor
    layer.states = [calls[call] for call in sorted(calls)]
    return layer


def _read_states(cache: DynamicCache) -> dict[str, Tensor]:
    """Return the states of all layers by name."""
    states: dict[str, Tensor] = {}
    layers: list[Any] = cache.layers
    for index, layer in enumerate(layers):
        if not isinstance(layer, RecurrentLayer):
            states.update({f"past.{index}.key": layer.keys, f"past.{index}.value": layer.values})
            continue
        for call, state in enumerate(layer.states):
            # most families call their attention function once a layer
            prefix = f"past.{index}." + (f"{call}." if len(layer.states) > 1 else "")
            states.update({f"{prefix}{name}": tensor for name, tensor in (state or {}).items()})
    return states


def _check_layers(cache: DynamicCache) -> None:
    for index, layer in enumerate(cache.layers):
        if type(layer) is RecurrentLayer or (type(layer) is DynamicLayer and layer.is_initialized):
            continue
        raise LimbeckError(
            f"layer {index} of this family keeps a state of its own kind ({type(layer).__name__})",
            expected="mixers of Limbeck and softmax attention",
        )


def export_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    limbeck_call: Any = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of a step: as `limbeck_attention_forward`, with the running step's tokens and mask.

    Args:
        query: [B, H, T, K]; key: [B, G, P + T, K]; value likewise, for softmax layers; mixers get their T tokens alone.
        attention_mask: [B, 1, T, P + T] bool.
        sliding_window: of softmax layers whose family has one; all keys are kept here, and those behind it masked.
    """
    if limbeck_call is None:
        assert attention_mask is not None
        sliding_window = sliding_window or getattr(module, "sliding_window", None)
        if sliding_window:
            at = torch.arange(key.shape[2], device=key.device)
            near = at[key.shape[2] - query.shape[2] :, None] - at < sliding_window
            attention_mask = attention_mask & near
        return softmax_attention_forward(module, query, key, value, attention_mask, **kwargs)
    layer, tokens = limbeck_call.layer, _tokens.get()
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    y, state = module.mixer(q, k, v, limbeck_call.x, tokens=tokens, state=layer.read_state(limbeck_call.count))
    layer.write_state(limbeck_call.count, state)
    limbeck_call.count += 1
    return y, None


register_attention(LIMBECK_EXPORT, export_attention_forward)
