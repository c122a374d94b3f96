"""A study from where it stands to its end; the same command starts it, resumes it, or runs what was added.

results = run_study(Study.load("paper-experiment-1", "gpu"))
results["claims"], results["arms"][0]["values"]

runs/<study>-<size>/
  study.yaml         the study as it is run
  study.json         all arms' numbers and the claims (docs/studies.md)
  table.md, values.csv, claims.md
  failures.json      what the arms that failed said
  <arm>/             an ordinary run directory, and result.json
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.console import console
from limbeck.data.cache import check_room, no_room_is_an_error
from limbeck.distributed import world
from limbeck.errors import LimbeckError
from limbeck.stages.run import check_run, held
from limbeck.study import record, tables
from limbeck.study.grid import Arm, Study, to_yaml
from limbeck.study.plan import StudyPlan, make_study_plan
from limbeck.study.sharing import teams
from limbeck.study.statements import judge_claims
from limbeck.study.work import Executor, InTurn, Task, Workplace

FAILURES = "failures.json"


def run_study(
    study: Study,
    out: Path | None = None,
    confirm: Callable[[StudyPlan], None] | None = None,
    executor: Executor | None = None,
) -> dict[str, Any]:
    """Run what is left of a study, and write its tables.

    Args:
        out: its folder, runs/<name>-<size> by default.
        confirm: called with the plan before work begins.
        executor: where the arms run; one after another in this process by default.

    Returns:
        What study.json holds.

    Raises:
        LimbeckError: anything wrong with the study or its folder. An arm that fails raises nothing, it is reported.
        Stopped: SIGTERM came; the same command goes on.
    """
    folder = Path(out or f"runs/{study.title}")
    arms = check_study(study, folder)
    workplace = Workplace()
    plan = make_study_plan(study, arms, workplace)
    if confirm:
        confirm(plan)
    with no_room_is_an_error(folder):
        folder.mkdir(parents=True, exist_ok=True)
    check_room(folder, plan.disk_bytes, f"the study {folder}")
    with held(folder):
        record.put(folder / "study.yaml", to_yaml(study))
        _run(study, folder, arms, executor or InTurn(workplace))
        failures = _failures(folder)
        claims = judge_claims(study.claims, _rows(study, arms))
        return tables.write(study, folder, arms, failures, claims)


def check_study(study: Study, folder: Path) -> list[Arm]:
    """The arms of a study, once nothing in its folder stands against it; writes nothing."""
    if world().size > 1:
        raise LimbeckError(
            "a study runs in one process", expected="limbeck study without torchrun; single arms can be run with it"
        )
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
                expected="the same settings for arms that are there; new arms may be added",
                hint="--out another folder, or delete the folders of the arms that shall be run anew",
            ) from error
    return arms


def _run(study: Study, folder: Path, arms: list[Arm], executor: Executor) -> None:
    left = [arm for arm in arms if record.state(arm, study) != "finished"]
    to_train = [arm for arm in left if record.state(arm, study) == "train"]
    _forget(folder, [arm.name for arm in left])
    together = [Task("together", tuple(arm.name for arm in team)) for team in teams(to_train)]
    failed: set[str] = set()
    for done in executor.run(study, folder, together):
        failed |= set(done.failures)
        _remember(folder, done.failures)
    alone = [Task("alone", (arm.name,)) for arm in left if arm.name not in failed]
    for done in executor.run(study, folder, [*_teachers(study, arms), *alone]):
        if done.task.kind == "alone":
            _remember(folder, done.failures)
        tables.write(study, folder, arms, _failures(folder), claims=[])
    for arm in arms:
        if record.state(arm, study) == "finished":
            record.drop(arm, study.keep)
    if failures := _failures(folder):
        console.print(f"{len(failures)} of {len(arms)} arms failed; the same command tries them again")


def _rows(study: Study, arms: list[Arm]) -> list[dict[str, Any]]:
    """What claims are judged by: the records of finished arms, each with the values of its `teacher`."""
    known = ((record.read(arm, study), record.read_teacher(arm, study)) for arm in arms)
    return [{**row, "teacher": teacher["values"] if teacher else {}} for row, teacher in known if row]


def _teachers(study: Study, arms: list[Arm]) -> list[Task]:
    """A task for each teacher that is not measured yet."""
    if not study.measures:
        return []
    first = {record.teacher_path(arm): arm for arm in reversed(arms)}
    return [Task("teacher", (arm.name,)) for arm in first.values() if record.read_teacher(arm, study) is None]


def _failures(folder: Path) -> dict[str, str]:
    """By arm, what those said that failed."""
    path = folder / FAILURES
    return json.loads(path.read_text()) if path.exists() else {}


def _remember(folder: Path, failures: dict[str, str]) -> None:
    if failures:
        record.put(folder / FAILURES, json.dumps({**_failures(folder), **failures}, indent=1) + "\n")


def _forget(folder: Path, names: list[str]) -> None:
    known = _failures(folder)
    if set(known) & set(names):
        left = {name: text for name, text in known.items() if name not in names}
        record.put(folder / FAILURES, json.dumps(left, indent=1) + "\n")
