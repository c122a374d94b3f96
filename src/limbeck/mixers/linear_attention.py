"""Linear attention: o_t = Σ_{j≤t} φ(q_t)·φ(k_j) v_j, optionally divided by the sum of the weights.

Katharopoulos et al. 2020 (arXiv 2006.16236), equations 8 to 12. State [K', V] per head with K' the number of features.
Every feature map φ is an option here (`feature_map`, see feature_maps.py); those with a name of their own in the
literature are registered as mixers too.

    mixers.build("linear_attention", shape, {"feature_map": "relu"})

Start: linear attention over the teacher's q, k, v; the matrices of feature maps are identities. Taylor and ReBased map
q and k to 16 channels first, because they have about K²/2 features.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.mixers.base import Mixer
from limbeck.mixers.feature_maps import FEATURE_MAPS, CosFormerMap
from limbeck.mixers.options import Options
from limbeck.mixers.registry import register
from limbeck.mixers.types import HeadShape, Inputs, State, Tokens
from limbeck.ops import scalar_decay
from limbeck.ops.common import find_document_starts

HORIZON = 2048  # tokens, of a cosformer that was not given a length


@dataclass(frozen=True)
class LinearAttentionOptions(Options):
    feature_map: Literal[
        "identity", "relu", "elu1", "softmax", "t2r", "hadamard", "dpfp", "hedgehog", "taylor", "rebased", "cosformer"
    ] = "elu1"
    normalise: bool = True
    width: int = 0  # map q and k to this number of channels first; 0 to leave them
    horizon: int = 0  # cosformer: tokens within which a weight falls to zero; 0 for the training sequences' length


@register
class LinearAttention(Mixer):
    """See the module's docstring."""

    name = "linear_attention"
    summary = "kernel attention without decay, phi(q)·phi(k), normalised (Katharopoulos 2020)"
    source = "arXiv 2006.16236, eq. 8 to 12"
    operator = scalar_decay
    options_class = LinearAttentionOptions
    options: LinearAttentionOptions
    published = {"rope": False}

    def __init__(self, teacher_shape: HeadShape, options: LinearAttentionOptions):
        self.feature_map_class = FEATURE_MAPS[options.feature_map]
        if options.normalise and not self.feature_map_class.is_positive:
            raise LimbeckError(
                f"linear_attention cannot normalize with feature_map={options.feature_map}, whose weights change sign",
                expected=f"feature_map={' | '.join(n for n, m in FEATURE_MAPS.items() if m.is_positive)}, "
                "or normalise=false",
            )
        super().__init__(teacher_shape, options)
        self.normalized = options.normalise

    @classmethod
    def for_length(cls, options: LinearAttentionOptions, length: int) -> LinearAttentionOptions:
        has_no_horizon = options.feature_map == "cosformer" and not options.horizon
        return replace(options, horizon=length) if has_no_horizon else options

    def build(self) -> None:
        self.phi_q = self.feature_map_class(self.shape.heads, self.shape.key_width)
        self.phi_k = self.feature_map_class(self.shape.kv_heads, self.shape.key_width)

    def qk_width(self, rows: int) -> int:
        if not rows:
            return self.options.width or super().qk_width(0)
        fitting = [width for width in range(1, rows + 1) if self.feature_map_class.count_features(width) <= rows]
        return max(fitting, default=1)

    def feature_width(self) -> int:
        return self.feature_map_class.count_features(self.shape.key_width)

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        q, k, carry = self.phi_q(q), self.phi_k(k), {}
        if self.feature_map_class is CosFormerMap:
            position = _positions(tokens, q, state.get("position"))
            q, k = (CosFormerMap.reweight(z, position, self.options.horizon or HORIZON) for z in (q, k))
            carry = {"position": position[:, -1] + 1}
        return Inputs(q if self.options.normalise else q * self.shape.scale, k, v, carry=carry)

    def memory_numel(self) -> int:
        return super().memory_numel() + (self.feature_map_class is CosFormerMap)


def _positions(tokens: Tokens, q: Tensor, first: Tensor | None) -> Tensor:
    """Count the valid tokens of its document before each token, [B, T]; `first` [B] of document 0 are in the state."""
    if tokens.valid is None:
        before = torch.arange(q.shape[1], device=q.device).expand(q.shape[:2])
        position = before
    else:
        position = tokens.valid.cumsum(1) - 1
        before = position + ~tokens.valid  # the number of valid tokens before each
    past = 0 if first is None else first[:, None]
    if tokens.segments is not None:
        position = position - torch.where(find_document_starts(tokens.segments), before, 0).cummax(1).values
        past = past * (tokens.segments == 0)
    return position + past


# Feature maps with a name of their own in the literature


@register
class T2R(LinearAttention):
    name = "t2r"
    summary = "linear attention with a learned relu(Wx + b) (Kasai 2021)"
    source = "arXiv 2103.13076, eq. 5"
    defaults = {"feature_map": "t2r"}


@register
class Hadamard(LinearAttention):
    name = "hadamard"
    summary = "linear attention with (W₁x)⊙(W₂x), not normalised"
    source = "flash-linear-attention"
    defaults = {"feature_map": "hadamard", "normalise": False}


@register
class DPFP(LinearAttention):
    name = "dpfp"
    summary = "linear attention with products of rolled relu(±x) (Schlag 2021)"
    source = "arXiv 2102.11174, eq. 37"
    defaults = {"feature_map": "dpfp"}


@register
class Hedgehog(LinearAttention):
    name = "hedgehog"
    summary = "linear attention with [softmax(Wx), softmax(−Wx)] per head (Zhang 2024)"
    source = "arXiv 2402.04347, sec. 4.2"
    defaults = {"feature_map": "hedgehog"}
    published = {"rope": True}


@register
class Based(LinearAttention):
    name = "based"
    summary = "linear attention with 1 + s + s²/2, s = q·k (Arora 2024)"
    source = "arXiv 2402.18668, sec. 4.1"
    defaults = {"feature_map": "taylor", "width": 16}


@register
class ReBased(LinearAttention):
    name = "rebased"
    summary = "linear attention with (q̂·k̂)² of layer-normed q and k (Aksenov 2024)"
    source = "arXiv 2402.10644, eq. 7"
    defaults = {"feature_map": "rebased", "width": 16}


@register
class CosFormerAttention(LinearAttention):
    name = "cosformer"
    summary = "linear attention with relu and a cosine weight over the distance (Qin 2022)"
    source = "arXiv 2202.08791, eq. 10"
    defaults = {"feature_map": "cosformer"}
