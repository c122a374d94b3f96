"""Run arms side by side on this machine: a worker process for each GPU, or several that share the CPU's threads.

    run_study(study, executor=ProcessExecutor(workers=2))

A worker loads the teacher once and runs task after task; its output goes to <folder>/logs/worker-<n>.log. A worker that
is killed loses its task alone, which another takes up from the disk; a task whose workers die `MAX_ATTEMPTS` times is
reported as failed. SIGTERM is passed on: the workers save their state, and the study ends.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from limbeck.core.errors import LimbeckError
from limbeck.core.signals import TrainingInterrupted, graceful_shutdown
from limbeck.study.executors.worker import BOOTSTRAP_CODE, task_to_dict
from limbeck.study.spec import Study
from limbeck.study.tasks import StudyTask, TaskResult

MAX_ATTEMPTS = 3
DEFAULT_CPU_WORKERS = 2
SHUTDOWN_TIMEOUT_S = 120.0  # how long a worker may take to save its state
WORKER_COMMAND = [sys.executable, "-c", BOOTSTRAP_CODE]
ResultQueue = queue.Queue["tuple[_Worker, str | None]"]


@dataclass
class ProcessExecutor:
    """Runs tasks in worker processes on this machine.

    workers: how many processes; 0: one for each GPU, or two without GPUs. GPUs allow one worker each.
    """

    workers: int = 0
    threads: int | None = field(init=False)
    gpus: list[str] = field(init=False)  # as CUDA_VISIBLE_DEVICES names them; a worker has one
    supports_planning: bool = field(default=True, init=False)
    _workers: "list[_Worker]" = field(default_factory=list, init=False)  # they live from one list of tasks to the next
    _results: "ResultQueue" = field(default_factory=queue.Queue, init=False)  # (worker, None): its process has ended

    def __post_init__(self) -> None:
        self.gpus = _list_gpus()
        if self.workers < 0 or (self.gpus and self.workers > len(self.gpus)):
            raise LimbeckError(
                f"{self.workers} workers" + (f" for {len(self.gpus)} GPUs" if self.gpus else ""),
                expected=f"at most {len(self.gpus)}, one for each GPU" if self.gpus else "a positive number",
                hint="CUDA_VISIBLE_DEVICES= limbeck study ...   (workers on the CPU)" if self.gpus else None,
            )
        self.workers = self.workers or len(self.gpus) or DEFAULT_CPU_WORKERS
        self.threads = max(1, torch.get_num_threads() // self.workers)

    def run(self, study: Study, folder: Path, tasks: list[StudyTask]) -> Iterator[TaskResult]:
        """Run the tasks in order, as workers become free.

        Raises:
            TrainingInterrupted: SIGTERM came; all workers have saved their state.
        """
        waiting, attempts = deque(tasks), Counter[StudyTask]()
        finished = False
        with graceful_shutdown() as stop_requested:
            try:
                while waiting or any(worker.task for worker in self._workers):
                    if stop_requested():
                        raise TrainingInterrupted(_save_and_stop(self._workers))
                    while waiting and (idle := self._get_idle_worker(folder)):
                        idle.submit(waiting.popleft())
                    try:
                        worker, line = self._results.get(timeout=0.5)
                    except queue.Empty:
                        continue
                    if worker not in self._workers:
                        continue  # it was started for a list of tasks that was interrupted
                    task, worker.task = worker.task, None
                    if line is None:
                        self._workers.remove(worker)
                        if task is None:
                            continue
                        attempts[task] += 1
                        if attempts[task] < MAX_ATTEMPTS:
                            waiting.appendleft(task)
                            continue
                        yield TaskResult(task, dict.fromkeys(task.arms, worker.describe_exit()))
                    elif task is not None:
                        yield TaskResult(task, json.loads(line))
                finished = True
            finally:
                if not finished:
                    self.close()

    def close(self) -> None:
        """Stop the workers at once."""
        while self._workers:
            self._workers.pop().end()

    def _get_idle_worker(self, folder: Path) -> "_Worker | None":
        """Get a worker without a task, starting one if there is room; None if all are busy."""
        for worker in self._workers:
            if worker.task is None:
                return worker
        slots = set(range(self.workers)) - {worker.slot for worker in self._workers}
        if not slots:
            return None
        slot = min(slots)
        env = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[slot]
        self._workers.append(_Worker(slot, folder, self.workers, env, self._results))
        return self._workers[-1]


class _Worker:
    """A worker process with its current task and its log."""

    def __init__(self, slot: int, folder: Path, local_workers: int, env: dict[str, str], results: ResultQueue):
        self.slot = slot
        self.task: StudyTask | None = None
        self.log = folder / "logs" / f"worker-{slot}.log"
        self.log.parent.mkdir(exist_ok=True)
        with open(self.log, "ab") as log:
            # a session of its own: Ctrl-C is for the study, which then ends its workers
            self.process = subprocess.Popen(
                [*WORKER_COMMAND, str(folder), str(local_workers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                encoding="utf-8",
                env=env,
                start_new_session=True,
            )
        threading.Thread(target=self._listen, args=(results,), daemon=True).start()

    def _listen(self, results: ResultQueue) -> None:
        """Put each result into the queue, and None when the process has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            results.put((self, line))
        self.process.wait()
        results.put((self, None))

    def submit(self, task: StudyTask) -> None:
        """Send the worker a task. If its process is gone, `_listen` puts None into the queue."""
        self.task = task
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(task_to_dict(task)) + "\n")
            self.process.stdin.flush()

    def describe_exit(self) -> str:
        """Describe how the process ended, with the last lines of its log."""
        code = self.process.returncode
        outcome = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        last_lines = self.log.read_text(errors="replace", encoding="utf-8").splitlines()[-3:]
        return "\n".join([f"its process {outcome}, {MAX_ATTEMPTS} times; see {self.log}", *last_lines])

    def end(self) -> None:
        """Stop the process at once: it exits when its stdin is closed."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _save_and_stop(workers: list[_Worker]) -> str:
    """Make all busy workers save their state and exit; returns a message for the user."""
    busy = [worker for worker in workers if worker.task]
    for worker in busy:
        worker.process.terminate()
    for worker in busy:
        try:
            worker.process.wait(SHUTDOWN_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            worker.process.kill()
    return f"Interrupted; the state of {len(busy)} arms or groups of arms was saved."


def _list_gpus() -> list[str]:
    """List this process's GPUs under the names that CUDA_VISIBLE_DEVICES takes."""
    if not torch.cuda.is_available():
        return []
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return visible[: torch.cuda.device_count()] or [str(i) for i in range(torch.cuda.device_count())]
