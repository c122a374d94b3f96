"""Run a study from its current state to its end; the same command starts it, resumes it, and runs added arms.

results = run_study(Study.load("paper-experiment-1", "gpu"))
results["claims"], results["arms"][0]["values"]              # a notebook shows the tables
run_study({"name": "mine", "base": {...}, "grid": {...}})    # the content of a study file

runs/<study>-<size>/
  study.yaml                            the study as it is run
  study.json                            all arms' numbers and the claims (docs/reference/files.md)
  table.md, values.csv, claims.md
  failures.json                         the errors of failed arms
  <arm>/                                an ordinary run directory, and result.json
"""

import json
import shlex
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.text import Text

from limbeck.core.console import console, format_duration
from limbeck.core.distributed import get_process_info
from limbeck.core.errors import LimbeckError
from limbeck.core.live import Phase, View
from limbeck.core.screen import watch
from limbeck.core.storage import (
    check_disk_space,
    check_link,
    check_writable,
    convert_write_errors,
    lock_folder,
    read_json,
)
from limbeck.models.temporary import quiet_transformers
from limbeck.study import results, tables
from limbeck.study.claims import evaluate_claims
from limbeck.study.plan import StudyPlan, plan_study, schedule_tasks
from limbeck.study.spec import Arm, Study, study_to_yaml
from limbeck.study.tasks import Executor, SequentialExecutor, StudyTask, TaskResult, TaskRunner, measure_teacher
from limbeck.training.identity import check_same_teacher
from limbeck.training.run_directory import check_run


class ProgressReporter:
    """Prints which arms are done, of how many, and about how long the rest takes; keeps the live view.

    A task weighs as much as the plan estimates for it; without a plan all weigh the same.

    Args:
        first, later: the study's lists, see `limbeck.study.plan`.
        workers: how many tasks run side by side, 0 if unknown.
        plan: the times of the tasks.
        view: where each task is a phase.
    """

    def __init__(
        self, first: list[StudyTask], later: list[StudyTask], workers: int, plan: StudyPlan | None, view: View
    ):
        self.workers, self.view = workers, view
        tasks = [(task, True) for task in first] + [(task, False) for task in later]
        self.weights = {task: plan.estimate_task_seconds(task, is_first) if plan else 1.0 for task, is_first in tasks}
        self.arms = len({name for task in self.weights for name in task.arms})
        self.num_done = 0
        self.running: set[StudyTask] = set()
        self.done_weight = 0.0  # weight of the tasks that have ended
        self.start = time.monotonic()
        view.plan([Phase(task, describe_task(task), self.weights[task]) for task, _ in tasks])
        if self.arms:
            console.print(f"{self.arms} arms to run" + (f", {workers} side by side" if workers > 1 else ""))

    def begin(self, tasks: list[StudyTask]) -> None:
        """Show which tasks of a list are running: the first that are not done, one for each worker."""
        for task in [task for task in tasks if task in self.weights][: self.workers]:
            if task not in self.running:
                self.running.add(task)
                self.view.begin(task)

    def report(self, result: TaskResult) -> None:
        """Print the result of a task."""
        error = next(iter(result.failures.values()), "").partition("\n")[0]
        self.view.finish(result.task, error, failed=bool(error))
        for name, error in result.failures.items():
            console.print(Text.assemble((f"arm {name} failed: ", "bold red"), error.splitlines()[0]))
        self.done_weight += self.weights.pop(result.task)
        if result.task.kind == "alone":
            self.num_done += 1
            message = f"{self.num_done} of {self.arms} arms done: {result.task.arms[0]}"
        else:
            for task in [task for task in self.weights if result.failures.keys() & set(task.arms)]:
                self.view.finish(task, "failed before", failed=True)
                del self.weights[task]  # an arm that failed in a group is not tried alone
            self.num_done += len(result.failures)
            num_trained = len(result.task.arms) - len(result.failures)
            message = f"{self.num_done} of {self.arms} arms done; {num_trained} finished their shared stages"
        console.print(f"{message}{self._format_remaining()}", markup=False)

    def _format_remaining(self) -> str:
        """Format the estimated time of the rest, from the time that the finished tasks took."""
        remaining = sum(self.weights.values())
        if not self.done_weight or not remaining:
            return ""
        seconds = (time.monotonic() - self.start) * remaining / self.done_weight
        return f"; about {format_duration(seconds)} left"


def describe_task(task: StudyTask) -> str:
    """Name a task for the live view."""
    if task.kind == "alone":
        return task.arms[0]
    return f"{len(task.arms)} at once: {', '.join(task.arms)}"


FAILURES_FILE = "failures.json"


class StudyResults(dict):
    """What study.json holds; a notebook shows the tables and the claims.

    folder: of the study, with report and values.
    """

    def __init__(self, results: dict[str, Any], folder: Path):
        super().__init__(results)
        self.folder = folder

    def __repr__(self) -> str:
        finished = sum(arm["status"] == "finished" for arm in self["arms"])
        return f"<study {self['study']['name']}: {finished} of {len(self['arms'])} arms finished, in {self.folder}>"

    def __str__(self) -> str:
        claims = tables.format_claims(self["claims"]) if self["claims"] else ""
        return "\n".join(filter(None, [(self.folder / "table.md").read_text(encoding="utf-8"), claims]))

    def _repr_markdown_(self) -> str:
        return str(self)


def run_study(
    study: Study | str | Path | dict[str, Any],
    out: str | Path | None = None,
    confirm: Callable[[StudyPlan], None] | None = None,
    executor: Executor | None = None,
) -> StudyResults:
    """Run what is left of a study, and write its tables.

    Args:
        study: a study; the name of a built-in one in its first size, or a YAML file; or the content of such a file.
        out: its folder, runs/<name>-<size> by default.
        confirm: called with the plan before work begins, if a plan is made here.
        executor: where the arms run (`limbeck.study.executors`); one after another in this process by default.

    Returns:
        What study.json holds.

    Raises:
        LimbeckError: anything wrong with the study or its folder. An arm that fails raises nothing, it is reported.
        TrainingInterrupted: SIGTERM came; the same command resumes.
    """
    if not isinstance(study, Study):
        study = Study.parse(study) if isinstance(study, dict) else Study.load(study)
    folder = Path(out or f"runs/{study.title}")
    arms = check_study(study, folder)
    check_writable(folder)
    task_runner = TaskRunner()
    active_executor = executor or SequentialExecutor(task_runner)
    with ExitStack() as stack:
        stack.enter_context(quiet_transformers())
        if existed := folder.is_dir():
            # so that a second process fails before the rehearsal, not after it
            stack.enter_context(lock_folder(folder))
        plan = None
        if active_executor.supports_planning:
            plan = plan_study(study, arms, task_runner, max(active_executor.workers, 1), active_executor.threads)
            if confirm:
                confirm(plan)
            if executor is not None:
                task_runner.clear()  # the workers need the memory
        if not existed:
            with convert_write_errors(folder):
                folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(lock_folder(folder))
        if plan is not None:
            check_disk_space(folder, plan.disk_bytes, f"the study {folder}")
        results.write_atomically(folder / "study.yaml", study_to_yaml(study))
        stack.callback(active_executor.close)
        _run_tasks(study, folder, arms, active_executor, plan)
        failures = _read_failures(folder)
        claims = evaluate_claims(study.claims, _collect_claim_rows(study, arms))
        return StudyResults(tables.write_study_results(study, folder, arms, failures, claims), folder)


def check_study(study: Study, folder: Path) -> list[Arm]:
    """Check that a study can run in its folder, and return its arms; writes nothing."""
    if get_process_info().world_size > 1:
        raise LimbeckError(
            "a study cannot run under torchrun",
            expected="limbeck study in one process; single arms can run under torchrun",
        )
    check_link(folder)
    if folder.exists() and not folder.is_dir():
        raise LimbeckError(f"{folder} is a file", expected="a folder for the study", hint="--out runs/another-name")
    if folder.is_dir() and not (folder / "study.yaml").exists() and any(p.name != ".lock" for p in folder.iterdir()):
        raise LimbeckError(
            f"{folder} holds files that are not a study",
            expected="a new or empty folder",
            hint="--out runs/another-name",
        )
    arms = study.arms(folder)
    for arm in arms:
        try:
            check_run(arm.path, arm.recipe)
        except LimbeckError as error:
            raise LimbeckError(
                f"the study's recipes have changed: {error.found}",
                expected="unchanged settings for existing arms; new arms can be added",
                hint="--out another folder, or delete the folders of the arms to run again",
            ) from error
    stale = {arm.name: previous for arm in arms if (previous := results.find_stale_evaluation(arm))}
    if stale:
        current = next(arm.recipe.evaluation.model_dump(mode="json") for arm in arms if arm.name in stale)
        previous = next(iter(stale.values()))
        changes = ", ".join(
            f"{key} {previous.get(key)}, now {value}" for key, value in current.items() if previous.get(key) != value
        )
        names = ", ".join(list(stale)[:4]) + (", ..." if len(stale) > 4 else "")
        raise LimbeckError(
            f"{len(stale)} arms were evaluated with other settings ({changes})"
            f" and their students were deleted: {names}",
            expected="the evaluation settings they had, so that means are over the same text",
            hint="--out another folder, or delete the folders of these arms",
        )
    check_same_teacher({arm.path: arm.recipe for arm in arms})
    return arms


def _run_tasks(study: Study, folder: Path, arms: list[Arm], executor: Executor, plan: StudyPlan | None) -> None:
    """Run the tasks of unfinished arms, and write the tables after each that finishes an arm."""
    states = {arm.name: results.get_arm_state(arm, study) for arm in arms}
    _remove_failures(folder, [name for name, state in states.items() if state != "finished"])
    first, later = schedule_tasks(arms, states, executor.workers)
    finished = [Phase(name, name, state="done", share=1.0) for name, state in states.items() if state == "finished"]
    failed: set[str] = set()
    with watch(
        View(f"study {study.title}", finished, str(folder), in_seconds=plan is not None, workers=executor.workers)
    ) as view:
        progress = ProgressReporter(first, later, executor.workers, plan, view)
        for tasks in (first, later):
            tasks = [task for task in tasks if not failed.intersection(task.arms)]
            progress.begin(tasks)
            for result in executor.run(study, folder, tasks):
                failed |= set(result.failures)
                _add_failures(folder, result.failures)
                progress.report(result)
                progress.begin(tasks)
                if result.task.kind == "alone":
                    tables.write_study_results(study, folder, arms, _read_failures(folder), claims=[])
    check_same_teacher({arm.path: arm.recipe for arm in arms})  # a checkpoint may have been replaced meanwhile
    for arm in arms:
        if results.get_arm_state(arm, study) == "finished":
            results.delete_artifacts(arm, study.save_artifacts)
            if study.measures and results.read_teacher_result(arm, study) is None:  # its file was deleted
                task_runner = TaskRunner()
                task_runner.subjects.register_teacher(arm.recipe.teacher, *task_runner.load_teacher(arm.recipe))
                measure_teacher(arm, study, task_runner)
    if failures := _read_failures(folder):
        console.print(f"{len(failures)} of {len(arms)} arms failed; the same command tries them again")


def _collect_claim_rows(study: Study, arms: list[Arm]) -> list[dict[str, Any]]:
    """Collect the records of finished arms to test claims on, each with the values of its `teacher`."""
    records = ((results.read_arm_result(arm, study), results.read_teacher_result(arm, study)) for arm in arms)
    rows = []
    for arm, (row, teacher) in zip(arms, records):
        if row:
            rows.append({**row, "mixer": arm.recipe.student.mixer, "teacher": teacher["values"] if teacher else {}})
    return rows


def _read_failures(folder: Path) -> dict[str, str]:
    """Read the errors of failed arms by name."""
    path = folder / FAILURES_FILE
    return (
        read_json(path, f"rm {shlex.quote(str(path))}   (it only holds the errors of failed arms)")
        if path.exists()
        else {}
    )


def _add_failures(folder: Path, failures: dict[str, str]) -> None:
    if failures:
        results.write_atomically(
            folder / FAILURES_FILE, json.dumps({**_read_failures(folder), **failures}, indent=1) + "\n"
        )


def _remove_failures(folder: Path, names: list[str]) -> None:
    failures = _read_failures(folder)
    if set(failures) & set(names):
        remaining = {name: error for name, error in failures.items() if name not in names}
        results.write_atomically(folder / FAILURES_FILE, json.dumps(remaining, indent=1) + "\n")
