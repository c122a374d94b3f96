"""DeltaNet: S_t = (I − b_t k_t k_tᵀ) S_{t-1} + b_t k_t v_tᵀ, no decay, a write strength per head.

Yang et al. 2024 (arXiv 2406.06484), equations 4 to 6: b_t = σ(w·x_t), unit-length q and k. A write replaces what the
state holds for its key instead of adding to it.

Start: w = 0 and the bias such that the write strength is `write`: delta-rule attention over the teacher's q, k, v.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.mixers.base import Mixer
from limbeck.mixers.options import Options, scale_to_unit_length, upcast
from limbeck.mixers.registry import register
from limbeck.mixers.types import Inputs, State, Tokens
from limbeck.ops import delta_rule


@dataclass(frozen=True)
class DeltaNetOptions(Options):
    rope: bool = False
    write: float = 0.25  # write strength at the start
    strength_bias: bool = True  # give the write strength a bias; without one it starts at one half, whatever `write`
    negative_eigenvalues: bool = False  # write strengths up to 2 instead of 1


@register
class DeltaNet(Mixer):
    """See the module's docstring. Subclasses add a decay."""

    name = "deltanet"
    summary = "delta rule: a write replaces what the state holds for its key (Schlag 2021, Yang 2024)"
    source = "arXiv 2406.06484, eq. 4 to 6"
    operator = delta_rule
    options_class = DeltaNetOptions
    options: DeltaNetOptions
    published = {"conv": 4, "conv_activation": "silu", "output_norm": "rms"}

    def build(self) -> None:
        self.strength = nn.Linear(self.shape.hidden, self.shape.heads, bias=self.options.strength_bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        most = 2.0 if self.options.negative_eigenvalues else 1.0
        nn.init.zeros_(self.strength.weight)
        if self.options.strength_bias:
            nn.init.constant_(self.strength.bias, math.log(self.options.write / (most - self.options.write)))

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        beta = torch.sigmoid(upcast(self.strength(x)))
        beta = 2 * beta if self.options.negative_eigenvalues else beta
        q, k = scale_to_unit_length(q), scale_to_unit_length(k)
        return Inputs(q, k, v, self.log_decay(x), beta)

    def log_decay(self, x: Tensor) -> Tensor | None:
        """Compute log a_t, [B, T, H] or [B, T, H, K]; None for no decay."""
        return None
