"""Rehearse a run before it starts: time one step of each stage on the real models, and try its export.

    times = measure_stage_times(recipe, job.make_pair(student), make_stage, stages=[0, 1, 2])
    plan = plan.with_measured_times(times)                             # limbeck.training.plan
    dry_run_export(job, build_student(job))                            # LimbeckError if the end of the run would fail

It takes about as long as two steps of each stage. Tokens are random; learning rates and gradients are zero in the
update, so no weight changes except the output projections of `student`, which is discarded afterwards.
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

from limbeck.core.console import console, progress
from limbeck.core.errors import LimbeckError, summarize_error
from limbeck.core.recipe import Recipe
from limbeck.core.stage_settings import Calibrate, Trained
from limbeck.core.system import get_peak_memory
from limbeck.data.packing import Batch
from limbeck.data.teacher_logits import TeacherLogitsBatch
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.hooks import DistillationPair
from limbeck.models.saved_check import check_export
from limbeck.report.run_summary import format_summary
from limbeck.training.calibration import RIDGE_EVAL_SEQUENCES, RIDGES, NormalEquations
from limbeck.training.export import evaluate_run
from limbeck.training.job import Job
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.optim import StageOptimizer, clip_gradients, count_training_steps
from limbeck.training.stage_protocol import get_clip_groups

WARMUP_TOKENS = 64  # of the first step, which is not timed


@dataclass(frozen=True)
class StageTimes:
    """Measured cost of a run."""

    seconds: dict[int, float]  # of all steps of a stage, by stage index
    eval_seconds_per_token: float
    peak_memory_bytes: int | None  # of this process so far; None if the system does not tell


def measure_stage_times(
    recipe: Recipe,
    pair: DistillationPair,
    make_stage: Callable[[int], Any],
    stages: list[int],
) -> StageTimes:
    """Run a step of each stage and extrapolate to all of its steps.

    Args:
        pair: with a student that is discarded afterwards.
        make_stage: builds the stage of this index, for the pair's student.
        stages: indices of the stages to rehearse.
    """
    seconds: dict[int, float] = {}
    teacher = pair.teacher
    vocab_size = int(teacher.get_input_embeddings().weight.shape[0])  # type: ignore[arg-type, index]

    def draw(tokens: int, sequences: int = 1) -> Batch:
        ids = torch.randint(0, vocab_size, (sequences, tokens))
        return Batch(ids, torch.arange(tokens).repeat(sequences, 1), ids).to(teacher.device)

    with torch.random.fork_rng(), progress("rehearse", len(stages), "stages") as advance:
        evaluation = LogitsStage(pair, ObjectiveWeights())
        evaluation.evaluate(draw(WARMUP_TOKENS))
        eval_seconds = _timed(lambda: evaluation.evaluate(draw(recipe.data.seq_len))) / recipe.data.seq_len
        for index in stages:
            settings = recipe.stages[index]
            length = recipe.text_of(settings).seq_len
            if isinstance(settings, Calibrate):
                seconds[index] = _time_calibration(settings, NormalEquations(pair, settings.weight), draw, length)
                if settings.ridge == "auto":  # each candidate is evaluated
                    seconds[index] += len(RIDGES) * RIDGE_EVAL_SEQUENCES * length * eval_seconds
            else:
                seconds[index] = _time_training(settings, make_stage(index), draw, length)
                seconds[index] += _time_teacher_cache(settings, pair, draw, length)
            advance(1)
    return StageTimes(seconds, eval_seconds, get_peak_memory())


def dry_run_export(job: Job, student: PreTrainedModel) -> None:
    """Do what `export_and_evaluate` does, with an untrained student, in a temporary folder and on a small scale.

    One tensor of the weights is written, one sequence evaluated, the beginning of the exam run, one token sampled.
    Writing all weights is skipped: it takes most of the time at the end of a run, and fails only for lack of disk
    space, which the plan checks.

    Raises:
        LimbeckError: the student cannot be saved, loaded again, sampled from or summarized.
    """
    student.eval()
    name, smallest = min(student.named_parameters(), key=lambda pair: pair[1].numel())
    quiet, console.quiet = console.quiet, True
    try:
        with tempfile.TemporaryDirectory() as folder, _explain_errors("the student cannot be saved and loaded again"):
            student.save_pretrained(folder, state_dict={name: smallest.detach()})
            job.tokenizer.save_pretrained(folder)
            check_export(Path(folder), student, job.tokenizer, weights=False)
        with _explain_errors("the student cannot be sampled and evaluated"):
            result = evaluate_run(job, student, stages=[], plan={}, tokens=1, new_tokens=1, rehearsal=True)
        with _explain_errors("the summary cannot be written"):
            format_summary(result).encode()
            json.dumps(result)
    finally:
        console.quiet = quiet


@contextmanager
def _explain_errors(what: str) -> Iterator[None]:
    """Turn errors of other libraries into LimbeckError, prefixed with what could not be done."""
    try:
        yield
    except (LimbeckError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise LimbeckError(
            f"{what}: {summarize_error(error)}", expected="an export that works at the end of the run"
        ) from error


def _time_calibration(settings: Calibrate, fits: NormalEquations, draw: Callable, length: int) -> float:
    """Return the seconds that stage 0 takes."""
    fits.add(draw(WARMUP_TOKENS))
    sequence_seconds = _timed(lambda: fits.add(draw(length)))
    solve_seconds = _timed(lambda: fits.solve(1e-2 if settings.ridge == "auto" else settings.ridge))
    n_solutions = len(RIDGES) + 1 if settings.ridge == "auto" else 1
    return max(1, round(settings.tokens / length)) * sequence_seconds + n_solutions * solve_seconds


def _time_training(settings: Trained, stage: Any, draw: Callable, length: int) -> float:
    """Return the seconds that the optimizer steps of a stage take."""
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
                batch = _add_teacher_logits(batch, settings.top_k)  # type: ignore[attr-defined]
            stage.backward(batch, stage.count(batch))

        def update() -> None:
            clip_gradients(parameters, settings.max_grad_norm, clip_groups=get_clip_groups(stage))
            for parameter in parameters.values():
                # Zero, because not even a NaN may reach the weights: many of them are the teacher's.
                if parameter.grad is not None:
                    parameter.grad.zero_()
            optimizer.step()
            optimizer.zero_grad()

        backward(WARMUP_TOKENS, 1)
        update()  # the first one creates the optimizer state
        micro_seconds = 0.0
        for share, prepare in getattr(stage, "rehearsal_kinds", lambda: [(1.0, lambda: None)])():
            prepare()  # where a stage treats some sequences in another way, each kind is timed by itself
            micro_seconds += share * _timed(lambda: backward(length, micro))
        step_seconds = math.ceil(settings.batch_size / micro) * micro_seconds + _timed(update)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    return count_training_steps(settings, length) * step_seconds


def _add_teacher_logits(batch: Batch, top_k: int) -> TeacherLogitsBatch:
    """Add invented teacher logits to a batch: its first `top_k` tokens, which share half of the probability."""
    index = torch.arange(top_k, device=batch.input_ids.device).expand(*batch.input_ids.shape, top_k)
    log_q = torch.full_like(index, -math.log(2 * top_k), dtype=torch.float32)
    return TeacherLogitsBatch(**vars(batch), index=index, log_q=log_q)


@torch.no_grad()
def _time_teacher_cache(settings: Any, pair: DistillationPair, draw: Callable, length: int) -> float:
    """Return the seconds that filling the cache of teacher logits takes, as if nothing was cached yet."""
    if getattr(settings, "cache_teacher", None) is None:
        return 0.0
    head = LMHead(pair.teacher)

    def compute() -> None:
        with pair.autocast():
            for part in run_backbone(pair.teacher, draw(length)).flatten(0, 1).split(128):
                head(part).topk(settings.top_k)

    return count_training_steps(settings, length) * settings.batch_size * _timed(compute)


def _timed(work: Callable[[], Any]) -> float:
    """Time one call, in seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
