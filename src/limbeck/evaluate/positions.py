"""Loss by position and perplexity over growing length on one long text, read in pieces on one cache.

    found = take(find("positions"), subject, {"length": 65536})
    found.values["loss, tokens 4097 to 8192"], found.values["perplexity, first 8192 tokens"]

Of a student only its state goes from piece to piece, so the length is bounded by patience and not by memory. A model of
softmax alone stops at the context that it was made for, unless `past_context` says otherwise.
"""

import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from limbeck.console import console
from limbeck.data.sources import documents, fingerprint
from limbeck.data.special_tokens import around, plain_ids
from limbeck.errors import LimbeckError
from limbeck.evaluate.measurement import Measurement
from limbeck.evaluate.measures import Found, Measure, Settings
from limbeck.evaluate.pieces import context_of, token_losses
from limbeck.evaluate.subject import Subject

BLOCK = 256  # tokens in a block: what the standard errors are taken over, and a point of the curve


class PositionsSettings(Settings):
    """What is read.

    text: a source of documents, the longest of which are read one after the other.
    length: tokens.
    piece: tokens in a forward pass.
    past_context: let a model of softmax alone go on behind the context that it was made for.
    """

    text: str = "embedded:held-out-wikipedia"
    length: Annotated[int, Field(ge=16)] = 8192
    piece: Annotated[int, Field(ge=1)] = 1024
    past_context: bool = False


@dataclass(frozen=True)
class LongText:
    """Tokens [T] and how many documents of the source they are from."""

    ids: Tensor
    documents: int


def long_text(source: str, tokenizer: Any, length: int) -> LongText:
    """The first `length` tokens of the longest documents of a source, parted by blank lines, longest first.

    They begin as the tokenizer begins a text.

    Raises:
        LimbeckError: all documents together are shorter; see also `limbeck.data.sources.documents`.
    """
    ids = list(around(tokenizer).begin)
    texts = sorted(documents(source), key=len, reverse=True)
    for taken, text in enumerate(texts, 1):
        ids += plain_ids(tokenizer, [text if taken == 1 else f"\n\n{text}"])[0]
        if len(ids) >= length:
            return LongText(torch.tensor(ids[:length]), taken)
    raise LimbeckError(f"'{source}' has {len(ids)} tokens in {len(texts)} documents", expected=f"{length} or more")


def measure_positions(subject: Subject, settings: PositionsSettings) -> Found:
    """Loss of every token of one long text."""
    context, length = context_of(subject.model), settings.length
    if not subject.student and context is not None and length > context and not settings.past_context:
        console.print(
            f"positions: {subject.name} is read up to its context of {context:,} tokens, not {length:,}; "
            "positions.past_context=true goes on"
        )
        length = context
    text = long_text(settings.text, subject.tokenizer, length)
    losses = token_losses(subject.model, text.ids, settings.piece).double()
    values, errors, curve = {}, {}, []
    begin = 0
    for end in _ends(len(losses)):
        part = losses[begin:end]
        name = f"loss, tokens {begin + 1} to {end}"
        values[name] = float(part.mean())
        if (error := _error(part)) is not None:
            errors[name] = error
        begin = end
    for end in _ends(len(losses)):
        values[f"perplexity, first {end} tokens"] = math.exp(min(float(losses[:end].mean()), 700))
    for begin in range(0, len(losses), BLOCK):
        part = losses[begin : begin + BLOCK]
        curve.append([begin + len(part), float(part.mean()), float(losses[: begin + len(part)].mean())])
    return Found(
        values,
        errors,
        data={
            "document_source": settings.text,
            "contents": {settings.text: fingerprint(settings.text)},
            "documents": text.documents,
            "targets": len(losses),
        },
        details={"curve": curve, "curve_columns": ["tokens", "loss of the block", "loss so far"], "context": context},
    )


def draw(found: list[Measurement]) -> Any:
    """Loss by position on the left, perplexity of all tokens so far on the right; a dotted line at the context."""
    from limbeck.report.figure import new_figure

    figure = new_figure(9, 3.6)
    by_position, so_far = figure.subplots(1, 2)
    for one in found:
        curve = one.details["curve"]
        ends = [point[0] for point in curve]
        losses = torch.tensor([point[1] for point in curve])
        # neighbours averaged: what differs between blocks is mostly the text, for all models alike
        smooth = [float(losses[max(0, i - 4) : i + 5].mean()) for i in range(len(losses))]
        (line,) = by_position.plot(ends, losses, alpha=0.2, linewidth=0.7)
        by_position.plot(ends, smooth, color=line.get_color(), label=one.model)
        so_far.plot(ends, [math.exp(min(point[2], 700)) for point in curve], color=line.get_color(), label=one.model)
    titles = ("loss by position, nats a token", "perplexity of all tokens so far")
    for axes, title in zip((by_position, so_far), titles):
        for context in {one.details["context"] for one in found} - {None}:
            axes.axvline(context, color="grey", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    so_far.set_yscale("log")
    by_position.legend(fontsize=7)
    return figure


def _ends(n: int) -> list[int]:
    """512, 1024, 2048, ... up to `n`, and `n` unless it is one of them but for the token that has no loss."""
    ends = []
    end = 2 * BLOCK
    while end < n:
        ends.append(end)
        end *= 2
    return [*ends, n]


def _error(losses: Tensor) -> float | None:
    """Standard error of the mean over blocks, since neighbouring tokens are not independent; None for one block."""
    blocks = losses[: len(losses) // BLOCK * BLOCK].view(-1, BLOCK).mean(1)
    return float(blocks.std() / math.sqrt(len(blocks))) if len(blocks) > 1 else None


MEASURE = Measure(
    "positions",
    "loss by position and perplexity over growing length on long text",
    PositionsSettings,
    measure_positions,
    draw,
)
