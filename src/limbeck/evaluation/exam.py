"""The measure `exam`: loss by position on the longest documents of a text, and on a passage that comes again.

    result = run_measure(get_measure("exam"), subject, {})
    result.values["perplexity"], result.values["perplexity@512"], result.values["loss, tokens 65 to 256"]
    result.values["repeat_loss@512"], result.errors["repeat_loss@512"]

Each document stands alone in its sequence, so all that a model can use is the document itself, up to `length` tokens
of it. The repeat is A B A: A the document's first `repeat_tokens` tokens and B what follows them, so a model that can
look back len(A) + len(B) tokens, the distance, pays next to nothing for the second A. The first token of the second A
counts nowhere: nothing tells that it comes. Documents are the units of all standard errors. Legend: T time.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel

from limbeck.core.console import console, progress
from limbeck.core.errors import LimbeckError
from limbeck.data.documents import fingerprint_source, iter_documents
from limbeck.data.special_tokens import encode_plain_texts, find_special_token_ids
from limbeck.evaluation.agreement import clustered_standard_error
from limbeck.evaluation.long_text import LOGITS_CHUNK_SIZE, get_context_length, iter_chunks, run_chunk
from limbeck.evaluation.measure import Measure, MeasureResult, MeasureSettings
from limbeck.evaluation.subject import Subject
from limbeck.evaluation.timing import CacheGrowth
from limbeck.models.backbone import LMHead

HELD_OUT_TEXT = "embedded:held-out-wikipedia"
POSITION_EDGES = (64, 256, 512)  # targets; from the last on the edges double
SHORT_TOKENS = 512  # targets of the second perplexity
CHUNK_SIZE = 1024  # tokens in a forward pass
REPEAT_TOKENS = 256
GAPS = (256, 512, 1024)  # tokens of B


class ExamSettings(MeasureSettings):
    """Settings of the measure `exam`.

    text: a source of documents, of which the longest are taken.
    documents: their number.
    length: tokens of each.
    repeat_tokens, gaps: tokens of A, and of each B, in the repeats A B A; a repeat longer than `length` is left out.
    """

    text: str = HELD_OUT_TEXT
    documents: Annotated[int, Field(ge=1)] = 4
    length: Annotated[int, Field(ge=16)] = 2048
    repeat_tokens: Annotated[int, Field(ge=2)] = REPEAT_TOKENS
    gaps: list[Annotated[int, Field(ge=0)]] = list(GAPS)


@dataclass(frozen=True)
class ExamDocuments:
    """Documents [T] as tokens, special tokens first.

    prefix: number of special tokens before the text, which do not come again.
    """

    source: str
    tokens: list[Tensor]
    prefix: int


def load_exam_documents(source: str, tokenizer: Any, documents: int, length: int) -> ExamDocuments:
    """Load the first `length` tokens of each of the longest documents (in characters) of a source.

    Documents that are shorter are said and taken as far as they go.

    Raises:
        LimbeckError: there are fewer documents, or one ends before the first of `POSITION_EDGES`, or before `length`
            where that is less; see also `iter_documents`.
    """
    texts = sorted(iter_documents(source), key=len, reverse=True)
    if len(texts) < documents:
        raise LimbeckError(
            f"'{source}' has {len(texts)} document{'s' * (len(texts) != 1)}",
            expected=f"{documents} or more for the exam",
            hint=f"fewer documents, {len(texts)}, or another text",
        )
    prefix = list(find_special_token_ids(tokenizer).prefix_ids)
    encoded = encode_plain_texts(tokenizer, texts[:documents])
    tokens = [torch.tensor([*prefix, *ids][:length]) for ids in encoded]
    counts = [len(ids) for ids in tokens]
    if min(counts) < min(length, POSITION_EDGES[0]):
        raise LimbeckError(
            f"the {documents} longest documents of '{source}' have {', '.join(f'{n:,}' for n in counts)} tokens",
            expected=f"at least {min(length, POSITION_EDGES[0])} each for the exam",
            hint="fewer documents, or a text with longer ones",
        )
    if short := [n for n in counts if n < length]:
        console.print(
            f"exam: of {documents} documents {len(short)} are shorter than {length:,} tokens "
            f"({', '.join(f'{n:,}' for n in short)}) and count as far as they go",
            markup=False,
        )
    return ExamDocuments(source, tokens, len(prefix))


@torch.no_grad()
def compute_document_losses(
    model: PreTrainedModel, ids: Tensor, repeat_tokens: int, gaps: Sequence[int], prefix: int = 0
) -> tuple[Tensor, dict[int, Tensor]]:
    """Compute the losses in nats of a document [T - 1] and, by distance, of a second A [repeat_tokens - 1] behind A B.

    A B is the document's own beginning, so one pass over the document serves all repeats: where B ends, A is read on a
    copy of the cache.

    Args:
        ids: [T] tokens of the document, at least two.
        gaps: tokens of each B; none may reach beyond the document.
        prefix: number of tokens before A.
    """
    passage = ids[prefix : prefix + repeat_tokens]
    distance_at = {prefix + repeat_tokens + gap: repeat_tokens + gap for gap in gaps}  # by the end of B
    cache, losses, repeats = DynamicCache(config=model.config), [], {}
    for begin, end in pairwise(sorted({0, *distance_at, len(ids)})):
        losses.append(_read(model, ids[begin:end], ids[begin + 1 : end + 1], cache))
        if end in distance_at:
            repeats[distance_at[end]] = _read(model, passage[:-1], passage[1:], copy.deepcopy(cache))
    return torch.cat(losses), repeats


def _read(model: PreTrainedModel, ids: Tensor, targets: Tensor, cache: Cache) -> Tensor:
    """Read tokens [T] into the cache, and compute the losses of the targets, the next tokens: [T], or [T - 1]."""
    head, losses = LMHead(model), []
    for begin, end in iter_chunks(len(ids), CHUNK_SIZE):
        hidden = run_chunk(model, ids[begin:end], cache)[: max(0, len(targets) - begin)]
        labels = targets[begin : begin + len(hidden)].to(hidden.device)
        for states, chunk in zip(hidden.split(LOGITS_CHUNK_SIZE), labels.split(LOGITS_CHUNK_SIZE)):
            losses.append(_cross_entropy(head(states), chunk))
    return torch.cat(losses) if losses else torch.zeros(0)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(wide, labels, reduction="none").cpu()


@dataclass(frozen=True)
class ExamResult:
    """Losses of one model: of each document [T - 1], and by distance of the second A in each document that has it."""

    documents: list[Tensor]
    repeats: dict[int, list[Tensor]]

    def summarize(self) -> tuple[dict[str, float], dict[str, float]]:
        """Average the losses.

        Returns:
            values: `perplexity` of all targets, `perplexity@512` of the first ones, `repeat_loss@DISTANCE` in nats;
            errors: their standard errors over documents, without those of which there is one document.
        """
        values, errors = {}, {}
        for name, limit in (("perplexity", None), (f"perplexity@{SHORT_TOKENS}", SHORT_TOKENS)):
            if limit is not None and max(map(len, self.documents)) <= limit:
                continue
            loss, error = _average([losses[:limit] for losses in self.documents])
            values[name] = math.exp(min(loss, 700.0))
            if error is not None:
                errors[name] = values[name] * error  # d exp(x) = exp(x) dx
        for distance, losses in self.repeats.items():
            _record(f"repeat_loss@{distance}", losses, values, errors)
        return values, errors

    def average_by_position(self) -> tuple[dict[str, float], dict[str, float]]:
        """Average the losses between `POSITION_EDGES`: values and standard errors in nats, as in `summarize`."""
        values: dict[str, float] = {}
        errors: dict[str, float] = {}
        for begin, end in pairwise(list_position_edges(max(map(len, self.documents)))):
            reached = [losses[begin:end] for losses in self.documents if len(losses) > begin]
            _record(f"loss, tokens {begin + 1} to {end}", reached, values, errors)
        return values, errors


def list_position_edges(targets: int) -> list[int]:
    """List 0, 64, 256, 512, 1024, ... below `targets`, and `targets` itself."""
    edges = [0, *(edge for edge in POSITION_EDGES if edge < targets)]
    while edges[-1] >= POSITION_EDGES[-1] and 2 * edges[-1] < targets:
        edges.append(2 * edges[-1])
    return [*edges, targets]


def _record(name: str, losses: list[Tensor], values: dict[str, float], errors: dict[str, float]) -> None:
    values[name], error = _average(losses)
    if error is not None:
        errors[name] = error


def _average(documents: list[Tensor]) -> tuple[float, float | None]:
    """Average over the tokens of all documents; with the standard error over documents, None for one."""
    index = torch.cat([torch.full((len(losses),), number) for number, losses in enumerate(documents)])
    losses = torch.cat(documents).double()
    return float(losses.mean()), clustered_standard_error(losses, index)


def run_exam(
    model: PreTrainedModel,
    documents: ExamDocuments,
    length: int,
    repeat_tokens: int = REPEAT_TOKENS,
    gaps: Sequence[int] = GAPS,
    label: str = "exam",
) -> ExamResult:
    """Compute a model's losses on the documents, and on the repeats that fit into them and into `length` tokens.

    Args:
        label: of the progress line.
    """
    losses: list[Tensor] = []
    repeats: dict[int, list[Tensor]] = {}
    with progress(label, len(documents.tokens), "documents") as advance:
        for ids in documents.tokens:
            fitting = list_fitting_gaps(len(ids) - documents.prefix, length - documents.prefix, repeat_tokens, gaps)
            of_document, again = compute_document_losses(model, ids, repeat_tokens, fitting, documents.prefix)
            losses.append(of_document)
            for distance, of_repeat in again.items():
                repeats.setdefault(distance, []).append(of_repeat)
            advance(1)
    return ExamResult(losses, dict(sorted(repeats.items())))


def list_fitting_gaps(tokens: int, length: int, repeat_tokens: int, gaps: Sequence[int]) -> list[int]:
    """List the gaps for which A B is within a document of `tokens` tokens, and A B A within `length`."""
    return [gap for gap in sorted(set(gaps)) if repeat_tokens + gap <= tokens and 2 * repeat_tokens + gap <= length]


def measure_exam(subject: Subject, settings: ExamSettings) -> MeasureResult:
    """Measure the loss by position and on repeats; the length is limited by the model's context."""
    length = get_exam_length(subject, settings)
    if length < settings.length:
        console.print(
            f"exam: the context of {subject.name} is {length:,} tokens, so documents end there "
            f"instead of at {settings.length:,}",
            markup=False,
        )
    documents = load_exam_documents(settings.text, subject.tokenizer, settings.documents, length)
    result = run_exam(subject.model, documents, length, settings.repeat_tokens, settings.gaps)
    values, errors = result.summarize()
    by_position, position_errors = result.average_by_position()
    values["state_bytes"] = CacheGrowth.measure(subject.model).at(length)
    return MeasureResult(
        {**values, **by_position},
        {**errors, **position_errors},
        data={
            "document_source": settings.text,
            "contents": {settings.text: fingerprint_source(settings.text)},
            "documents": len(documents.tokens),
            "tokens": [len(ids) for ids in documents.tokens],
            "repeats": {str(distance): len(losses) for distance, losses in result.repeats.items()},
        },
        details={
            "edges": list_position_edges(max(map(len, result.documents))),
            "distances": list(result.repeats),
            "by_document": [float(losses.double().mean()) for losses in result.documents],
        },
    )


def get_exam_length(subject: Subject, settings: ExamSettings) -> int:
    """Return the tokens of a document that a model is examined on: `length`, or its context where that is shorter."""
    return min(settings.length, get_context_length(subject.model) or settings.length)


MEASURE = Measure(
    "exam",
    "perplexity and loss by position on the longest documents, one a sequence, and the loss on a repeated passage",
    ExamSettings,
    measure_exam,
    baseline_length=get_exam_length,
)
