"""The work of a study in pieces that any process can run, and the interface of what runs them.

    for result in SequentialExecutor().run(study, folder, tasks):
        result.task, result.failures                 # {arm's name: error as text}

A task is plain data, and everything else is on disk: an executor may hand tasks to other processes, or to machines that
see the same folder. Tasks of one list do not depend on each other; a study has two lists (`limbeck.study.plan`).
`SequentialExecutor` runs them in this process; the other implementations are in `limbeck.study.executors`.
"""

import gc
import json
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from limbeck.core.console import console, panel
from limbeck.core.distributed import get_local_device
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.core.signals import TrainingInterrupted
from limbeck.core.storage import lock_folder
from limbeck.evaluation.baselines import measure_baselines
from limbeck.evaluation.measure import Measurement, get_measure, run_measure
from limbeck.evaluation.subject import SubjectLoader
from limbeck.study import results
from limbeck.study.shared_training import estimate_free_memory, train_shared_stages
from limbeck.study.spec import Arm, Study
from limbeck.training.pipeline import distill
from limbeck.training.teacher_loading import LoadedTeacher, load_recipe_teacher


@dataclass(frozen=True)
class StudyTask:
    """A piece of a study's work.

    kind: "shared" trains a group of arms through the stages that they share, "alone" takes one arm to its end.
    arms: their names.
    """

    kind: Literal["shared", "alone"]
    arms: tuple[str, ...]


@dataclass
class TaskResult:
    """The result of a task. failures: the errors of failed arms, as text, by name."""

    task: StudyTask
    failures: dict[str, str] = field(default_factory=dict)


class Executor(Protocol):
    """Runs tasks, in any order: each task once, and a failing one does not stop the others.

    workers: how many tasks run side by side; 0 if unknown.
    threads: CPU threads of each worker, for the plan's times; None: those of this process.
    supports_planning: whether the machine that starts the study is like those that work on it, so that a rehearsal
        here predicts their times.
    """

    workers: int
    threads: int | None
    supports_planning: bool

    def run(self, study: Study, folder: Path, tasks: list[StudyTask]) -> Iterator[TaskResult]:
        """Run the tasks, and yield each result as it comes."""
        ...

    def close(self) -> None:
        """Release what `run` holds for the next list: workers, a cluster."""


class SequentialExecutor:
    """Runs one task after another in this process."""

    workers = 1
    threads: int | None = None
    supports_planning = True

    def __init__(self, task_runner: "TaskRunner | None" = None):
        self.task_runner = task_runner or TaskRunner()

    def run(self, study: Study, folder: Path, tasks: list[StudyTask]) -> Iterator[TaskResult]:
        arms = {arm.name: arm for arm in study.arms(folder)}
        for task in tasks:
            if task.kind == "alone" and panel is None:
                console.print(", ".join(task.arms), style="bold")
            with nullcontext() if panel is None else panel.passing_bars():
                result = self.task_runner.run_task(study, task, arms)
            yield result

    def close(self) -> None:
        """Nothing to release."""


class TaskRunner:
    """Runs tasks in this process, and holds the teachers that it has loaded.

    local_workers: how many such processes share this machine's memory.
    """

    def __init__(self, local_workers: int = 1) -> None:
        self.local_workers = local_workers
        self.teachers: dict[tuple[Any, ...], LoadedTeacher] = {}
        self.subjects = SubjectLoader()
        self.baselines: list[Measurement] = []  # untrained windows, each measured once for all arms of its memory

    def run_task(self, study: Study, task: StudyTask, arms: dict[str, Arm]) -> TaskResult:
        """Run a task; returns its result, with the errors of the arms that failed.

        Args:
            arms: the study's arms by name.

        Raises:
            TrainingInterrupted, KeyboardInterrupt: the whole study is to stop.
        """
        result = TaskResult(task)
        task_arms = [arms[name] for name in task.arms]
        try:
            if task.kind == "shared":
                loaded = self.load_teacher(task_arms[0].recipe)
                failures = train_shared_stages(task_arms, loaded, lambda: self.memory_budget(loaded[0].device))
                result.failures = {name: format_error(error) for name, error in failures.items()}
            else:
                for arm in task_arms:
                    run_arm(arm, study, self)
        except TrainingInterrupted:
            raise
        except Exception as error:
            result.failures = dict.fromkeys(task.arms, format_error(error))
        return result

    def memory_budget(self, device: torch.device) -> int:
        """Get this process's share of a device's free memory in bytes; a GPU is not shared."""
        return estimate_free_memory(device) // (self.local_workers if device.type == "cpu" else 1)

    def clear(self) -> None:
        """Release the loaded models and their memory."""
        self.teachers, self.subjects = {}, SubjectLoader()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def load_teacher(self, recipe: Recipe) -> LoadedTeacher:
        """Load the teacher and the tokenizer of a recipe, once."""
        key = recipe.teacher, recipe.teacher_bits, recipe.device
        if key not in self.teachers:
            device = get_local_device(recipe.device)
            self.teachers[key] = load_recipe_teacher(recipe, device)
        return self.teachers[key]


def run_arm(arm: Arm, study: Study, task_runner: TaskRunner) -> None:
    """Train an arm from its current state to its end, measure its student, write its record, delete artifacts."""
    state = results.get_arm_state(arm, study)
    if state != "finished":
        loaded = task_runner.load_teacher(arm.recipe)
        if state == "measure":
            summary = json.loads((arm.path / "eval.json").read_text(encoding="utf-8"))
        else:
            summary = distill(arm.recipe, loaded=loaded, measure_times=False, plot_curves=False)
        if study.measures:
            task_runner.subjects.register_teacher(arm.recipe.teacher, *loaded)
            measure_teacher(arm, study, task_runner)
            subject = task_runner.subjects.load(str(arm.path))
            measurements = []
            for name, settings in study.measures.items():
                measurements.append(run_measure(get_measure(name), subject, settings))
                beside = measure_baselines(get_measure(name), subject, settings, known=task_runner.baselines)
                task_runner.baselines += beside
                measurements += beside
        else:
            measurements = []
        results.write_arm_result(arm, study, summary, measurements)
    results.delete_artifacts(arm, study.save_artifacts)


def measure_teacher(arm: Arm, study: Study, task_runner: TaskRunner) -> None:
    """Measure an arm's teacher on the text of its student, unless that is done or another worker is doing it."""
    if results.read_teacher_result(arm, study) is not None:
        return
    folder = results.get_teacher_result_path(arm).parent
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(folder))
        except LimbeckError:
            return
        output_dir = results.get_teacher_result_path(arm).with_suffix("")
        subject = replace(
            task_runner.subjects.load(arm.recipe.teacher),
            recipe=arm.recipe,
            data=arm.recipe.data,
            trained_on_data=True,
            output_dir=output_dir,
        )
        results.write_teacher_result(
            arm, study, [run_measure(get_measure(name), subject, settings) for name, settings in study.measures.items()]
        )


def format_error(error: Exception) -> str:
    """Format an error for the user: our own as they are, others with their traceback."""
    if isinstance(error, LimbeckError):
        return str(error)
    return f"{type(error).__name__}: {error}\n" + "".join(traceback.format_exception(error))
