"""Prompts that hide one fact in much text: RULER's single needles and Landmark Attention's pass key.

    hay = Haystack.load()
    question = build_needle_question(hay, task=2, length=2048, depth=0.5, tokenizer=tokenizer, rng=random.Random(0))
    question = build_passkey_question(length=2048, depth=0.5, tokenizer=tokenizer, rng=random.Random(0))

| task | haystack | key | value |
| --- | --- | --- | --- |
| S-NIAH-1 | five short sentences, repeated | adjective-noun | number of seven digits |
| S-NIAH-2 | Paul Graham's essays | adjective-noun | number of seven digits |
| S-NIAH-3 | Paul Graham's essays | adjective-noun | UUID |
| pass key | the same five sentences, repeated | | number of one to five digits |

Sources: RULER (arXiv 2404.06654, tasks niah_single_1 to 3), Landmark Attention (arXiv 2305.16300, section 4.2). The
haystack is as long as prompt and answer let it be, in single sentences (1), words (2, 3) and repetitions (pass key).
"""

import json
import random
import re
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from limbeck.core.errors import LimbeckError
from limbeck.data.offline.embedded import ensure_embedded_corpus
from limbeck.evaluation.haystacks import Question, count_prompt_tokens
from limbeck.evaluation.long_text import check_prompt_fits
from limbeck.evaluation.retrieval import draw_distinct

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+(?=[\"'(\[]?[A-Z0-9])")

NEEDLE = "One of the special magic {kind}s for {key} is: {value}."
NEEDLE_QUESTION = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. I will quiz you about the "
    "{kind} afterwards.\n{context}\nWhat is the special magic {kind} for {key} mentioned in the provided text? The "
    "special magic {kind} for {key} mentioned in the provided text is"
)
NEEDLE_VALUE_KINDS = {1: "number", 2: "number", 3: "uuid"}

PASSKEY_BEGIN = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. I will quiz you "
    "about the important information there.\n"
)
PASSKEY = "The pass key is {value}. Remember it. {value} is the pass key.\n"
PASSKEY_END = "What is the pass key? The pass key is"


@dataclass(frozen=True)
class Haystack:
    """What needles are made of and hidden in: words of running text, adjectives and nouns."""

    words: list[str]
    adjectives: list[str]
    nouns: list[str]

    @classmethod
    def load(cls) -> "Haystack":
        """RULER's own essays and wonderwords' lists, brought to the cache if they are not there."""
        with open(ensure_embedded_corpus("haystack"), encoding="utf-8") as file:
            texts = {row["source"]: row["text"] for row in map(json.loads, file)}
        return cls(texts["essays"].split(), texts["adjectives"].split(), texts["nouns"].split())


def build_needle_question(
    hay: Haystack,
    task: int,
    length: int,
    depth: float,
    tokenizer: Any,
    rng: random.Random,
    new_tokens: int = 128,
    distractors: int = 9,
) -> Question:
    """One single needle.

    Args:
        task: 1, 2 or 3 of RULER's niah_single.
        length: tokens of prompt and `new_tokens` together, at most.
        depth: where the needle stands, as a share of the haystack's sentences.
        distractors: other values of the same form.

    Raises:
        LimbeckError: no such task, `length` too short for a prompt without haystack or longer than the essays.
    """
    if task not in NEEDLE_VALUE_KINDS:
        raise LimbeckError(f"there is no S-NIAH-{task}", expected="1, 2 or 3")
    kind = NEEDLE_VALUE_KINDS[task]
    draw = _uuid if kind == "uuid" else _number
    key = f"{rng.choice(hay.adjectives)}-{rng.choice(hay.nouns)}"
    value, *others = draw_distinct(rng, draw, distractors + 1, set())
    fact = NEEDLE.format(kind=kind, key=key, value=value)

    def prompt(amount: int) -> str:
        if task == 1:
            sentences, joint = [NOISE] * amount, "\n"
        else:
            sentences, joint = SENTENCE_END.split(" ".join(hay.words[:amount])) if amount else [], " "
        sentences.insert(int(len(sentences) * depth), fact)
        return NEEDLE_QUESTION.format(kind=kind, key=key, context=joint.join(sentences))

    most = len(hay.words) if task > 1 else length  # a repetition is more than one token
    text = _fitted(f"S-NIAH-{task}", prompt, most, length, new_tokens, tokenizer)
    return Question(text, f" {value}", [f" {one}" for one in others], length, depth)


def build_passkey_question(
    length: int, depth: float, tokenizer: Any, rng: random.Random, new_tokens: int = 8, distractors: int = 9
) -> Question:
    """One pass key; arguments and errors as of `build_needle_question`."""
    value, *others = draw_distinct(rng, lambda rng: str(rng.randint(1, 50000)), distractors + 1, set())

    def prompt(amount: int) -> str:
        before = round(amount * depth)
        noise = [" ".join([NOISE] * times) + "\n" if times else "" for times in (before, amount - before)]
        return PASSKEY_BEGIN + noise[0] + PASSKEY.format(value=value) + noise[1] + PASSKEY_END

    text = _fitted("pass key", prompt, length, length, new_tokens, tokenizer)
    return Question(text, f" {value}", [f" {one}" for one in others], length, depth)


def _fitted(what: str, prompt: Callable[[int], str], most: int, length: int, new_tokens: int, tokenizer: Any) -> str:
    """The prompt with as many units of haystack as fit, of `most` that there are, by doubling and halving."""
    check_prompt_fits(what, count_prompt_tokens(tokenizer, prompt(0)), new_tokens, length)

    def fits(amount: int) -> bool:
        return count_prompt_tokens(tokenizer, prompt(amount)) + new_tokens <= length

    low, high = 0, 1
    while fits(high):
        if high == most:
            raise LimbeckError(f"{what}: the haystack has no {length} tokens", expected="a shorter length")
        low, high = high, min(2 * high, most)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return prompt(low)


def _number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
