"""RWKV-6: S_t = Diag(w_t) S_{t-1} + k_t v_tᵀ, read before the write with a bonus for the token itself.

Peng et al. 2024 (arXiv 2404.05892), equations 16 to 19: o_t = (S_{t-1} + Diag(u) k_t v_tᵀ)ᵀ r_t and w_t =
exp(−exp(d + W₂ tanh(W₁ x_t))). With `complement` the key is k_t (1 − w_t), as RADLADS converts attention (arXiv
2505.03005). The token shift of the original is the common convolution of width 2.

It runs on the vector-decay operator: o_t without the bonus is what the query of token t reads after token t − 1, so
queries move one token up and outputs one token down.

Start: W₂ = 0, d such that half-lives are spread from `shortest` to `longest` tokens over the heads (geometric), u = 1,
where RWKV-6 is gated linear attention whose own token does not decay.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.mixers.base import Mixer
from limbeck.mixers.options import Options, log_decays_from_half_lives, upcast
from limbeck.mixers.registry import register
from limbeck.mixers.types import Inputs, State, Tokens
from limbeck.ops import vector_decay
from limbeck.ops.common import build_document_mask, disable_autocast, find_document_starts, repeat_kv


@dataclass(frozen=True)
class RWKV6Options(Options):
    output_norm: Literal["none", "rms", "layer"] = "rms"
    output_gate: Literal["none", "silu", "sigmoid", "inner"] = "silu"
    rank: int = 64  # rank of the decay's projection
    complement: bool = False  # scale keys by 1 − w_t
    shortest: float = 8.0  # half-lives in tokens, spread over the heads
    longest: float = 512.0


@register
class RWKV6(Mixer):
    """See the module's docstring."""

    name = "rwkv6"
    summary = "decay per key channel, read before the write, a bonus for the token itself (Peng 2024)"
    source = "arXiv 2404.05892, eq. 16 to 19"
    operator = vector_decay
    options_class = RWKV6Options
    options: RWKV6Options
    published = {"rope": False, "conv": 2, "output_norm": "layer", "norm_bias": True}

    def build(self) -> None:
        s = self.shape
        self.decay_down = nn.Linear(s.hidden, self.options.rank, bias=False)
        self.decay_up = nn.Linear(self.options.rank, s.heads * s.key_width)
        self.bonus = nn.Parameter(torch.empty(s.heads, s.key_width))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.decay_down.weight, std=self.shape.hidden**-0.5)
        nn.init.zeros_(self.decay_up.weight)
        nn.init.ones_(self.bonus)
        rate = -log_decays_from_half_lives(self.shape.heads, self.options.shortest, self.options.longest)
        with torch.no_grad():
            self.decay_up.bias.copy_(torch.log(rate).repeat_interleave(self.shape.key_width))

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        gate = self.decay_up(torch.tanh(self.decay_down(x))).unflatten(-1, (self.shape.heads, -1))
        # exp(6) resets the state already; more would overflow.
        log_decay = -torch.exp(upcast(gate).clamp(max=6.0))
        k = repeat_kv(k, self.shape.heads)
        if self.options.complement:
            k = k * -torch.expm1(log_decay)
        q = q * self.shape.scale
        return Inputs(q, k, v, log_decay, diagonal=(q * k * self.bonus).sum(-1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
        arguments = self.compute_masked_inputs(q, k, v, x, tokens, state)
        operator = self.operator.recurrent if q.shape[1] == 1 else self.operator.chunked
        memory, segments = state.get("memory"), tokens.segments
        later, last = operator(
            _next_queries(arguments.q), arguments.k, arguments.v, arguments.log_decay, state=memory, segments=segments
        )
        if memory is None:
            first = torch.zeros_like(later[:, :1])
        else:
            with disable_autocast(q):
                first = torch.einsum("bhk,bhkv->bhv", arguments.q[:, 0].to(memory.dtype), memory)
            first = first[:, None].to(later.dtype)
        o = torch.cat([first, later[:, :-1]], 1)
        if segments is not None:  # a document's first token has nothing before it
            o = o.masked_fill(find_document_starts(segments)[..., None, None], 0)
        return arguments.add_diagonal_to_output(o), {"memory": last}

    def attend_matrix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens) -> Tensor:
        arguments = self.compute_masked_inputs(q, k, v, x, tokens, {})
        later = vector_decay.matrix(
            _next_queries(arguments.q), arguments.k, arguments.log_decay, segments=tokens.segments
        )
        m = F.pad(later[:, :, :-1], (0, 0, 1, 0))
        if tokens.segments is not None:
            m = m * build_document_mask(tokens.segments)
        return arguments.add_diagonal_to_matrix(m)


def _next_queries(q: Tensor) -> Tensor:
    """Move queries q [B, T, H, K] one token up: each token gets that of the next one, the last one zero."""
    return F.pad(q[:, 1:], (0, 0, 0, 0, 0, 1))
