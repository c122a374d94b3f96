"""The work of a study in pieces that any process can do, and who does them.

    for done in InTurn().run(study, folder, tasks):
        done.task, done.failures                 # {arm's name: error as text}

A task is plain data, and everything that it leads to is on disk: an executor may hand tasks to other processes or
machines that see the same folder. Tasks of one list do not depend on each other; a study has two lists
(`limbeck.study.schedule`). Executors other than this process itself are in `limbeck.study.executors`.
"""

import gc
import json
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from limbeck.console import console
from limbeck.distributed import local_device
from limbeck.errors import LimbeckError
from limbeck.evaluate.measures import find, take
from limbeck.evaluate.subject import Subjects
from limbeck.job import distill
from limbeck.prepare import Loaded, teacher_of
from limbeck.recipe import Recipe
from limbeck.stages.interrupt import Stopped
from limbeck.stages.run import held
from limbeck.study import record
from limbeck.study.grid import Arm, Study
from limbeck.study.team import free_bytes, learn_together


@dataclass(frozen=True)
class Task:
    """Arms by name: those that learn `together` in the stages that they share, or `alone` one to its end."""

    kind: Literal["together", "alone"]
    arms: tuple[str, ...]


@dataclass
class Done:
    """A task's end: the errors of the arms that failed in it, for people to read."""

    task: Task
    failures: dict[str, str] = field(default_factory=dict)


class Executor(Protocol):
    """Where tasks run. Order is free; each task is run once, and a failing one does not stop the others.

    workers: how many run side by side; 0 where that is not known.
    threads: of each worker, for the plan's times; None: those of this process.
    plans: whether the machine that starts the study is like those that work on it, so that a rehearsal here says
        how long they take.
    """

    workers: int
    threads: int | None
    plans: bool

    def run(self, study: Study, folder: Path, tasks: list[Task]) -> Iterator[Done]: ...

    def close(self) -> None:
        """The study is over: end what `run` has kept for the next list."""


class InTurn:
    """One task after another in this process."""

    workers = 1
    threads: int | None = None
    plans = True

    def __init__(self, workplace: "Workplace | None" = None):
        self.workplace = workplace or Workplace()

    def run(self, study: Study, folder: Path, tasks: list[Task]) -> Iterator[Done]:
        arms = {arm.name: arm for arm in study.arms(folder)}
        for task in tasks:
            if task.kind == "alone":
                console.print(", ".join(task.arms), style="bold")
            yield self.workplace.do(study, task, arms)

    def close(self) -> None:
        """Nothing is kept."""


class Workplace:
    """A process that does tasks: the teachers that it has loaded.

    sharers: how many such processes share this machine's memory.
    """

    def __init__(self, sharers: int = 1) -> None:
        self.sharers = sharers
        self.teachers: dict[tuple[Any, ...], Loaded] = {}
        self.subjects = Subjects()

    def do(self, study: Study, task: Task, arms: dict[str, Arm]) -> Done:
        """Do a task; `arms` are the study's, by name.

        Raises:
            Stopped, KeyboardInterrupt: the study is to end, not the arm alone.
        """
        done = Done(task)
        mine = [arms[name] for name in task.arms]
        try:
            if task.kind == "together":
                loaded = self.teacher(mine[0].recipe)
                failures = learn_together(mine, loaded, lambda: self.room(loaded[0].device))
                done.failures = {name: told(error) for name, error in failures.items()}
            else:
                for arm in mine:
                    finish(arm, study, self)
        except Stopped:
            raise
        except Exception as error:
            done.failures = dict.fromkeys(task.arms, told(error))
        return done

    def room(self, device: torch.device) -> int:
        """Bytes of a device's free memory that are this process's; a GPU is its own."""
        return free_bytes(device) // (self.sharers if device.type == "cpu" else 1)

    def clear(self) -> None:
        """Forget what is loaded, so that others have the memory."""
        self.teachers, self.subjects = {}, Subjects()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def teacher(self, recipe: Recipe) -> Loaded:
        """The recipe's teacher and its tokenizer, loaded once."""
        key = recipe.teacher, recipe.teacher_bits, recipe.device
        if key not in self.teachers:
            device = local_device(recipe.device)
            self.teachers[key] = teacher_of(recipe, device)
        return self.teachers[key]


def finish(arm: Arm, study: Study, workplace: Workplace) -> None:
    """Run an arm from where it stands to its end, measure its student, write its record, drop what need not be kept."""
    state = record.state(arm, study)
    if state != "finished":
        loaded = workplace.teacher(arm.recipe)
        if state == "measure":
            summary = json.loads((arm.path / "eval.json").read_text(encoding="utf-8"))
        else:
            summary = distill(arm.recipe, loaded=loaded, rehearsed=False, curves=False)
        if study.measures:
            workplace.subjects.lend(arm.recipe.teacher, *loaded)
            measure_teacher(arm, study, workplace)
            subject = workplace.subjects.open(str(arm.path))
            found = [take(find(name), subject, given) for name, given in study.measures.items()]
        else:
            found = []
        record.write(arm, study, summary, found)
    record.drop(arm, study.save_artifacts)


def measure_teacher(arm: Arm, study: Study, workplace: Workplace) -> None:
    """Measure an arm's teacher as its student, on the same text, unless that is done or another worker is at it."""
    if record.read_teacher(arm, study) is not None:
        return
    folder = record.teacher_path(arm).parent
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(held(folder))
        except LimbeckError:
            return
        home = record.teacher_path(arm).with_suffix("")
        subject = replace(
            workplace.subjects.open(arm.recipe.teacher), recipe=arm.recipe, data=arm.recipe.data, home=home
        )
        record.write_teacher(arm, study, [take(find(name), subject, given) for name, given in study.measures.items()])


def told(error: Exception) -> str:
    """What people read: our own errors as they are, others with where they came from."""
    if isinstance(error, LimbeckError):
        return str(error)
    return f"{type(error).__name__}: {error}\n" + "".join(traceback.format_exception(error))
