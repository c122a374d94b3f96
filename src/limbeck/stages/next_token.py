"""Plain language modelling: a model learns the next token of text, from labels alone.

    stage = NextToken(model)
    train(stage, settings, data, run, index, position)      # limbeck.stages.loop

This is how Limbeck trains a small teacher of its own (`limbeck.teachers`); a student learns by the other stages.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from limbeck.data.packing import IGNORE, Batch
from limbeck.model.body import Head, run_body
from limbeck.recipe import Trained


class NextToken:
    """A stage for the training loop: cross-entropy over the valid targets of a step."""

    def __init__(self, model: PreTrainedModel):
        self.model, self.head = model, Head(model)
        self.student = model  # what learns, as in every stage
        self.autocast: Callable[[], Any] = nullcontext
        self.loss_scale = 1.0
        self.stopped: set[str] = set()

    def parameters(self) -> dict[str, nn.Parameter]:
        """All of the model."""
        return dict(self.model.named_parameters())

    def learning_rates(self, recipe: Trained) -> dict[str, float]:
        """One for all."""
        return dict.fromkeys(self.parameters(), recipe.lr)

    def count(self, batch: Batch) -> dict[str, float]:
        """What this batch adds to the count that the loss is divided by."""
        return {"targets": float(batch.valid)}

    def backward(self, batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch; returns its share of the loss."""
        loss = self._loss(batch) / max(counts["targets"], 1.0)
        (loss * self.loss_scale).backward()
        return {"loss": loss.detach().double()}

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> dict[str, Tensor]:
        """The loss on a batch, without gradients."""
        return {"loss": self._loss(batch).double() / max(batch.valid, 1)}

    def _loss(self, batch: Batch) -> Tensor:
        """Summed over the valid targets."""
        rows = (batch.targets.flatten() != IGNORE).nonzero().squeeze(1)
        logits = self.head(run_body(self.model, batch).flatten(0, 1)[rows])
        return F.cross_entropy(logits, batch.targets.flatten()[rows], reduction="sum")
