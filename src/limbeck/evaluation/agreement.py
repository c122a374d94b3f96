"""The measure `agreement`: perplexity on held-out text, and how close a student's next-token predictions are.

    summary = evaluate_agreement(teacher, student, sequences, tokens=8192)
    summary["student_perplexity"], summary["teacher_perplexity"], summary["kl"], summary["top1_agreement"]
    tokens = compare_models(teacher, student, sequences, tokens=8192)                 # the same for each target
    average_by_bucket(tokens.metrics, tokens.position, [16, 64, 256])     # means of 0 to 15, 16 to 63, ...

Both models see the same packed sequences; numbers are per target, documents kept apart. The measure adds the same
numbers by position and by token frequency, and both models' own continuations (`limbeck.evaluation.free_running`).
Definitions: docs/reference/measures.md. Logits exist for a chunk of tokens at a time, so memory does not grow with
length times vocabulary.

Divergences are computed here rather than with the losses of training, so that a mistake there cannot hide itself.
Legend: B batch, T time, D model width, V vocabulary, n valid targets.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.core.console import progress
from limbeck.data.packing import IGNORE_INDEX, SequenceDataset, count_eval_sequences
from limbeck.evaluation.free_running import (
    Continuations,
    compare_free_running,
    count_common_tokens,
    extract_prefixes,
    write_continuations,
)
from limbeck.evaluation.measure import Measure, MeasureResult, MeasureSettings
from limbeck.evaluation.stored_answers import has_identity, load_or_ask
from limbeck.evaluation.stored_states import StoredStates
from limbeck.evaluation.subject import Subject
from limbeck.evaluation.timing import CacheGrowth
from limbeck.models.backbone import LMHead, run_backbone


def evaluate_agreement(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    data: SequenceDataset,
    tokens: int,
    autocast: Callable = contextlib.nullcontext,
    batch_size: int = 4,
) -> dict[str, Any]:
    """Compare student and teacher on the first `tokens` tokens of `data`, packed documents kept apart.

    Returns:
        perplexity of both; their loss difference (nats per target) with its standard error over sequences;
        KL(teacher || student) and KL(student || teacher) in nats per target; top1_agreement: share of targets with the
        same likeliest token; top5_agreement: with the teacher's likeliest among the student's five likeliest;
        top5_overlap: share of the teacher's five that are among the student's; number of targets and sequences.
    """
    return compare_models(teacher, student, data, tokens, autocast, batch_size).summary()


def compare_models(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    data: SequenceDataset,
    tokens: int,
    autocast: Callable = contextlib.nullcontext,
    batch_size: int = 4,
    states: StoredStates | None = None,
) -> "TokenComparison":
    """Compare student and teacher as in `evaluate_agreement`, but keep the numbers of each target."""
    return compare_students(teacher, [student], data, tokens, autocast, batch_size, states)[0]


@torch.no_grad()
def compare_students(
    teacher: PreTrainedModel,
    students: Sequence[PreTrainedModel],
    data: SequenceDataset,
    tokens: int,
    autocast: Callable = contextlib.nullcontext,
    batch_size: int = 4,
    states: StoredStates | None = None,
) -> list["TokenComparison"]:
    """Compare each of several students with the teacher, whose backbone runs once for all: see `compare_models`.

    Args:
        states: the teacher's; None keeps none.
    """
    states = StoredStates(None) if states is None else states
    n_sequences = count_eval_sequences(data, max(1, round(tokens / data.length)))
    head_t, heads = LMHead(teacher), [LMHead(student) for student in students]
    columns: list[dict[str, list[Tensor]]] = [{} for _ in students]
    with progress("evaluate", n_sequences, "sequences") as advance:
        for first in range(0, n_sequences, batch_size):
            batch = data.batch(first, min(batch_size, n_sequences - first)).to(teacher.device)
            valid = batch.targets != IGNORE_INDEX
            sequence = torch.arange(first, first + len(valid), device=valid.device)[:, None].expand_as(valid)
            places = {"position": batch.position_ids, "target": batch.targets, "sequence": sequence}
            with autocast():
                hidden_t = states.read(batch, partial(run_backbone, teacher, batch))
                for student, head_s, column in zip(students, heads, columns):
                    hidden_s = hidden_t if student is teacher else run_backbone(student, batch)
                    values = compare_tokens(head_s, hidden_s, head_t, hidden_t, batch.targets)
                    for name, value in (*values.items(), *((name, place[valid]) for name, place in places.items())):
                        column.setdefault(name, []).append(value.cpu())
            advance(len(batch.input_ids))
    comparisons = []
    for column in columns:
        metrics = {name: torch.cat(values) for name, values in column.items()}
        position, target, index = (metrics.pop(name) for name in places)
        comparisons.append(TokenComparison(metrics, position, target, index, n_sequences, data.length))
    return comparisons


@dataclass(frozen=True)
class TokenComparison:
    """Both models' predictions of every valid target of a text, in order.

    metrics: tensors [n] of `compare_tokens`.
    position: [n], tokens of the document before the one that predicts.
    target: [n], token to predict.
    sequence: [n], index of its sequence.
    sequences, length: number of sequences, and tokens in each.
    """

    metrics: dict[str, Tensor]
    position: Tensor
    target: Tensor
    sequence: Tensor
    sequences: int
    length: int

    def summary(self) -> dict[str, Any]:
        """Average over all targets; see `evaluate_agreement`."""
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
def compare_tokens(
    student_head: Callable[[Tensor], Tensor],
    student: Tensor,
    teacher_head: Callable[[Tensor], Tensor],
    teacher: Tensor,
    targets: Tensor,
    top_k: int = 5,
    chunk_size: int = 128,
) -> dict[str, Tensor]:
    """Compare both models' predictions of every valid target, in the order of the tokens.

    Args:
        student, teacher: hidden states [B, T, D] of either model; their widths may differ.
        targets: [B, T] next tokens, -100 where there is none.
        top_k: number of likeliest tokens to compare.
        chunk_size: tokens whose logits exist at a time.

    Returns:
        tensors [n] in float32: ce and teacher_ce (nats), kl = KL(teacher || student) and reverse_kl (nats), top1 (1
        where the likeliest token is the same), top (1 where the teacher's likeliest is among the student's `top_k`),
        overlap (share of the teacher's `top_k` that are among the student's).
    """
    valid = (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
    labels, flat_s, flat_t = targets.flatten(), student.flatten(0, 1), teacher.flatten(0, 1)
    chunks: dict[str, list[Tensor]] = {}
    for index in valid.split(chunk_size):
        s, t = student_head(flat_s[index]).float(), teacher_head(flat_t[index]).float()
        width = min(s.shape[-1], t.shape[-1])  # a vocabulary may be padded on one side
        s, t = s[:, :width], t[:, :width]
        log_p, log_q = s.log_softmax(-1), t.log_softmax(-1)  # student, teacher
        target = labels[index, None]
        # Of the logits, not of log_p and log_q: rounding could make ties that the logits do not have.
        top_s, top_t = s.topk(top_k).indices, t.topk(top_k).indices
        metrics = {
            "ce": -log_p.gather(1, target)[:, 0],
            "teacher_ce": -log_q.gather(1, target)[:, 0],
            "top1": (top_s[:, 0] == top_t[:, 0]).float(),
            "top": (top_s == top_t[:, :1]).any(1).float(),
            "overlap": (top_s[:, :, None] == top_t[:, None, :]).any(1).float().mean(1),
        }
        # Last and in place: each pass over [n, V] takes a tenth of the time of a head.
        gap = log_q - log_p
        metrics["kl"] = log_q.exp_().mul_(gap).sum(-1)
        metrics["reverse_kl"] = -log_p.exp_().mul_(gap).sum(-1)
        for name, value in metrics.items():
            chunks.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(values) for name, values in chunks.items()}


def average_by_bucket(metrics: dict[str, Tensor], bucket_key: Tensor, edges: Sequence[float]) -> list[dict[str, Any]]:
    """Average metrics by bucket of `bucket_key`.

    Args:
        metrics: tensors [n].
        bucket_key: [n], the number that determines a token's bucket.
        edges: ascending; a bucket reaches from one edge to just below the next, the first and last are open.

    Returns:
        one dict per bucket with tokens: `from` and `below` (None for an open end), targets, and the mean of each metric
    """
    bucket_index = torch.bucketize(bucket_key.double(), torch.tensor(edges, dtype=torch.float64), right=True)
    ends = [None, *edges, None]
    rows = []
    for bucket in range(len(edges) + 1):
        inside = bucket_index == bucket
        if inside.any():
            means = {name: float(value[inside].double().mean()) for name, value in metrics.items()}
            rows.append({"from": ends[bucket], "below": ends[bucket + 1], "targets": int(inside.sum()), **means})
    return rows


def clustered_standard_error(values: Tensor, sequence: Tensor) -> float | None:
    """Compute the standard error of a mean over tokens [n], given each token's sequence [n].

    Tokens of a sequence are not independent, sequences are; they differ in their number of targets, so this is the
    linearised variance of a ratio of sums (Cochran 1977, section 6.3). None for a single sequence.
    """
    values = values.double()
    count = int(sequence.max()) + 1
    if count < 2:
        return None
    deviation = torch.zeros(count, dtype=torch.float64).index_add(0, sequence, values - values.mean())
    return math.sqrt(float(deviation.square().sum()) * count / (count - 1)) / len(values)


FREQUENCY_EDGES = [1, 10, 100, 1_000, 10_000]  # bucket edges: occurrences per million tokens of training text
BUCKET_METRICS = ("kl", "ce", "teacher_ce", "top1", "top", "overlap")  # averaged in every bucket


class AgreementSettings(MeasureSettings):
    """Settings of the measure `agreement`.

    tokens: amount of text.
    length: tokens in a sequence; None for that of the run.
    prefixes: number of prefixes that both models continue; 0 for none.
    prefix, new: tokens in a prefix and in its continuation.
    """

    tokens: Annotated[int, Field(gt=0)] = 8192
    length: Annotated[int, Field(ge=16)] | None = None
    prefixes: Annotated[int, Field(ge=0)] = 16
    prefix: Annotated[int, Field(ge=1)] = 64
    new: Annotated[int, Field(ge=1)] = 64


def measure_agreement(subject: Subject, settings: AgreementSettings) -> MeasureResult:
    """Measure a subject's agreement with its teacher on the subject's held-out text."""
    length = get_agreement_length(subject, settings)
    sequences, data_info = subject.load_held_out(length, settings.tokens)
    # Before the forward passes, so that a text without long documents is reported at once.
    prefixes = None
    if settings.prefixes:
        prefixes = extract_prefixes(sequences, settings.prefixes, min(settings.prefix, length))
    teacher = subject.teacher
    known = {"model": teacher.fingerprint, "dtype": str(teacher.model.dtype)} if has_identity(teacher) else None
    states = StoredStates(known, subject.ignore_cache)
    comparison = compare_models(teacher.model, subject.model, sequences, settings.tokens, states=states)
    metrics, summary = comparison.metrics, comparison.summary()

    bucket_metrics = {name: metrics[name] for name in BUCKET_METRICS}
    position_edges = [2**i for i in range(4, 32) if 2**i < length]
    details: dict[str, Any] = {"by_position": average_by_bucket(bucket_metrics, comparison.position, position_edges)}
    counts = subject.count_token_frequencies(length)
    if counts is not None:
        per_million = 1e6 * counts.double() / counts.sum()
        details["by_frequency"] = average_by_bucket(bucket_metrics, per_million[comparison.target], FREQUENCY_EDGES)
        data_info["frequencies_from"] = f"{int(counts.sum()):,} tokens of the training part of the same text"

    values = {"perplexity": summary["student_perplexity"]}
    for name in ("teacher_perplexity", "kl", "reverse_kl", "top1_agreement", "top5_agreement", "top5_overlap"):
        values[name] = summary[name]
    values["loss_difference"] = summary["loss_difference"]
    per_token = {
        "kl": metrics["kl"],
        "reverse_kl": metrics["reverse_kl"],
        "top1_agreement": metrics["top1"],
        "top5_agreement": metrics["top"],
        "top5_overlap": metrics["overlap"],
        "loss_difference": metrics["ce"] - metrics["teacher_ce"],
    }
    errors = {name: clustered_standard_error(tokens, comparison.sequence) for name, tokens in per_token.items()}

    if prefixes is not None:
        written = _continue_as_teacher(subject, prefixes, settings.new)
        free_running = compare_free_running(teacher.model, subject.model, prefixes, settings.new, written)
        errors["equal_tokens"] = free_running.pop("equal_tokens_error")
        values |= {name: value for name, value in free_running.items() if isinstance(value, float)}
        details |= {name: curve for name, curve in free_running.items() if isinstance(curve, list)}
        data_info["prefixes"] = len(prefixes)
    data_info |= {key: summary[key] for key in ("targets", "sequences", "length")}
    data_info["state_bytes"] = CacheGrowth.measure(subject.model).at(length)
    return MeasureResult(
        values=values,
        errors={name: error for name, error in errors.items() if error is not None},
        data=data_info,
        details=details,
    )


def _continue_as_teacher(subject: Subject, prefixes: Tensor, new_tokens: int) -> Continuations:
    """Let the teacher of a subject continue the prefixes [N, P], or load what it wrote for another student."""
    teacher = replace(subject.teacher, ignore_cache=subject.ignore_cache)
    width = count_common_tokens(teacher.model, subject.model)
    asked = {"prefixes": prefixes.tolist(), "new": new_tokens, "width": width, "device": teacher.device.type}

    def ask() -> dict[str, Any]:
        written = write_continuations(teacher.model, prefixes, new_tokens, width)
        return {"tokens": written.tokens.tolist(), "perplexity": written.perplexity}

    found = load_or_ask(teacher, "continuations", asked, ask)
    return Continuations(torch.tensor(found["tokens"], device=subject.device), found["perplexity"])


def get_agreement_length(subject: Subject, settings: AgreementSettings) -> int:
    """Return the tokens in a sequence: those of the settings, else those of the subject's run."""
    return settings.length or (subject.data.seq_len if subject.data else 512)


MEASURE = Measure(
    "agreement",
    "perplexity, divergence and likeliest tokens beside the teacher's, by position and frequency, and free-running",
    AgreementSettings,
    measure_agreement,
    baseline_length=get_agreement_length,
)
