"""Train arms of a study together: their shared stages, one wave after the other, each arm in its own run directory.

    failures = train_shared_stages(arms, loaded)           # {arm's name: the error that ended it}

A wave is one stage of all arms that are ready for it. Their students are built, finished stages are loaded, as many as
fit into memory train on the same passes of the teacher, and their weights are saved before the next wave. So a killed
wave resumes from its members' checkpoints, and an arm can be finished by `limbeck distill` alone at any time.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.signals import TrainingInterrupted
from limbeck.core.stage_settings import Calibrate
from limbeck.core.system import get_free_memory
from limbeck.study.sharing import pass_key
from limbeck.study.spec import Arm
from limbeck.training.alignment import LayerwiseStage
from limbeck.training.calibration import (
    NormalEquations,
    accumulate_normal_equations,
    get_output_projections,
    solve_calibration,
)
from limbeck.training.job import Job
from limbeck.training.joint_trainer import train_jointly
from limbeck.training.pipeline import start_run
from limbeck.training.precision import numerics_context
from limbeck.training.run_directory import RunDirectory, open_run
from limbeck.training.setup import build_student, prepare_job
from limbeck.training.stages import StageContext, StageRunner, make_stage
from limbeck.training.teacher_loading import LoadedTeacher
from limbeck.training.trainer import Trainer

# share of the free memory that the students of a wave may take; those beyond it wait for another pass of the teacher
MAX_MEMORY_FRACTION = 0.7
UNKNOWN_MEMORY_BYTES = 4 << 30  # assumed where the system does not tell how much is free


def train_shared_stages(
    arms: list[Arm], loaded: LoadedTeacher, memory_budget: Callable[[], int] | None = None
) -> dict[str, Exception]:
    """Train arms through the stages that they share; returns the errors of the arms that failed, by name.

    Args:
        arms: with one teacher; see `limbeck.study.sharing.group_arms_by_pass`.
        loaded: that teacher and its tokenizer.
        memory_budget: returns the bytes that students may take; by default the free memory.
    """
    failures: dict[str, Exception] = {}
    budget = memory_budget or partial(estimate_free_memory, loaded[0].device)
    while wave := _next_wave([arm for arm in arms if arm.name not in failures]):
        waiting = list(wave)
        while waiting:
            with numerics_context(waiting[0].recipe), ExitStack() as stack:
                student_runs = _build_student_runs(waiting, loaded, stack, failures, budget)
                if student_runs:
                    _train_wave(student_runs, failures)
    return failures


def can_share_pass(arms: list[Arm]) -> bool:
    """Tell whether several of these arms have an unfinished stage in common. Reads the disk only."""
    return bool(_next_wave(arms))


def estimate_free_memory(device: torch.device) -> int:
    """Return the free bytes of a device, a guess where the system does not tell."""
    free = get_free_memory(device)
    return UNKNOWN_MEMORY_BYTES if free is None else free


def _next_wave(arms: list[Arm]) -> list[Arm]:
    """Return arms whose next stage is the same pass of the teacher, if no other arm becomes ready for it later."""
    ready: dict[str, list[Arm]] = {}
    later: dict[str, int] = {}
    for arm in arms:
        keys = _list_unfinished_keys(arm)
        if keys:
            ready.setdefault(keys[0], []).append(arm)
        for key in keys[1:]:
            later[key] = later.get(key, 0) + 1
    # an arm may have to go alone through a stage before one that it shares
    shareable = {
        key: members
        for key, members in ready.items()
        if len(members) + later.get(key, 0) > 1 or _shares_later_stage(members, ready, later)
    }
    for key, members in shareable.items():
        if key not in later:
            return members
    return next(iter(shareable.values()), [])


def _shares_later_stage(members: list[Arm], ready: dict[str, list[Arm]], later: dict[str, int]) -> bool:
    """Tell whether one of the arms shares a stage with another after its next one."""
    return any(len(ready.get(key, [])) + later[key] > 1 for arm in members for key in _list_unfinished_keys(arm)[1:])


def _list_unfinished_keys(arm: Arm) -> list[str]:
    """Return the keys of the arm's stages from the first unfinished one on, as far as their passes can be shared."""
    run = RunDirectory(arm.path, arm.recipe)
    keys: list[str] = []
    for index in range(len(arm.recipe.stages)):
        key = pass_key(arm.recipe, index)
        if key is None:
            break
        if keys or not run.is_finished(index, verify=True):
            keys.append(key)
    return keys


@dataclass
class _StudentRun:
    """An arm in a wave: its student and the stage that is next."""

    arm: Arm
    job: Job
    run: RunDirectory
    runner: StageRunner
    context: StageContext


def _build_student_runs(
    waiting: list[Arm],
    loaded: LoadedTeacher,
    stack: ExitStack,
    failures: dict[str, Exception],
    memory_budget: Callable[[], int],
) -> list[_StudentRun]:
    """Take arms off the list and build their students, until no further one fits into memory."""
    student_runs: list[_StudentRun] = []
    free, used = memory_budget(), 0
    teacher_ids = {id(p) for p in loaded[0].parameters()}
    while waiting and (not student_runs or used + used / len(student_runs) < MAX_MEMORY_FRACTION * free):
        arm = waiting.pop(0)
        try:
            job = prepare_job(arm.recipe, loaded)
            run = stack.enter_context(open_run(job.path, arm.recipe))
            start_run(job, run)
            runner = StageRunner(job, run, build_student(job))
            context = runner.next_stage()
        except TrainingInterrupted:
            raise
        except Exception as error:
            failures[arm.name] = error
            continue
        assert context is not None
        student_runs.append(_StudentRun(arm, job, run, runner, context))
        own_bytes = sum(p.numel() * p.element_size() for p in runner.student.parameters() if id(p) not in teacher_ids)
        # beside the weights a gradient and the optimizer's two moments, or the sums of calibration; the guard's copy
        used += own_bytes * ((3 if isinstance(context.settings, Calibrate) else 4) + arm.recipe.keep_better)
    return student_runs


def _train_wave(student_runs: list[_StudentRun], failures: dict[str, Exception]) -> None:
    """Train the next stage of all students on the same passes of the teacher, and save their weights."""
    first = student_runs[0]
    stage = first.context.settings.stage
    console.print(f"{stage}, seed {first.job.recipe.seed}: {len(student_runs)} arms share the teacher's passes")
    if any(student_run.context.position != first.context.position for student_run in student_runs):
        raise LimbeckError("arms that should share the teacher's passes are at different positions in the text")
    results = _calibrate(student_runs) if stage == "calibrate" else _train(student_runs)
    for student_run, result in zip(student_runs, results):
        if isinstance(result, Exception):
            failures[student_run.arm.name] = result
        else:
            parameters, facts = result
            student_run.runner.finish_stage(student_run.context, parameters, facts)


def _train(student_runs: list[_StudentRun]) -> list[Any]:
    """Train a stage 1 or 2 of all students; returns for each its parameters and facts, or an error."""
    trainers = []
    for student_run in student_runs:
        context = student_run.context
        stage = cast(
            LayerwiseStage, make_stage(student_run.job, student_run.runner.student, context.settings, context.index)
        )
        trainers.append(
            Trainer(
                stage,
                context.settings,
                context.data,
                student_run.run,
                index=context.index,
                position=context.position,
                held_out=student_run.job.stage_held_out_dataset(context.settings),
            )
        )
    results = train_jointly(trainers)
    return [
        result if isinstance(result, Exception) else (trainer.model_parameters, result)
        for trainer, result in zip(trainers, results)
    ]


def _calibrate(student_runs: list[_StudentRun]) -> list[Any]:
    """Do stage 0 of all students: sums in the same passes, then each solves its own equations. Returns as `_train`."""
    context = student_runs[0].context
    equations = [
        NormalEquations(student_run.job.make_pair(student_run.runner.student), student_run.context.settings.weight)
        for student_run in student_runs
    ]
    start = time.monotonic()
    accumulate_normal_equations(equations, context.settings, context.data, context.position)
    seconds = (time.monotonic() - start) / len(student_runs)
    results: list[Any] = []
    for student_run, own_equations in zip(student_runs, equations):
        try:
            facts = solve_calibration(
                own_equations,
                student_run.context.settings,
                student_run.context.data,
                student_run.context.position,
                seconds,
            )
            parameters = get_output_projections(own_equations.pair)
            results.append((parameters, {**facts, "students_sharing_pass": len(student_runs)}))
        except Exception as error:
            results.append(error)
    return results
