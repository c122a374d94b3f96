"""Select the layers of a hybrid that keep softmax attention, by what replacing each layer alone costs.

    scores = score_layers(teacher, student, sites, data, held_out, autocast)      # a LayerScore per layer
    select_layers(scores, 7, by="kl")                                             # [0, 1, 2, 3, 16, 17, 23]

All mixers are calibrated at once on the teacher's inputs (stage 0), so no gradients are needed. Then one attention
module of the teacher at a time is replaced by the student's, and two costs are measured: KL(teacher || swapped) on
held-out text, and recall, the increase of the loss on tokens that repeat the first third of a sequence.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import PreTrainedModel

from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.core.system import flush_denormals
from limbeck.data.packing import IGNORE_INDEX, Batch, SequenceDataset, take_sequences_with_targets
from limbeck.models import Site
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.hooks import DistillationPair
from limbeck.models.layers import space_evenly
from limbeck.training.calibration import NormalEquations
from limbeck.training.chunked_losses import TeacherLogitsFromHidden, logit_losses

SelectionCriterion = Literal["kl", "recall", "both", "halo", "uniform"]
CALIBRATION_BATCH_SIZE = 4  # sequences
# nats: layers that cost less are not told apart. A window in documents shorter than itself costs nothing at all.
LEAST_COST = 1e-3


@dataclass(frozen=True)
class LayerScore:
    """Cost of replacing one layer alone, in nats per token."""

    layer: int
    kl: float
    recall: float  # increase of the loss on repeated text
    unexplained: float  # share of the layer's output that the calibrated mixer does not reproduce


@flush_denormals()
def score_layers(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    sites: list[Site],
    data: SequenceDataset,
    held_out: SequenceDataset,
    autocast: Callable,
    tokens: int = 8192,
    eval_tokens: int = 2048,
    ridge: float = 1e-2,
) -> list[LayerScore]:
    """Score each layer.

    Args:
        student: `convert(teacher, ..., layers="all", share_weights=True)`; its output projections are overwritten.
        sites: layers to score.
        tokens: tokens of `data` for the calibration.
        eval_tokens: tokens of `held_out` for KL, and as many for recall.
        ridge: of the calibration, as a share of the mean diagonal.
    """
    device = teacher.device
    fits = NormalEquations(DistillationPair(teacher, student, sites, autocast))
    sequences = max(1, round(tokens / data.length))
    with progress("calibrate", sequences, "sequences") as advance:
        for start in range(0, sequences, CALIBRATION_BATCH_SIZE):
            size = min(CALIBRATION_BATCH_SIZE, sequences - start)
            fits.add(data.batch(start, size).to(device))
            advance(size)
    fits.solve(ridge)
    text = take_sequences_with_targets(held_out, 0, max(1, round(eval_tokens / held_out.length)))[0].to(device)
    eval_batches = text, make_repeated_batch(text)
    head = LMHead(teacher)
    scores = []
    with torch.no_grad(), autocast():
        teacher_hidden = [run_backbone(teacher, eval_batch) for eval_batch in eval_batches]
        signals = [TeacherLogitsFromHidden(head, hidden) for hidden in teacher_hidden]
        before = logit_losses(head, teacher_hidden[1], signals[1], eval_batches[1].targets)[0]
        count = float(eval_batches[1].n_targets)
        with progress("swap one layer", len(sites), "layers") as advance:
            for site in sites:
                with swap_module(teacher, site.module, student.get_submodule(site.module)):
                    hidden = [run_backbone(teacher, eval_batch) for eval_batch in eval_batches]
                kl = logit_losses(head, hidden[0], signals[0], eval_batches[0].targets)[0]["kl"]
                after = logit_losses(head, hidden[1], signals[1], eval_batches[1].targets)[0]
                score = LayerScore(
                    site.shape.layer,
                    kl=float(kl) / eval_batches[0].n_targets,
                    recall=float(after["ce"] - before["ce"]) / count,
                    unexplained=fits.unexplained[site.module],
                )
                scores.append(score)
                advance(1, f"layer {score.layer}: KL {score.kl:.2g}")
    return scores


def select_layers(scores: list[LayerScore], num_softmax_layers: int, by: SelectionCriterion = "both") -> list[int]:
    """Select the layers that keep softmax attention, in ascending order.

    Args:
        num_softmax_layers: how many.
        by: "kl": the highest divergence; "recall": the highest recall cost; "both": the sum of the two, each relative
            to its maximum, or to a thousandth of a nat where that is more; "halo": recall cost over divergence (after
            HALO, arXiv 2601.22156: layers that recall needs and the rest of the model does not);
            "uniform": evenly spaced.
    """
    check_selection(num_softmax_layers, by, len(scores))
    layers = [score.layer for score in scores]
    if by == "uniform":
        return [layers[i] for i in space_evenly(len(layers), num_softmax_layers)]
    max_kl, max_recall = max(s.kl for s in scores), max(s.recall for s in scores)
    importance = {
        "kl": lambda s: s.kl,
        "recall": lambda s: s.recall,
        "both": lambda s: s.kl / max(max_kl, LEAST_COST) + max(s.recall, 0.0) / max(max_recall, LEAST_COST),
        "halo": lambda s: max(s.recall, 0.0) / (max(s.kl, 0.0) + LEAST_COST),
    }[by]
    top = sorted(scores, key=importance, reverse=True)[:num_softmax_layers]
    return sorted(score.layer for score in top)


def check_selection(num_softmax_layers: int, by: str, count: int) -> None:
    """Raise LimbeckError unless `num_softmax_layers` of `count` layers can be selected by that criterion."""
    if by not in get_args(SelectionCriterion):
        raise LimbeckError(
            f"unknown criterion '{by}'{suggest_closest(by, get_args(SelectionCriterion))}",
            expected=", ".join(get_args(SelectionCriterion)),
        )
    if not 0 < num_softmax_layers < count:
        raise LimbeckError(
            f"cannot keep {num_softmax_layers} of the teacher's {count} layers", expected=f"1 to {count - 1}"
        )


def selection_to_dict(scores: list[LayerScore], softmax_layers: list[int], **facts: Any) -> dict[str, Any]:
    """Return the content of the file that `limbeck select` writes and `student.softmax_layers` of a recipe reads."""
    return {"softmax_layers": softmax_layers, **facts, "prices": [asdict(score) for score in scores]}


def make_repeated_batch(batch: Batch) -> Batch:
    """Turn each row into A B A: its first third, its second, and the first again, which alone has targets."""
    length = batch.input_ids.shape[1]
    third = length // 3
    if third < 8:
        raise LimbeckError(
            f"sequences of {length} tokens are too short to repeat a third", expected="at least 24 tokens"
        )
    first, second = batch.input_ids[:, :third], batch.input_ids[:, third : 2 * third]
    ids = torch.cat([first, second, first], 1)
    targets = torch.full_like(ids, IGNORE_INDEX)
    targets[:, 2 * third : -1] = ids[:, 2 * third + 1 :]
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return Batch(ids, positions, targets)


@contextmanager
def swap_module(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """Replace the model's submodule of this name by `module` inside this block."""
    parent, _, leaf = name.rpartition(".")
    before = model.get_submodule(name)
    setattr(model.get_submodule(parent), leaf, module)
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), leaf, before)
