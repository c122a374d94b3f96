"""Kimi Delta Attention: S_t = (I − b_t k_t k_tᵀ) Diag(a_t) S_{t-1} + b_t k_t v_tᵀ, one decay per key channel.

Kimi Team 2025 (arXiv 2510.26692), equations 1 and 2: log a_t = −exp(A) softplus(W₂W₁x_t + dt) with a low rank of the
head width, b_t = σ(w_b·x_t), unit-length q and k, head norm times a low-rank sigmoid gate.

Start: W₂ = w_b = 0, so decay and write strength are constants: half-lives spread from `shortest` to `longest` tokens
over the heads (geometric) and strength `write`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.mixers.deltanet import DeltaNet, DeltaNetOptions
from limbeck.mixers.options import inverse_softplus, log_decays_from_half_lives, upcast
from limbeck.mixers.registry import register


@dataclass(frozen=True)
class KDAOptions(DeltaNetOptions):
    rank: int = 0  # rank of the decay's projection; 0 for the value width
    shortest: float = 14.0  # half-lives in tokens, spread over the heads
    longest: float = 14.0


@register
class KDA(DeltaNet):
    """See the module's docstring."""

    name = "kda"
    summary = "Kimi Delta Attention: delta rule with a data-dependent decay per key channel (Kimi 2025)"
    source = "arXiv 2510.26692, eq. 1 and 2"
    options_class = KDAOptions
    options: KDAOptions
    published = {
        **DeltaNet.published,
        "output_gate": "sigmoid",
        "gate_rank": 64,
        "shortest": 1.0,
        "longest": 512.0,
    }

    def build(self) -> None:
        super().build()
        s = self.shape
        rank = self.options.rank or s.value_width
        self.decay_down = nn.Linear(s.hidden, rank, bias=False)
        self.decay_up = nn.Linear(rank, s.heads * s.key_width)
        self.log_rate = nn.Parameter(torch.empty(s.heads))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.normal_(self.decay_down.weight, std=self.shape.hidden**-0.5)
        nn.init.zeros_(self.decay_up.weight)
        nn.init.zeros_(self.log_rate)
        rate = -log_decays_from_half_lives(self.shape.heads, self.options.shortest, self.options.longest)
        with torch.no_grad():
            self.decay_up.bias.copy_(inverse_softplus(rate).repeat_interleave(self.shape.key_width))

    def log_decay(self, x: Tensor) -> Tensor:
        """Compute log a_t = −exp(A) softplus(W₂W₁x_t + dt), [B, T, H, K]."""
        raw = self.decay_up(self.decay_down(x)).unflatten(-1, (self.shape.heads, -1))
        rate = self.log_rate.exp().unsqueeze(-1)
        return -rate * F.softplus(upcast(raw))
