"""MetaLA: gated linear attention without keys, S_t = Diag(a_t) S_{t-1} + (1 − a_t) v_tᵀ, plus self-augmentation.

Chou et al. 2024 (arXiv 2411.10741), equation 13: the key is 1 − a_t, so one projection yields key and decay. Here it is
the teacher's key projection: a_t = σ(b − k_t)^(1/16), so that 1 − a_t rises with the teacher's k. With `augment` a
token adds σ((q·(w⊙(1−a))) v) of its own, which is not linear in v and so not part of the mixing matrix.

Start: b such that half-lives are spread from `shortest` to `longest` tokens over the heads where k is 0; w = 0.
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
from limbeck.ops.common import repeat_kv


@dataclass(frozen=True)
class MetaLAOptions(Options):
    rope: bool = False
    output_norm: Literal["none", "rms", "layer"] = "layer"
    output_gate: Literal["none", "silu", "sigmoid", "inner"] = "silu"
    augment: bool = False  # add each token's self-augmentation
    temperature: float = 16.0  # a_t is the 16th root of a sigmoid
    shortest: float = 8.0  # half-lives in tokens, spread over the heads
    longest: float = 512.0


@register
class MetaLA(Mixer):
    """See the module's docstring."""

    name = "metala"
    summary = "decay per key channel and the key tied to it, k = 1 − a, with self-augmentation (Chou 2024)"
    source = "arXiv 2411.10741, eq. 13"
    operator = vector_decay
    options_class = MetaLAOptions
    options: MetaLAOptions
    # No silu: the authors' convolution goes over the block's input, but over q, k and v a silu would bound v and the
    # logits of the decay on one side.
    published = {"augment": True, "conv": 4, "state": 0.5}

    def build(self) -> None:
        s = self.shape
        self.bias = nn.Parameter(torch.empty(s.heads, s.key_width))
        if self.options.augment:
            self.own = nn.Parameter(torch.empty(s.heads, s.key_width))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        o = self.options
        gate = (log_decays_from_half_lives(self.shape.heads, o.shortest, o.longest) * o.temperature).exp()
        with torch.no_grad():
            self.bias.copy_(logit(gate)[:, None].expand_as(self.bias))
            if o.augment:
                self.own.zero_()

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        gate = self.bias - repeat_kv(k, self.shape.heads)
        log_decay = F.logsigmoid(upcast(gate)) / self.options.temperature
        return Inputs(q * self.shape.scale, -torch.expm1(log_decay), v, log_decay)

    def before_norm(self, o: Tensor, q: Tensor, inputs: Inputs) -> Tensor:
        if not self.options.augment:
            return o
        # In float32, because half precision has few steps around σ(0) = 0.5, which the head norm then subtracts.
        dtype = torch.promote_types(o.dtype, torch.float32)
        weight = (q * self.own * inputs.k).sum(-1, keepdim=True)
        return o.to(dtype) + torch.sigmoid(weight.to(dtype) * repeat_kv(inputs.v, o.shape[2]).to(dtype))
