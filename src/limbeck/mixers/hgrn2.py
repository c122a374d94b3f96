"""HGRN2: S_t = Diag(a_t) S_{t-1} + (1 − a_t) v_tᵀ with a decay that has a lower bound, rising from layer to layer.

Qin et al. 2024 (arXiv 2404.07904), equations 10 and 11: a_t = β + (1 − β) σ(f_t), q = swish(q). The forget gate's
projection is the teacher's key projection, f_t = b − k_t, so that 1 − a_t rises with the teacher's k.

Start: b such that half-lives are spread from `shortest` to `longest` tokens over the heads (geometric) where k is 0;
β such that the bound is the layer's relative depth times that decay.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.mixers.base import Mixer
from limbeck.mixers.options import Options, log_decays_from_half_lives, logit
from limbeck.mixers.registry import register
from limbeck.mixers.types import Inputs, State, Tokens
from limbeck.ops import vector_decay
from limbeck.ops.common import repeat_kv


@dataclass(frozen=True)
class HGRN2Options(Options):
    rope: bool = False
    output_norm: Literal["none", "rms", "layer"] = "rms"
    swish: bool = False  # on q, as published
    shortest: float = 8.0  # half-lives in tokens, spread over the heads
    longest: float = 512.0


@register
class HGRN2(Mixer):
    """See the module's docstring."""

    name = "hgrn2"
    summary = "decay per key channel with a lower bound by depth, k = 1 − a (Qin 2024)"
    source = "arXiv 2404.07904, eq. 10 and 11"
    operator = vector_decay
    options_class = HGRN2Options
    options: HGRN2Options
    published = {"swish": True, "norm_over": "heads"}

    def build(self) -> None:
        s = self.shape
        self.bias = nn.Parameter(torch.empty(s.heads, s.key_width))
        self.bound = nn.Parameter(torch.empty(s.heads, s.key_width))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        s, o = self.shape, self.options
        decay = log_decays_from_half_lives(s.heads, o.shortest, o.longest).exp()
        bound = decay * (s.layer + 0.5) / (s.layers + 1)
        with torch.no_grad():
            self.bound.copy_(logit(bound)[:, None].expand_as(self.bound))
            self.bias.copy_(logit((decay - bound) / (1 - bound))[:, None].expand_as(self.bias))

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        gate = self.bias - repeat_kv(k, self.shape.heads)
        dtype = torch.promote_types(gate.dtype, torch.float32)
        # 1 − a = (1 − β)(1 − σ(f)), written without cancellation.
        forget = torch.sigmoid(-self.bound.to(dtype)) * torch.sigmoid(-gate.to(dtype))
        log_decay = torch.log1p(-forget.clamp(max=1 - 1e-6))
        q = F.silu(q) if self.options.swish else q
        return Inputs(q * self.shape.scale, forget, v, log_decay)
