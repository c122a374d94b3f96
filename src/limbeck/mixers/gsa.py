"""Gated slot attention: a softmax over a fixed number of slots, each a gated average of keys and of values.

Zhang et al. 2024 (arXiv 2409.07146), equations 10 to 12, M slots: a_t = σ(W x_t)^(1/16), write weights s_t = 1 − a_t,
slot keys K_t = K_{t-1} Diag(a_t) + k_t s_tᵀ, slot values V_t = Diag(a_t) V_{t-1} + s_t v_tᵀ, p_t = softmax(K_tᵀ q_t),
o_t = V_tᵀ p_t. Rows of its mixing matrix are positive and sum to at most one.

Start: W = 0 and its bias such that half-lives are spread from `shortest` to `longest` tokens over a head's slots
(geometric), so that slots remember spans of different lengths.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.mixers.base import Mixer
from limbeck.mixers.options import Options, log_decays_from_half_lives, logit, upcast
from limbeck.mixers.registry import register
from limbeck.mixers.types import Inputs, State, Tokens
from limbeck.ops import slot_attention, value_decay


@dataclass(frozen=True)
class GSAOptions(Options):
    slots: int = 64
    temperature: float = 16.0  # a_t is the 16th root of a sigmoid
    swish: bool = False  # on q and k, as published
    shortest: float = 1.0  # half-lives in tokens, spread over the slots
    longest: float = 512.0


@register
class GSA(Mixer):
    """See the module's docstring."""

    name = "gsa"
    summary = "gated slot attention: softmax over slots that average keys and values (Zhang 2024)"
    source = "arXiv 2409.07146, eq. 10 to 12"
    operator = value_decay
    options_class = GSAOptions
    options: GSAOptions
    published = {"rope": False, "swish": True, "output_norm": "rms", "norm_over": "heads"}

    def build(self) -> None:
        s, rows = self.shape, self.options.state * self.shape.key_width
        # A slot holds a key and a value, so the numbers in `rows` rows of a common state make fewer slots.
        slots = round(rows * s.value_width / (s.key_width + s.value_width)) if rows else self.options.slots
        self.slots = max(slots, 1)
        self.forget = nn.Linear(s.hidden, s.heads * self.slots)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        o = self.options
        gate = (log_decays_from_half_lives(self.slots, o.shortest, o.longest) * o.temperature).exp()
        nn.init.zeros_(self.forget.weight)
        with torch.no_grad():
            self.forget.bias.copy_(logit(gate).repeat(self.shape.heads))

    def qk_width(self, rows: int) -> int:
        return self._head_width("key")

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        gate = upcast(self.forget(x).unflatten(-1, (self.shape.heads, -1)))
        log_decay = F.logsigmoid(gate) / self.options.temperature
        if self.options.swish:
            q, k = F.silu(q), F.silu(k)
        return Inputs(q * self.shape.scale, k, v, log_decay)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
        arguments = self.compute_masked_inputs(q, k, v, x, tokens, state)
        operator = slot_attention.recurrent if q.shape[1] == 1 else slot_attention.chunked
        o, keys, values = operator(
            *self._operands(arguments),
            keys=state.get("keys"),
            values=state.get("values"),
            segments=tokens.segments,
        )
        return o, {"keys": keys, "values": values}

    def attend_matrix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens) -> Tensor:
        arguments = self.compute_masked_inputs(q, k, v, x, tokens, {})
        queries, keys, _, write, log_decay = self._operands(arguments)
        return slot_attention.matrix(queries, keys, write, log_decay, segments=tokens.segments)

    def memory_numel(self) -> int:
        return self.shape.heads * self.slots * (self.shape.key_width + self.shape.value_width)

    def _operands(self, arguments: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return the operator's arguments; the write weights 1 − a_t are zero where a token is masked."""
        log_decay = arguments.log_decay
        assert log_decay is not None
        return arguments.q, arguments.k, arguments.v, -torch.expm1(log_decay), log_decay
