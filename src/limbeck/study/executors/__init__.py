"""Where a study runs: in this process, in several processes, on a Ray cluster, or as Slurm job arrays.

    run_study(study, executor=create_executor("processes", workers=2))
    run_study(study, executor=create_executor("slurm", partition="gpu", gpus=1, time="4:00:00"))

All implement `limbeck.study.tasks.Executor`: they run the same tasks on the same folder, so a study can be started with
one and resumed with another. `worker.py` is the other end of all three; docs/guides/gpu.md has a command for each.
"""

from dataclasses import fields
from typing import Any

from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.study.executors.processes import ProcessExecutor
from limbeck.study.executors.ray import RayExecutor
from limbeck.study.executors.slurm import SlurmExecutor
from limbeck.study.tasks import Executor

__all__ = ["EXECUTORS", "ProcessExecutor", "RayExecutor", "SlurmExecutor", "create_executor"]

EXECUTORS: dict[str, Any] = {"local": None, "processes": ProcessExecutor, "ray": RayExecutor, "slurm": SlurmExecutor}


def create_executor(name: str, **options: Any) -> Executor | None:
    """Create an executor by name, None for "local"; options that are None count as unset.

    Raises:
        LimbeckError: no such executor, or an option that it does not have.
    """
    if name not in EXECUTORS:
        raise LimbeckError(
            f"unknown executor '{name}'{suggest_closest(name, EXECUTORS)}", expected=", ".join(EXECUTORS)
        )
    chosen = {key: value for key, value in options.items() if value is not None}
    cls = EXECUTORS[name]
    supported = [field.name for field in fields(cls) if field.init] if cls else []
    for key in chosen:
        if key not in supported:
            listed = ", ".join(f"--{option}" for option in supported) or "none"
            others = [
                other
                for other, executor in EXECUTORS.items()
                if executor and key in {option.name for option in fields(executor)}
            ]
            raise LimbeckError(
                f"the executor {name} has no option --{key}",
                expected=f"its options: {listed}",
                hint=f"--executor {others[0]}" if others else None,
            )
    return cls(**chosen) if cls else None
