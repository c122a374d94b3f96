"""What a run's steps take on this machine, measured: one step of each stage on the real models before the run begins.
And whether its end will work: the untouched student is saved, opened again, sampled and summed up.

    seen = measure_stage_times(recipe, job.make_pair(student), make_stage, stages=[0, 1, 2])
    seen.seconds[1], seen.eval_seconds_per_token, seen.peak_memory_bytes          # of a stage, of a token, of this process

Tokens are drawn at random, and rates and gradients are zero in the update, so no weight moves, but for the output
projections of `student`, which is thrown away. It takes about as long as two steps of each stage.

    dry_run_export(job, build_student(job))     # LimbeckError where the hand-over would fail after all the training
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

from limbeck.core import recipe as recipes
from limbeck.core.console import console, progress
from limbeck.core.errors import LimbeckError, summarize_error
from limbeck.core.recipe import Recipe
from limbeck.core.system import get_peak_memory
from limbeck.data.packing import Batch
from limbeck.data.teacher_logits import TeacherLogitsBatch
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.hooks import DistillationPair
from limbeck.models.loading import check_export
from limbeck.report.run_summary import format_summary
from limbeck.training.calibration import RIDGE_EVAL_SEQUENCES, RIDGES, NormalEquations
from limbeck.training.export import evaluate_run
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.optim import StageOptimizer, clip_gradients, count_training_steps
from limbeck.training.setup import Job
from limbeck.training.trainer import get_clip_groups

WARM = 64  # tokens of the step that is not counted


@dataclass(frozen=True)
class StageTimes:
    """Seconds by stage number, seconds for a token of the evaluation, and the peak of resident memory so far."""

    seconds: dict[int, float]
    eval_seconds_per_token: float
    peak_memory_bytes: int | None


def measure_stage_times(
    recipe: Recipe,
    pair: DistillationPair,
    make_stage: Callable[[int], Any],
    stages: list[int],
) -> StageTimes:
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
        judge = LogitsStage(pair, ObjectiveWeights())
        judge.evaluate(draw(WARM))
        evaluation = _timed(lambda: judge.evaluate(draw(recipe.data.seq_len))) / recipe.data.seq_len
        for index in stages:
            settings = recipe.stages[index]
            length = recipe.text_of(settings).seq_len
            if isinstance(settings, recipes.Calibrate):
                seconds[index] = _calibrate(settings, NormalEquations(pair, settings.weight), draw, length)
                seconds[index] += (
                    len(RIDGES) * RIDGE_EVAL_SEQUENCES * length * evaluation if settings.ridge == "auto" else 0
                )
            else:
                seconds[index] = _train(settings, make_stage(index), draw, length)
                seconds[index] += _asking(settings, pair, draw, length)
            advance(1)
    return StageTimes(seconds, evaluation, get_peak_memory())


def dry_run_export(job: Job, student: PreTrainedModel) -> None:
    """Go through the end of a run with a student that has learnt nothing, in a temporary folder.

    All that `export_and_evaluate` does is done, but small: of the weights one tensor is written, one sequence is measured, one
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
            result = evaluate_run(job, student, stages=[], plan={}, tokens=1, new_tokens=1)
        with _told("no summary can be written"):
            format_summary(result).encode()
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
        raise LimbeckError(f"{what}: {summarize_error(error)}", expected="what the end of the run has to do") from error


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
        optimizer = StageOptimizer(parameters, stage.learning_rates(settings), settings, stage.student)
        optimizer.set_lr_multiplier(0.0)

        def backward(tokens: int, sequences: int) -> None:
            batch = draw(tokens, sequences)
            if getattr(settings, "cache_teacher", None):
                batch = _taught(batch, settings.top_k)  # type: ignore[attr-defined]
            stage.backward(batch, stage.count(batch))

        def update() -> None:
            clip_gradients(parameters, settings.max_grad_norm, clip_groups=get_clip_groups(stage))
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
    return count_training_steps(settings, length) * step


def _taught(batch: Batch, top: int) -> TeacherLogitsBatch:
    index = torch.arange(top, device=batch.input_ids.device).expand(*batch.input_ids.shape, top)
    return TeacherLogitsBatch(
        **vars(batch), index=index, log_q=torch.full_like(index, -math.log(2 * top), dtype=torch.float32)
    )


@torch.no_grad()
def _asking(settings: Any, pair: DistillationPair, draw: Callable, length: int) -> float:
    """Seconds in which the teacher says all of it for the cache; nothing is taken to be there."""
    if getattr(settings, "cache_teacher", None) is None:
        return 0.0
    head = LMHead(pair.teacher)

    def ask() -> None:
        with pair.autocast():
            for part in run_backbone(pair.teacher, draw(length)).flatten(0, 1).split(128):
                head(part).topk(settings.top_k)

    return count_training_steps(settings, length) * settings.batch_size * _timed(ask)


def _timed(work: Callable[[], Any]) -> float:
    """Seconds of one call."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began
