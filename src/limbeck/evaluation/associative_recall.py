"""The measure `recall`: multi-query associative recall over the number of pairs, with real words and no training.

    result = run_measure(get_measure("recall"), subject, {"pairs": [4, 16, 64]})
    result.values["recall, 16 pairs"], result.values["chance, 16 pairs"], result.values["state bytes, 16 pairs"]

The task is MQAR (Zoology, arXiv 2312.04927, section 4): pairs of a key and a value, then every key again in another
order, each to be followed by its value. MQAR trains a model on arbitrary symbols; a pretrained model is asked without
training, so keys and values are English nouns, one pair per line:

     river: candle
     window: soldier
     window: soldier
     river: candle

All keys and values of a sequence are different. The sequence continues with the true value whatever the model predicts,
as in MQAR, so one forward pass answers all queries. A query is recalled if the true value is the likeliest of the
values shown; chance is one in the number of pairs. Legend: N pairs, T time, V vocabulary.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError
from limbeck.data.offline.embedded import ensure_embedded_corpus
from limbeck.data.special_tokens import encode_plain_texts, find_special_token_ids
from limbeck.evaluation.long_text import check_prompt_fits, get_context_length
from limbeck.evaluation.measure import Measure, MeasureResult, MeasureSettings
from limbeck.evaluation.retrieval import proportion_with_stderr
from limbeck.evaluation.subject import Subject
from limbeck.models import build_cache_kwargs, cache_bytes
from limbeck.models.backbone import LMHead


class RecallSettings(MeasureSettings):
    """Settings of the measure `recall`.

    pairs: numbers of pairs in a sequence.
    sequences: number of sequences for each number of pairs.
    sign: text between a key and its value; "" for none, as in MQAR.
    past_context: also ask a softmax model beyond the context it was made for.
    """

    pairs: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)] = [4, 8, 16, 32, 64, 128]
    sequences: Annotated[int, Field(ge=1)] = 4
    sign: str = ":"
    past_context: bool = False


def measure_recall(subject: Subject, settings: RecallSettings) -> MeasureResult:
    """Measure recall for each number of pairs; tokenizer and seed determine the sequences."""
    words = select_single_token_words(load_nouns(), subject.tokenizer)
    colon, newline = encode_plain_texts(subject.tokenizer, [settings.sign, "\n"])
    prefix = list(find_special_token_ids(subject.tokenizer).prefix_ids)
    context = None if subject.is_student or settings.past_context else get_context_length(subject.model)
    values, errors, state_sizes = {}, {}, []
    with progress("recall", len(settings.pairs) * settings.sequences, "sequences") as advance:
        for pairs in settings.pairs:
            right_among_shown: list[bool] = []
            right_among_all: list[bool] = []
            for index in range(settings.sequences):
                rng = random.Random(f"{subject.seed} {pairs} {index}")
                sequence = RecallSequence.sample(words, pairs, rng, colon, newline, prefix)
                if context is not None:
                    check_prompt_fits(f"recall, {pairs} pairs", len(sequence.ids), 0, context)
                logits, state_size = compute_query_logits(subject.model, sequence)
                predicted = sequence.values[logits[:, sequence.values].argmax(-1)]
                right_among_shown += (predicted == sequence.answers).tolist()
                right_among_all += (logits.argmax(-1) == sequence.answers).tolist()
                advance(1, note=f"{pairs} pairs")
            name = f"recall, {pairs} pairs"
            values[name], errors[name] = proportion_with_stderr(right_among_shown)
            name = f"recall, {pairs} pairs, among all tokens"
            values[name], errors[name] = proportion_with_stderr(right_among_all)
            values[f"chance, {pairs} pairs"] = 1 / pairs
            values[f"state bytes, {pairs} pairs"] = state_size
            state_sizes.append(state_size)
    return MeasureResult(
        values,
        errors,
        data={"words": len(words), "sequences": settings.sequences},
        details={"pairs": settings.pairs, "state_bytes": state_sizes},
    )


@dataclass(frozen=True)
class RecallSequence:
    """One sequence of N pairs and N queries.

    ids: [T] tokens.
    queries: [N] positions whose next token is a value: those of the colons, of the keys if there are none.
    values: [N] tokens of the values shown.
    answers: [N] true value of each query.
    """

    ids: Tensor
    queries: Tensor
    values: Tensor
    answers: Tensor

    @classmethod
    def sample(
        cls,
        words: list[int],
        pairs: int,
        rng: random.Random,
        colon: list[int],
        newline: list[int],
        prefix: Sequence[int] = (),
    ) -> "RecallSequence":
        """Sample `pairs` pairs and the order of the queries.

        Args:
            words: tokens that may be keys or values.
            colon, newline: tokens behind a key and behind a value.
            prefix: tokens at the beginning of the sequence.

        Raises:
            LimbeckError: fewer words than keys and values.
        """
        if len(words) < 2 * pairs:
            raise LimbeckError(
                f"{pairs} pairs need {2 * pairs} different words, there are {len(words)}",
                expected=f"{len(words) // 2} pairs or fewer",
                hint=f"--set recall.pairs=[{','.join(str(n) for n in (2, 4, 8, 16, 32, 64) if 2 * n <= len(words))}]",
            )
        sampled = rng.sample(words, 2 * pairs)
        shown_pairs = list(zip(sampled[:pairs], sampled[pairs:]))
        queried_pairs = rng.sample(shown_pairs, pairs)
        ids = list(prefix)
        value_positions = []
        for key, value in shown_pairs + queried_pairs:
            ids += [key, *colon]
            value_positions.append(len(ids) - 1)
            ids += [value, *newline]
        return cls(
            torch.tensor(ids),
            torch.tensor(value_positions[pairs:]),
            torch.tensor(sampled[pairs:]),
            torch.tensor([value for _, value in queried_pairs]),
        )


def load_nouns() -> list[str]:
    """Load wonderwords' nouns, building them in the cache if they are missing."""
    with open(ensure_embedded_corpus("haystack"), encoding="utf-8") as file:
        return next(row["text"] for row in map(json.loads, file) if row["source"] == "nouns").split()


def select_single_token_words(words: list[str], tokenizer: Any) -> list[int]:
    """Select the words that are a single token behind a space; returns their tokens without duplicates."""
    plain = [f" {word}" for word in words if len(word) > 2 and word.isalpha() and word.islower()]
    encoded = encode_plain_texts(tokenizer, plain)
    return list(dict.fromkeys(ids[0] for ids in encoded if len(ids) == 1))


@torch.no_grad()
def compute_query_logits(model: PreTrainedModel, sequence: RecallSequence) -> tuple[Tensor, int]:
    """Compute the logits [N, V] at the queries, on the CPU, and the bytes of the cache after the last token."""
    cache = DynamicCache(config=model.config)
    ids = sequence.ids[None].to(model.device)
    backbone = model.get_decoder()
    hidden = backbone(input_ids=ids, **build_cache_kwargs(backbone, cache)).last_hidden_state[0]
    return LMHead(model)(hidden[sequence.queries.to(hidden.device)]).float().cpu(), cache_bytes(cache)


def get_recall_length(subject: Subject, settings: RecallSettings) -> int:
    """Return the tokens of the longest sequence, at which a student's untrained window has its memory."""
    colon, newline = encode_plain_texts(subject.tokenizer, [settings.sign, "\n"])
    prefix = find_special_token_ids(subject.tokenizer).prefix_ids
    return len(prefix) + 2 * max(settings.pairs) * (2 + len(colon) + len(newline))


MEASURE = Measure(
    "recall",
    "multi-query associative recall with real words, by number of pairs",
    RecallSettings,
    measure_recall,
    baseline_length=get_recall_length,
)
