"""Answers to many questions as values of a measure: by length, with chance beside them.

    found = tabulate({"niah 1": asked}, candidates=10)
    found.values["niah 1, 512 tokens"], found.values["niah 1, 512 tokens, among 10"], found.values["chance among 10"]

`details["cells"]` holds the same by length and depth, for a heat map; `RetrievalSettings` is what such measures share.
"""

from dataclasses import asdict
from typing import Annotated

from pydantic import Field

from limbeck.console import console
from limbeck.errors import LimbeckError
from limbeck.evaluate.measures import Found, Settings
from limbeck.evaluate.pieces import context_of
from limbeck.evaluate.retrieval import Asked, share_of
from limbeck.evaluate.subject import Subject

Lengths = Annotated[list[Annotated[int, Field(ge=64)]], Field(min_length=1)]  # tokens of prompt and answer together


class RetrievalSettings(Settings):
    """What measures that hide a fact in a long prompt share.

    distractors: values of the same form that the true one is compared with.
    piece: tokens of the prompt that are read at a time.
    past_context: ask a softmax model beyond the context that it was made for, too.
    """

    distractors: Annotated[int, Field(ge=1)] = 9
    piece: Annotated[int, Field(ge=1)] = 1024
    past_context: bool = False


def within_context(what: str, subject: Subject, lengths: list[int], past_context: bool) -> list[int]:
    """The lengths that a model can be asked at: of softmax alone those in the context that it was made for.

    Raises:
        LimbeckError: there are none.
    """
    context = context_of(subject.model)
    if subject.student or context is None or past_context:
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


def tabulate(asked: dict[str, list[Asked]], candidates: int) -> Found:
    """Shares of answers found and chosen, by task and length."""
    values, errors, cells = {}, {}, []
    for task, answers in asked.items():
        for length in sorted({one.length for one in answers}):
            mine = [one for one in answers if one.length == length]
            name = f"{task}, {length} tokens"
            for ending, hits in (("", [a.found for a in mine]), (f", among {candidates}", [a.chosen for a in mine])):
                values[name + ending], errors[name + ending] = share_of(hits)
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
    return Found(values, errors, data={"questions": counts}, details={"cells": cells, "answers": told})
