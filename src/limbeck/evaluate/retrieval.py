"""Did a model keep what it read? An answer by generation and by likelihood, and the table of many such.

    asked = ask(model, tokenizer, Question(prompt, " 1234567", [" 7654321", ...]), new_tokens=16)
    asked.found, asked.chosen, asked.share

By generation, as RULER scores it: the value occurs in the greedily generated text, whatever else does. By likelihood,
for models that are too small to be asked: is the value's text the likeliest among it and distractors of the same form
that are nowhere in the prompt? Chance is one in their number.
"""

import math
import random
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck.data.special_tokens import plain_ids, prompt_ids
from limbeck.evaluate.pieces import Read


@dataclass(frozen=True)
class Question:
    """A prompt, and how it goes on if the model remembers: `answer` and `others` begin with the space before them."""

    prompt: str
    answer: str
    others: list[str]
    length: int = 0  # of prompt and answer together, in tokens, at most
    depth: float = 0.0  # where the answer stands in the prompt, 0 at the beginning, 1 at the end


@dataclass(frozen=True)
class Asked:
    """What became of a question.

    text: what the model wrote.
    found: the answer is in it.
    chosen: the answer is the likeliest of all candidates.
    rank: how many candidates are likelier.
    share: of the probability of all candidates.
    """

    length: int
    depth: float
    text: str
    found: bool
    chosen: bool
    rank: int
    share: float


def token_count(tokenizer: Any, text: str) -> int:
    """Tokens of a text as a prompt, with those that begin it."""
    return len(prompt_ids(tokenizer, text))


def ask(model: PreTrainedModel, tokenizer: Any, question: Question, new_tokens: int, piece: int = 1024) -> Asked:
    """Both answers of a model; a text of `new_tokens` tokens at most."""
    ids = torch.tensor(prompt_ids(tokenizer, question.prompt))
    read = Read.of(model, ids, piece)
    answer = question.answer.strip().lower()

    def written(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    # once the value is there nothing can change the score any more
    text = written(read.greedy(new_tokens, lambda tokens: answer in written(tokens).lower()))
    candidates = [question.answer, *question.others]
    scores = read.log_likelihoods(plain_ids(tokenizer, candidates)).double()
    rank = int((scores[1:] >= scores[0]).sum())
    found = answer in text.lower()
    return Asked(question.length, question.depth, text, found, rank == 0, rank, float(scores.softmax(0)[0]))


def share_of(hits: list[bool]) -> tuple[float, float]:
    """The share of hits and its standard error, that of a binomial with one half hit and one half miss added.

    Without the halves the error of 0 of 10 would be 0 (Agresti and Coull, 1998, with one success and failure less).
    """
    n = len(hits)
    smooth = (sum(hits) + 0.5) / (n + 1)
    return sum(hits) / n, math.sqrt(smooth * (1 - smooth) / (n + 1))


def distinct(rng: random.Random, draw: Any, n: int, taken: set[str]) -> list[str]:
    """`n` draws that differ from each other and from those taken."""
    made: list[str] = []
    seen = set(taken)
    while len(made) < n:
        one = draw(rng)
        if one not in seen:
            seen.add(one)
            made.append(one)
    return made
