"""Long texts in chunks on one cache: losses by token, prompts to continue, and the measure `positions`.

    losses = compute_token_losses(model, ids, prefill_chunk_size=1024)          # [T - 1] nats
    prompt = PrefilledPrompt.from_tokens(model, ids, prefill_chunk_size=1024)
    prompt.generate(16), prompt.log_likelihoods([[5, 6], [7]])
    result = run_measure(get_measure("positions"), subject, {"length": 65536})
    result.values["loss, tokens 4097 to 8192"], result.values["perplexity, first 8192 tokens"]

A student's cache is a state of constant size, so a chunk takes the same memory and time wherever it is in the text, and
the length is limited by time only; a softmax model's cache holds the keys and values of all tokens before. There is
never a tensor of T x vocabulary. Legend: T time, D model width, V vocabulary, N answers.
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
from limbeck.evaluation.measure import Measure, MeasureResult, MeasureSettings
from limbeck.evaluation.subject import Subject
from limbeck.models import build_cache_kwargs, cache_bytes
from limbeck.models.backbone import LMHead

LOGITS_CHUNK_SIZE = 256  # tokens whose logits exist at a time
MAX_MASK_BYTES = 2**24  # of the mask that transformers builds for a chunk: its tokens times all tokens so far
MAX_CACHE_COPY_BYTES = 2**30  # of the copies of a cache that score several answers in one batch
BLOCK_TOKENS = 256  # tokens per point of the loss curve; standard errors are taken over such blocks


@torch.no_grad()
def compute_token_losses(model: PreTrainedModel, ids: Tensor, prefill_chunk_size: int = 1024) -> Tensor:
    """Compute the negative log-likelihood [T - 1] in nats of each token but the first, given all before it.

    Args:
        ids: [T] token ids, at least two.
        prefill_chunk_size: tokens per forward pass, fewer far into a text (`MAX_MASK_BYTES`).
    """
    head, cache, losses = LMHead(model), DynamicCache(config=model.config), []
    with progress("stream", len(ids) - 1, "tokens") as advance:
        for begin, end in iter_chunks(len(ids) - 1, prefill_chunk_size):
            hidden = run_chunk(model, ids[begin:end], cache)
            targets = ids[begin + 1 : end + 1].to(model.device)
            for states, labels in zip(hidden.split(LOGITS_CHUNK_SIZE), targets.split(LOGITS_CHUNK_SIZE)):
                losses.append(F.cross_entropy(head(states).float(), labels, reduction="none").cpu())
            advance(end - begin)
    return torch.cat(losses)


@dataclass
class PrefilledPrompt:
    """A model with the cache of a prompt; methods continue on copies, so the cache stays as it is.

    logits: [V] after the prompt's last token.
    """

    model: PreTrainedModel
    cache: Cache
    logits: Tensor

    @classmethod
    @torch.no_grad()
    def from_tokens(cls, model: PreTrainedModel, ids: Tensor, prefill_chunk_size: int = 1024) -> "PrefilledPrompt":
        """Prefill the prompt `ids` [T] in chunks of `prefill_chunk_size` tokens."""
        cache = DynamicCache(config=model.config)
        for begin, end in iter_chunks(len(ids), prefill_chunk_size):
            hidden = run_chunk(model, ids[begin:end], cache)
        return cls(model, cache, LMHead(model)(hidden[-1:])[0])

    @torch.no_grad()
    def generate(
        self, new_tokens: int, stopping_criteria: Callable[[list[int]], bool] = lambda tokens: False
    ) -> list[int]:
        """Decode greedily, at most `new_tokens` tokens.

        Stops after an end-of-text token or as soon as `stopping_criteria` of the tokens so far is true.
        """
        stops = self.model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        cache, logits, tokens = copy.deepcopy(self.cache), self.logits, []
        while True:
            tokens.append(int(logits.argmax()))
            if len(tokens) == new_tokens or tokens[-1] in stops or stopping_criteria(tokens):
                return tokens
            hidden = run_chunk(self.model, torch.tensor(tokens[-1:]), cache)
            logits = LMHead(self.model)(hidden[-1:])[0]

    @torch.no_grad()
    def log_likelihoods(self, answers: list[list[int]]) -> Tensor:
        """Compute the log-probability [N] in nats of each answer's tokens after the prompt."""
        log_probs = self.logits.float().log_softmax(-1)
        sums = [float(log_probs[answer[0]]) for answer in answers]
        # The prompt's logits score first tokens; only longer answers need another forward pass.
        longer = [index for index, answer in enumerate(answers) if len(answer) > 1]
        batch_size = max(1, MAX_CACHE_COPY_BYTES // max(1, cache_bytes(self.cache)))
        backbone = self.model.get_decoder()
        for begin in range(0, len(longer), batch_size):
            indices = longer[begin : begin + batch_size]
            width = max(len(answers[index]) for index in indices) - 1
            # Padding on the right comes after an answer's last token, so it changes nothing.
            padded = [[*answers[index][:-1], *[0] * (width - len(answers[index]) + 1)] for index in indices]
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(len(indices))
            inputs = torch.tensor(padded).to(self.model.device)
            hidden = backbone(input_ids=inputs, **build_cache_kwargs(backbone, cache)).last_hidden_state
            for index, states in zip(indices, hidden):
                targets = torch.tensor(answers[index][1:], device=states.device)
                logits = LMHead(self.model)(states[: len(targets)]).float()
                sums[index] -= float(F.cross_entropy(logits, targets, reduction="sum"))
        return torch.tensor(sums)


def get_context_length(model: PreTrainedModel) -> int | None:
    """Look up the context length of a model's config, in tokens; None if the config has none."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_prompt_fits(name: str, prompt: int, answer: int, length: int) -> None:
    """Raises LimbeckError if prompt and answer have more than `length` tokens."""
    if prompt + answer > length:
        raise LimbeckError(
            f"{name}: a prompt of {prompt} tokens and an answer of {answer} do not fit in {length}",
            expected=f"a length of {prompt + answer} or more",
        )


def iter_chunks(n: int, chunk_size: int) -> Iterator[tuple[int, int]]:
    """Yield begin and end of each chunk of `n` tokens; chunks shrink so that no mask exceeds `MAX_MASK_BYTES`."""
    begin = 0
    while begin < n:
        end = min(n, begin + min(chunk_size, max(16, MAX_MASK_BYTES // (begin + chunk_size))))
        yield begin, end
        begin = end


def run_chunk(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Compute the hidden states [T, D] of one sequence's next tokens [T]; updates the cache."""
    backbone = model.get_decoder()
    return backbone(input_ids=ids[None].to(model.device), **build_cache_kwargs(backbone, cache)).last_hidden_state[0]


class PositionsSettings(MeasureSettings):
    """Settings of the measure `positions`.

    text: a source of documents; the longest are concatenated.
    length: tokens.
    piece: tokens per forward pass.
    past_context: let a softmax model continue beyond the context it was made for.
    """

    text: str = "embedded:held-out-wikipedia"
    length: Annotated[int, Field(ge=16)] = 8192
    piece: Annotated[int, Field(ge=1)] = 1024
    past_context: bool = False


def measure_positions(subject: Subject, settings: PositionsSettings) -> MeasureResult:
    """Measure the loss of every token of one long text: means between and up to powers of two, and a curve."""
    context, length = get_context_length(subject.model), settings.length
    if not subject.is_student and context is not None and length > context and not settings.past_context:
        console.print(
            f"positions: limiting {subject.name} to its context of {context:,} tokens instead of {length:,}; "
            "positions.past_context=true continues beyond it",
            markup=False,
        )
        length = context
    text = load_long_text(settings.text, subject.tokenizer, length)
    losses = compute_token_losses(subject.model, text.ids, settings.piece).double()
    values, errors, curve = {}, {}, []
    ends = _list_interval_ends(len(losses))
    for begin, end in zip([0, *ends], ends):
        interval = losses[begin:end]
        name = f"loss, tokens {begin + 1} to {end}"
        values[name] = float(interval.mean())
        if (error := _compute_block_stderr(interval)) is not None:
            errors[name] = error
    for end in ends:
        values[f"perplexity, first {end} tokens"] = math.exp(min(float(losses[:end].mean()), 700))
    for begin in range(0, len(losses), BLOCK_TOKENS):
        block = losses[begin : begin + BLOCK_TOKENS]
        end = begin + len(block)
        curve.append([end, float(block.mean()), float(losses[:end].mean())])
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


@dataclass(frozen=True)
class LongText:
    """Tokens [T] and the number of documents they are from."""

    ids: Tensor
    documents: int


def load_long_text(source: str, tokenizer: Any, length: int) -> LongText:
    """Load the first `length` tokens of a source's documents, longest first, separated by blank lines.

    The tokenizer's special tokens come first.

    Raises:
        LimbeckError: all documents together are shorter; see also `limbeck.data.documents.iter_documents`.
    """
    ids = list(find_special_token_ids(tokenizer).prefix_ids)
    texts = sorted(iter_documents(source), key=len, reverse=True)
    for count, text in enumerate(texts, 1):
        ids += encode_plain_texts(tokenizer, [text if count == 1 else f"\n\n{text}"])[0]
        if len(ids) >= length:
            return LongText(torch.tensor(ids[:length]), count)
    raise LimbeckError(f"'{source}' has {len(ids)} tokens in {len(texts)} documents", expected=f"{length} or more")


def _list_interval_ends(n: int) -> list[int]:
    """List 512, 1024, 2048, ... below `n`, and `n` itself."""
    ends = []
    end = 2 * BLOCK_TOKENS
    while end < n:
        ends.append(end)
        end *= 2
    return [*ends, n]


def _compute_block_stderr(losses: Tensor) -> float | None:
    """Compute the standard error of the mean over blocks, since neighboring tokens are not independent.

    None for a single block.
    """
    blocks = losses[: len(losses) // BLOCK_TOKENS * BLOCK_TOKENS].view(-1, BLOCK_TOKENS).mean(1)
    return float(blocks.std() / math.sqrt(len(blocks))) if len(blocks) > 1 else None


MEASURE = Measure(
    "positions",
    "loss by position and perplexity over growing length on long text",
    PositionsSettings,
    measure_positions,
)
