"""How good a student is on held-out text, and how like its teacher: perplexity, divergence, likeliest tokens.

    result = evaluate_agreement(teacher, student, packed, tokens=8192)
    result["student_perplexity"], result["teacher_perplexity"], result["kl"], result["top1_agreement"]

Both models see the same packed sequences; the numbers are per target, documents kept apart. The measure adds the same
numbers by position and by frequency of the token, and both models' own continuations (`compare_free_running`). What each
number is: docs/analysis.md.

Student and teacher token by token: what each target costs both, and how far their likeliest tokens are the same.

    found = compare_tokens(Head(student), hidden_s, Head(teacher), hidden_t, targets)      # tensors [n]
    average_by_bucket(found, positions, [16, 64, 256])       # means by bucket: 0 to 15, 16 to 63, 64 to 255, 256 and more

Logits exist for a chunk of tokens at a time, so memory does not grow with length times vocabulary. Legend: B batch,
T time, D model width, n valid targets.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.core.console import progress
from limbeck.data.packing import IGNORE_INDEX, SequenceDataset, count_eval_sequences
from limbeck.evaluation.free_running import compare_free_running, extract_prefixes
from limbeck.evaluation.measure import Measure, Measurement, MeasureResult, MeasureSettings
from limbeck.evaluation.subject import Subject
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.training.losses import TokenLogits


@torch.no_grad()
def compare_tokens(
    student_head: Callable[[Tensor], Tensor],
    student: Tensor,
    teacher_head: Callable[[Tensor], Tensor],
    teacher: Tensor,
    targets: Tensor,
    top_k: int = 5,
    chunk_size: int = 128,
) -> dict[str, Tensor]:
    """Both models on every valid target, in the order of the tokens.

    Args:
        student, teacher: hidden states [B, T, D] of either model; their widths may differ.
        targets: [B, T] next tokens, -100 where there is none.
        top_k: how many of the likeliest tokens are compared.
        chunk_size: tokens whose logits exist at a time.

    Returns:
        tensors [n] in float32: ce and teacher_ce (nats), kl = KL(teacher || student) and reverse_kl (nats), top1 (1
        where the likeliest token is the same), top (1 where the teacher's likeliest is among the student's `top_k`),
        overlap (share of the teacher's `top_k` that are among the student's).
    """
    rows = (targets.flatten() != -100).nonzero().squeeze(1)
    labels, flat_s, flat_t = targets.flatten(), student.flatten(0, 1), teacher.flatten(0, 1)
    parts: dict[str, list[Tensor]] = {}
    for part in rows.split(chunk_size):
        s, t = student_head(flat_s[part]).float(), teacher_head(flat_t[part]).float()
        width = min(s.shape[-1], t.shape[-1])  # a vocabulary may be padded on one side
        both = TokenLogits(s[:, :width], t[:, :width], labels[part])
        best_s, best_t = both.s.topk(top_k).indices, both.t.topk(top_k).indices
        found = {
            "ce": both.student[1] - both.s.gather(1, both.labels)[:, 0],
            "teacher_ce": both.other[1] - both.t.gather(1, both.labels)[:, 0],
            "kl": both.kl_divergence(),
            "reverse_kl": both.kl_divergence(reverse=True),
            "top1": (best_s[:, 0] == best_t[:, 0]).float(),
            "top": (best_s == best_t[:, :1]).any(1).float(),
            "overlap": (best_s[:, :, None] == best_t[:, None, :]).any(1).float().mean(1),
        }
        for name, value in found.items():
            parts.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def average_by_bucket(metrics: dict[str, Tensor], bucket_key: Tensor, edges: Sequence[float]) -> list[dict[str, Any]]:
    """Means of each number by bucket of `bucket_key`.

    Args:
        metrics: tensors [n].
        bucket_key: [n], what the tokens are sorted by.
        edges: ascending; a bucket goes from an edge up to just before the next one, the first from anything below, the
            last to anything above.

    Returns:
        one dict a bucket that has tokens: `from` and `below` (None for an open end), targets, and the mean of each
        number.
    """
    which = torch.bucketize(bucket_key.double(), torch.tensor(edges, dtype=torch.float64), right=True)
    ends = [None, *edges, None]
    rows = []
    for bucket in range(len(edges) + 1):
        inside = which == bucket
        if inside.any():
            means = {name: float(value[inside].double().mean()) for name, value in metrics.items()}
            rows.append({"from": ends[bucket], "below": ends[bucket + 1], "targets": int(inside.sum()), **means})
    return rows


def clustered_standard_error(number: Tensor, sequence: Tensor) -> float | None:
    """Standard error of a mean over tokens [n], sequences being what is independent; None for a single sequence.

    The linearised variance of a ratio of sums (Cochran 1977, section 6.3): sequences differ in their count of targets.
    """
    number = number.double()
    count = int(sequence.max()) + 1
    if count < 2:
        return None
    deviation = torch.zeros(count, dtype=torch.float64).index_add(0, sequence, number - number.mean())
    return math.sqrt(float(deviation.square().sum()) * count / (count - 1)) / len(number)


FREQUENCY_EDGES = [1, 10, 100, 1_000, 10_000]  # edges of the buckets of frequency
BUCKET_METRICS = ("kl", "ce", "teacher_ce", "top1", "top", "overlap")  # in every bucket


@dataclass(frozen=True)
class TokenComparison:
    """Every valid target of some text, in order.

    metrics: of `compare_tokens`, each [n].
    position: [n], tokens of its document that the models saw before the one that predicts; target: [n], the token that
    was to be predicted; sequence: [n], which sequence it stands in.
    """

    metrics: dict[str, Tensor]
    position: Tensor
    target: Tensor
    sequence: Tensor
    sequences: int
    length: int

    def summary(self) -> dict[str, Any]:
        """Means over all targets; see `evaluate_agreement`."""
        mean = {name: float(value.double().mean()) for name, value in self.metrics.items()}
        difference = self.metrics["ce"] - self.metrics["teacher_ce"]
        return {
            "teacher_perplexity": math.exp(mean["teacher_ce"]),
            "student_perplexity": math.exp(min(mean["ce"], 700)),
            "loss_difference": mean["ce"] - mean["teacher_ce"],
            "loss_difference_standard_error": clustered_standard_error(difference, self.sequence),
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
def evaluate_agreement(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    data: SequenceDataset,
    tokens: int,
    autocast: Callable = contextlib.nullcontext,
    batch_size: int = 4,
) -> dict[str, Any]:
    """Both models on the first `tokens` tokens of `data`, packed documents kept apart.

    Returns:
        perplexity of both (nats per target, exponentiated), their loss difference with its standard error over
        sequences, KL(teacher || student) and KL(student || teacher) in nats per token, share of tokens on which the
        most likely next token is the same, on which the teacher's is among the student's five most likely, share of
        the teacher's five that are among the student's five, and how many targets in how many sequences were counted.
    """
    return compare_models(teacher, student, data, tokens, autocast, batch_size).summary()


@torch.no_grad()
def compare_models(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    data: SequenceDataset,
    tokens: int,
    autocast: Callable = contextlib.nullcontext,
    batch_size: int = 4,
) -> TokenComparison:
    """The same, token by token."""
    sequences = count_eval_sequences(data, max(1, round(tokens / data.length)))
    head_s, head_t = LMHead(student), LMHead(teacher)
    parts: dict[str, list[Tensor]] = {}
    with progress("evaluate", sequences, "sequences") as advance:
        for at in range(0, sequences, batch_size):
            part = data.batch(at, min(batch_size, sequences - at)).to(student.device)
            with autocast():
                hidden_t, hidden_s = run_backbone(teacher, part), run_backbone(student, part)
                found = compare_tokens(head_s, hidden_s, head_t, hidden_t, part.targets)
            where = part.targets != IGNORE_INDEX
            sequence = torch.arange(at, at + len(where), device=where.device)[:, None].expand_as(where)
            found |= {"position": part.position_ids[where], "target": part.targets[where], "sequence": sequence[where]}
            for name, value in found.items():
                parts.setdefault(name, []).append(value.cpu())
            advance(len(part.input_ids))
    joined = {name: torch.cat(values) for name, values in parts.items()}
    position, target, sequence = (joined.pop(name) for name in ("position", "target", "sequence"))
    return TokenComparison(joined, position, target, sequence, sequences, data.length)


class AgreementSettings(MeasureSettings):
    """How much text, in sequences of which length (None: as in the run); prefixes that both models go on from."""

    tokens: Annotated[int, Field(gt=0)] = 8192
    length: Annotated[int, Field(ge=16)] | None = None
    prefixes: Annotated[int, Field(ge=0)] = 16
    prefix: Annotated[int, Field(ge=1)] = 64
    new: Annotated[int, Field(ge=1)] = 64


def measure_agreement(subject: Subject, settings: AgreementSettings) -> MeasureResult:
    """Agreement with the teacher on the subject's held-out text."""
    length = settings.length or (subject.data.seq_len if subject.data else 512)
    sequences, about = subject.load_held_out(length, settings.tokens)
    starts = extract_prefixes(sequences, settings.prefixes, min(settings.prefix, length)) if settings.prefixes else None
    compared = compare_models(subject.teacher.model, subject.model, sequences, settings.tokens)
    result = compared.summary()
    shown = {name: compared.metrics[name] for name in BUCKET_METRICS}
    edges = [2**i for i in range(4, 32) if 2**i < length]
    details: dict[str, Any] = {"by_position": average_by_bucket(shown, compared.position, edges)}
    counts = subject.count_token_frequencies(length)
    if counts is not None:
        per_million = 1e6 * counts.double() / counts.sum()
        details["by_frequency"] = average_by_bucket(shown, per_million[compared.target], FREQUENCY_EDGES)
        about = {**about, "frequencies_from": f"{int(counts.sum()):,} tokens of the training part of the same text"}
    values = {"perplexity": result["student_perplexity"]}
    kept = ("teacher_perplexity", "kl", "reverse_kl", "top1_agreement", "top5_agreement", "top5_overlap")
    values |= {name: result[name] for name in (*kept, "loss_difference")}
    difference = compared.metrics["ce"] - compared.metrics["teacher_ce"]
    of = {"kl": "kl", "reverse_kl": "reverse_kl", "top1_agreement": "top1", "top5_agreement": "top"}
    spread = {name: compared.metrics[number] for name, number in of.items()}
    spread |= {"top5_overlap": compared.metrics["overlap"], "loss_difference": difference}
    errors = {name: clustered_standard_error(value, compared.sequence) for name, value in spread.items()}
    if starts is not None:
        free = compare_free_running(subject.teacher.model, subject.model, starts, settings.new)
        errors["equal_tokens"] = free.pop("equal_tokens_error")
        values |= {name: number for name, number in free.items() if isinstance(number, float)}
        details |= {name: curve for name, curve in free.items() if isinstance(curve, list)}
        about = {**about, "prefixes": len(starts)}
    return MeasureResult(
        values=values,
        errors={name: error for name, error in errors.items() if error is not None},
        data={**about, **{key: result[key] for key in ("targets", "sequences", "length")}},
        details=details,
    )


def draw_agreement(found: list[Measurement]) -> Any:
    """The measure's figure; pictures stand above measures, so theirs is looked up when one is drawn."""
    from limbeck.report.figures.measures import draw_agreement

    return draw_agreement(found)


MEASURE = Measure(
    "agreement",
    "perplexity, divergence and likeliest tokens beside the teacher's, by position and frequency, and free-running",
    AgreementSettings,
    measure_agreement,
    draw_agreement,
)
