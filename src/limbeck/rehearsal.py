"""What a run's steps take on this machine, measured: one step of each stage on the real models before the run begins.
And whether its end will work: the untouched student is saved, opened again, sampled and summed up.

    seen = rehearse(recipe, job.pair(student), make_stage, stages=[0, 1, 2])
    seen.seconds[1], seen.evaluation, seen.peak_bytes          # of a stage, of a token, of this process

Tokens are drawn at random, and rates and gradients are zero in the update, so no weight moves, but for the output
projections of `student`, which is thrown away. It takes about as long as two steps of each stage.

    rehearse_end(job, new_student(job))     # LimbeckError where the hand-over would fail after all the training
"""

import json
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck import recipe as recipes
from limbeck.console import console, progress
from limbeck.data.packing import Batch
from limbeck.data.signals import TaughtBatch
from limbeck.errors import LimbeckError, sentences
from limbeck.handover import measured
from limbeck.losses import Weights
from limbeck.machine import peak_memory
from limbeck.model.body import Head, run_body
from limbeck.model.exported import check_export
from limbeck.prepare import Job
from limbeck.recipe import Recipe
from limbeck.stages.calibrate import RIDGES, NormalEquations
from limbeck.stages.end_to_end import Logits
from limbeck.stages.learner import alone_in
from limbeck.stages.optimize import Optimizer, gradient_norm, steps_of
from limbeck.stages.teacher import Pair
from limbeck.summary import write_summary

WARM = 64  # tokens of the step that is not counted
CHOOSING = 2  # sequences on which the ridge is chosen


@dataclass(frozen=True)
class Rehearsal:
    """Seconds by stage number, seconds for a token of the evaluation, and the peak of resident memory so far."""

    seconds: dict[int, float]
    evaluation: float
    peak_bytes: int | None


def rehearse(
    recipe: Recipe,
    pair: Pair,
    make_stage: Callable[[int], Any],
    stages: list[int],
) -> Rehearsal:
    """Run a step of the given stages and tell what all of their steps will take.

    Args:
        pair: with a student that may be spoiled.
        make_stage: the stage object of a stage number, on `student`.
        stages: numbers of those to rehearse.
    """
    seconds: dict[int, float] = {}
    teacher = pair.teacher
    vocabulary = int(teacher.get_input_embeddings().weight.shape[0])  # type: ignore[arg-type, index]

    def draw(tokens: int, sequences: int = 1) -> Batch:
        ids = torch.randint(0, vocabulary, (sequences, tokens))
        return Batch(ids, torch.arange(tokens).repeat(sequences, 1), ids).to(teacher.device)

    with torch.random.fork_rng(), progress("rehearse", len(stages), "stages") as advance:
        judge = Logits(pair, Weights())
        judge.evaluate(draw(WARM))
        evaluation = _timed(lambda: judge.evaluate(draw(recipe.data.seq_len))) / recipe.data.seq_len
        for index in stages:
            settings = recipe.stages[index]
            length = recipe.text_of(settings).seq_len
            if isinstance(settings, recipes.Calibrate):
                seconds[index] = _calibrate(settings, NormalEquations(pair, settings.weight), draw, length)
                seconds[index] += len(RIDGES) * CHOOSING * length * evaluation if settings.ridge == "auto" else 0
            else:
                seconds[index] = _train(settings, make_stage(index), draw, length)
                seconds[index] += _asking(settings, pair, draw, length)
            advance(1)
    return Rehearsal(seconds, evaluation, peak_memory())


def rehearse_end(job: Job, student: PreTrainedModel) -> None:
    """Go through the end of a run with a student that has learnt nothing, in a temporary folder.

    All that `hand_over` does is done, but small: of the weights one tensor is written, one sequence is measured, one
    token sampled. What costs at the end of a run is writing all weights, and that fails for want of room alone.

    Raises:
        LimbeckError: what cannot be saved, opened again, generated from or summed up.
    """
    student.eval()
    name, least = min(student.named_parameters(), key=lambda pair: pair[1].numel())
    quiet, console.quiet = console.quiet, True
    try:
        with tempfile.TemporaryDirectory() as folder, _told("the student cannot be saved and opened again"):
            student.save_pretrained(folder, state_dict={name: least.detach()})
            job.tokenizer.save_pretrained(folder)
            check_export(Path(folder), student, job.tokenizer, weights=False)
        with _told("the student cannot be sampled and measured"):
            result = measured(job, student, stages=[], plan={}, tokens=1, new_tokens=1)
        with _told("no summary can be written"):
            write_summary(result).encode()
            json.dumps(result)
    finally:
        console.quiet = quiet


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of other libraries as ours, each with what they kept from happening."""
    try:
        yield
    except (LimbeckError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise LimbeckError(f"{what}: {sentences(error)}", expected="what the end of the run has to do") from error


def _calibrate(settings: recipes.Calibrate, fits: NormalEquations, draw: Callable, length: int) -> float:
    fits.add(draw(WARM))
    one = _timed(lambda: fits.add(draw(length)))
    solving = _timed(lambda: fits.solve(1e-2 if settings.ridge == "auto" else settings.ridge))
    solutions = len(RIDGES) + 1 if settings.ridge == "auto" else 1
    return max(1, round(settings.tokens / length)) * one + solutions * solving


def _train(settings: recipes.Trained, stage: Any, draw: Callable, length: int) -> float:
    parameters = stage.parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    micro = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
    try:
        optimizer = Optimizer(parameters, stage.learning_rates(settings), settings, stage.student)
        optimizer.set_rate(0.0)

        def backward(tokens: int, sequences: int) -> None:
            batch = draw(tokens, sequences)
            if getattr(settings, "cache_teacher", None):
                batch = _taught(batch, settings.top_k)  # type: ignore[attr-defined]
            stage.backward(batch, stage.count(batch))

        def update() -> None:
            gradient_norm(parameters, settings.max_grad_norm, alone=alone_in(stage))
            for parameter in parameters.values():
                if parameter.grad is not None:  # not even a NaN may reach the weights, many of them the teacher's
                    parameter.grad.zero_()
            optimizer.step()
            optimizer.zero_grad()

        backward(WARM, 1)
        update()  # the first one makes the optimiser's state
        one = _timed(lambda: backward(length, micro))
        step = math.ceil(settings.batch_size / micro) * one + _timed(update)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    return steps_of(settings, length) * step


def _taught(batch: Batch, top: int) -> TaughtBatch:
    index = torch.arange(top, device=batch.input_ids.device).expand(*batch.input_ids.shape, top)
    return TaughtBatch(
        **vars(batch), index=index, log_q=torch.full_like(index, -math.log(2 * top), dtype=torch.float32)
    )


@torch.no_grad()
def _asking(settings: Any, pair: Pair, draw: Callable, length: int) -> float:
    """Seconds in which the teacher says all of it for the cache; nothing is taken to be there."""
    if getattr(settings, "cache_teacher", None) is None:
        return 0.0
    head = Head(pair.teacher)

    def ask() -> None:
        with pair.autocast():
            for part in run_body(pair.teacher, draw(length)).flatten(0, 1).split(128):
                head(part).topk(settings.top_k)

    return steps_of(settings, length) * settings.batch_size * _timed(ask)


def _timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
