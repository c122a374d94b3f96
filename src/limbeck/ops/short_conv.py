"""The short convolution over q, k and v in many mixers: causal and depthwise, each channel sees its last few tokens.

    y_t = Σ_j w_j ⊙ x_{t-j},    j = 0 … W-1

    y, state = short_conv.causal(x, weight)                         # a whole sequence
    y, state = short_conv.causal(x1, weight, state=state)           # the next token
    y, state = short_conv.causal_masked(x, weight, valid)           # padding anywhere takes no place in any window
    y, state = short_conv.delay(x, 64)                              # y_t = x_{t-64}, a weight of a single one

Tokens of other documents count as zeros, but in `delay`. Legend: B batch, T time, W width of the window.
"""

import torch
from torch import Tensor

from limbeck.ops.fla import accelerated
from limbeck.ops.window_state import gather_tokens


@accelerated("convolution")
def causal(
    x: Tensor, weight: Tensor, *, state: Tensor | None = None, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve the channels of every token with those of the W-1 tokens before it.

    Args:
        x: [B, T, ...].
        weight: [W, ...] with x's channels; weight[0] meets the token itself.
        state: [B, W-1, ...] the inputs before these; None for none.
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
        return y, history[:, length:].clone()  # a view would keep all of the history
    number = torch.cat([segments.new_zeros(len(segments), width - 1), segments], 1)
    channels = (1,) * (x.dim() - 2)
    y = x * weight[0]
    for j in range(1, width):
        rows = slice(width - 1 - j, width - 1 - j + length)
        same = (number[:, rows] == segments).view(*segments.shape, *channels)
        y = y + history[:, rows] * same * weight[j]
    of_last_document = (number[:, length:] == segments[:, -1:]).view(len(segments), width - 1, *channels)
    return y, history[:, length:] * of_last_document


def causal_masked(
    x: Tensor, weight: Tensor, valid: Tensor, *, state: Tensor | None = None, segments: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Convolve the valid tokens alone, as `causal` does; y is zero at the others, the state holds valid inputs only.

    Args:
        valid: [B, T] bool, False where a token is padding: before, after or between the others.
    """
    width, channels = weight.shape[0], (1,) * (x.dim() - 2)
    if state is None:
        state = x.new_zeros(x.shape[0], width - 1, *x.shape[2:])
    x = x.masked_fill(~valid.view(*valid.shape, *channels), 0)
    if x.shape[1] == 1:
        y, new = causal(x, weight, state=state, segments=segments)
        real = valid.view(*valid.shape, *channels)
        old = state if segments is None else state * (segments == 0).view(*segments.shape, *channels)
        return y * real, torch.where(real, new, old.to(x.dtype))
    # Sort padding to before the state, where no token's window reaches.
    real = torch.cat([valid.new_ones(len(valid), width - 1), valid], 1)
    order = real.to(torch.uint8).argsort(dim=1, stable=True)
    history = gather_tokens(torch.cat([state.to(x.dtype), x], 1), order)
    number = None
    if segments is not None:
        with_state = torch.cat([segments.new_zeros(len(segments), width - 1), segments], 1)
        number = with_state.masked_fill(~real, 0).gather(1, order)[:, width - 1 :]
    y, new = causal(history[:, width - 1 :], weight, state=history[:, : width - 1], segments=number)
    if segments is not None and number is not None:  # the last document may be nothing but padding so far
        new = new * (number[:, -1:] == segments[:, -1:]).view(-1, 1, *channels)
    positions = (~valid).sum(1, keepdim=True) + valid.cumsum(1) - 1
    return gather_tokens(y, positions) * valid.view(*valid.shape, *channels), new


def delay(x: Tensor, steps: int, valid: Tensor | None = None, state: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return what each token's predecessor by `steps` valid tokens had, of whatever document: the caller masks those.

    Args:
        x: [B, T, ...].
        valid: [B, T] bool, False where a token is padding; None where every token counts.
        state: [B, steps, ...] the inputs before these; None for zeros.

    Returns:
        y [B, T, ...], arbitrary where a token is not valid, and the last inputs that were.
    """
    if state is None:
        state = x.new_zeros(x.shape[0], steps, *x.shape[2:])
    history = torch.cat([state.to(x.dtype), x], 1)
    if valid is None:
        return history[:, : x.shape[1]], history[:, x.shape[1] :].clone()  # a view would keep all of the history
    order = torch.cat([valid.new_ones(len(valid), steps), valid], 1).logical_not().to(torch.uint8)
    history = gather_tokens(history, order.argsort(dim=1, stable=True))
    last = valid.sum(1, keepdim=True) + torch.arange(steps, device=x.device)
    return gather_tokens(history, (valid.cumsum(1) - 1).clamp(min=0)), gather_tokens(history, last)
