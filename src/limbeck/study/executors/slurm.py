"""Run arms as Slurm job arrays: a script for each of the study's two lists, submitted, and its results read from disk.

    run_study(study, executor=SlurmExecutor(partition="gpu", gpus=1, time="4:00:00"))

<folder>/slurm/ holds tasks.json (the task of each array index), array.sh (the script), <index>.json (the result of a
task, until it is read), <array>_<index>.log and job (the running array). Each array task is
`limbeck study FOLDER --task N`. It resumes from disk, so Slurm may requeue it, and two minutes before its time limit it
requeues itself.

A study that is killed while its array runs waits for that array when it is started again. On a machine without `sbatch`
the script is written and the command is printed; once it has been run, the same `limbeck study` reads the results.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.signals import TrainingInterrupted, graceful_shutdown
from limbeck.study import results
from limbeck.study.executors.worker import run_study_task, task_to_dict
from limbeck.study.shared_training import can_share_pass
from limbeck.study.spec import Study
from limbeck.study.tasks import StudyTask, TaskResult

TASKS_FILE, JOB_FILE = "tasks.json", "job"
POLL_INTERVAL_S = 2.0
PREEMPTION_NOTICE_S = 120  # how long before its time limit a task gets the signal to save its state
SCRIPT = """\
#!/bin/bash
{options}

task= again= interrupted=yes
trap 'interrupted=yes again=yes; [ -n "$task" ] && kill -TERM "$task"' USR1   # its time limit is near: requeue it
trap 'interrupted=yes; [ -n "$task" ] && kill -TERM "$task"' TERM
{command} --task "$SLURM_ARRAY_TASK_ID" &
task=$!
# a signal ends `wait` with a code of its own, so the task's code is that of the first wait without one
while [ -n "$interrupted" ]; do interrupted=; wait "$task"; code=$?; done
if [ -n "$again" ] && [ "$code" -ne 0 ]; then
    scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
fi
exit "$code"
"""


@dataclass
class SlurmExecutor:
    """Runs tasks as Slurm job arrays.

    workers: how many array tasks run side by side; 0: no limit but that of Slurm.
    cpus, gpus, partition, time: the resources of an array task, as options of sbatch.
    sbatch: further options of sbatch, each as one string: "--account=abc".
    """

    workers: int = 0
    cpus: int | None = None
    gpus: float | None = None
    partition: str | None = None
    time: str | None = None
    sbatch: list[str] = field(default_factory=list)
    threads: int | None = field(default=None, init=False)
    supports_planning: bool = field(default=False, init=False)  # other machines than this one do the work

    def __post_init__(self) -> None:
        for option in self.sbatch:
            if not option.startswith("-") or not option.isprintable():
                raise LimbeckError(
                    f"--sbatch {option!r}", expected="an option of sbatch, such as --sbatch=--account=abc"
                )
        check_single_line("--partition", self.partition)
        check_single_line("--time", self.time)
        if self.gpus is not None and self.gpus != int(self.gpus):
            raise LimbeckError(f"--gpus {self.gpus}", expected="a whole number: Slurm allocates whole GPUs")
        if self.workers < 0:
            raise LimbeckError(f"--workers {self.workers}", expected="a positive number, or none for no limit")

    def run(self, study: Study, folder: Path, tasks: list[StudyTask]) -> Iterator[TaskResult]:
        """Submit the tasks as an array and wait for them.

        Raises:
            LimbeckError: there is no sbatch here (the script is written), or it rejected the script.
            TrainingInterrupted: SIGTERM came; the array keeps running.
        """
        array_folder = folder / "slurm"
        arms = {arm.name: arm for arm in study.arms(folder)}
        with graceful_shutdown() as stop_requested:
            _wait_for_running_array(array_folder, stop_requested)
            failures_by_task = _take_results(array_folder)
            pending = []
            for task in tasks:
                task_arms = [arms[name] for name in task.arms]
                finished = all(results.get_arm_state(arm, study) == "finished" for arm in task_arms)
                if failures_by_task.get(task) or finished or (task.kind == "shared" and not can_share_pass(task_arms)):
                    yield TaskResult(task, failures_by_task.get(task, {}))
                else:
                    pending.append(task)
            if not pending:
                return
            script = self.write_script(folder, pending)
            if shutil.which("sbatch") is None:
                raise LimbeckError(
                    f"there is no sbatch on this machine; the script for {len(pending)} tasks was written",
                    hint=f"sbatch {script}   (on a machine that has it), and then the same command again",
                )
            yield from _submit(array_folder, script, pending, stop_requested)

    def close(self) -> None:
        """Nothing to release."""

    def write_script(self, folder: Path, tasks: list[StudyTask]) -> Path:
        """Write the script and the list of its tasks; returns the path of the script."""
        array_folder = folder / "slurm"
        check_single_line("--out", str(folder))
        check_single_line("the working directory", os.getcwd())
        array_folder.mkdir(exist_ok=True)
        results.write_atomically(
            array_folder / TASKS_FILE, json.dumps([task_to_dict(task) for task in tasks], indent=1) + "\n"
        )
        limit = f"%{self.workers}" if self.workers else ""
        resources = {
            "job-name": f"limbeck-{folder.name}",
            "array": f"0-{len(tasks) - 1}{limit}",
            "chdir": os.getcwd(),
            "output": f"{array_folder.absolute()}/%A_%a.log",
            "open-mode": "append",
            "signal": f"B:USR1@{PREEMPTION_NOTICE_S}",
            "partition": self.partition,
            "time": self.time,
            "cpus-per-task": self.cpus,
            "gpus": None if self.gpus is None else int(self.gpus),
        }
        options = [f"--{key}={shlex.quote(str(value))}" for key, value in resources.items() if value is not None]
        lines = [f"#SBATCH {option}" for option in [*options, "--ntasks=1", "--requeue", *self.sbatch]]
        if self.cpus is not None:
            lines += ["", f"export OMP_NUM_THREADS={self.cpus}"]
        command = shlex.join([sys.executable, "-m", "limbeck", "study", str(folder)])
        script = array_folder / "array.sh"
        results.write_atomically(script, SCRIPT.format(options="\n".join(lines), command=command))
        return script


def check_single_line(option: str, value: str | None) -> None:
    """Raise LimbeckError if a value has a line break: what follows it would be a command of the script."""
    if value is not None and not value.isprintable():
        raise LimbeckError(f"{option} {value!r}", expected="one line of printable characters, for Slurm's script")


def run_array_task(folder: Path, index: int) -> dict[str, str]:
    """Run one task of the array in the study's folder; returns the errors of failed arms.

    Raises:
        LimbeckError: the folder has no array, or the array no such index.
        TrainingInterrupted: SIGTERM came; the state is saved.
    """
    array_folder = folder / "slurm"
    try:
        tasks = json.loads((array_folder / TASKS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LimbeckError(
            f"{folder} has no tasks", expected="a study's folder", hint="limbeck study STUDY --executor slurm"
        ) from error
    if not 0 <= index < len(tasks):
        raise LimbeckError(f"--task {index}", expected=f"0 to {len(tasks) - 1}")
    failures = run_study_task(str(folder), tasks[index])
    results.write_atomically(array_folder / f"{index}.json", json.dumps(failures) + "\n")
    return failures


def _submit(
    array_folder: Path, script: Path, tasks: list[StudyTask], stop_requested: Callable[[], bool]
) -> Iterator[TaskResult]:
    """Submit the script, and yield the results of its tasks as they come."""
    # in a session of its own, so that Ctrl-C stops the study, not the array
    sbatch = subprocess.Popen(
        ["sbatch", "--wait", "--parsable", str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )
    assert sbatch.stdout is not None
    assert sbatch.stderr is not None
    job = sbatch.stdout.readline().strip().partition(";")[0]  # the cluster's name may follow
    if not job:
        raise LimbeckError(
            f"sbatch rejected {script}: {sbatch.stderr.read().strip()}", hint="--partition, --time, --sbatch=OPTION"
        )
    results.write_atomically(array_folder / JOB_FILE, job + "\n")
    console.print(f"array {job} of {len(tasks)} tasks submitted; logs are in {array_folder}/", markup=False)
    waiting = dict(enumerate(tasks))
    try:
        while waiting:
            finished = sbatch.poll() is not None and not _is_alive(job)
            for index in [index for index in waiting if (array_folder / f"{index}.json").exists()]:
                failures = json.loads((array_folder / f"{index}.json").read_text(encoding="utf-8"))
                (array_folder / f"{index}.json").unlink()
                yield TaskResult(waiting.pop(index), failures)
            if finished:
                break
            if stop_requested():
                raise TrainingInterrupted(f"Interrupted; array {job} keeps running (scancel {job} stops it).")
            time.sleep(POLL_INTERVAL_S)
    finally:
        if sbatch.poll() is None:
            sbatch.kill()
    (array_folder / JOB_FILE).unlink()
    for index, task in waiting.items():
        log = array_folder / f"{job}_{index}.log"
        last_lines = log.read_text(errors="replace", encoding="utf-8").splitlines()[-3:] if log.exists() else []
        message = "\n".join([f"array task {job}_{index} ended without a result; see {log}", *last_lines])
        yield TaskResult(task, dict.fromkeys(task.arms, message))


def _wait_for_running_array(array_folder: Path, stop_requested: Callable[[], bool]) -> None:
    """Wait for an array that is still running since this study was killed."""
    if not (array_folder / JOB_FILE).exists():
        return
    job = (array_folder / JOB_FILE).read_text(encoding="utf-8").strip()
    if _is_alive(job):
        console.print(f"array {job} of this study is still running; waiting for it (scancel {job} stops it)")
    while _is_alive(job):
        if stop_requested():
            raise TrainingInterrupted(f"Interrupted; array {job} keeps running (scancel {job} stops it).")
        time.sleep(POLL_INTERVAL_S)
    (array_folder / JOB_FILE).unlink()


def _is_alive(job: str) -> bool:
    """Tell whether a task of the array is running or waiting."""
    if shutil.which("squeue") is None:
        return False
    listing = subprocess.run(
        ["squeue", "--noheader", "--jobs", job],
        capture_output=True,
        text=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    return bool(listing.stdout.strip())


def _take_results(array_folder: Path) -> dict[StudyTask, dict[str, str]]:
    """Read and delete the results of an array that ended after its study was killed: failures by task."""
    try:
        tasks = json.loads((array_folder / TASKS_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    failures_by_task = {}
    for index, task in enumerate(tasks):
        path = array_folder / f"{index}.json"
        if path.exists():
            failures_by_task[StudyTask(task["kind"], tuple(task["arms"]))] = json.loads(
                path.read_text(encoding="utf-8")
            )
            path.unlink()
    return failures_by_task
