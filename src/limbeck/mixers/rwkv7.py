"""RWKV-7: S_t = (Diag(w_t) − (a_t⊙κ_t) κ_tᵀ) S_{t-1} + k_t v_tᵀ, a delta rule with rates per key channel.

Peng et al. 2025 (arXiv 2503.14456), equations 5 to 17: log w = −e^(−1/2) σ(·) and the rate a = σ(·), both per key
channel, κ = unit(k ⊙ k_k), keys k (1 + (a − 1) k_a), and after the head norm a bonus (q·(k⊙r_k)) v. The token shift
of the original is the common convolution of width 2; mixing v with the first layer's is left out, since a mixer sees
one layer. With `unit_keys` k is scaled to unit length first, so that a token writes as much as it erases.

Start: low-rank maps' second factors 0; half-lives spread from `shortest` to `longest` tokens over the heads;
a = `write`, k_k = k_a = 1, so that the rule is the delta rule with write strength a; r_k = 0.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from limbeck.mixers.base import Mixer
from limbeck.mixers.options import Options, log_decays_from_half_lives, logit, scale_to_unit_length, upcast
from limbeck.mixers.registry import register
from limbeck.mixers.types import Inputs, State, Tokens
from limbeck.ops import dplr
from limbeck.ops.common import repeat_kv

FASTEST = math.exp(-0.5)  # the largest decay rate per token


@dataclass(frozen=True)
class RWKV7Options(Options):
    rope: bool = False
    rank: int = 64  # rank of the projections of decay and rate
    unit_keys: bool = True  # scale keys to unit length
    write: float = 0.25  # rate a at the start
    shortest: float = 14.0  # half-lives in tokens, spread over the heads
    longest: float = 14.0


@register
class RWKV7(Mixer):
    """See the module's docstring."""

    name = "rwkv7"
    summary = "generalised delta rule: decay, erasure and write each per key channel (Peng 2025)"
    source = "arXiv 2503.14456, eq. 5 to 17"
    operator = dplr
    options_class = RWKV7Options
    options: RWKV7Options
    published = {
        "conv": 2,
        "output_norm": "layer",
        "norm_bias": True,
        "output_gate": "inner",
        "gate_rank": 128,
        "unit_keys": False,
        "shortest": 2.0,
        "longest": 512.0,
    }

    def build(self) -> None:
        s, rank = self.shape, self.options.rank
        channels = s.heads * s.key_width
        self.decay_down, self.decay_up = nn.Linear(s.hidden, rank, bias=False), nn.Linear(rank, channels)
        self.rate_down, self.rate_up = nn.Linear(s.hidden, rank, bias=False), nn.Linear(rank, channels)
        per_channel = (nn.Parameter(torch.empty(s.heads, s.key_width)) for _ in range(3))
        self.erase_scale, self.rate_share, self.bonus = per_channel

    def reset_parameters(self) -> None:
        super().reset_parameters()
        s, o = self.shape, self.options
        for down, up in ((self.decay_down, self.decay_up), (self.rate_down, self.rate_up)):
            nn.init.normal_(down.weight, std=s.hidden**-0.5)
            nn.init.zeros_(up.weight)
        nn.init.ones_(self.erase_scale)
        nn.init.ones_(self.rate_share)
        nn.init.zeros_(self.bonus)
        nn.init.constant_(self.rate_up.bias, math.log(o.write / (1 - o.write)))
        rate = -log_decays_from_half_lives(s.heads, o.shortest, o.longest)
        with torch.no_grad():
            self.decay_up.bias.copy_(logit(rate / FASTEST).repeat_interleave(s.key_width))

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        decay = self.decay_up(torch.tanh(self.decay_down(x))).unflatten(-1, (self.shape.heads, -1))
        log_decay = -FASTEST * torch.sigmoid(upcast(decay))
        k = repeat_kv(scale_to_unit_length(k) if self.options.unit_keys else k, self.shape.heads)
        rate = torch.sigmoid(upcast(self.rate_up(self.rate_down(x)).unflatten(-1, (self.shape.heads, -1))))
        erased = scale_to_unit_length(k * self.erase_scale)
        written = k * (1 + (rate.to(k.dtype) - 1) * self.rate_share)
        return Inputs(q * self.shape.scale, written, v, log_decay, erase=(-erased, rate.to(erased.dtype) * erased))

    def after_norm(self, o: Tensor, q: Tensor, inputs: Inputs) -> Tensor:
        weight = (inputs.q * inputs.k * self.bonus).sum(-1, keepdim=True)
        return o + (weight.to(inputs.v.dtype) * repeat_kv(inputs.v, o.shape[2])).to(o.dtype)
