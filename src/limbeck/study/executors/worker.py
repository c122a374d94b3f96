"""A process that runs tasks of a study for an executor; tasks and results are plain data.

    failures = run_study_task("runs/mine", {"kind": "alone", "arms": ["gla_3_seed0"]})     # {} if nothing failed
    [sys.executable, "-c", BOOTSTRAP_CODE, "runs/mine", "2"]      # a task a line on stdin, a result a line on stdout

Everything else is on disk: the study in <folder>/study.yaml, and each arm in its run directory. A worker of the second
kind exits at once when its stdin is closed, so also when its parent is killed: two never work on one arm.
"""

import json
import os
import platform
import queue
import sys
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.signals import SIGTERM_EXIT_CODE, TrainingInterrupted
from limbeck.mixers import registry
from limbeck.study.spec import Arm, Study
from limbeck.study.tasks import StudyTask, TaskRunner, format_error

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# a worker reads its stdin before it imports what takes seconds, so that it exits at once when its parent is killed
BOOTSTRAP_CODE = """
import json, os, queue, sys, threading

task_queue = queue.Queue()

def listen():
    for line in sys.stdin:
        task_queue.put(json.loads(line))
    os._exit(0)

threading.Thread(target=listen, daemon=True).start()
from limbeck.study.executors.worker import main
main(task_queue)
"""
LOCK_TIMEOUT_S = 60.0  # how long a process that is about to exit may hold an arm


def task_to_dict(task: StudyTask) -> dict[str, Any]:
    """Convert a task to plain data, with the files of the mixers that this process has loaded."""
    return {"kind": task.kind, "arms": list(task.arms), "mixers": [str(path) for path in registry.list_loaded_files()]}


def run_study_task(folder: str, task: dict[str, Any], local_workers: int = 1) -> dict[str, str]:
    """Run a task of the study in `folder`; returns the errors of failed arms.

    Args:
        folder: as the study's recipes have it, absolute or relative to this process's directory.
        task: see `task_to_dict`.
        local_workers: how many workers share this machine's memory.

    Raises:
        TrainingInterrupted: SIGTERM came; the state is saved.
    """
    try:
        for file in task["mixers"]:
            registry.execute_file(Path(file))
        study, arms = _load_study(folder, (Path(folder) / "study.yaml").stat().st_mtime_ns)
        missing = [name for name in task["arms"] if name not in arms]
        if missing:
            raise LimbeckError(f"the study in {folder} has no arm {missing[0]}", hint="start the study again")
        for name in task["arms"]:
            _wait_until_free(arms[name].path)
        return _task_runner(local_workers).run_task(study, StudyTask(task["kind"], tuple(task["arms"])), arms).failures
    except TrainingInterrupted:
        raise
    except Exception as error:
        return dict.fromkeys(task["arms"], format_error(error))


def run_remote_task(
    directory: str, folder: str, task: dict[str, Any], threads: int, log: str, local_workers: int
) -> dict[str, str]:
    """Run a task in a process that Ray started: in `directory`, with output to the file `log`."""
    # start-up time: see BOOTSTRAP_CODE
    import torch

    torch.set_num_threads(threads)
    try:
        os.chdir(directory)
        with open(log, "a", encoding="utf-8") as file:
            console.file = file
            console.print(f"process {os.getpid()} on {platform.node()}: {task['kind']} {', '.join(task['arms'])}")
            return run_study_task(folder, task, local_workers)
    except OSError as error:
        return dict.fromkeys(task["arms"], f"{error} on {platform.node()}\nexpected: the same folders on all machines")


@lru_cache(maxsize=1)
def _load_study(folder: str, mtime_ns: int) -> tuple[Study, dict[str, Arm]]:
    """Load the study in a folder and its arms by name; again only when its file has changed."""
    study = Study.load(Path(folder) / "study.yaml")
    return study, {arm.name: arm for arm in study.arms(Path(folder))}


@lru_cache(maxsize=1)
def _task_runner(local_workers: int) -> TaskRunner:
    return TaskRunner(local_workers)


def _wait_until_free(path: Path) -> None:
    """Wait for the lock of a run directory: workers of a killed study may take a moment to exit."""
    if fcntl is None or not (path / ".lock").exists():
        return
    start = time.monotonic()
    with open(path / ".lock", "w", encoding="utf-8") as lock:
        while time.monotonic() - start < LOCK_TIMEOUT_S:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                time.sleep(0.2)


def main(task_queue: "queue.Queue[dict[str, Any]]") -> None:
    """Run the tasks of the queue until the process ends; its arguments are the folder and the number of workers."""
    output = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of libraries must not mix with the results
    try:
        while True:
            failures = run_study_task(sys.argv[1], task_queue.get(), int(sys.argv[2]))
            print(json.dumps(failures), file=output, flush=True)
    except TrainingInterrupted as stopped:
        console.print(str(stopped), markup=False)
        sys.exit(SIGTERM_EXIT_CODE)
