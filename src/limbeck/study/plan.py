"""Plan what is left of a study: its tasks in order, and their cost in tokens, time and disk.

    plan = plan_study(study, arms, task_runner, workers=2)
    plan.seconds, plan.saved_seconds, plan.tokens, plan.disk_bytes
    plan.wall_seconds                                    # time to the end with two workers
    first, later = schedule_tasks(arms, states, workers=8)

The first list holds the groups of arms that share passes of the teacher, and the arms that share nothing; the second
takes each arm of a group to its end. With fewer tasks than workers the largest groups are split: the teacher then runs
once for each part, and the weights stay the same, since an arm's do not depend on the arms it trains beside.

One arm of each student is rehearsed (`limbeck.training.rehearsal`), one step of each stage; the times of the others are
scaled from it by their steps. What sharing saves is the teacher's time, measured on a pass.
"""

import heapq
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from limbeck.data.packing import Batch
from limbeck.models.backbone import run_backbone
from limbeck.models.quantization import count_unquantized_parameters
from limbeck.study import results
from limbeck.study.shared_training import can_share_pass
from limbeck.study.sharing import group_arms_by_pass, pass_key
from limbeck.study.spec import Arm, Study
from limbeck.study.tasks import StudyTask, TaskRunner
from limbeck.training.job import Job
from limbeck.training.pipeline import measure_plan
from limbeck.training.plan import Plan, make_plan
from limbeck.training.setup import prepare_job


def schedule_tasks(
    arms: list[Arm], states: dict[str, str], workers: int = 1
) -> tuple[list[StudyTask], list[StudyTask]]:
    """List the tasks that can run at once, and those that come after them.

    Args:
        states: the state of each arm by name, see `limbeck.study.results.get_arm_state`.
        workers: how many tasks can run side by side.
    """
    unfinished = [arm for arm in arms if states[arm.name] != "finished"]
    groups = [
        group
        for group in group_arms_by_pass([arm for arm in unfinished if states[arm.name] == "train"])
        if can_share_pass(group)
    ]
    grouped = {arm.name for group in groups for arm in group}
    ungrouped = [arm.name for arm in unfinished if arm.name not in grouped]
    parts = _split_groups([[arm.name for arm in group] for group in groups], workers - len(ungrouped))
    first = [StudyTask("shared" if len(part) > 1 else "alone", tuple(part)) for part in parts]
    completed_first = {name for task in first if task.kind == "alone" for name in task.arms}
    first += [StudyTask("alone", (name,)) for name in ungrouped]
    later = [StudyTask("alone", (arm.name,)) for arm in unfinished if arm.name in grouped - completed_first]
    return first, later


def estimate_wall_seconds(
    first: list[StudyTask], later: list[StudyTask], seconds: Callable[[StudyTask, bool], float], workers: int = 1
) -> float:
    """Estimate the seconds to the end: a free worker takes the next task, and the second list waits for the first."""
    total = 0.0
    for tasks in (first, later):
        free = [0.0] * workers
        for task in tasks:
            heapq.heappush(free, heapq.heappop(free) + seconds(task, tasks is first))
        total += max(free)
    return total


def _split_groups(groups: list[list[str]], num_parts: int) -> list[list[str]]:
    """Halve the largest group until there are `num_parts` or all have one member; the largest come first."""
    parts = sorted(groups, key=len, reverse=True)
    while parts and len(parts) < num_parts and len(parts[0]) > 1:
        largest = parts.pop(0)
        middle = (len(largest) + 1) // 2
        parts = sorted([*parts, largest[:middle], largest[middle:]], key=len, reverse=True)
    return parts


@dataclass(frozen=True)
class ArmPlan:
    """The cost of what is left of an arm. state: see `limbeck.study.results.get_arm_state`."""

    name: str
    state: str
    tokens: int = 0
    seconds: float = 0.0
    saved_seconds: float = 0.0
    disk_bytes: int = 0
    error: str = ""  # why its recipe cannot run
    shared_seconds: float = 0.0  # part of `seconds`: stages that it shares with other arms
    # part of `shared_seconds`: the teacher's passes, by `pass_key`
    teacher_pass_seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class StudyPlan:
    """The plans of all arms, finished ones included, and the cost of the whole study."""

    arms: list[ArmPlan]
    disk_bytes: int
    workers: int = 1
    wall_seconds: float = 0.0  # time to the end with that many workers

    @property
    def seconds(self) -> float:
        """Time of all arms that are left, one after another, with shared passes counted once."""
        return sum(arm.seconds - arm.saved_seconds for arm in self.arms)

    @property
    def saved_seconds(self) -> float:
        """Time that sharing the teacher's passes saves."""
        return sum(arm.saved_seconds for arm in self.arms)

    @property
    def tokens(self) -> int:
        """Training tokens of all arms together."""
        return sum(arm.tokens for arm in self.arms)

    def to_dict(self) -> dict[str, Any]:
        """Convert the totals to plain data."""
        return {
            "arms": len(self.arms),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "saved_seconds": self.saved_seconds,
            "workers": self.workers,
            "wall_seconds": self.wall_seconds,
            "disk_bytes": self.disk_bytes,
        }

    def estimate_task_seconds(self, task: StudyTask, first: bool) -> float:
        """Estimate how long a task takes, in the first or the second list of `schedule_tasks`."""
        arms = [arm for arm in self.arms if arm.name in task.arms]
        if task.kind == "alone":
            return sum(arm.seconds if first else arm.seconds - arm.shared_seconds for arm in arms)
        pass_seconds: dict[str, float] = {}
        for arm in arms:
            pass_seconds |= {
                key: max(seconds, pass_seconds.get(key, 0.0)) for key, seconds in arm.teacher_pass_seconds.items()
            }
        student_seconds = sum(arm.shared_seconds - sum(arm.teacher_pass_seconds.values()) for arm in arms)
        return student_seconds + sum(pass_seconds.values())


def plan_study(
    study: Study, arms: list[Arm], task_runner: TaskRunner, workers: int = 1, threads: int | None = None
) -> StudyPlan:
    """Plan what is left of a study; rehearses on the real models, writes nothing but the caches.

    Args:
        workers: how many tasks run side by side, on devices or threads of their own.
        threads: CPU threads of each; those of this process by default.
    """
    with _cpu_threads(threads):
        plans, disk_bytes, states = _plan_arms(study, arms, task_runner)
    plan = StudyPlan(plans, disk_bytes, workers)
    first, later = schedule_tasks(arms, states, workers)
    return replace(plan, wall_seconds=estimate_wall_seconds(first, later, plan.estimate_task_seconds, workers))


def _plan_arms(study: Study, arms: list[Arm], task_runner: TaskRunner) -> tuple[list[ArmPlan], int, dict[str, str]]:
    """Return the arms' plans, the disk that they need in bytes, and the state of each arm by name."""
    states = {arm.name: results.get_arm_state(arm, study) for arm in arms}
    untrained = [arm for arm in arms if states[arm.name] == "train"]
    sharers: dict[str, int] = {}
    for arm in untrained:
        for index in range(len(arm.recipe.stages)):
            key = pass_key(arm.recipe, index)
            if key is not None:
                sharers[key] = sharers.get(key, 0) + 1
    scales = _TimeScales(untrained, task_runner)
    plans, peak_bytes = [], 0
    for arm in arms:
        if states[arm.name] != "train":
            plans.append(ArmPlan(arm.name, states[arm.name]))
            continue
        try:
            job = prepare_job(arm.recipe, task_runner.load_teacher(arm.recipe))
            estimate = make_plan(arm.recipe, job.teacher, job.sites)
        except Exception as error:  # this arm will fail with it, but others need not
            if len(untrained) == 1 or (len(plans) + 1 == len(arms) and all(plan.error for plan in plans)):
                raise
            plans.append(ArmPlan(arm.name, "train", error=str(error).splitlines()[0]))
            continue
        seconds, saved_seconds, stored_bytes, shared_seconds = 0.0, 0.0, 0, 0.0
        pass_seconds: dict[str, float] = {}
        for index, stage in enumerate(estimate.stages):
            stage_seconds = stage.seconds * scales.get(arm, stage.stage)
            seconds += stage_seconds
            key = pass_key(arm.recipe, index)
            num_sharers = sharers.get(key, 0) if key is not None else 0
            if key is not None and num_sharers > 1:
                pass_seconds[key] = min(stage.tokens * scales.get_teacher_seconds(arm, job), stage_seconds)
                shared_seconds += stage_seconds
                saved_seconds += (num_sharers - 1) / num_sharers * pass_seconds[key]
                stored_bytes += 4 * stage.trained_parameters  # a shared stage's weights stay until the arm is finished
        # the run's own evaluation; the cost of the study's measures cannot be estimated
        evaluation = estimate.seconds - sum(stage.seconds for stage in estimate.stages)
        seconds += evaluation * scales.get(arm, estimate.stages[-1].stage)
        student_bytes = 4 * count_unquantized_parameters(job.teacher)
        stored_bytes += {"none": 0, "students": student_bytes, "all": estimate.disk_bytes}[study.save_artifacts]
        peak_bytes = max(peak_bytes, estimate.disk_bytes)
        tokens = sum(stage.tokens for stage in estimate.stages)
        plans.append(
            ArmPlan(arm.name, "train", tokens, seconds, saved_seconds, stored_bytes, "", shared_seconds, pass_seconds)
        )
    return plans, peak_bytes + sum(plan.disk_bytes for plan in plans), states


class _TimeScales:
    """Measures how far the estimated times are off, by rehearsing one arm of each student.

    scales: measured over estimated time of each stage, by teacher and student.
    teacher_seconds: what a token takes each teacher.
    """

    def __init__(self, arms: list[Arm], task_runner: TaskRunner):
        self.arms, self.task_runner = arms, task_runner
        self.scales: dict[tuple[str, str], dict[str, float]] = {}
        self.teacher_seconds: dict[str, float] = {}

    def get(self, arm: Arm, stage: str) -> float:
        key = arm.axes["teacher"], arm.axes["student"]
        if key not in self.scales:
            candidates = [
                candidate for candidate in self.arms if (candidate.axes["teacher"], candidate.axes["student"]) == key
            ]
            self.scales[key] = self._rehearse(max(candidates, key=lambda candidate: len(candidate.recipe.stages)))
        scales = self.scales[key]
        return scales.get(stage, max(scales.values(), default=1.0))

    def get_teacher_seconds(self, arm: Arm, job: Job) -> float:
        if arm.recipe.teacher not in self.teacher_seconds:
            self.teacher_seconds[arm.recipe.teacher] = _measure_teacher_seconds(job)
        return self.teacher_seconds[arm.recipe.teacher]

    def _rehearse(self, arm: Arm) -> dict[str, float]:
        job = prepare_job(arm.recipe, self.task_runner.load_teacher(arm.recipe))
        estimate: Plan = make_plan(arm.recipe, job.teacher, job.sites)
        measurement = measure_plan(job, estimate)
        return {
            estimated.stage: rehearsed.seconds / max(estimated.seconds, 1e-12)
            for estimated, rehearsed in zip(estimate.stages, measurement.stages)
        }


@contextmanager
def _cpu_threads(count: int | None) -> Iterator[None]:
    """Use this number of CPU threads inside the context; None leaves it as it is."""
    previous = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(previous)


@torch.no_grad()
def _measure_teacher_seconds(job: Job) -> float:
    """Measure the seconds a token takes the teacher's backbone, the faster of two passes."""
    length = job.recipe.data.seq_len
    ids = torch.randint(0, int(job.teacher.config.get_text_config().vocab_size), (1, length), device=job.device)
    batch = Batch(ids, torch.arange(length, device=job.device)[None], ids)
    timings = []
    for _ in range(2):
        start = time.perf_counter()
        with job.autocast():
            run_backbone(job.teacher, batch)
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        timings.append(time.perf_counter() - start)
    return min(timings) / length
