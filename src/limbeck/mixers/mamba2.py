"""Mamba-2: S_t = a_t S_{t-1} + B_t x_tᵀ with a data-dependent decay per head, plus a skip D x_t.

Dao and Gu 2024 (arXiv 2405.21060), with C, B, x the teacher's q, k, v. `mamba2` is the standard discretization: step
Δ_t = softplus(w·x_t + d), a_t = exp(−exp(A) Δ_t), keys Δ_t B_t. `discrete_mamba2` is that of Phi-Mamba and Llamba
(arXiv 2408.10189, section 4.1): a_t = exp(−softplus(w·x_t + d)), keys B_t.

Start: w = 0, A = 0, d such that half-lives are spread from `shortest` to `longest` tokens over the heads (geometric),
and D = `skip`.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.mixers.base import Mixer
from limbeck.mixers.options import Options, inverse_softplus, log_decays_from_half_lives, upcast
from limbeck.mixers.registry import register
from limbeck.mixers.types import Inputs, State, Tokens
from limbeck.ops import scalar_decay
from limbeck.ops.common import repeat_kv


@dataclass(frozen=True)
class Mamba2Options(Options):
    output_norm: Literal["none", "rms", "layer"] = "rms"
    output_gate: Literal["none", "silu", "sigmoid", "inner"] = "silu"
    skip: float = 0.0  # D at the start
    shortest: float = 8.0  # half-lives in tokens, spread over the heads
    longest: float = 512.0


@register
class Mamba2(Mixer):
    """See the module's docstring."""

    name = "mamba2"
    summary = "state-space duality: a data-dependent decay and step per head, a skip, norm and gate (Dao 2024)"
    source = "arXiv 2405.21060, eq. 1 and sec. 7"
    operator = scalar_decay
    options_class = Mamba2Options
    options: Mamba2Options
    published = {"rope": False, "conv": 4, "conv_activation": "silu", "norm_over": "gated", "skip": 1.0}
    steps_in_keys = True  # whether keys are scaled by Δ_t, and a_t has a rate A

    def build(self) -> None:
        s = self.shape
        self.step = nn.Linear(s.hidden, s.heads)
        if self.steps_in_keys:
            self.log_rate = nn.Parameter(torch.empty(s.heads))
        self.skip = nn.Parameter(torch.empty(s.heads))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.step.weight)
        nn.init.constant_(self.skip, self.options.skip)
        if self.steps_in_keys:
            nn.init.zeros_(self.log_rate)
        rate = -log_decays_from_half_lives(self.shape.heads, self.options.shortest, self.options.longest)
        with torch.no_grad():
            self.step.bias.copy_(inverse_softplus(rate))

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        step = F.softplus(upcast(self.step(x)))
        log_decay = -step
        if self.steps_in_keys:
            log_decay = -self.log_rate.exp() * step
            k = repeat_kv(k, self.shape.heads) * step.unsqueeze(-1)
        return Inputs(q * self.shape.scale, k, v, log_decay, diagonal=self.skip.expand(step.shape))


@register
class DiscreteMamba2(Mamba2):
    """Mamba-2 as Phi-Mamba and Llamba convert attention to it."""

    name = "discrete_mamba2"
    summary = "Mamba-2 without step sizes in the keys, as MOHAWK converts attention (Bick 2024)"
    source = "arXiv 2408.10189, sec. 4.1"
    published = {"rope": False, "conv": 4, "skip": 1.0, "output_norm": "none"}
    steps_in_keys = False
