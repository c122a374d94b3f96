"""Which layers to keep as softmax: what each layer costs when it alone is swapped, measured on the user's own text.

    prices = price_layers(teacher, sites, student, data, held_out)      # one Price a layer
    choose(prices, 7, by="kl")                                          # [0, 1, 2, 3, 16, 17, 23]

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

from limbeck.console import progress
from limbeck.data.packing import IGNORE, Batch, Sequences, with_targets
from limbeck.errors import LimbeckError, closest
from limbeck.losses import FromHidden, logit_losses
from limbeck.machine import flushing_denormals
from limbeck.model import Site
from limbeck.model.body import Head, run_body
from limbeck.model.layers import spread
from limbeck.stages.calibrate import NormalEquations
from limbeck.stages.teacher import Pair

Score = Literal["kl", "recall", "both", "halo", "uniform"]
BATCH = 4  # sequences that calibration takes at once


@dataclass(frozen=True)
class Price:
    """What swapping one layer alone costs in nats per token, and the share of its output that the mixer leaves."""

    layer: int
    kl: float
    recall: float  # rise of the loss on repeated text
    unexplained: float


@flushing_denormals()
def price_layers(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    sites: list[Site],
    data: Sequences,
    held_out: Sequences,
    autocast: Callable,
    tokens: int = 8192,
    judged: int = 2048,
    ridge: float = 1e-2,
) -> list[Price]:
    """The price of each layer.

    Args:
        student: `convert(teacher, ..., layers="all", share=True)`; its output projections are solved here.
        sites: of the layers to price.
        tokens: of `data`, for the calibration.
        judged: tokens of `held_out` that KL is measured on; recall takes as many.
        ridge: of the calibration, a share of the mean diagonal.
    """
    device = teacher.device
    fits = NormalEquations(Pair(teacher, student, sites, autocast))
    sequences = max(1, round(tokens / data.length))
    with progress("calibrate", sequences, "sequences") as advance:
        for at in range(0, sequences, BATCH):
            size = min(BATCH, sequences - at)
            fits.add(data.batch(at, size).to(device))
            advance(size)
    fits.solve(ridge)
    text = with_targets(held_out, 0, max(1, round(judged / held_out.length)))[0].to(device)
    exams = text, repeating(text)
    head = Head(teacher)
    prices = []
    with torch.no_grad(), autocast():
        known = [run_body(teacher, exam) for exam in exams]
        signals = [FromHidden(head, hidden) for hidden in known]
        before = logit_losses(head, known[1], signals[1], exams[1].targets)[0]
        count = float(exams[1].valid)
        with progress("swap one layer", len(sites), "layers") as advance:
            for site in sites:
                with swapped(teacher, site.module, student.get_submodule(site.module)):
                    hidden = [run_body(teacher, exam) for exam in exams]
                kl = logit_losses(head, hidden[0], signals[0], exams[0].targets)[0]["kl"]
                after = logit_losses(head, hidden[1], signals[1], exams[1].targets)[0]
                price = Price(
                    site.shape.layer,
                    kl=float(kl) / exams[0].valid,
                    recall=float(after["ce"] - before["ce"]) / count,
                    unexplained=fits.unexplained[site.module],
                )
                prices.append(price)
                advance(1, f"layer {price.layer}: KL {price.kl:.3f}")
    return prices


def choose(prices: list[Price], keep: int, by: Score = "both") -> list[int]:
    """The layers to keep as softmax.

    Args:
        keep: how many.
        by: "kl" the dearest by divergence, "recall" by recall, "both" by the sum of the two as shares of the dearest
            layer's, "halo" by recall over divergence (after HALO, arXiv 2601.22156: what recall needs and the rest of
            the model does not), "uniform" evenly spread.
    """
    check(keep, by, len(prices))
    layers = [price.layer for price in prices]
    if by == "uniform":
        return [layers[i] for i in spread(len(layers), keep)]
    most = max(p.kl for p in prices), max(p.recall for p in prices)
    worth = {
        "kl": lambda p: p.kl,
        "recall": lambda p: p.recall,
        "both": lambda p: p.kl / max(most[0], 1e-9) + max(p.recall, 0.0) / max(most[1], 1e-9),
        "halo": lambda p: max(p.recall, 0.0) / (max(p.kl, 0.0) + 1e-3),
    }[by]
    dearest = sorted(prices, key=worth, reverse=True)[:keep]
    return sorted(price.layer for price in dearest)


def check(keep: int, by: str, count: int) -> None:
    """Raises a LimbeckError unless `keep` of `count` layers can be chosen by that score."""
    if by not in get_args(Score):
        raise LimbeckError(f"score is '{by}'{closest(by, get_args(Score))}", expected=", ".join(get_args(Score)))
    if not 0 < keep < count:
        raise LimbeckError(f"{keep} layers to keep, the teacher has {count}", expected=f"1 to {count - 1}")


def plan_file(prices: list[Price], keep: list[int], **facts: Any) -> dict[str, Any]:
    """What `limbeck select` writes and `student.softmax_layers` of a recipe reads."""
    return {"softmax_layers": keep, **facts, "prices": [asdict(price) for price in prices]}


def repeating(batch: Batch) -> Batch:
    """Each row as A B A: its first third, its second, and the first again, which alone is to be predicted."""
    length = batch.input_ids.shape[1]
    third = length // 3
    if third < 8:
        raise LimbeckError(f"sequences of {length} tokens", expected="at least 24, to repeat a third of them")
    first, second = batch.input_ids[:, :third], batch.input_ids[:, third : 2 * third]
    ids = torch.cat([first, second, first], 1)
    targets = torch.full_like(ids, IGNORE)
    targets[:, 2 * third : -1] = ids[:, 2 * third + 1 :]
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return Batch(ids, positions, targets)


@contextmanager
def swapped(model: nn.Module, name: str, module: nn.Module) -> Iterator[None]:
    """`module` in place of the model's submodule of that name."""
    parent, _, leaf = name.rpartition(".")
    before = model.get_submodule(name)
    setattr(model.get_submodule(parent), leaf, module)
    try:
        yield
    finally:
        setattr(model.get_submodule(parent), leaf, before)
