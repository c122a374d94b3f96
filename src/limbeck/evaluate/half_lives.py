"""How long a head's state remembers: half-lives of the decays that a mixer has on some text.

    with decays(module) as found:
        module(...)                              # the mixer's operands are looked at as they go by
    half_life(found, heads=9)                    # [9] tokens; None where the mixer has no decay

Only the decay counts. What a delta rule overwrites is forgotten sooner, and what softmax or a window drops is no decay.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from limbeck.mixers import Mixer
from limbeck.mixers.inputs import Inputs


@contextmanager
def decays(module: nn.Module) -> Iterator[list[Tensor]]:
    """The mean of −log a over the tokens of each call of a mixer inside `module`, per head [h] or channel [h, K]."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for mixer in [inner for inner in module.modules() if isinstance(inner, Mixer)]:
            stack.enter_context(_watched(mixer, found))
        yield found


def half_life(found: list[Tensor], heads: int) -> Tensor | None:
    """ln 2 over the mean decay rate, [heads]: of a head with a decay per channel the median over its channels.

    Where the mixer works with fewer heads than the teacher, each stands for several. Infinite where nothing decays.
    """
    if not found:
        return None
    lives = math.log(2) / torch.stack(found).mean(0).clamp_min(0)
    if lives.dim() == 2:
        lives = lives.median(-1).values
    return lives.repeat_interleave(heads // len(lives))


def log_decay(inputs: Inputs) -> Tensor | None:
    """[h], [B, T, h] or [B, T, h, K]: the logarithm of what is left of the state after one more token.

    Where a running maximum stabilises the state (mLSTM), the operator's decay holds its steps too. The floor of the
    denominator is exp(−maximum), so they can be taken out again, from the second token on.
    """
    decay = inputs.log_decay
    if decay is None or inputs.floor is None:
        return decay
    maximum = -inputs.floor.log()
    return decay[:, 1:] + maximum[:, 1:] - maximum[:, :-1]


@contextmanager
def _watched(mixer: Mixer, found: list[Tensor]) -> Iterator[None]:
    operands = mixer.operands

    def watched(*args, **kwargs) -> Inputs:
        inputs = operands(*args, **kwargs)
        decay = log_decay(inputs)
        if decay is not None:
            found.append(-(decay if decay.dim() == 1 else decay.flatten(0, 1).mean(0)).detach().float().cpu())
        return inputs

    mixer.operands = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        del mixer.operands
