"""Arms that learn together: their shared stages, wave after wave, each arm in its own run directory.

    failures = train_shared_stages(arms, loaded)           # {arm's name: the error that ended it}

A wave is one stage of all arms that are ready for it: their students are made, what they learnt before is loaded, as
many as fit into memory train on the same passes of the teacher, and what they learnt is kept before the next wave. So a
killed wave goes on from its members' checkpoints, and an arm can be finished by `limbeck distill` alone at any time.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch

from limbeck.core import recipe as recipes
from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.signals import TrainingInterrupted
from limbeck.study.sharing import pass_key
from limbeck.study.spec import Arm
from limbeck.training.alignment import LayerwiseStage
from limbeck.training.calibration import NormalEquations
from limbeck.training.joint_trainer import StudentTraining, train_jointly
from limbeck.training.pipeline import start_run
from limbeck.training.precision import numerics_context
from limbeck.training.run_directory import RunDirectory, open_run
from limbeck.training.setup import Job, build_student, prepare_job
from limbeck.training.stages import (
    StageContext,
    StageRunner,
    accumulate_normal_equations,
    get_output_projections,
    make_stage,
    solve_calibration,
)
from limbeck.training.teacher_loading import LoadedTeacher

MAX_MEMORY_FRACTION = 0.7  # of the free memory: students of a wave beyond that wait for another pass of the teacher


@dataclass
class _StudentRun:
    """An arm in a wave."""

    arm: Arm
    job: Job
    run: RunDirectory
    stage_runner: StageRunner
    context: StageContext


def train_shared_stages(
    arms: list[Arm], loaded: LoadedTeacher, memory_budget: Callable[[], int] | None = None
) -> dict[str, Exception]:
    """Bring arms through the stages that they share; returns the errors of those that could not go on.

    Args:
        arms: with one teacher; see `limbeck.study.sharing.group_arms_by_pass`.
        loaded: that teacher and its tokenizer.
        memory_budget: bytes that may be used for students; what is free, by default.
    """
    failures: dict[str, Exception] = {}
    free = memory_budget or partial(get_free_memory, loaded[0].device)
    while wave := _next_wave([arm for arm in arms if arm.name not in failures]):
        waiting = list(wave)
        while waiting:
            with numerics_context(waiting[0].recipe), ExitStack() as stack:
                student_runs = _gather_student_runs(waiting, loaded, stack, failures, free)
                if student_runs:
                    _learn(student_runs, failures)
    return failures


def can_share_pass(arms: list[Arm]) -> bool:
    """Is there a stage left that several of these arms can go through together? Reads the disk alone."""
    return bool(_next_wave(arms))


def _next_wave(arms: list[Arm]) -> list[Arm]:
    """Arms whose next stage is the same pass of the teacher, and that no other arm will be ready for later."""
    ready: dict[str, list[Arm]] = {}
    later: dict[str, int] = {}
    for arm in arms:
        left = _unfinished(arm)
        if left:
            ready.setdefault(left[0], []).append(arm)
        for key in left[1:]:
            later[key] = later.get(key, 0) + 1
    together = {key for key, members in ready.items() if len(members) + later.get(key, 0) > 1}
    # an arm may have to go alone through a stage before one that it shares
    useful = {key: members for key, members in ready.items() if key in together or _shared_later(members, ready, later)}
    for key, members in useful.items():
        if key not in later:
            return members
    return next(iter(useful.values()), [])


def _shared_later(members: list[Arm], ready: dict[str, list[Arm]], later: dict[str, int]) -> bool:
    return any(len(ready.get(key, [])) + later[key] > 1 for arm in members for key in _unfinished(arm)[1:])


def _unfinished(arm: Arm) -> list[str]:
    """Keys of the arm's stages from the first unfinished one on, as far as their passes can be shared."""
    run = RunDirectory(arm.path, arm.recipe)
    found: list[str] = []
    for index in range(len(arm.recipe.stages)):
        key = pass_key(arm.recipe, index)
        if key is None:
            break
        if found or not run.is_finished(index, verify=True):
            found.append(key)
    return found


def _gather_student_runs(
    waiting: list[Arm],
    loaded: LoadedTeacher,
    stack: ExitStack,
    failures: dict[str, Exception],
    memory_budget: Callable[[], int],
) -> list[_StudentRun]:
    """Take arms off the list and make their students, until no further one would fit."""
    student_runs: list[_StudentRun] = []
    free, used = memory_budget(), 0
    theirs = {id(p) for p in loaded[0].parameters()}
    while waiting and (not student_runs or used + used / len(student_runs) < MAX_MEMORY_FRACTION * free):
        arm = waiting.pop(0)
        try:
            job = prepare_job(arm.recipe, loaded)
            run = stack.enter_context(open_run(job.path, arm.recipe))
            start_run(job, run)
            stage_runner = StageRunner(job, run, build_student(job))
            context = stage_runner.next_stage()
        except TrainingInterrupted:
            raise
        except Exception as error:
            failures[arm.name] = error
            continue
        assert context is not None
        student_runs.append(_StudentRun(arm, job, run, stage_runner, context))
        own = sum(p.numel() * p.element_size() for p in stage_runner.student.parameters() if id(p) not in theirs)
        used += own * (4 if not isinstance(context.settings, recipes.Calibrate) else 3)  # gradient, two moments; sums
    return student_runs


def _learn(student_runs: list[_StudentRun], failures: dict[str, Exception]) -> None:
    first = student_runs[0]
    name = first.context.settings.stage
    console.print(f"{name}, seed {first.job.recipe.seed}: {len(student_runs)} arms on the same passes of the teacher")
    if any(p.context.position != first.context.position for p in student_runs):
        raise LimbeckError("arms that were to share the teacher's passes stand at different places of the text")
    ends = _calibrate(student_runs) if name == "calibrate" else _train(student_runs)
    for student_run, end in zip(student_runs, ends):
        if isinstance(end, Exception):
            failures[student_run.arm.name] = end
            continue
        learned, facts = end
        student_run.stage_runner.finish_stage(student_run.context, learned, facts)


def _train(student_runs: list[_StudentRun]) -> list[Any]:
    """Of each what it learnt and its facts, or an error."""
    stages = [
        cast(LayerwiseStage, make_stage(p.job, p.stage_runner.student, p.context.settings, p.context.index))
        for p in student_runs
    ]
    members = [
        StudentTraining(
            stage,
            p.context.settings,
            p.context.data,
            p.run,
            p.context.index,
            p.context.position,
            p.job.held_out_dataset(p.context.text),
        )
        for stage, p in zip(stages, student_runs)
    ]
    ends = train_jointly(members)
    return [end if isinstance(end, Exception) else (stage.parameters(), end) for stage, end in zip(stages, ends)]


def _calibrate(student_runs: list[_StudentRun]) -> list[Any]:
    """The same for stage 0: the sums are gathered together, each arm solves for itself."""
    first = student_runs[0]
    ends: list[Any] = []
    fits = [NormalEquations(p.job.make_pair(p.stage_runner.student), p.context.settings.weight) for p in student_runs]
    context = first.context
    began = time.monotonic()
    accumulate_normal_equations(fits, context.settings, context.data, context.position, first.job.device)
    share = (time.monotonic() - began) / len(student_runs)
    for p, fit in zip(student_runs, fits):
        student = p.stage_runner.student
        try:
            facts = solve_calibration(
                p.job, student, p.context.settings, p.context.data, p.context.position, fit, share
            )
            ends.append((get_output_projections(p.job, student), {**facts, "students_sharing_pass": len(student_runs)}))
        except Exception as error:
            ends.append(error)
    return ends


def get_free_memory(device: torch.device) -> int:
    """Free memory of a device; of the CPU what the system can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return 4 << 30
