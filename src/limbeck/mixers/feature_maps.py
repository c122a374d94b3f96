"""Feature maps φ of linear attention, which replaces exp(q·k) by φ(q)·φ(k).

    phi = FEATURE_MAPS["hedgehog"](heads=9, width=64)
    phi(q).shape                                 # [B, T, 9, phi.count_features(64)]

A mixer has one for q and one for k. Those with a matrix have one per head, which starts as the identity.
Shapes: B batch, T time, H heads, K width of q or k.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class FeatureMap(nn.Module):
    """Map every head's q or k, [B, T, H, K] -> [B, T, H, count_features(K)]. The base class is the identity."""

    is_positive: ClassVar[bool] = False  # whether φ(q)·φ(k) is never negative, so that rows can be normalized

    def __init__(self, heads: int, width: int):
        super().__init__()
        self.width = width

    @staticmethod
    def count_features(width: int) -> int:
        """Return the number of features of a q of that width."""
        return width

    def forward(self, x: Tensor) -> Tensor:
        return x


class ReLUMap(FeatureMap):
    """relu(x)."""

    is_positive = True

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)


class Elu1Map(FeatureMap):
    """elu(x) + 1, Katharopoulos et al. 2020 (arXiv 2006.16236), equation 7."""

    is_positive = True

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(x) + 1


class SoftmaxMap(FeatureMap):
    """softmax over the channels, as Liger has it (arXiv 2503.01496)."""

    is_positive = True

    def forward(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


class _PerHead(FeatureMap):
    """Base of the maps with a matrix per head, which starts as the identity."""

    def __init__(self, heads: int, width: int):
        super().__init__(heads, width)
        self.weight = nn.Parameter(torch.eye(width).expand(heads, width, width).clone())

    def project(self, x: Tensor) -> Tensor:
        return torch.einsum("bthk,hkj->bthj", x, self.weight)


class T2RMap(_PerHead):
    """relu(Wx + b), Kasai et al. 2021 (arXiv 2103.13076), equation 5."""

    is_positive = True

    def __init__(self, heads: int, width: int):
        super().__init__(heads, width)
        self.bias = nn.Parameter(torch.zeros(heads, width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.project(x) + self.bias)


class HadamardMap(_PerHead):
    """(Wx) ⊙ (W'x): the product of two linear maps. W' starts as zero with a bias of one, so that φ(x) = x."""

    def __init__(self, heads: int, width: int):
        super().__init__(heads, width)
        self.second = nn.Parameter(torch.zeros(heads, width, width))
        self.bias = nn.Parameter(torch.ones(heads, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x) * (torch.einsum("bthk,hkj->bthj", x, self.second) + self.bias)


class DPFPMap(FeatureMap):
    """r ⊙ roll(r) with r = [relu(x), relu(−x)], the deterministic parameter-free projection with ν = 1.

    Schlag et al. 2021 (arXiv 2102.11174), equation 37.
    """

    is_positive = True

    @staticmethod
    def count_features(width: int) -> int:
        return 2 * width

    def forward(self, x: Tensor) -> Tensor:
        r = torch.cat([F.relu(x), F.relu(-x)], -1)
        return r * r.roll(1, -1)


class HedgehogMap(_PerHead):
    """[softmax(Wx), softmax(−Wx)], Zhang et al. 2024 (arXiv 2402.04347), section 4.2, as LoLCATs trains it."""

    is_positive = True

    @staticmethod
    def count_features(width: int) -> int:
        return 2 * width

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(x)
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], -1)


class TaylorMap(FeatureMap):
    """φ(q)·φ(k) = 1 + s + s²/2 with s = q·k/√K: exp(s) to second order; Based, Arora et al. 2024 (arXiv 2402.18668)."""

    is_positive = True

    @staticmethod
    def count_features(width: int) -> int:
        return 1 + width + width * (width + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.width**-0.25
        return torch.cat([torch.ones_like(x[..., :1]), x, pairwise_products(x) * 0.5**0.5], -1)


class ReBasedMap(FeatureMap):
    """φ(q)·φ(k) = (q̂·k̂/K)² with q̂ = γ ⊙ layernorm(q) + β; Aksenov et al. 2024 (arXiv 2402.10644), equation 7."""

    is_positive = True

    def __init__(self, heads: int, width: int):
        super().__init__(heads, width)
        self.gamma = nn.Parameter(torch.ones(heads, width))
        self.beta = nn.Parameter(torch.zeros(heads, width))

    @staticmethod
    def count_features(width: int) -> int:
        return width * (width + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        x = F.layer_norm(x, x.shape[-1:]) * self.gamma + self.beta
        return pairwise_products(x * self.width**-0.5)


class CosFormerMap(FeatureMap):
    """relu(x), to which linear_attention adds the position; Qin et al. 2022 (arXiv 2202.08791), equation 10."""

    is_positive = True

    @staticmethod
    def count_features(width: int) -> int:
        return 2 * width

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x)

    @staticmethod
    def reweight(x: Tensor, position: Tensor, horizon: int) -> Tensor:
        """Turn features x [B, T, H, K] by their position [B, T]: products get the weight cos(π(i−j)/2L), L the horizon.

        Positions do not grow beyond the horizon, so no weight is ever negative: tokens after it have weight 1 for each
        other, and see the earlier ones as a token at the horizon does.
        """
        # In float64, because bfloat16 has few steps.
        angle = position.clamp(max=horizon).double() * (math.pi / (2 * horizon))
        cos, sin = (f.clamp(min=0).to(x.dtype)[..., None, None] for f in (angle.cos(), angle.sin()))
        return torch.cat([x * cos, x * sin], -1)


def pairwise_products(x: Tensor) -> Tensor:
    """Compute all products of two channels, [..., K] -> [..., K(K+1)/2].

    They are weighted such that pairwise_products(q)·pairwise_products(k) = (q·k)².
    """
    first, second = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    weight = torch.where(first == second, 1, 2).to(x.dtype).sqrt()
    return x[..., first] * x[..., second] * weight


FEATURE_MAPS: dict[str, type[FeatureMap]] = {
    "identity": FeatureMap,
    "relu": ReLUMap,
    "elu1": Elu1Map,
    "softmax": SoftmaxMap,
    "t2r": T2RMap,
    "hadamard": HadamardMap,
    "dpfp": DPFPMap,
    "hedgehog": HedgehogMap,
    "taylor": TaylorMap,
    "rebased": ReBasedMap,
    "cosformer": CosFormerMap,
}
