"""The measures `needle` and `passkey`: does a model retrieve a fact from a long prompt?

    result = run_measure(get_measure("needle"), subject, {"lengths": [512, 1024], "samples": 4})
    result.values["niah 1, 512 tokens"], result.values["niah 1, 512 tokens, among 10"], result.values["chance among 10"]
    result = run_measure(get_measure("passkey"), subject, {"lengths": [1024, 4096], "samples": 10})
    answer = answer_question(model, tokenizer, question, new_tokens=16)           # one question of `haystacks`

Each question is scored twice. By generation, as RULER does (arXiv 2404.06654): the value occurs anywhere in the
greedily generated text. By likelihood, for models too small to follow instructions: the value is the likeliest among
itself and distractors of the same form that do not occur in the prompt; chance is one in their number.
`details["cells"]` holds both by length and depth, for a heat map. Each answer is kept in the cache, by content.

RULER samples the depth of each needle; here every depth gets the same number of samples, so that a map can be drawn.
The depth of a pass key (Landmark Attention, arXiv 2305.16300, section 4.2) is sampled.
"""

import math
import random
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
from pydantic import Field
from transformers import PreTrainedModel

from limbeck.core.console import console, progress
from limbeck.core.errors import LimbeckError
from limbeck.data.special_tokens import encode_continuations, encode_prompt
from limbeck.evaluation.haystacks import Haystack, Question, build_needle_question, build_passkey_question
from limbeck.evaluation.long_text import PrefilledPrompt, get_context_length
from limbeck.evaluation.measure import Measure, MeasureResult, MeasureSettings
from limbeck.evaluation.stored_answers import load_or_ask
from limbeck.evaluation.subject import Subject

Lengths = Annotated[list[Annotated[int, Field(ge=64)]], Field(min_length=1)]  # tokens of prompt and answer together
Depth = Annotated[float, Field(ge=0, le=1)]


class RetrievalSettings(MeasureSettings):
    """Settings of every measure that hides a fact in a long prompt.

    distractors: number of wrong values of the same form that the true one is compared with.
    piece: tokens of the prompt per forward pass.
    past_context: also ask a softmax model beyond the context it was made for.
    """

    distractors: Annotated[int, Field(ge=1)] = 9
    piece: Annotated[int, Field(ge=1)] = 1024
    past_context: bool = False


class NeedleSettings(RetrievalSettings):
    """Settings of the measure `needle`.

    tasks: which of S-NIAH-1 to 3.
    lengths: tokens of prompt and answer together.
    depths: positions of the needle, 0 at the beginning of the haystack and 1 at its end.
    samples: questions per task, length and depth.
    new_tokens: tokens to generate, reserved in the length; RULER uses 128.
    """

    tasks: list[Annotated[int, Field(ge=1, le=3)]] = [1, 2, 3]
    lengths: Lengths = [512, 1024, 2048]
    depths: Annotated[list[Depth], Field(min_length=1)] = [0.0, 0.25, 0.5, 0.75, 1.0]
    samples: Annotated[int, Field(ge=1)] = 2
    new_tokens: Annotated[int, Field(ge=1)] = 128


class PasskeySettings(RetrievalSettings):
    """Settings of the measure `passkey`; a pass key takes at most five tokens and one for its space."""

    lengths: Lengths = [256, 512, 1024, 2048, 4096]
    samples: Annotated[int, Field(ge=1)] = 10
    new_tokens: Annotated[int, Field(ge=1)] = 8


def measure_needle(subject: Subject, settings: NeedleSettings) -> MeasureResult:
    """Ask all needle tasks at all lengths and depths; tokenizer and seed determine the questions."""
    haystack = Haystack.load()
    lengths = filter_lengths_by_context("needle", subject, settings.lengths, settings.past_context)
    answers: dict[str, list[RetrievalAnswer]] = {f"niah {task}": [] for task in settings.tasks}
    n_questions = len(settings.tasks) * len(settings.depths) * settings.samples * len(lengths)
    with progress("needle", n_questions, "questions") as advance:
        for task in settings.tasks:
            for length in lengths:
                for depth in settings.depths:
                    for sample in range(settings.samples):
                        rng = random.Random(f"{subject.seed} {task} {length} {depth} {sample}")
                        question = build_needle_question(
                            haystack,
                            task,
                            length,
                            depth,
                            subject.tokenizer,
                            rng,
                            settings.new_tokens,
                            settings.distractors,
                        )
                        answers[f"niah {task}"].append(
                            load_or_answer(subject, question, settings.new_tokens, settings.piece)
                        )
                        advance(1, note=f"S-NIAH-{task}, {length} tokens")
    return summarize_answers(answers, settings.distractors + 1)


def measure_passkey(subject: Subject, settings: PasskeySettings) -> MeasureResult:
    """Ask for pass keys at all lengths; tokenizer and seed determine the questions."""
    lengths = filter_lengths_by_context("passkey", subject, settings.lengths, settings.past_context)
    answers = []
    with progress("passkey", len(lengths) * settings.samples, "questions") as advance:
        for length in lengths:
            for sample in range(settings.samples):
                rng = random.Random(f"{subject.seed} {length} {sample}")
                depth = rng.random()
                question = build_passkey_question(
                    length, depth, subject.tokenizer, rng, settings.new_tokens, settings.distractors
                )
                answers.append(load_or_answer(subject, question, settings.new_tokens, settings.piece))
                advance(1, note=f"{length} tokens")
    return summarize_answers({"passkey": answers}, settings.distractors + 1)


@dataclass(frozen=True)
class RetrievalAnswer:
    """A model's answer to a question, by generation and by likelihood.

    text: generated text.
    found: whether the true value is in it.
    chosen: whether the true value is the likeliest of all candidates.
    rank: number of candidates that are at least as likely.
    share: the true value's share of the probability of all candidates.
    """

    length: int
    depth: float
    text: str
    found: bool
    chosen: bool
    rank: int
    share: float


def load_or_answer(
    subject: Subject, question: Question, new_tokens: int, prefill_chunk_size: int = 1024
) -> RetrievalAnswer:
    """Answer a question, or load the answer: at 8,192 tokens one takes a CPU a minute, so a killed run resumes."""

    def ask() -> dict[str, Any]:
        answer = answer_question(subject.model, subject.tokenizer, question, new_tokens, prefill_chunk_size)
        return asdict(answer)

    asked = [asdict(question), new_tokens]
    return RetrievalAnswer(**load_or_ask(subject, "retrieval", asked, ask))


def answer_question(
    model: PreTrainedModel, tokenizer: Any, question: Question, new_tokens: int, prefill_chunk_size: int = 1024
) -> RetrievalAnswer:
    """Answer a question by generating at most `new_tokens` tokens and by the likelihood of its candidates."""
    prompt = PrefilledPrompt.from_tokens(
        model, torch.tensor(encode_prompt(tokenizer, question.prompt)), prefill_chunk_size
    )
    value = question.answer.strip().lower()

    def decode(tokens: list[int]) -> str:
        return str(tokenizer.decode(tokens, skip_special_tokens=True))

    # Generation stops as soon as the value is there: what follows cannot change the score.
    text = decode(prompt.generate(new_tokens, lambda tokens: value in decode(tokens).lower()))
    candidates = encode_continuations(tokenizer, [question.answer, *question.wrong_answers])
    scores = prompt.log_likelihoods(candidates).double()
    rank = int((scores[1:] >= scores[0]).sum())
    return RetrievalAnswer(
        length=question.length,
        depth=question.depth,
        text=text,
        found=value in text.lower(),
        chosen=rank == 0,
        rank=rank,
        share=float(scores.softmax(0)[0]),
    )


def filter_lengths_by_context(measure: str, subject: Subject, lengths: list[int], past_context: bool) -> list[int]:
    """Select the lengths a model can be asked at: for a softmax model those within its context.

    Raises:
        LimbeckError: all lengths exceed the context.
    """
    context = get_context_length(subject.model)
    if subject.is_student or context is None or past_context:
        return lengths
    within = [length for length in lengths if length <= context]
    if not within:
        raise LimbeckError(
            f"{measure}: {subject.name} has a context of {context} tokens, the shortest length is {min(lengths)}",
            hint=f"--set {measure}.past_context=true",
        )
    if within != lengths:
        console.print(
            f"{measure}: skipping lengths beyond the context of {subject.name} ({context:,} tokens); "
            f"{measure}.past_context=true includes them",
            markup=False,
        )
    return within


def summarize_answers(answers: dict[str, list[RetrievalAnswer]], candidates: int) -> MeasureResult:
    """Average answers by task and length, and for heat maps by depth too."""
    values, errors, cells = {}, {}, []
    for task, task_answers in answers.items():
        for length in sorted({answer.length for answer in task_answers}):
            at_length = [answer for answer in task_answers if answer.length == length]
            name = f"{task}, {length} tokens"
            values[name], errors[name] = proportion_with_stderr([answer.found for answer in at_length])
            name = f"{name}, among {candidates}"
            values[name], errors[name] = proportion_with_stderr([answer.chosen for answer in at_length])
            for depth in sorted({answer.depth for answer in at_length}):
                group = [answer for answer in at_length if answer.depth == depth]
                cells.append(
                    {
                        "task": task,
                        "length": length,
                        "depth": depth,
                        "samples": len(group),
                        "generated": sum(answer.found for answer in group) / len(group),
                        "chosen": sum(answer.chosen for answer in group) / len(group),
                        "rank": sum(answer.rank for answer in group) / len(group),
                        "share": sum(answer.share for answer in group) / len(group),
                    }
                )
    values[f"chance among {candidates}"] = 1 / candidates
    return MeasureResult(
        values,
        errors,
        data={"questions": {task: len(task_answers) for task, task_answers in answers.items()}},
        details={"cells": cells, "answers": {task: [asdict(a) for a in one] for task, one in answers.items()}},
    )


def proportion_with_stderr(hits: list[bool]) -> tuple[float, float]:
    """Return the proportion of hits and its standard error.

    The error is that of a binomial with one half hit and one half miss added: otherwise that of 0 of 10 would be 0
    (Agresti and Coull, 1998, with one success and failure less).
    """
    n = len(hits)
    smoothed = (sum(hits) + 0.5) / (n + 1)
    return sum(hits) / n, math.sqrt(smoothed * (1 - smoothed) / (n + 1))


def get_longest_prompt(subject: Subject, settings: NeedleSettings | PasskeySettings) -> int:
    """Return the tokens of the longest prompt with its answer: a student's window has the memory it needs there."""
    return max(settings.lengths)


NEEDLE = Measure(
    "needle",
    "RULER's single needles in a haystack, by length and depth",
    NeedleSettings,
    measure_needle,
    baseline_length=get_longest_prompt,
)
PASSKEY = Measure(
    "passkey", "pass-key retrieval by length", PasskeySettings, measure_passkey, baseline_length=get_longest_prompt
)
