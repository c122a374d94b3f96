"""RetNet: retention, S_t = γ_h S_{t-1} + k_t v_tᵀ with a constant decay per head, then a norm and a silu gate.

Sun et al. 2023 (arXiv 2307.08621), equations 5 to 8: γ_h = 1 − 2^(−5−h), RoPE on q and k, per-head norm.

Start: the published decays (half-lives from 22 tokens upwards, doubling from head to head), gate open.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.mixers.base import Mixer
from limbeck.mixers.options import Options
from limbeck.mixers.registry import register
from limbeck.mixers.types import Inputs, State, Tokens
from limbeck.ops import scalar_decay


@dataclass(frozen=True)
class RetNetOptions(Options):
    output_norm: Literal["none", "rms", "layer"] = "rms"
    output_gate: Literal["none", "silu", "sigmoid", "inner"] = "silu"


@register
class RetNet(Mixer):
    """See the module's docstring."""

    name = "retnet"
    summary = "retention: a fixed decay per head, RoPE, head norm and silu gate (Sun 2023)"
    source = "arXiv 2307.08621, eq. 5 to 8"
    operator = scalar_decay
    options_class = RetNetOptions

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        # Computed here and not a buffer, because loading through the meta device loses buffers that are not saved.
        exponent = -(5.0 + torch.arange(self.shape.heads, device=q.device, dtype=torch.float64)) * math.log(2.0)
        log_decay = torch.log1p(-exponent.exp()).to(torch.promote_types(q.dtype, torch.float32))
        return Inputs(q * self.shape.scale, k, v, log_decay)
