"""Multi-query associative recall against the number of pairs, with real words and no training for it.

    found = run_measure(get_measure("recall"), subject, {"pairs": [4, 16, 64]})
    found.values["recall, 16 pairs"], found.values["chance, 16 pairs"], found.values["state bytes, 16 pairs"]

The form is that of MQAR (Zoology, arXiv 2312.04927, section 4): pairs of a key and a value, then every key again, and
behind each its value is due. MQAR trains a model on arbitrary symbols; a pretrained one is asked as it is, so keys and
values are English nouns, a pair a line:

     river: candle
     window: soldier
     window: soldier
     river: candle

Keys and values of a sequence are all different. Whatever a model has answered, the line goes on with the true value, as
in MQAR, so one pass asks for all keys. What counts is the likeliest of the values shown: chance is one in the pairs.
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
from limbeck.evaluation.measure import Measure, Measurement, MeasureResult, MeasureSettings
from limbeck.evaluation.retrieval import proportion_with_stderr
from limbeck.evaluation.subject import Subject
from limbeck.models import build_cache_kwargs, cache_bytes
from limbeck.models.backbone import LMHead


class RecallSettings(MeasureSettings):
    """How many pairs in a sequence, and how many sequences of each number."""

    pairs: Annotated[list[Annotated[int, Field(ge=2)]], Field(min_length=1)] = [4, 8, 16, 32, 64, 128]
    sequences: Annotated[int, Field(ge=1)] = 4
    sign: str = ":"  # between a key and its value; "": nothing, as in MQAR
    past_context: bool = False


def measure_recall(subject: Subject, settings: RecallSettings) -> MeasureResult:
    """The same sequences for every model with the same tokenizer and seed."""
    words = select_single_token_words(load_nouns(), subject.tokenizer)
    colon, newline = encode_plain_texts(subject.tokenizer, [settings.sign, "\n"])
    lead = list(find_special_token_ids(subject.tokenizer).prefix_ids)
    context = None if subject.is_student or settings.past_context else get_context_length(subject.model)
    values, errors, sizes = {}, {}, []
    with progress("recall", len(settings.pairs) * settings.sequences, "sequences") as advance:
        for pairs in settings.pairs:
            among_shown: list[bool] = []
            among_all: list[bool] = []
            for sequence in range(settings.sequences):
                made = RecallSequence.sample(
                    words, pairs, random.Random(f"{subject.seed} {pairs} {sequence}"), colon, newline, lead
                )
                if context is not None:
                    check_prompt_fits(f"recall, {pairs} pairs", len(made.ids), 0, context)
                logits, size = compute_query_logits(subject.model, made)
                best = made.values[logits[:, made.values].argmax(-1)]
                among_shown += (best == made.answers).tolist()
                among_all += (logits.argmax(-1) == made.answers).tolist()
                advance(1, note=f"{pairs} pairs")
            values[f"recall, {pairs} pairs"], errors[f"recall, {pairs} pairs"] = proportion_with_stderr(among_shown)
            name = f"recall, {pairs} pairs, among all tokens"
            values[name], errors[name] = proportion_with_stderr(among_all)
            values[f"chance, {pairs} pairs"] = 1 / pairs
            values[f"state bytes, {pairs} pairs"] = size
            sizes.append(size)
    return MeasureResult(
        values,
        errors,
        data={"words": len(words), "sequences": settings.sequences},
        details={"pairs": settings.pairs, "state_bytes": sizes},
    )


@dataclass(frozen=True)
class RecallSequence:
    """One sequence of N pairs and N queries.

    ids: [T] tokens.
    queries: [N] positions whose next token is due, those of the colons (of the keys where there are none).
    values: [N] tokens of the values shown.
    answers: [N] what is due at each query.
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
        lead: Sequence[int] = (),
    ) -> "RecallSequence":
        """Keys and values of `pairs` pairs, and the order of the queries, from `words` (tokens), behind `lead`.

        Raises:
            LimbeckError: fewer words than keys and values.
        """
        if len(words) < 2 * pairs:
            raise LimbeckError(
                f"{pairs} pairs take {2 * pairs} different words", expected=f"{len(words) // 2} pairs or fewer"
            )
        drawn = rng.sample(words, 2 * pairs)
        known = list(zip(drawn[:pairs], drawn[pairs:]))
        asked = rng.sample(known, pairs)
        ids = list(lead)
        queries = []
        for key, value in known + asked:
            ids += [key, *colon]
            queries.append(len(ids) - 1)
            ids += [value, *newline]
        return cls(
            torch.tensor(ids),
            torch.tensor(queries[pairs:]),
            torch.tensor(drawn[pairs:]),
            torch.tensor([value for _, value in asked]),
        )


def load_nouns() -> list[str]:
    """wonderwords' nouns, brought to the cache if they are not there."""
    with open(ensure_embedded_corpus("haystack"), encoding="utf-8") as file:
        return next(row["text"] for row in map(json.loads, file) if row["source"] == "nouns").split()


def select_single_token_words(words: list[str], tokenizer: Any) -> list[int]:
    """Tokens of those words that are a single token behind a space, each token once."""
    plain = [f" {word}" for word in words if len(word) > 2 and word.isalpha() and word.islower()]
    found = encode_plain_texts(tokenizer, plain)
    return list(dict.fromkeys(ids[0] for ids in found if len(ids) == 1))


@torch.no_grad()
def compute_query_logits(model: PreTrainedModel, sequence: RecallSequence) -> tuple[Tensor, int]:
    """Logits [N, vocabulary] at the queries, on the CPU, and the bytes of the cache behind the last token."""
    cache = DynamicCache(config=model.config)
    ids = sequence.ids[None].to(model.device)
    body = model.get_decoder()
    hidden = body(input_ids=ids, **build_cache_kwargs(body, cache)).last_hidden_state[0]
    return LMHead(model)(hidden[sequence.queries.to(hidden.device)]).float().cpu(), cache_bytes(cache)


def draw_recall(found: list[Measurement]) -> Any:
    """Recall over the number of pairs, chance dotted; and the same over the bytes that the state takes by then."""
    from limbeck.report.figures.style import create_figure

    figure = create_figure(9, 3.4)
    by_pairs, by_state = figure.subplots(1, 2, sharey=True)
    for one in found:
        pairs = one.details["pairs"]
        names = [f"recall, {n} pairs" for n in pairs]
        recalls = [one.values[name] for name in names]
        bars = by_pairs.errorbar(
            pairs,
            recalls,
            [one.errors[name] for name in names],
            marker="o",
            markersize=3,
            capsize=2,
            label=one.model,
        )
        sizes = [size / 1e6 for size in one.details["state_bytes"]]
        by_state.plot(sizes, recalls, marker="o", markersize=3, color=bars.lines[0].get_color(), label=one.model)
    numbers = sorted({n for one in found for n in one.details["pairs"]})
    by_pairs.plot(numbers, [1 / n for n in numbers], color="grey", linestyle=":", linewidth=1, label="chance")
    for axes, label in ((by_pairs, "pairs"), (by_state, "MB of state behind so many pairs")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    by_pairs.set_ylabel("recall among the values shown")
    return figure


MEASURE = Measure(
    "recall",
    "multi-query associative recall with real words, against the number of pairs",
    RecallSettings,
    measure_recall,
    draw_recall,
)
