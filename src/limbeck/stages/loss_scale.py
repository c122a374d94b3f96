"""Loss scaling for fp16 (arXiv 1710.03740): gradients that would be too small for it are kept by a larger loss.

    scale = LossScale(facts, needed=needs_scale(autocast, "cuda"))
    stage.loss_scale = scale.value
    scale.off(parameters)                # divides the gradients, after they were summed
    scale.update(finite=True)

The rule is that of torch.amp.GradScaler: halved where a gradient is not finite, doubled after 2,000 steps that were.
GradScaler itself decides for each optimiser of each process. Here a step may have two optimisers and several processes,
and the one decision is the loop's; and a power of two is held by a checkpoint's JSON exactly.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

FIRST = 2.0**16
DOUBLED_AFTER = 2000  # finite steps in a row


def needs_scale(autocast: Callable[[], Any], device: str) -> bool:
    """Are products taken in fp16 inside?"""
    with autocast():
        return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


class LossScale:
    """The factor on the loss; one, always, where none is needed. Its state lives in `facts`."""

    def __init__(self, facts: dict[str, Any], needed: bool):
        self.facts, self.needed = facts, needed
        facts.setdefault("loss_scale", FIRST if needed else 1.0)
        facts.setdefault("finite_in_a_row", 0)

    @property
    def value(self) -> float:
        return self.facts["loss_scale"]

    @torch.no_grad()
    def off(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale."""
        if self.needed:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / self.value)

    def update(self, finite: bool) -> bool:
        """After a step; True where the scale came down, so that the next step has a chance that this one had not."""
        if not self.needed:
            return False
        if finite:
            self.facts["finite_in_a_row"] += 1
            if self.facts["finite_in_a_row"] == DOUBLED_AFTER:
                self.facts["loss_scale"], self.facts["finite_in_a_row"] = 2 * self.value, 0
            return False
        self.facts["finite_in_a_row"] = 0
        if self.value <= 1:
            return False
        self.facts["loss_scale"] = self.value / 2
        return True
