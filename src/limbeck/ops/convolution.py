"""The causal depthwise convolution that goes over q, k and v in many mixers: each channel sees its last few tokens.

    y_t = Σ_j w_j ⊙ x_{t-j},    j = 0 … W-1

    y, state = convolution.causal(x, weight)                         # a whole sequence
    y, state = convolution.causal(x1, weight, state=state)           # the next token

Tokens of other documents and padding count as zeros. Legend: B batch, T time, W width of the window.
"""

import torch
from torch import Tensor

from limbeck.kernels import accelerated


@accelerated("convolution")
def causal(
    x: Tensor, weight: Tensor, *, state: Tensor | None = None, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve the channels of every token with those of the tokens before it.

    Args:
        x: [B, T, ...] with zeros where a token is padding.
        weight: [W, ...] with x's channels; weight[0] meets the token itself.
        state: [B, W-1, ...] the inputs before these, None for none.
        segments: [B, T] non-decreasing document numbers; the state belongs to document 0.

    Returns:
        y [B, T, ...] and the last W-1 inputs of the last token's document, zeros where there are fewer.
    """
    width, length = weight.shape[0], x.shape[1]
    if state is None:
        state = x.new_zeros(x.shape[0], width - 1, *x.shape[2:])
    history = torch.cat([state.to(x.dtype), x], 1)
    if segments is None:
        y = x * weight[0]
        for j in range(1, width):
            y = y + history[:, width - 1 - j : width - 1 - j + length] * weight[j]
        return y, history[:, length:]
    number = torch.cat([segments.new_zeros(len(segments), width - 1), segments], 1)
    channels = (1,) * (x.dim() - 2)
    y = x * weight[0]
    for j in range(1, width):
        rows = slice(width - 1 - j, width - 1 - j + length)
        same = (number[:, rows] == segments).view(*segments.shape, *channels)
        y = y + history[:, rows] * same * weight[j]
    kept = (number[:, length:] == segments[:, -1:]).view(len(segments), width - 1, *channels)
    return y, history[:, length:] * kept
