"""Which layers to keep as softmax: what each layer costs when it alone is swapped, measured on the user's own text.

    scores = score_layers(teacher, sites, student, data, held_out)      # one LayerScore a layer
    select_layers(scores, 7, by="kl")                                          # [0, 1, 2, 3, 16, 17, 23]

All layers' mixers are calibrated at once on the teacher's own inputs (stage 0), so no gradient is needed. Then one
attention module at a time takes the place of the teacher's, and two things are read: KL(teacher ‖ swapped) on held-out
text, and by how much the loss rises where the text repeats what stood a third of the sequence before (recall).
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
BATCH = 4  # sequences that calibration takes at once


@dataclass(frozen=True)
class LayerScore:
    """What swapping one layer alone costs in nats per token, and the share of its output that the mixer leaves."""

    layer: int
    kl: float
    recall: float  # rise of the loss on repeated text
    unexplained: float


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
    """The score of each layer.

    Args:
        student: `convert(teacher, ..., layers="all", share=True)`; its output projections are solved here.
        sites: of the layers to score.
        tokens: of `data`, for the calibration.
        eval_tokens: tokens of `held_out` that KL is measured on; recall takes as many.
        ridge: of the calibration, a share of the mean diagonal.
    """
    device = teacher.device
    fits = NormalEquations(DistillationPair(teacher, student, sites, autocast))
    sequences = max(1, round(tokens / data.length))
    with progress("calibrate", sequences, "sequences") as advance:
        for at in range(0, sequences, BATCH):
            size = min(BATCH, sequences - at)
            fits.add(data.batch(at, size).to(device))
            advance(size)
    fits.solve(ridge)
    text = take_sequences_with_targets(held_out, 0, max(1, round(eval_tokens / held_out.length)))[0].to(device)
    eval_batches = text, make_repeated_batch(text)
    head = LMHead(teacher)
    scores = []
    with torch.no_grad(), autocast():
        known = [run_backbone(teacher, eval_batch) for eval_batch in eval_batches]
        signals = [TeacherLogitsFromHidden(head, hidden) for hidden in known]
        before = logit_losses(head, known[1], signals[1], eval_batches[1].targets)[0]
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
                advance(1, f"layer {score.layer}: KL {score.kl:.3f}")
    return scores


def select_layers(scores: list[LayerScore], num_softmax_layers: int, by: SelectionCriterion = "both") -> list[int]:
    """The layers to keep as softmax.

    Args:
        num_softmax_layers: how many.
        by: "kl" the dearest by divergence, "recall" by recall, "both" by the sum of the two as shares of the dearest
            layer's, "halo" by recall over divergence (after HALO, arXiv 2601.22156: what recall needs and the rest of
            the model does not), "uniform" evenly spread.
    """
    check_selection(num_softmax_layers, by, len(scores))
    layers = [score.layer for score in scores]
    if by == "uniform":
        return [layers[i] for i in space_evenly(len(layers), num_softmax_layers)]
    most = max(p.kl for p in scores), max(p.recall for p in scores)
    worth = {
        "kl": lambda p: p.kl,
        "recall": lambda p: p.recall,
        "both": lambda p: p.kl / max(most[0], 1e-9) + max(p.recall, 0.0) / max(most[1], 1e-9),
        "halo": lambda p: max(p.recall, 0.0) / (max(p.kl, 0.0) + 1e-3),
    }[by]
    dearest = sorted(scores, key=worth, reverse=True)[:num_softmax_layers]
    return sorted(score.layer for score in dearest)


def check_selection(num_softmax_layers: int, by: str, count: int) -> None:
    """Raises a LimbeckError unless `num_softmax_layers` of `count` layers can be chosen by that score."""
    if by not in get_args(SelectionCriterion):
        raise LimbeckError(
            f"score is '{by}'{suggest_closest(by, get_args(SelectionCriterion))}",
            expected=", ".join(get_args(SelectionCriterion)),
        )
    if not 0 < num_softmax_layers < count:
        raise LimbeckError(
            f"{num_softmax_layers} layers to keep, the teacher has {count}", expected=f"1 to {count - 1}"
        )


def selection_to_dict(scores: list[LayerScore], softmax_layers: list[int], **facts: Any) -> dict[str, Any]:
    """What `limbeck select` writes and `student.softmax_layers` of a recipe reads."""
    return {"softmax_layers": softmax_layers, **facts, "prices": [asdict(score) for score in scores]}


def make_repeated_batch(batch: Batch) -> Batch:
    """Each row as A B A: its first third, its second, and the first again, which alone is to be predicted."""
    length = batch.input_ids.shape[1]
    third = length // 3
    if third < 8:
        raise LimbeckError(f"sequences of {length} tokens", expected="at least 24, to repeat a third of them")
    first, second = batch.input_ids[:, :third], batch.input_ids[:, third : 2 * third]
    ids = torch.cat([first, second, first], 1)
    targets = torch.full_like(ids, IGNORE_INDEX)
    targets[:, 2 * third : -1] = ids[:, 2 * third + 1 :]
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return Batch(ids, positions, targets)


@contextmanager
def swap_module(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """`module` in place of the model's submodule of that name."""
    parent, _, leaf = name.rpartition(".")
    before = model.get_submodule(name)
    setattr(model.get_submodule(parent), leaf, module)
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), leaf, before)
