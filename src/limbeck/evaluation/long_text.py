"""A long text through a model in pieces on one cache: losses, what follows a prompt, and how likely an answer is.

    losses = compute_token_losses(model, ids, prefill_chunk_size=1024)          # [T - 1] nats, no T x vocabulary tensor
    prompt = PrefilledPrompt.from_tokens(model, ids, prefill_chunk_size=1024)               # a cache and the logits behind the last token
    prompt.generate(16), prompt.log_likelihoods([[5, 6], [7]])

Of a student the cache is a state of constant size, so a piece takes the same memory and time wherever it stands in the
text; of a softmax model it is the keys and values of all tokens before.

Loss by position and perplexity over growing length on one long text, read in pieces on one cache.

    found = run_measure(get_measure("positions"), subject, {"length": 65536})
    found.values["loss, tokens 4097 to 8192"], found.values["perplexity, first 8192 tokens"]

Of a student only its state goes from piece to piece, so the length is bounded by patience and not by memory. A model of
softmax alone stops at the context that it was made for, unless `past_context` says otherwise.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from limbeck.evaluation.measure import Measure, Measurement, MeasureResult, MeasureSettings
from limbeck.evaluation.subject import Subject
from limbeck.models import build_cache_kwargs, cache_bytes
from limbeck.models.backbone import LMHead

HEAD_ROWS = 256  # tokens whose logits exist at a time
MASK_BYTES = 2**24  # of the mask that transformers builds for a piece: its tokens times all tokens so far
COPIES_BYTES = 2**30  # how much the copies of a cache may take that score answers side by side


@torch.no_grad()
def compute_token_losses(model: PreTrainedModel, ids: Tensor, prefill_chunk_size: int = 1024) -> Tensor:
    """Negative log-likelihood [T - 1] in nats of each token but the first, given all before it.

    Args:
        ids: [T] token ids, at least two.
        prefill_chunk_size: tokens in a forward pass, fewer far into a text (`MASK_BYTES`).
    """
    head, cache, losses = LMHead(model), DynamicCache(config=model.config), []
    with progress("stream", len(ids) - 1, "tokens") as advance:
        for begin, end in _pieces(len(ids) - 1, prefill_chunk_size):
            inputs = ids[begin:end]
            hidden = _body(model, inputs, cache)
            for row in range(0, len(inputs), HEAD_ROWS):
                rows = hidden[row : row + HEAD_ROWS]
                targets = ids[begin + row + 1 : begin + row + 1 + len(rows)].to(model.device)
                losses.append(F.cross_entropy(head(rows).float(), targets, reduction="none").cpu())
            advance(len(inputs))
    return torch.cat(losses)


@dataclass
class PrefilledPrompt:
    """A model that has read a prompt. What is asked of it leaves the cache as it was.

    logits: [vocabulary] behind the prompt's last token.
    """

    model: PreTrainedModel
    cache: Cache
    logits: Tensor

    @classmethod
    @torch.no_grad()
    def from_tokens(cls, model: PreTrainedModel, ids: Tensor, prefill_chunk_size: int = 1024) -> "PrefilledPrompt":
        """Read the prompt `ids` [T] in pieces of `prefill_chunk_size` tokens."""
        cache = DynamicCache(config=model.config)
        for begin, end in _pieces(len(ids), prefill_chunk_size):
            hidden = _body(model, ids[begin:end], cache)
        return cls(model, cache, LMHead(model)(hidden[-1:])[0])

    @torch.no_grad()
    def generate(
        self, new_tokens: int, stopping_criteria: Callable[[list[int]], bool] = lambda tokens: False
    ) -> list[int]:
        """The most likely token again and again, at most `new_tokens`; stops behind an end of text or when `stopping_criteria`."""
        stops = self.model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        cache, logits, made = copy.deepcopy(self.cache), self.logits, []
        while True:
            made.append(int(logits.argmax()))
            if len(made) == new_tokens or made[-1] in stops or stopping_criteria(made):
                return made
            hidden = _body(self.model, torch.tensor(made[-1:]), cache)
            logits = LMHead(self.model)(hidden[-1:])[0]

    @torch.no_grad()
    def log_likelihoods(self, answers: list[list[int]]) -> Tensor:
        """Log-probability [N] in nats of each answer's tokens behind the prompt, all given those before."""
        first = self.logits.float().log_softmax(-1)
        sums = [float(first[answer[0]]) for answer in answers]
        longer = [i for i, answer in enumerate(answers) if len(answer) > 1]
        side_by_side = max(1, COPIES_BYTES // max(1, cache_bytes(self.cache)))
        for begin in range(0, len(longer), side_by_side):
            rows = longer[begin : begin + side_by_side]
            width = max(len(answers[row]) for row in rows) - 1
            # what an answer is padded with on the right comes behind its last token, so it changes nothing
            inputs = torch.tensor([[*answers[row][:-1], *[0] * (width - len(answers[row]) + 1)] for row in rows])
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(len(rows))
            inputs = inputs.to(self.model.device)
            body = self.model.get_decoder()
            hidden = body(input_ids=inputs, **build_cache_kwargs(body, cache)).last_hidden_state
            for row, states in zip(rows, hidden):
                rest = torch.tensor(answers[row][1:], device=states.device)
                logits = LMHead(self.model)(states[: len(rest)]).float()
                sums[row] -= float(F.cross_entropy(logits, rest, reduction="sum"))
        return torch.tensor(sums)


def get_context_length(model: PreTrainedModel) -> int | None:
    """Tokens of context that the family was made for; None where its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_prompt_fits(what: str, prompt: int, answer: int, length: int) -> None:
    """Raises LimbeckError where prompt and answer take more than `length` tokens."""
    if prompt + answer > length:
        raise LimbeckError(
            f"{what}: {prompt} tokens of prompt and {answer} of answer do not fit in {length}",
            expected=f"a length of {prompt + answer} or more",
        )


def _pieces(n: int, prefill_chunk_size: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each piece of `n` tokens, shorter and shorter so that no mask outgrows `MASK_BYTES`."""
    begin = 0
    while begin < n:
        end = min(n, begin + min(prefill_chunk_size, max(16, MASK_BYTES // (begin + prefill_chunk_size))))
        yield begin, end
        begin = end


def _body(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Hidden states [T, D] of one sequence's next tokens [T]; the cache goes on."""
    inputs = ids[None].to(model.device)
    body = model.get_decoder()
    return body(input_ids=inputs, **build_cache_kwargs(body, cache)).last_hidden_state[0]


BLOCK_TOKENS = 256  # tokens in a block: what the standard errors are taken over, and a point of the curve


class PositionsSettings(MeasureSettings):
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


def load_long_text(source: str, tokenizer: Any, length: int) -> LongText:
    """The first `length` tokens of the longest documents of a source, parted by blank lines, longest first.

    They begin as the tokenizer begins a text.

    Raises:
        LimbeckError: all documents together are shorter; see also `limbeck.data.documents.iter_documents`.
    """
    ids = list(find_special_token_ids(tokenizer).prefix_ids)
    texts = sorted(iter_documents(source), key=len, reverse=True)
    for taken, text in enumerate(texts, 1):
        ids += encode_plain_texts(tokenizer, [text if taken == 1 else f"\n\n{text}"])[0]
        if len(ids) >= length:
            return LongText(torch.tensor(ids[:length]), taken)
    raise LimbeckError(f"'{source}' has {len(ids)} tokens in {len(texts)} documents", expected=f"{length} or more")


def measure_positions(subject: Subject, settings: PositionsSettings) -> MeasureResult:
    """Loss of every token of one long text."""
    context, length = get_context_length(subject.model), settings.length
    if not subject.is_student and context is not None and length > context and not settings.past_context:
        console.print(
            f"positions: {subject.name} is read up to its context of {context:,} tokens, not {length:,}; "
            "positions.past_context=true goes on"
        )
        length = context
    text = load_long_text(settings.text, subject.tokenizer, length)
    losses = compute_token_losses(subject.model, text.ids, settings.piece).double()
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
    for begin in range(0, len(losses), BLOCK_TOKENS):
        part = losses[begin : begin + BLOCK_TOKENS]
        curve.append([begin + len(part), float(part.mean()), float(losses[: begin + len(part)].mean())])
    return MeasureResult(
        values,
        errors,
        data={
            "document_source": settings.text,
            "contents": {settings.text: fingerprint_source(settings.text)},
            "documents": text.documents,
            "targets": len(losses),
        },
        details={"curve": curve, "curve_columns": ["tokens", "loss of the block", "loss so far"], "context": context},
    )


def draw_positions(found: list[Measurement]) -> Any:
    """Loss by position on the left, perplexity of all tokens so far on the right; a dotted line at the context."""
    from limbeck.report.figures.style import create_figure

    figure = create_figure(9, 3.6)
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
    end = 2 * BLOCK_TOKENS
    while end < n:
        ends.append(end)
        end *= 2
    return [*ends, n]


def _error(losses: Tensor) -> float | None:
    """Standard error of the mean over blocks, since neighbouring tokens are not independent; None for one block."""
    blocks = losses[: len(losses) // BLOCK_TOKENS * BLOCK_TOKENS].view(-1, BLOCK_TOKENS).mean(1)
    return float(blocks.std() / math.sqrt(len(blocks))) if len(blocks) > 1 else None


MEASURE = Measure(
    "positions",
    "loss by position and perplexity over growing length on long text",
    PositionsSettings,
    measure_positions,
    draw_positions,
)
