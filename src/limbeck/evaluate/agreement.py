"""How good a student is on held-out text, and how like its teacher: perplexity, divergence, likeliest tokens.

    result = agreement(teacher, student, packed, tokens=8192)
    result["student_perplexity"], result["teacher_perplexity"], result["kl"], result["top1_agreement"]

Both models see the same packed sequences; the numbers are per target, documents kept apart. The measure adds the same
numbers by position and by frequency of the token, and both models' own continuations (`free_running`). What each
number is: docs/analysis.md.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.console import progress
from limbeck.data.packing import IGNORE, Sequences, count_with_targets
from limbeck.evaluate.free_running import free_running, prefixes
from limbeck.evaluate.measurement import Measurement
from limbeck.evaluate.measures import Found, Measure, Settings
from limbeck.evaluate.subject import Subject
from limbeck.evaluate.tokens import compare_tokens, error_over_sequences, in_buckets
from limbeck.model.body import Head, run_body

PER_MILLION = [1, 10, 100, 1_000, 10_000]  # edges of the buckets of frequency
SHOWN = ("kl", "ce", "teacher_ce", "top1", "top", "overlap")  # in every bucket


@dataclass(frozen=True)
class Compared:
    """Every valid target of some text, in order.

    numbers: of `compare_tokens`, each [n].
    position: [n], tokens of its document that the models saw before the one that predicts; target: [n], the token that
    was to be predicted; sequence: [n], which sequence it stands in.
    """

    numbers: dict[str, Tensor]
    position: Tensor
    target: Tensor
    sequence: Tensor
    sequences: int
    length: int

    def summary(self) -> dict[str, Any]:
        """Means over all targets; see `agreement`."""
        mean = {name: float(value.double().mean()) for name, value in self.numbers.items()}
        difference = self.numbers["ce"] - self.numbers["teacher_ce"]
        return {
            "teacher_perplexity": math.exp(mean["teacher_ce"]),
            "student_perplexity": math.exp(min(mean["ce"], 700)),
            "loss_difference": mean["ce"] - mean["teacher_ce"],
            "loss_difference_standard_error": error_over_sequences(difference, self.sequence),
            "kl": mean["kl"],
            "reverse_kl": mean["reverse_kl"],
            "top1_agreement": mean["top1"],
            "top5_agreement": mean["top"],
            "top5_overlap": mean["overlap"],
            "targets": len(self.target),
            "sequences": self.sequences,
            "length": self.length,
        }


@torch.no_grad()
def agreement(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    data: Sequences,
    tokens: int,
    autocast: Callable = contextlib.nullcontext,
    batch: int = 4,
) -> dict[str, Any]:
    """Both models on the first `tokens` tokens of `data`, packed documents kept apart.

    Returns:
        perplexity of both (nats per target, exponentiated), their loss difference with its standard error over
        sequences, KL(teacher || student) and KL(student || teacher) in nats per token, share of tokens on which the
        most likely next token is the same, on which the teacher's is among the student's five most likely, share of
        the teacher's five that are among the student's five, and how many targets in how many sequences were counted.
    """
    return compare(teacher, student, data, tokens, autocast, batch).summary()


@torch.no_grad()
def compare(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    data: Sequences,
    tokens: int,
    autocast: Callable = contextlib.nullcontext,
    batch: int = 4,
) -> Compared:
    """The same, token by token."""
    sequences = count_with_targets(data, max(1, round(tokens / data.length)))
    head_s, head_t = Head(student), Head(teacher)
    parts: dict[str, list[Tensor]] = {}
    with progress("evaluate", sequences, "sequences") as advance:
        for at in range(0, sequences, batch):
            part = data.batch(at, min(batch, sequences - at)).to(student.device)
            with autocast():
                hidden_t, hidden_s = run_body(teacher, part), run_body(student, part)
                found = compare_tokens(head_s, hidden_s, head_t, hidden_t, part.targets)
            where = part.targets != IGNORE
            sequence = torch.arange(at, at + len(where), device=where.device)[:, None].expand_as(where)
            found |= {"position": part.position_ids[where], "target": part.targets[where], "sequence": sequence[where]}
            for name, value in found.items():
                parts.setdefault(name, []).append(value.cpu())
            advance(len(part.input_ids))
    joined = {name: torch.cat(values) for name, values in parts.items()}
    position, target, sequence = (joined.pop(name) for name in ("position", "target", "sequence"))
    return Compared(joined, position, target, sequence, sequences, data.length)


class AgreementSettings(Settings):
    """How much text, in sequences of which length (None: as in the run); prefixes that both models go on from."""

    tokens: Annotated[int, Field(gt=0)] = 8192
    length: Annotated[int, Field(ge=16)] | None = None
    prefixes: Annotated[int, Field(ge=0)] = 16
    prefix: Annotated[int, Field(ge=1)] = 64
    new: Annotated[int, Field(ge=1)] = 64


def measure_agreement(subject: Subject, settings: AgreementSettings) -> Found:
    """Agreement with the teacher on the subject's held-out text."""
    length = settings.length or (subject.data.seq_len if subject.data else 512)
    sequences, about = subject.held_out(length, settings.tokens)
    starts = prefixes(sequences, settings.prefixes, min(settings.prefix, length)) if settings.prefixes else None
    compared = compare(subject.teacher.model, subject.model, sequences, settings.tokens)
    result = compared.summary()
    shown = {name: compared.numbers[name] for name in SHOWN}
    edges = [2**i for i in range(4, 32) if 2**i < length]
    details: dict[str, Any] = {"by_position": in_buckets(shown, compared.position, edges)}
    counts = subject.token_counts(length)
    if counts is not None:
        per_million = 1e6 * counts.double() / counts.sum()
        details["by_frequency"] = in_buckets(shown, per_million[compared.target], PER_MILLION)
        about = {**about, "frequencies_from": f"{int(counts.sum()):,} tokens of the training part of the same text"}
    values = {"perplexity": result["student_perplexity"]}
    kept = ("teacher_perplexity", "kl", "reverse_kl", "top1_agreement", "top5_agreement", "top5_overlap")
    values |= {name: result[name] for name in (*kept, "loss_difference")}
    difference = compared.numbers["ce"] - compared.numbers["teacher_ce"]
    of = {"kl": "kl", "reverse_kl": "reverse_kl", "top1_agreement": "top1", "top5_agreement": "top"}
    spread = {name: compared.numbers[number] for name, number in of.items()}
    spread |= {"top5_overlap": compared.numbers["overlap"], "loss_difference": difference}
    errors = {name: error_over_sequences(value, compared.sequence) for name, value in spread.items()}
    if starts is not None:
        free = free_running(subject.teacher.model, subject.model, starts, settings.new)
        errors["equal_tokens"] = free.pop("equal_tokens_error")
        values |= {name: number for name, number in free.items() if isinstance(number, float)}
        details |= {name: curve for name, curve in free.items() if isinstance(curve, list)}
        about = {**about, "prefixes": len(starts)}
    return Found(
        values=values,
        errors={name: error for name, error in errors.items() if error is not None},
        data={**about, **{key: result[key] for key in ("targets", "sequences", "length")}},
        details=details,
    )


def draw_agreement(found: list[Measurement]) -> Any:
    """The measure's figure; pictures stand above measures, so theirs is looked up when one is drawn."""
    from limbeck.report.agreement import draw

    return draw(found)


MEASURE = Measure(
    "agreement",
    "perplexity, divergence and likeliest tokens beside the teacher's, by position and frequency, and free-running",
    AgreementSettings,
    measure_agreement,
    draw_agreement,
)
