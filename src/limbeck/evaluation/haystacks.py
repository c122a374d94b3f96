"""Questions about one fact hidden in a long text: RULER's single needles and Landmark Attention's pass key.

    haystack = Haystack.load()
    rng = random.Random(0)
    question = build_needle_question(haystack, task=2, length=2048, depth=0.5, tokenizer=tokenizer, rng=rng)
    question = build_passkey_question(length=2048, depth=0.5, tokenizer=tokenizer, rng=rng)
    question.prompt, question.answer, question.wrong_answers       # asked by `limbeck.evaluation.retrieval`

| task | haystack | key | value |
| --- | --- | --- | --- |
| S-NIAH-1 | five short sentences, repeated | adjective-noun | number of seven digits |
| S-NIAH-2 | Paul Graham's essays | adjective-noun | number of seven digits |
| S-NIAH-3 | Paul Graham's essays | adjective-noun | UUID |
| pass key | the same five sentences, repeated | | number of one to five digits |

Sources: RULER (arXiv 2404.06654, tasks niah_single_1 to 3), Landmark Attention (arXiv 2305.16300, section 4.2). The
haystack is as long as prompt and answer allow, in steps of a sentence (1), a word (2, 3) or a repetition (pass key).
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
from limbeck.data.special_tokens import encode_prompt
from limbeck.evaluation.long_text import check_prompt_fits

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
class Question:
    """A prompt with its answer.

    answer, wrong_answers: begin with the space that separates them from the prompt.
    length: upper limit of prompt and answer together, in tokens.
    depth: relative position of the fact in the haystack, 0 at the beginning, 1 at the end.
    """

    prompt: str
    answer: str
    wrong_answers: list[str]
    length: int = 0
    depth: float = 0.0


@dataclass(frozen=True)
class Haystack:
    """Source texts of needles: words of running text, adjectives and nouns."""

    words: list[str]
    adjectives: list[str]
    nouns: list[str]

    @classmethod
    def load(cls) -> "Haystack":
        """Load RULER's own essays and wonderwords' lists, building them in the cache if they are missing."""
        with open(ensure_embedded_corpus("haystack"), encoding="utf-8") as file:
            texts = {row["source"]: row["text"] for row in map(json.loads, file)}
        return cls(texts["essays"].split(), texts["adjectives"].split(), texts["nouns"].split())


def build_needle_question(
    haystack: Haystack,
    task: int,
    length: int,
    depth: float,
    tokenizer: Any,
    rng: random.Random,
    new_tokens: int = 128,
    distractors: int = 9,
) -> Question:
    """Build a question of one of RULER's single-needle tasks.

    Args:
        task: 1, 2 or 3 of RULER's niah_single.
        length: upper limit of prompt and `new_tokens` together, in tokens.
        depth: position of the needle as a fraction of the haystack's sentences.
        distractors: number of wrong answers of the same form.

    Raises:
        LimbeckError: unknown task, `length` too short for a prompt without haystack or longer than the essays.
    """
    if task not in NEEDLE_VALUE_KINDS:
        raise LimbeckError(f"there is no S-NIAH-{task}", expected="1, 2 or 3")
    kind = NEEDLE_VALUE_KINDS[task]
    sample = _sample_uuid if kind == "uuid" else _sample_number
    # The order of the draws is part of the benchmark: a seed must give the same questions in every version.
    key = f"{rng.choice(haystack.adjectives)}-{rng.choice(haystack.nouns)}"
    value, *others = _sample_distinct(rng, sample, distractors + 1)
    fact = NEEDLE.format(kind=kind, key=key, value=value)

    def build_prompt(units: int) -> str:
        if task == 1:
            sentences, separator = [NOISE] * units, "\n"
        else:
            sentences = SENTENCE_END.split(" ".join(haystack.words[:units])) if units else []
            separator = " "
        sentences.insert(int(len(sentences) * depth), fact)
        return NEEDLE_QUESTION.format(kind=kind, key=key, context=separator.join(sentences))

    max_units = len(haystack.words) if task > 1 else length  # a repetition is more than one token
    prompt = build_longest_prompt(f"S-NIAH-{task}", build_prompt, max_units, length, new_tokens, tokenizer)
    return Question(prompt, f" {value}", [f" {other}" for other in others], length, depth)


def build_passkey_question(
    length: int, depth: float, tokenizer: Any, rng: random.Random, new_tokens: int = 8, distractors: int = 9
) -> Question:
    """Build a pass-key question; arguments and errors as in `build_needle_question`."""
    value, *others = _sample_distinct(rng, lambda rng: str(rng.randint(1, 50000)), distractors + 1)

    def build_prompt(units: int) -> str:
        before = round(units * depth)
        noise = [" ".join([NOISE] * times) + "\n" if times else "" for times in (before, units - before)]
        return PASSKEY_BEGIN + noise[0] + PASSKEY.format(value=value) + noise[1] + PASSKEY_END

    prompt = build_longest_prompt("pass key", build_prompt, length, length, new_tokens, tokenizer)
    return Question(prompt, f" {value}", [f" {other}" for other in others], length, depth)


def count_prompt_tokens(tokenizer: Any, text: str) -> int:
    """Count the tokens of a text as a prompt, special tokens at its beginning included."""
    return len(encode_prompt(tokenizer, text))


def build_longest_prompt(
    name: str, build_prompt: Callable[[int], str], max_units: int, length: int, new_tokens: int, tokenizer: Any
) -> str:
    """Build the prompt with as many of at most `max_units` units of haystack as fit into `length` tokens."""
    check_prompt_fits(name, count_prompt_tokens(tokenizer, build_prompt(0)), new_tokens, length)

    def fits(units: int) -> bool:
        return count_prompt_tokens(tokenizer, build_prompt(units)) + new_tokens <= length

    # Doubling before bisection: tokenizing the whole haystack would take longer than all the short prompts together.
    low, high = 0, 1
    while fits(high):
        if high == max_units:
            raise LimbeckError(f"{name}: the haystack has fewer than {length} tokens", expected="a shorter length")
        low, high = high, min(2 * high, max_units)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return build_prompt(low)


def _sample_distinct(rng: random.Random, sample: Callable[[random.Random], str], count: int) -> list[str]:
    """Sample until there are `count` different values, in the order in which they came."""
    values: dict[str, None] = {}
    while len(values) < count:
        values.setdefault(sample(rng))
    return list(values)


def _sample_number(rng: random.Random) -> str:
    return str(rng.randint(10**6, 10**7 - 1))


def _sample_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
