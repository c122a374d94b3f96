"""The guard between stages: a stage that makes the student worse on held-out text is not taken (key `keep_better`).

    guard = StageGuard(job.make_pair(student), job.held_out_dataset(job.recipe.guard_text))
    guard.open_stage()                                # before a stage: keeps the weights and the losses of the student
    facts["guard"] = guard.close_stage("hidden", learned)    # after it: puts the weights back if the loss rose

The losses are next-token cross-entropies on the held-out part of the recipe's own text, in the longest sequences of any
stage, the same for all stages of a run. Worse is a higher mean; the standard error of the difference, paired over
sequences, is recorded beside it and decides nothing. What a stage hands on stands in its facts, so a resumed run
compares with the very numbers that the interrupted one compared with.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.core.console import console
from limbeck.core.distributed import run_on_main
from limbeck.core.live import current
from limbeck.data.packing import SequenceDataset, count_eval_sequences
from limbeck.evaluation.agreement import clustered_standard_error
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.hooks import DistillationPair
from limbeck.training.chunked_losses import choose_logit_chunk_size, logit_losses

GUARD_TOKENS = 4096  # held-out tokens that a student is judged on
MIN_GUARD_SEQUENCES = 4  # at least, where they are long


@dataclass(frozen=True)
class SequenceLosses:
    """Cross-entropy of a student on each of n held-out sequences.

    nats: summed over the targets of each sequence.
    targets: their numbers.
    """

    nats: list[float]
    targets: list[int]

    @property
    def mean(self) -> float:
        """Nats a target over all sequences."""
        return sum(self.nats) / sum(self.targets)


class StageGuard:
    """Judges each stage of one student, and takes back what made it worse.

    Args:
        pair: the student, and the teacher with which it shares weights.
        held_out: the text that it is judged on.
    """

    def __init__(self, pair: DistillationPair, held_out: SequenceDataset):
        self.pair, self.held_out = pair, held_out
        self.losses: SequenceLosses | None = None  # of the student as it is
        self.weights: dict[str, Tensor] = {}  # of the student before the stage; the rest are the teacher's own

    def load_verdict(self, facts: dict[str, Any]) -> None:
        """Take the losses of the student that a finished stage handed on from the facts of that stage."""
        recorded = facts["guard"]
        self.losses = SequenceLosses(recorded["sequence_nats"], recorded["sequence_targets"])

    def open_stage(self) -> None:
        """Keep the student's weights before a stage and, before the first one, measure its losses."""
        if self.losses is None:
            self.losses = self._measure()
            console.print(f"before training: held-out loss {self.losses.mean:.4f} nats a token")
        teacher_ids = {id(p) for p in self.pair.teacher.parameters()}
        self.weights = {
            name: p.detach().to("cpu", copy=True)
            for name, p in self.pair.student.named_parameters()
            if id(p) not in teacher_ids
        }

    def close_stage(self, stage: str, learned: dict[str, nn.Parameter]) -> dict[str, Any]:
        """Judge a stage, put the weights from before it back if the held-out loss rose, and say so.

        Args:
            stage: its name.
            learned: the student's parameters that the stage has changed, by name; written where it is not taken.

        Returns:
            kept: whether the stage is taken; before, after, difference and standard_error of the difference, in nats a
            token, None where they are not finite or there is one sequence; sequence_nats and sequence_targets of the
            student that is handed on; their length.
        """
        before = self.losses
        assert before is not None, "open_stage comes first"
        after = self._measure()
        kept = math.isfinite(after.mean) and not after.mean > before.mean
        if kept:
            self.losses = after
        else:
            self._put_back(learned)
        self.weights = {}
        difference, error = compare_losses(before, after)
        facts: dict[str, Any] = {
            "kept": kept,
            "before": _finite(before.mean),
            "after": _finite(after.mean),
            "difference": _finite(difference),
            "standard_error": error,
            "sequence_nats": self.losses.nats,  # type: ignore[union-attr]
            "sequence_targets": self.losses.targets,  # type: ignore[union-attr]
            "length": self.held_out.length,
        }
        console.print(f"{stage}: {describe_verdict(facts)}")
        values = " to ".join(_format_loss(facts[name]) for name in ("before", "after"))
        current().show("held-out loss", values + ("" if kept else f", {stage} not taken"))
        return facts

    def _measure(self) -> SequenceLosses:
        return run_on_main(lambda: measure_losses(self.pair.student, self.held_out, self.pair.autocast))

    @torch.no_grad()
    def _put_back(self, learned: dict[str, nn.Parameter]) -> None:
        for name, parameter in learned.items():
            # merged adapters may have given the student its own copy of what it shared with the teacher
            before = self.weights[name] if name in self.weights else self.pair.teacher.get_parameter(name)
            parameter.copy_(before)


def count_guard_tokens(length: int) -> int:
    """Count the held-out tokens that a student is judged on, in sequences of `length`."""
    return max(MIN_GUARD_SEQUENCES, GUARD_TOKENS // length) * length


@torch.no_grad()
def measure_losses(student: PreTrainedModel, data: SequenceDataset, autocast: Callable) -> SequenceLosses:
    """Measure a student on the first sequences of `data` that make up the guard's number of tokens."""
    count = count_eval_sequences(data, count_guard_tokens(data.length) // data.length)
    head, chunk_size = LMHead(student), choose_logit_chunk_size(student)
    nats: list[float] = []
    targets: list[int] = []
    for at in range(count):
        batch = data.batch(at, 1).to(student.device)
        if not batch.n_targets:
            continue
        with autocast():
            sums, _ = logit_losses(head, run_backbone(student, batch), None, batch.targets, chunk_size=chunk_size)
        nats.append(float(sums["ce"]))
        targets.append(batch.n_targets)
    return SequenceLosses(nats, targets)


def compare_losses(before: SequenceLosses, after: SequenceLosses) -> tuple[float, float | None]:
    """Return the rise of the mean loss, in nats a token, and its standard error, paired over sequences."""
    targets = torch.tensor(before.targets)
    rise = torch.tensor(after.nats, dtype=torch.float64) - torch.tensor(before.nats, dtype=torch.float64)
    error = clustered_standard_error(
        (rise / targets).repeat_interleave(targets), torch.arange(len(targets)).repeat_interleave(targets)
    )
    return float(rise.sum() / targets.sum()), None if error is None else _finite(error)


def describe_verdict(facts: dict[str, Any]) -> str:
    """Say in a sentence whether a stage was taken and by which numbers; `facts` are those of `close_stage`."""
    before, after = (_format_loss(facts[name]) for name in ("before", "after"))
    numbers = f"held-out loss {before} before, {after} after"
    if facts["difference"] is not None:
        error = f" ± {facts['standard_error']:.4f}" if facts["standard_error"] is not None else ""
        numbers += f" (difference {facts['difference']:+.4f}{error}, {len(facts['sequence_nats'])} sequences)"
    if facts["kept"]:
        return f"taken, {numbers}"
    return f"not taken, {numbers}; the student keeps the weights from before this stage"


def _format_loss(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _finite(value: float) -> float | None:
    """Return the value, None in the place of NaN and infinity, which JSON does not have."""
    return value if math.isfinite(value) else None
