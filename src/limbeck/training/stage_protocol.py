"""What a stage is to those who train it, and what they do with it in a step, whether or not there is a trainer.

    counts = reduce_counts(stage, batches)                       # what the losses of a step are divided by
    losses = accumulate_gradients(stage, batches)                # {"layer 0": ..., "layer 1": ...}, gradients in place
    groups = get_clip_groups(stage)                              # [] where all gradients are clipped together

`limbeck.training.alignment` and `limbeck.training.logit_distillation` have the stages.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor, nn

from limbeck.core.collectives import all_reduce_scalars
from limbeck.data.packing import Batch


class Stage(Protocol):
    """What the trainer needs of a stage: its parameters and their losses."""

    autocast: Callable[[], Any]
    loss_scale: float  # factor on the loss in `backward`; set by the trainer
    stopped: set[str]  # names of the losses that are skipped, of layers that have converged; set by the trainer
    requires_targets: bool  # sequences without a target are skipped

    @property
    def student(self) -> nn.Module: ...

    def parameters(self) -> dict[str, nn.Parameter]: ...

    def learning_rates(self, recipe: Any) -> dict[str, float]: ...

    def count(self, batch: Batch) -> dict[str, float]: ...

    def backward(self, batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]: ...

    def evaluate(self, batch: Batch, counts: dict[str, float] | None = None) -> dict[str, Tensor]: ...


def accumulate_gradients(stage: Stage, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Add the gradients of a step's micro-batches without a trainer, as the learning rate sweep does.

    Returns:
        Each loss, summed over this process's micro-batches.
    """
    counts = reduce_counts(stage, batches)
    losses: dict[str, Tensor] = {}
    for batch in batches:
        add_losses(losses, stage.backward(batch, counts))
    return losses


def reduce_counts(stage: Stage, batches: Sequence[Batch]) -> dict[str, float]:
    """Sum what the losses are divided by over all micro-batches and processes of a step."""
    return all_reduce_scalars(sum_counts(stage, batches))


def sum_counts(stage: Stage, batches: Iterable[Batch]) -> dict[str, float]:
    """Sum the same over some batches of this process."""
    counts: dict[str, float] = {}
    for batch in batches:
        for name, value in stage.count(batch).items():
            counts[name] = counts.get(name, 0.0) + value
    return counts


def add_losses(totals: dict[str, Tensor], losses: dict[str, Tensor]) -> None:
    """Add losses to totals of the same names, in place."""
    for name, value in losses.items():
        totals[name] = totals[name] + value if name in totals else value


def total_loss(losses: dict[str, float]) -> float:
    """Return the total, "loss"; in layerwise stages, which have none, the mean over layers."""
    return losses["loss"] if "loss" in losses else sum(losses.values()) / len(losses)


def get_clip_groups(stage: Stage) -> list[list[str]]:
    """Return the parameter names of each layer whose gradient is clipped alone; empty if all are clipped together."""
    return getattr(stage, "clip_groups", list)()


def get_buffers(stage: Stage) -> dict[str, Tensor]:
    """Return what a stage remembers between steps beside its parameters, by name; empty for most."""
    return getattr(stage, "buffers", dict)()
