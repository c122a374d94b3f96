"""How good a student is on held-out text, and how like its teacher: perplexity, divergence, top-1 agreement.

    result = agreement(teacher, student, packed, tokens=8192)
    result["student_perplexity"], result["teacher_perplexity"], result["kl"], result["top1_agreement"]

Both models see the same packed sequences; the numbers are per target, documents kept apart.
"""

import contextlib
import math
from collections.abc import Callable
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import PreTrainedModel

from limbeck.console import progress
from limbeck.data.packing import Sequences
from limbeck.evaluate.measures import Found, Measure, Settings
from limbeck.evaluate.subject import Subject
from limbeck.losses import FromHidden, logit_losses
from limbeck.model.body import Head, run_body


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
        most likely next token is the same, and how many targets in how many sequences were counted.
    """
    sequences = min(max(1, round(tokens / data.length)), data.n_sequences)
    head_s, head_t = Head(student), Head(teacher)
    device = student.device
    totals: dict[str, float] = {}
    differences: list[float] = []
    with progress("evaluate", sequences, "sequences") as advance:
        for at in range(0, sequences, batch):
            part = data.batch(at, min(batch, sequences - at)).to(device)
            with autocast():
                hidden_t, hidden_s = run_body(teacher, part), run_body(student, part)
                for row in range(len(part.input_ids)):
                    rows = slice(row, row + 1)
                    signal = FromHidden(head_t, hidden_t[rows])
                    sums, _ = logit_losses(head_s, hidden_s[rows], signal, part.targets[rows])
                    numbers = {name: float(value) for name, value in sums.items()}
                    differences.append((numbers["ce"] - numbers["teacher_ce"]) / max(numbers["count"], 1))
                    for name, value in numbers.items():
                        totals[name] = totals.get(name, 0.0) + value
            advance(len(part.input_ids))
    n = totals["count"]
    spread = torch.tensor(differences, dtype=torch.float64)
    error = float(spread.std() / math.sqrt(len(differences))) if len(differences) > 1 else None
    return {
        "teacher_perplexity": math.exp(totals["teacher_ce"] / n),
        "student_perplexity": math.exp(min(totals["ce"] / n, 700)),
        "loss_difference": (totals["ce"] - totals["teacher_ce"]) / n,
        "loss_difference_standard_error": error,
        "kl": totals["kl"] / n,
        "reverse_kl": totals["reverse_kl"] / n,
        "top1_agreement": totals["agree"] / n,
        "targets": int(n),
        "sequences": sequences,
        "length": data.length,
    }


class AgreementSettings(Settings):
    """How much text, in sequences of which length (None: as in the run)."""

    tokens: Annotated[int, Field(gt=0)] = 8192
    length: Annotated[int, Field(ge=16)] | None = None


def measure_agreement(subject: Subject, settings: AgreementSettings) -> Found:
    """Agreement with the teacher on the subject's held-out text."""
    length = settings.length or (subject.data.length if subject.data else 512)
    sequences, about = subject.held_out(length, settings.tokens)
    result = agreement(subject.teacher.model, subject.model, sequences, settings.tokens)
    names = {
        "perplexity": "student_perplexity",
        "teacher_perplexity": "teacher_perplexity",
        "kl": "kl",
        "reverse_kl": "reverse_kl",
        "top1_agreement": "top1_agreement",
        "loss_difference": "loss_difference",
    }
    error = result["loss_difference_standard_error"]
    return Found(
        values={name: result[key] for name, key in names.items()},
        errors={} if error is None else {"loss_difference": error},
        data={**about, **{key: result[key] for key in ("targets", "sequences", "length")}},
    )


MEASURE = Measure(
    "agreement", "perplexity, divergence and top-1 agreement with the teacher", AgreementSettings, measure_agreement
)
