"""Gated DeltaNet: S_t = a_t (I − b_t k_t k_tᵀ) S_{t-1} + b_t k_t v_tᵀ, one decay and one write strength per head.

Yang et al. 2024 (arXiv 2412.06464), equation 10: log a_t = −exp(A) softplus(w_a·x_t + dt), b_t = σ(w_b·x_t),
unit-length q and k. This is DeltaNet (deltanet.py) with a decay.

Start: w_a = w_b = 0, so decay and write strength are constants: half-lives spread from `shortest` to `longest` tokens
over the heads (geometric) and strength `write`; delta-rule attention over the teacher's q, k, v.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.mixers.deltanet import DeltaNet, DeltaNetOptions
from limbeck.mixers.options import inverse_softplus, log_decays_from_half_lives, upcast
from limbeck.mixers.registry import register


@dataclass(frozen=True)
class GatedDeltaNetOptions(DeltaNetOptions):
    shortest: float = 14.0  # half-lives in tokens, spread over the heads
    longest: float = 14.0


@register
class GatedDeltaNet(DeltaNet):
    """See the module's docstring."""

    name = "gated_deltanet"
    summary = "delta rule with a data-dependent decay and write strength per head (Yang 2024)"
    source = "arXiv 2412.06464, eq. 10"
    options_class = GatedDeltaNetOptions
    options: GatedDeltaNetOptions
    # the published decay rates, A in (0, 16) times steps of 0.001 to 0.1, span these half-lives
    published = {**DeltaNet.published, "output_gate": "silu", "shortest": 1.0, "longest": 512.0}

    def build(self) -> None:
        super().build()
        self.decay = nn.Linear(self.shape.hidden, self.shape.heads)
        self.log_rate = nn.Parameter(torch.empty(self.shape.heads))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.decay.weight)
        nn.init.zeros_(self.log_rate)
        rate = -log_decays_from_half_lives(self.shape.heads, self.options.shortest, self.options.longest)
        with torch.no_grad():
            self.decay.bias.copy_(inverse_softplus(rate))

    def log_decay(self, x: Tensor) -> Tensor:
        """Compute log a_t = −exp(A) softplus(w_a·x_t + dt), [B, T, H]."""
        return -self.log_rate.exp() * F.softplus(upcast(self.decay(x)))
