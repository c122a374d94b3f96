"""Gated linear attention: S_t = Diag(a_t) S_{t-1} + k_t v_tᵀ with one data-dependent decay per key channel.

Yang et al. 2023 (arXiv 2312.06635), equation 3 and section 4.4: a_t = σ(W₂ W₁ x_t + b)^(1/16), low rank 16,
per-head norm, silu gate.

Start: W₂ = 0 and b such that half-lives are spread from `shortest` to `longest` tokens over the heads (geometric), gate
open: linear attention with a fixed, gentle decay.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.mixers.base import Mixer
from limbeck.mixers.options import Options, log_decays_from_half_lives, logit, upcast
from limbeck.mixers.registry import register
from limbeck.mixers.types import Inputs, State, Tokens
from limbeck.ops import vector_decay


@dataclass(frozen=True)
class GLAOptions(Options):
    output_norm: Literal["none", "rms", "layer"] = "rms"
    output_gate: Literal["none", "silu", "sigmoid", "inner"] = "silu"
    rank: int = 16  # rank of the decay's projection
    temperature: float = 16.0  # a_t is the 16th root of a sigmoid
    shortest: float = 8.0  # half-lives in tokens, spread over the heads
    longest: float = 512.0


@register
class GLA(Mixer):
    """See the module's docstring."""

    name = "gla"
    summary = "gated linear attention: a data-dependent decay per key channel, head norm and gate (Yang 2023)"
    source = "arXiv 2312.06635, eq. 3 and sec. 4.4"
    operator = vector_decay
    options_class = GLAOptions
    options: GLAOptions
    published = {"rope": False}

    def build(self) -> None:
        s = self.shape
        self.decay_down = nn.Linear(s.hidden, self.options.rank, bias=False)
        self.decay_up = nn.Linear(self.options.rank, s.heads * s.key_width)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.decay_down.weight, std=self.shape.hidden**-0.5)
        nn.init.zeros_(self.decay_up.weight)
        o = self.options
        log_decay = log_decays_from_half_lives(self.shape.heads, o.shortest, o.longest) * o.temperature
        with torch.no_grad():
            self.decay_up.bias.copy_(logit(log_decay.exp()).repeat_interleave(self.shape.key_width))

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        gate = upcast(self.decay_up(self.decay_down(x)).unflatten(-1, (self.shape.heads, -1)))
        return Inputs(q * self.shape.scale, k, v, F.logsigmoid(gate) / self.options.temperature)
