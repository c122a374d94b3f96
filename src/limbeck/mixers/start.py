"""Where gates start: decay rates from half-lives, and the inverses of the functions that gates go through.

rate = -spread_half_lives(heads=9, shortest=8, longest=512)          # [H]
bias = inverse_softplus(rate)
"""

import math

import torch
from torch import Tensor


def spread_half_lives(heads: int, shortest: float, longest: float) -> Tensor:
    """Log decay per token [H] (negative) under which a write fades to one half in `shortest` tokens in the first head,
    `longest` in the last and geometrically in between."""
    steps = torch.linspace(0, 1, heads, dtype=torch.float64) if heads > 1 else torch.zeros(1, dtype=torch.float64)
    return (-math.log(2.0) / (shortest * (longest / shortest) ** steps)).float()


def inverse_softplus(x: Tensor) -> Tensor:
    """y with softplus(y) = x, for x > 0."""
    return torch.log(torch.expm1(x))


def logit(x: Tensor) -> Tensor:
    """y with sigmoid(y) = x, for x in (0, 1), exact near both ends."""
    return torch.log(x) - torch.log1p(-x)
