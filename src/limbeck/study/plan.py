"""What a study will cost, before it starts: arms, tokens, time and disk, and what sharing saves.

    plan = make_study_plan(study, arms, workplace, workers=2)
    plan.seconds, plan.saved_seconds, plan.tokens, plan.disk_bytes
    plan.wall_seconds                                    # until two workers are done

The stages of one arm of each student are rehearsed (`limbeck.rehearsal`), one step each; the times of the other arms
are those of the rehearsed one, scaled by their steps. What sharing saves is the teacher's time, measured on a pass.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from limbeck.data.packing import Batch
from limbeck.job import measured_plan
from limbeck.model.body import run_body
from limbeck.plan import Plan, make_plan
from limbeck.prepare import Job, prepare_job
from limbeck.quantise import numel
from limbeck.study import record
from limbeck.study.grid import Arm, Study
from limbeck.study.schedule import lists, wall_seconds
from limbeck.study.sharing import pass_key
from limbeck.study.work import Task, Workplace


@dataclass(frozen=True)
class ArmPlan:
    """One arm. state: "finished", "measure" (its student is there) or "train"."""

    name: str
    state: str
    tokens: int = 0
    seconds: float = 0.0
    saved_seconds: float = 0.0
    disk_bytes: int = 0
    problem: str = ""  # why its recipe cannot be run
    shared_seconds: float = 0.0  # of `seconds`, in stages that it shares with others
    passes: dict[str, float] = field(default_factory=dict)  # of those the teacher's, by `pass_key`


@dataclass(frozen=True)
class StudyPlan:
    """All arms, those that are finished too."""

    arms: list[ArmPlan]
    disk_bytes: int
    workers: int = 1
    wall_seconds: float = 0.0  # until so many workers are done

    @property
    def seconds(self) -> float:
        """Of all arms that are left, with their work shared."""
        return sum(arm.seconds - arm.saved_seconds for arm in self.arms)

    @property
    def saved_seconds(self) -> float:
        """What sharing saves of the time of all arms one by one."""
        return sum(arm.saved_seconds for arm in self.arms)

    @property
    def tokens(self) -> int:
        """That the students are trained on, all arms together."""
        return sum(arm.tokens for arm in self.arms)

    def facts(self) -> dict[str, Any]:
        """For study.json."""
        return {
            "arms": len(self.arms),
            "tokens": self.tokens,
            "seconds": self.seconds,
            "saved_seconds": self.saved_seconds,
            "workers": self.workers,
            "wall_seconds": self.wall_seconds,
            "disk_bytes": self.disk_bytes,
        }

    def task_seconds(self, task: Task, first: bool) -> float:
        """How long a task takes, in the first or the second of a study's lists (`limbeck.study.schedule`)."""
        mine = [arm for arm in self.arms if arm.name in task.arms]
        if task.kind == "alone":
            return sum(arm.seconds if first else arm.seconds - arm.shared_seconds for arm in mine)
        once: dict[str, float] = {}
        for arm in mine:
            once |= {key: max(taken, once.get(key, 0.0)) for key, taken in arm.passes.items()}
        return sum(arm.shared_seconds - sum(arm.passes.values()) for arm in mine) + sum(once.values())


def make_study_plan(
    study: Study, arms: list[Arm], workplace: Workplace, workers: int = 1, threads: int | None = None
) -> StudyPlan:
    """Plan what is left of a study; rehearses on the real models, writes nothing but the caches.

    Args:
        workers: how many tasks go side by side, on devices or threads of their own.
        threads: CPU threads of each; those of this process by default.
    """
    with _threads(threads):
        plans, disk_bytes, states = _plan_arms(study, arms, workplace)
    plan = StudyPlan(plans, disk_bytes, workers)
    first, later = lists(arms, states, workers)
    return replace(plan, wall_seconds=wall_seconds(first, later, plan.task_seconds, workers))


def _plan_arms(study: Study, arms: list[Arm], workplace: Workplace) -> tuple[list[ArmPlan], int, dict[str, str]]:
    """The arms' plans, bytes of disk, and where each arm stands."""
    states = {arm.name: record.state(arm, study) for arm in arms}
    left = [arm for arm in arms if states[arm.name] == "train"]
    sharers: dict[str, int] = {}
    for arm in left:
        for index in range(len(arm.recipe.stages)):
            key = pass_key(arm.recipe, index)
            if key is not None:
                sharers[key] = sharers.get(key, 0) + 1
    paces = _Paces(left, workplace)
    plans, peak = [], 0
    for arm in arms:
        if states[arm.name] != "train":
            plans.append(ArmPlan(arm.name, states[arm.name]))
            continue
        try:
            job = prepare_job(arm.recipe, workplace.teacher(arm.recipe))
            counted = make_plan(arm.recipe, job.teacher, job.sites)
        except Exception as error:  # the arm will fail with it, others need not
            if len(left) == 1 or (len(plans) + 1 == len(arms) and all(plan.problem for plan in plans)):
                raise
            plans.append(ArmPlan(arm.name, "train", problem=str(error).splitlines()[0]))
            continue
        seconds, saved, kept, shared = 0.0, 0.0, 0, 0.0
        passes: dict[str, float] = {}
        for index, row in enumerate(counted.rows):
            taken = row.seconds * paces.of(arm, row.stage)
            seconds += taken
            key = pass_key(arm.recipe, index)
            n = sharers.get(key, 0) if key is not None else 0
            if key is not None and n > 1:
                passes[key] = min(row.tokens * paces.teacher(arm, job), taken)
                shared += taken
                saved += (n - 1) / n * passes[key]
                kept += 4 * row.trained  # what it taught stays until the arm is finished
        # the run's own evaluation; what the study's measures take is not known beforehand
        evaluation = counted.seconds - sum(row.seconds for row in counted.rows)
        seconds += evaluation * paces.of(arm, counted.rows[-1].stage)
        student = 4 * numel(job.teacher)
        kept += {"none": 0, "students": student, "all": counted.disk_bytes}[study.save_artifacts]
        peak = max(peak, counted.disk_bytes)
        tokens = sum(row.tokens for row in counted.rows)
        plans.append(ArmPlan(arm.name, "train", tokens, seconds, saved, kept, "", shared, passes))
    return plans, peak + sum(plan.disk_bytes for plan in plans), states


class _Paces:
    """Measured over counted time of each student's stages, and the teacher's seconds a token."""

    def __init__(self, arms: list[Arm], workplace: Workplace):
        self.arms, self.workplace = arms, workplace
        self.known: dict[tuple[str, str], dict[str, float]] = {}
        self.teachers: dict[str, float] = {}

    def of(self, arm: Arm, stage: str) -> float:
        key = arm.axes["teacher"], arm.axes["student"]
        if key not in self.known:
            alike = [one for one in self.arms if (one.axes["teacher"], one.axes["student"]) == key]
            self.known[key] = self._rehearse(max(alike, key=lambda one: len(one.recipe.stages)))
        paces = self.known[key]
        return paces.get(stage, max(paces.values(), default=1.0))

    def teacher(self, arm: Arm, job: Job) -> float:
        if arm.recipe.teacher not in self.teachers:
            self.teachers[arm.recipe.teacher] = _teacher_seconds(job)
        return self.teachers[arm.recipe.teacher]

    def _rehearse(self, arm: Arm) -> dict[str, float]:
        job = prepare_job(arm.recipe, self.workplace.teacher(arm.recipe))
        counted: Plan = make_plan(arm.recipe, job.teacher, job.sites)
        measured = measured_plan(job, counted)
        return {then.stage: now.seconds / max(then.seconds, 1e-12) for then, now in zip(counted.rows, measured.rows)}


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    """So many CPU threads for a while."""
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def _teacher_seconds(job: Job) -> float:
    """Seconds a token of the teacher's body, the faster of two passes."""
    length = job.recipe.data.seq_len
    ids = torch.randint(0, int(job.teacher.config.get_text_config().vocab_size), (1, length), device=job.device)
    batch = Batch(ids, torch.arange(length, device=job.device)[None], ids)
    taken = []
    for _ in range(2):
        began = time.perf_counter()
        with job.autocast():
            run_body(job.teacher, batch)
        if job.device.type == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return min(taken) / length
