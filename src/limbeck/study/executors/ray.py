"""Run arms as Ray tasks: on an existing cluster, or on one that is started on this machine for the study.

    run_study(study, executor=RayExecutor(workers=2))                    # on this machine
    run_study(study, executor=RayExecutor(address="auto", gpus=1))       # on the cluster of this machine

All machines need Limbeck, and see the study's folder, the text and the teacher under the same paths. The output of a
task goes to <folder>/logs/. A task whose process or machine is lost is taken up by another from the disk,
`MAX_ATTEMPTS` times in all. After SIGTERM the study resumes from its arms' last checkpoints.
"""

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError, summarize_error
from limbeck.core.signals import TrainingInterrupted, graceful_shutdown
from limbeck.study.executors.worker import run_remote_task, task_to_dict
from limbeck.study.spec import Study
from limbeck.study.tasks import StudyTask, TaskResult

MAX_ATTEMPTS = 3
DEFAULT_LOCAL_WORKERS = 2
OBJECT_STORE_BYTES = 80_000_000  # little: tasks and results are short texts
TEMPORARY_PREFIX = "limbeck-ray-"


@dataclass
class RayExecutor:
    """Runs tasks on a Ray cluster.

    address: that of a cluster, `auto` for the one that this machine belongs to; None starts one here.
    workers: how many tasks run side by side; 0: two here, on a cluster as many as it has room for.
    cpus: cores and threads of a task; 0: here its part of this process's threads, on a cluster one.
    gpus: GPUs of a task; None: one if the cluster has GPUs, else none.
    """

    address: str | None = None
    workers: int = 0
    cpus: int = 0
    gpus: float | None = None
    threads: int | None = field(init=False)
    supports_planning: bool = field(init=False)
    _cluster_stack: list[ExitStack] = field(
        default_factory=list, init=False
    )  # holds the cluster from one list of tasks to the next

    def __post_init__(self) -> None:
        _import_ray()
        for name, value in (("workers", self.workers), ("cpus", self.cpus), ("gpus", self.gpus or 0)):
            if value < 0:
                raise LimbeckError(f"--{name} {value}", expected="a positive number")
        self.supports_planning = self.address is None
        if self.address is None:
            self.workers = self.workers or DEFAULT_LOCAL_WORKERS
            self.cpus = self.cpus or max(1, torch.get_num_threads() // self.workers)
        self.cpus = self.cpus or 1
        self.threads = self.cpus

    def run(self, study: Study, folder: Path, tasks: list[StudyTask]) -> Iterator[TaskResult]:
        """Run the tasks, as many at once as there is room for.

        Raises:
            LimbeckError: there is no cluster at that address, or no machine of it has what a task needs.
            TrainingInterrupted: SIGTERM came.
        """
        if not tasks:
            return
        ray = _import_ray()
        (folder / "logs").mkdir(exist_ok=True)
        if not self._cluster_stack:
            self._cluster_stack.append(ExitStack())
            self._cluster_stack[0].enter_context(self._cluster(ray))
        with graceful_shutdown() as stop_requested:
            gpus, local_workers = self._fit_to_cluster(ray)
            # a task that is stopped by a signal on its machine starts again on another
            remote = ray.remote(run_remote_task).options(
                num_cpus=self.cpus, num_gpus=gpus, max_retries=MAX_ATTEMPTS - 1, retry_exceptions=[TrainingInterrupted]
            )
            waiting, running = deque(tasks), dict[Any, StudyTask]()
            try:
                while waiting or running:
                    if stop_requested():
                        raise TrainingInterrupted("Interrupted; the arms resume from their last checkpoints.")
                    while waiting and (len(running) < self.workers or not self.workers):
                        task = waiting.popleft()
                        running[remote.remote(*self._build_arguments(folder, task), local_workers)] = task
                    ready, _ = ray.wait(list(running), timeout=0.5)
                    for reference in ready:
                        yield self._get_result(ray, reference, running.pop(reference))
            finally:
                for reference in running:
                    ray.cancel(reference, force=True)

    def close(self) -> None:
        """Leave the cluster, or end the one that was started here."""
        while self._cluster_stack:
            self._cluster_stack.pop().close()

    def _build_arguments(self, folder: Path, task: StudyTask) -> tuple[str, str, dict[str, Any], int, str]:
        """Return the arguments of `run_remote_task`, but for the number of workers."""
        log = folder / "logs" / f"{task.kind}-{task.arms[0]}.log"
        return os.getcwd(), str(folder), task_to_dict(task), self.cpus, str(log)

    def _get_result(self, ray: Any, reference: Any, task: StudyTask) -> TaskResult:
        """Get the result of a task that Ray has finished."""
        try:
            return TaskResult(task, ray.get(reference))
        except TrainingInterrupted as error:
            message = str(error)
        except ray.exceptions.RayError as error:
            message = f"Ray task failed after {MAX_ATTEMPTS} attempts: {type(error).__name__}: {str(error).strip()}"
        return TaskResult(task, dict.fromkeys(task.arms, message))

    def _fit_to_cluster(self, ray: Any) -> tuple[float, int]:
        """Check that some machine has what a task needs; returns GPUs of a task and how many tasks one machine runs."""
        resources = ray.cluster_resources()
        gpus = self.gpus if self.gpus is not None else float(resources.get("GPU", 0) > 0)
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not any(machine.get("CPU", 0) >= self.cpus and machine.get("GPU", 0) >= gpus for machine in machines):
            raise LimbeckError(
                f"no machine of the cluster has {self.cpus} CPUs and {gpus:g} GPUs",
                expected="at most what one machine has: "
                + "; ".join(f"{machine.get('CPU', 0):g} CPUs, {machine.get('GPU', 0):g} GPUs" for machine in machines),
                hint="--cpus and --gpus are those of one task",
            )
        tasks_per_machine = int(max(machine.get("CPU", 0) for machine in machines) // self.cpus)
        return gpus, min(tasks_per_machine, self.workers or tasks_per_machine)

    @contextmanager
    def _cluster(self, ray: Any) -> Iterator[None]:
        """Join the cluster, or start one on this machine and remove it afterwards; one that is joined already stays."""
        if ray.is_initialized():
            yield
            return
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray sends usage statistics by default
        options = {"log_to_driver": False, "include_dashboard": False, "logging_level": "ERROR"}
        if self.address is not None:
            del options["include_dashboard"]
            try:
                ray.init(address=self.address, **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise LimbeckError(
                    f"no Ray cluster at {self.address}: {summarize_error(error)}",
                    expected="the address of a head node, or auto on a machine of a cluster",
                    hint="ray start --head   (on the first machine), or no --address for this machine alone",
                ) from error
            try:
                console.print(f"Ray at {self.address}: {_format_resources(ray.cluster_resources())}", markup=False)
                yield
            finally:
                ray.shutdown()
            return
        _remove_stale_folders()
        # Ray puts its sockets in there, and paths of sockets have to be short
        folder = tempfile.mkdtemp(prefix=f"{TEMPORARY_PREFIX}{os.getpid()}-", dir=_get_temporary_root())
        try:
            ray.init(
                num_cpus=self.workers * self.cpus, object_store_memory=OBJECT_STORE_BYTES, _temp_dir=folder, **options
            )
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


def _remove_stale_folders() -> None:
    """Delete the temporary folders of clusters whose study was killed."""
    for folder in _get_temporary_root().glob(f"{TEMPORARY_PREFIX}*"):
        pid = folder.name.removeprefix(TEMPORARY_PREFIX).partition("-")[0]
        if pid.isdigit() and not Path(f"/proc/{pid}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _get_temporary_root() -> Path:
    return Path("/tmp") if Path("/tmp").is_dir() else Path(tempfile.gettempdir())


def _format_resources(resources: dict[str, float]) -> str:
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"


def _import_ray() -> Any:
    try:  # an optional dependency, of the extra `ray`
        import ray
        import ray.exceptions  # noqa: F401  (ray.exceptions.X is used below)
    except ImportError as error:
        raise LimbeckError("Ray is not installed", hint="pip install 'limbeck[ray]'") from error
    return ray
