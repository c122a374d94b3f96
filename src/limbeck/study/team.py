"""Arms that learn together: their shared stages, wave after wave, each arm in its own run directory.

    failures = learn_together(arms, loaded)           # {arm's name: the error that ended it}

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

from limbeck import recipe as recipes
from limbeck.console import console
from limbeck.errors import LimbeckError
from limbeck.job import begin
from limbeck.precision import arithmetic
from limbeck.prepare import Job, Loaded, new_student, prepare_job
from limbeck.stages.calibrate import NormalEquations
from limbeck.stages.interrupt import Stopped
from limbeck.stages.layerwise import LayerStage
from limbeck.stages.run import RunDirectory, open_run
from limbeck.stages.together import Member, train_together
from limbeck.study.grid import Arm
from limbeck.study.sharing import pass_key
from limbeck.teach import Course, Lesson, gather, make_stage, projections_of, solve

FILLED = 0.7  # of the free memory: students of a wave beyond that wait for another pass of the teacher


@dataclass
class _Pupil:
    """An arm in a wave."""

    arm: Arm
    job: Job
    run: RunDirectory
    course: Course
    lesson: Lesson


def learn_together(arms: list[Arm], loaded: Loaded, room: Callable[[], int] | None = None) -> dict[str, Exception]:
    """Bring arms through the stages that they share; returns the errors of those that could not go on.

    Args:
        arms: with one teacher; see `limbeck.study.sharing.teams`.
        loaded: that teacher and its tokenizer.
        room: bytes that may be used for students; what is free, by default.
    """
    failures: dict[str, Exception] = {}
    free = room or partial(free_bytes, loaded[0].device)
    while wave := _next_wave([arm for arm in arms if arm.name not in failures]):
        waiting = list(wave)
        while waiting:
            with arithmetic(waiting[0].recipe), ExitStack() as stack:
                pupils = _gather_pupils(waiting, loaded, stack, failures, free)
                if pupils:
                    _learn(pupils, failures)
    return failures


def shares_a_pass(arms: list[Arm]) -> bool:
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
        if found or not run.finished(index, verify=True):
            found.append(key)
    return found


def _gather_pupils(
    waiting: list[Arm], loaded: Loaded, stack: ExitStack, failures: dict[str, Exception], room: Callable[[], int]
) -> list[_Pupil]:
    """Take arms off the list and make their students, until no further one would fit."""
    pupils: list[_Pupil] = []
    free, used = room(), 0
    theirs = {id(p) for p in loaded[0].parameters()}
    while waiting and (not pupils or used + used / len(pupils) < FILLED * free):
        arm = waiting.pop(0)
        try:
            job = prepare_job(arm.recipe, loaded)
            run = stack.enter_context(open_run(job.path, arm.recipe))
            begin(job, run)
            course = Course(job, run, new_student(job))
            lesson = course.next()
        except Stopped:
            raise
        except Exception as error:
            failures[arm.name] = error
            continue
        assert lesson is not None
        pupils.append(_Pupil(arm, job, run, course, lesson))
        own = sum(p.numel() * p.element_size() for p in course.student.parameters() if id(p) not in theirs)
        used += own * (4 if not isinstance(lesson.settings, recipes.Calibrate) else 3)  # gradient, two moments; sums
    return pupils


def _learn(pupils: list[_Pupil], failures: dict[str, Exception]) -> None:
    first = pupils[0]
    name = first.lesson.settings.stage
    console.print(f"{name}, seed {first.job.recipe.seed}: {len(pupils)} arms on the same passes of the teacher")
    if any(p.lesson.position != first.lesson.position for p in pupils):
        raise LimbeckError("arms that were to share the teacher's passes stand at different places of the text")
    ends = _calibrate(pupils) if name == "calibrate" else _train(pupils)
    for pupil, end in zip(pupils, ends):
        if isinstance(end, Exception):
            failures[pupil.arm.name] = end
            continue
        learnt, facts = end
        pupil.course.finish(pupil.lesson, learnt, facts)


def _train(pupils: list[_Pupil]) -> list[Any]:
    """Of each what it learnt and its facts, or an error."""
    stages = [cast(LayerStage, make_stage(p.job, p.course.student, p.lesson.settings, p.lesson.index)) for p in pupils]
    members = [
        Member(
            stage,
            p.lesson.settings,
            p.lesson.data,
            p.run,
            p.lesson.index,
            p.lesson.position,
            p.job.held_out(p.lesson.text),
        )
        for stage, p in zip(stages, pupils)
    ]
    ends = train_together(members)
    return [end if isinstance(end, Exception) else (stage.parameters(), end) for stage, end in zip(stages, ends)]


def _calibrate(pupils: list[_Pupil]) -> list[Any]:
    """The same for stage 0: the sums are gathered together, each arm solves for itself."""
    first = pupils[0]
    ends: list[Any] = []
    fits = [NormalEquations(p.job.pair(p.course.student), p.lesson.settings.weight) for p in pupils]
    lesson = first.lesson
    began = time.monotonic()
    gather(fits, lesson.settings, lesson.data, lesson.position, first.job.device)
    share = (time.monotonic() - began) / len(pupils)
    for p, fit in zip(pupils, fits):
        student = p.course.student
        try:
            facts = solve(p.job, student, p.lesson.settings, p.lesson.data, p.lesson.position, fit, share)
            ends.append((projections_of(p.job, student), {**facts, "together": len(pupils)}))
        except Exception as error:
            ends.append(error)
    return ends


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; of the CPU what the system can give without swapping."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        return 4 << 30
