"""Where a study runs: in this process, in several side by side, on a Ray cluster, or as arrays of Slurm.

    run_study(study, executor=make("processes", workers=2))
    run_study(study, executor=make("slurm", partition="gpu", gpus=1, time="4:00:00"))

All of them do the same tasks on the same folder (`limbeck.study.work`), so a study may be begun with one and gone on
with by another. docs/studies.md has a command for each.
"""

from dataclasses import fields
from typing import Any

from limbeck.errors import LimbeckError, closest
from limbeck.study.executors.processes import Processes
from limbeck.study.executors.ray import OnRay
from limbeck.study.executors.slurm import Slurm
from limbeck.study.work import Executor

__all__ = ["EXECUTORS", "OnRay", "Processes", "Slurm", "make"]

EXECUTORS: dict[str, Any] = {"local": None, "processes": Processes, "ray": OnRay, "slurm": Slurm}


def make(name: str, **options: Any) -> Executor | None:
    """The executor of that name, None for "local"; options that are None count as not given.

    Raises:
        LimbeckError: no such executor, or an option that it does not have.
    """
    if name not in EXECUTORS:
        raise LimbeckError(f"unknown executor '{name}'{closest(name, EXECUTORS)}", expected=", ".join(EXECUTORS))
    given = {key: value for key, value in options.items() if value is not None}
    cls = EXECUTORS[name]
    known = [field.name for field in fields(cls) if field.init] if cls else []
    for key in given:
        if key not in known:
            has = ", ".join(f"--{one}" for one in known) or "none"
            others = [other for other, it in EXECUTORS.items() if it and key in {one.name for one in fields(it)}]
            raise LimbeckError(
                f"the executor {name} has no --{key}",
                expected=f"its own options: {has}",
                hint=f"--executor {others[0]}" if others else None,
            )
    return cls(**given) if cls else None
