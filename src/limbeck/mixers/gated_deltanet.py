"""Gated DeltaNet: S_t = a_t (I - b_t k_t k_tᵀ) S_{t-1} + b_t k_t v_tᵀ, one decay and one write strength per head.

Yang et al. 2024 (arXiv 2412.06464), equation 10: log a_t = -exp(A) softplus(w_a·x_t + dt), b_t = sigmoid(w_b·x_t),
unit-length q and k. The state replaces what it holds at a key instead of adding to it.

Start: w_a = w_b = 0, so decay and write strength are constants: half-lives spread from `shortest` to `longest` tokens
over the heads (geometric) and strength `write`; delta-rule attention over the teacher's q, k, v.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.mixers.base import Inputs, Mixer, Options, State, Tokens, register, spread_half_lives
from limbeck.ops import delta_rule


@dataclass(frozen=True)
class GatedDeltaNetOptions(Options):
    rope: bool = False
    shortest: float = 14.0  # half-lives in tokens, spread over the heads
    longest: float = 14.0
    write: float = 0.25


@register
class GatedDeltaNet(Mixer):
    """See the module's docstring."""

    name = "gated_deltanet"
    summary = "delta rule with a data-dependent decay and write strength per head (Yang 2024)"
    operator = delta_rule
    options_class = GatedDeltaNetOptions
    options: GatedDeltaNetOptions

    def build(self) -> None:
        s = self.shape
        self.decay = nn.Linear(s.hidden, s.heads)
        self.strength = nn.Linear(s.hidden, s.heads)
        self.log_rate = nn.Parameter(torch.empty(s.heads))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        o = self.options
        nn.init.zeros_(self.decay.weight)
        nn.init.zeros_(self.strength.weight)
        nn.init.constant_(self.strength.bias, math.log(o.write / (1 - o.write)))
        nn.init.zeros_(self.log_rate)
        with torch.no_grad():
            rate = -spread_half_lives(self.shape.heads, o.shortest, o.longest)
            self.decay.bias.copy_(torch.log(torch.expm1(rate)))  # inverse of softplus

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        raw = self.decay(x)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        log_decay = -self.log_rate.exp() * F.softplus(raw)
        beta = torch.sigmoid(self.strength(x).to(raw.dtype))
        q, k = F.normalize(q, dim=-1, eps=1e-6), F.normalize(k, dim=-1, eps=1e-6)
        return Inputs(q, k, v, log_decay, beta)
