"""Lightning attention: S_t = exp(-r) S_{t-1} + k_t v_tᵀ with a fixed rate r per head, lower in deeper layers.

MiniMax-01 (arXiv 2501.08313): r = 2^(-8h/H) · (1 - l/(L-1)) for head h = 1..H of layer l = 0..L-1, so the last layer
does not forget; silu on q, k and v, norm, sigmoid gate.

Start: nothing is learned but head norm and gate, which start open.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from limbeck.mixers import Inputs, Mixer, Options, State, Tokens, register
from limbeck.ops import scalar_decay


@dataclass(frozen=True)
class LightningOptions(Options):
    output_norm: Literal["none", "rms", "layer"] = "rms"
    output_gate: Literal["none", "silu", "sigmoid", "inner"] = "sigmoid"
    slower_with_depth: bool = True


@register
class Lightning(Mixer):
    """See the module's docstring."""

    name = "lightning"
    summary = "a fixed decay per head that slows with depth, head norm and sigmoid gate (MiniMax 2025)"
    source = "arXiv 2501.08313, sec. 2.2"
    operator = scalar_decay
    options_class = LightningOptions
    options: LightningOptions
    published = {"rope": False, "conv_activation": "silu"}

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        s = self.shape
        rate = 2.0 ** (-8.0 * torch.arange(1, s.heads + 1, device=q.device, dtype=torch.float64) / s.heads)
        if self.options.slower_with_depth:
            rate = rate * (1 - s.layer / max(s.layers - 1, 1))
        return Inputs(q * s.scale, k, v, -rate.to(torch.promote_types(q.dtype, torch.float32)))
