"""Linear attention: o_t = sum_j phi(q_t)·phi(k_j) v_j, optionally divided by the sum of the weights.

Katharopoulos et al. 2020 (arXiv 2006.16236), equations 8 to 12. State [K', V] per head with K' the feature width.

Start: no parameters of its own, so the student at step 0 is linear attention over the teacher's q, k, v.
"""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from limbeck.errors import LimbeckError
from limbeck.mixers.base import HeadShape, Inputs, Mixer, Options, State, Tokens, register
from limbeck.ops import scalar_decay

FEATURE_MAPS = {
    "identity": lambda x: x,
    "relu": F.relu,
    "elu1": lambda x: F.elu(x) + 1,
    "softmax": lambda x: x.softmax(-1),
}


@dataclass(frozen=True)
class LinearAttentionOptions(Options):
    feature_map: Literal["identity", "relu", "elu1", "softmax"] = "elu1"
    normalise: bool = True


@register
class LinearAttention(Mixer):
    """See the module's docstring."""

    name = "linear_attention"
    summary = "kernel attention without decay, phi(q)·phi(k), normalised (Katharopoulos 2020)"
    operator = scalar_decay
    options_class = LinearAttentionOptions
    options: LinearAttentionOptions

    def __init__(self, shape: HeadShape, options: LinearAttentionOptions):
        if options.normalise and options.feature_map == "identity":
            raise LimbeckError(
                "linear_attention cannot normalise with feature_map=identity: its weights change sign",
                expected="feature_map=elu1 | relu | softmax, or normalise=false",
            )
        super().__init__(shape, options)
        self.normalised = options.normalise

    def inputs(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> Inputs:
        phi = FEATURE_MAPS[self.options.feature_map]
        q, k = phi(q), phi(k)
        return Inputs(q if self.normalised else q * self.shape.scale, k, v)
