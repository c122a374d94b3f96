"""Did a model keep what it read? An answer by generation and by likelihood, and the table of many such.

    asked = answer_question(model, tokenizer, Question(prompt, " 1234567", [" 7654321", ...]), new_tokens=16)
    asked.found, asked.chosen, asked.share

By generation, as RULER scores it: the value occurs in the greedily generated text, whatever else does. By likelihood,
for models that are too small to be asked: is the value's text the likeliest among it and distractors of the same form
that are nowhere in the prompt? Chance is one in their number.

Answers to many questions as values of a measure: by length, with chance beside them.

    found = summarize_answers({"niah 1": asked}, candidates=10)
    found.values["niah 1, 512 tokens"], found.values["niah 1, 512 tokens, among 10"], found.values["chance among 10"]

`details["cells"]` holds the same by length and depth, for a heat map; `RetrievalSettings` is what such measures share.
"""

import math
import random
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import PreTrainedModel

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.data.special_tokens import encode_plain_texts, encode_prompt
from limbeck.evaluation.long_text import PrefilledPrompt, get_context_length
from limbeck.evaluation.measure import MeasureResult, MeasureSettings
from limbeck.evaluation.subject import Subject


@dataclass(frozen=True)
class Question:
    """A prompt, and how it goes on if the model remembers: `answer` and `wrong_answers` begin with the space before them."""

    prompt: str
    answer: str
    wrong_answers: list[str]
    length: int = 0  # of prompt and answer together, in tokens, at most
    depth: float = 0.0  # where the answer stands in the prompt, 0 at the beginning, 1 at the end


@dataclass(frozen=True)
class RetrievalAnswer:
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


def count_prompt_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of a text as a prompt, with those that begin it."""
    return len(encode_prompt(tokenizer, text))


def answer_question(
    model: PreTrainedModel, tokenizer: Any, question: Question, new_tokens: int, prefill_chunk_size: int = 1024
) -> RetrievalAnswer:
    """Both answers of a model; a text of `new_tokens` tokens at most."""
    ids = torch.tensor(encode_prompt(tokenizer, question.prompt))
    read = PrefilledPrompt.from_tokens(model, ids, prefill_chunk_size)
    answer = question.answer.strip().lower()

    def written(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    # once the value is there nothing can change the score any more
    text = written(read.generate(new_tokens, lambda tokens: answer in written(tokens).lower()))
    candidates = [question.answer, *question.wrong_answers]
    scores = read.log_likelihoods(encode_plain_texts(tokenizer, candidates)).double()
    rank = int((scores[1:] >= scores[0]).sum())
    found = answer in text.lower()
    return RetrievalAnswer(question.length, question.depth, text, found, rank == 0, rank, float(scores.softmax(0)[0]))


def proportion_with_stderr(hits: list[bool]) -> tuple[float, float]:
    """The share of hits and its standard error, that of a binomial with one half hit and one half miss added.

    Without the halves the error of 0 of 10 would be 0 (Agresti and Coull, 1998, with one success and failure less).
    """
    n = len(hits)
    smooth = (sum(hits) + 0.5) / (n + 1)
    return sum(hits) / n, math.sqrt(smooth * (1 - smooth) / (n + 1))


def draw_distinct(rng: random.Random, draw: Any, n: int, taken: set[str]) -> list[str]:
    """`n` draws that differ from each other and from those taken."""
    made: list[str] = []
    seen = set(taken)
    while len(made) < n:
        one = draw(rng)
        if one not in seen:
            seen.add(one)
            made.append(one)
    return made


Lengths = Annotated[list[Annotated[int, Field(ge=64)]], Field(min_length=1)]  # tokens of prompt and answer together


class RetrievalSettings(MeasureSettings):
    """What measures that hide a fact in a long prompt share.

    distractors: values of the same form that the true one is compared with.
    piece: tokens of the prompt that are read at a time.
    past_context: ask a softmax model beyond the context that it was made for, too.
    """

    distractors: Annotated[int, Field(ge=1)] = 9
    piece: Annotated[int, Field(ge=1)] = 1024
    past_context: bool = False


def filter_lengths_by_context(what: str, subject: Subject, lengths: list[int], past_context: bool) -> list[int]:
    """The lengths that a model can be asked at: of softmax alone those in the context that it was made for.

    Raises:
        LimbeckError: there are none.
    """
    context = get_context_length(subject.model)
    if subject.is_student or context is None or past_context:
        return lengths
    kept = [length for length in lengths if length <= context]
    if not kept:
        raise LimbeckError(
            f"{what}: {subject.name} has a context of {context} tokens, the shortest length is {min(lengths)}",
            hint=f"--set {what}.past_context=true",
        )
    if kept != lengths:
        console.print(f"{what}: {subject.name} is asked up to its context of {context:,} tokens")
    return kept


def summarize_answers(asked: dict[str, list[RetrievalAnswer]], candidates: int) -> MeasureResult:
    """Shares of answers found and chosen, by task and length."""
    values, errors, cells = {}, {}, []
    for task, answers in asked.items():
        for length in sorted({one.length for one in answers}):
            mine = [one for one in answers if one.length == length]
            name = f"{task}, {length} tokens"
            for ending, hits in (("", [a.found for a in mine]), (f", among {candidates}", [a.chosen for a in mine])):
                values[name + ending], errors[name + ending] = proportion_with_stderr(hits)
            for depth in sorted({one.depth for one in mine}):
                here = [one for one in mine if one.depth == depth]
                cells.append(
                    {
                        "task": task,
                        "length": length,
                        "depth": depth,
                        "samples": len(here),
                        "generated": sum(one.found for one in here) / len(here),
                        "chosen": sum(one.chosen for one in here) / len(here),
                        "rank": sum(one.rank for one in here) / len(here),
                        "share": sum(one.share for one in here) / len(here),
                    }
                )
    values[f"chance among {candidates}"] = 1 / candidates
    told = {task: [asdict(one) for one in answers] for task, answers in asked.items()}
    counts = {task: len(answers) for task, answers in asked.items()}
    return MeasureResult(values, errors, data={"questions": counts}, details={"cells": cells, "answers": told})
