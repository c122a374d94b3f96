"""The work of a study in pieces that any process can do, and who does them.

    for done in InTurn().run(study, folder, tasks):
        done.task, done.failures                 # {arm's name: error as text}

A task is plain data, and everything that it leads to is on disk: an executor may hand tasks to other processes or
machines that see the same folder. Tasks of one list do not depend on each other; a study has two lists, what arms learn
together and then each arm to its end.
"""

import json
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from limbeck import assets
from limbeck.console import console
from limbeck.distributed import local_device
from limbeck.errors import LimbeckError
from limbeck.evaluate.measures import find, take
from limbeck.evaluate.subject import Subjects
from limbeck.job import distill
from limbeck.prepare import Loaded
from limbeck.recipe import Recipe
from limbeck.stages.interrupt import Stopped
from limbeck.stages.teacher import load_teacher
from limbeck.study import record
from limbeck.study.grid import Arm, Study
from limbeck.study.team import learn_together


@dataclass(frozen=True)
class Task:
    """Arms by name: those that learn `together` in the stages that they share, or `alone` one to its end; or one whose
    `teacher` is measured as the students are."""

    kind: Literal["together", "alone", "teacher"]
    arms: tuple[str, ...]


@dataclass
class Done:
    """A task's end: the errors of the arms that failed in it, for people to read."""

    task: Task
    failures: dict[str, str] = field(default_factory=dict)


class Executor(Protocol):
    """Where tasks run. Order is free; each task is run once, and a failing one does not stop the others."""

    def run(self, study: Study, folder: Path, tasks: list[Task]) -> Iterator[Done]: ...


class InTurn:
    """One task after another in this process."""

    def __init__(self, workplace: "Workplace | None" = None):
        self.workplace = workplace or Workplace()

    def run(self, study: Study, folder: Path, tasks: list[Task]) -> Iterator[Done]:
        arms = {arm.name: arm for arm in study.arms(folder)}
        for number, task in enumerate(tasks, 1):
            if task.kind == "alone":
                console.print(f"[bold]arm {number} of {len(tasks)}: {', '.join(task.arms)}[/]")
            yield self.workplace.do(study, task, arms)


class Workplace:
    """A process that does tasks: the teachers that it has loaded."""

    def __init__(self) -> None:
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
                failures = learn_together(mine, self.teacher(mine[0].recipe))
                done.failures = {name: _told(error) for name, error in failures.items()}
            elif task.kind == "teacher":
                measure_teacher(mine[0], study, self)
            else:
                for arm in mine:
                    finish(arm, study, self)
        except Stopped:
            raise
        except Exception as error:
            done.failures = dict.fromkeys(task.arms, _told(error))
        what = "the teacher of arm" if task.kind == "teacher" else "arm"
        for name, text in done.failures.items():
            console.print(f"[bold red]{what} {name} failed:[/] ", end="")
            console.print(text.splitlines()[0], markup=False)
        return done

    def teacher(self, recipe: Recipe) -> Loaded:
        """The recipe's teacher and its tokenizer, loaded once."""
        key = recipe.teacher, recipe.teacher_bits, recipe.device
        if key not in self.teachers:
            device = local_device(recipe.device)
            self.teachers[key] = load_teacher(assets.resolve_teacher(recipe.teacher), device, recipe.teacher_bits)
        return self.teachers[key]


def finish(arm: Arm, study: Study, workplace: Workplace) -> None:
    """Run an arm from where it stands to its end, measure its student, write its record, drop what need not be kept."""
    state = record.state(arm, study)
    if state != "finished":
        loaded = workplace.teacher(arm.recipe)
        if state == "measure":
            summary = json.loads((arm.path / "eval.json").read_text())
        else:
            summary = distill(arm.recipe, loaded=loaded, rehearsed=False, curves=False)
        if study.measures:
            workplace.subjects.lend(arm.recipe.teacher, *loaded)
            subject = workplace.subjects.open(str(arm.path))
            found = [take(find(name), subject, given) for name, given in study.measures.items()]
        else:
            found = []
        record.write(arm, study, summary, found)
    record.drop(arm, study.keep)


def measure_teacher(arm: Arm, study: Study, workplace: Workplace) -> None:
    """Measure an arm's teacher by what students are measured by, and keep it beside the arms."""
    workplace.subjects.lend(arm.recipe.teacher, *workplace.teacher(arm.recipe))
    subject = workplace.subjects.open(arm.recipe.teacher)
    record.write_teacher(arm, study, [take(find(name), subject, given) for name, given in study.measures.items()])


def _told(error: Exception) -> str:
    """What people read: our own errors as they are, others with where they came from."""
    if isinstance(error, LimbeckError):
        return str(error)
    return f"{type(error).__name__}: {error}\n" + "".join(traceback.format_exception(error))
