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
import shlex
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from limbeck.console import console
from limbeck.data.cache import check_link, check_room, check_writable, no_room_is_an_error, read_json
from limbeck.distributed import world
from limbeck.errors import LimbeckError
from limbeck.identity import check_teachers
from limbeck.stages.run import check_run, held
from limbeck.study import record, tables
from limbeck.study.grid import Arm, Study, to_yaml
from limbeck.study.plan import StudyPlan, make_study_plan
from limbeck.study.schedule import lists
from limbeck.study.statements import judge_claims
from limbeck.study.watcher import Watcher
from limbeck.study.work import Executor, InTurn, Workplace, measure_teacher

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
        confirm: called with the plan before work begins, where a plan is made here.
        executor: where the arms run (`limbeck.study.executors`); one after another in this process by default.

    Returns:
        What study.json holds.

    Raises:
        LimbeckError: anything wrong with the study or its folder. An arm that fails raises nothing, it is reported.
        Stopped: SIGTERM came; the same command goes on.
    """
    folder = Path(out or f"runs/{study.title}")
    arms = check_study(study, folder)
    check_writable(folder)
    workplace = Workplace()
    place = executor or InTurn(workplace)
    with ExitStack() as stack:
        if known := folder.is_dir():
            stack.enter_context(held(folder))  # whoever works on it already is told before the rehearsal, not after it
        plan = None
        if place.plans:
            plan = make_study_plan(study, arms, workplace, max(place.workers, 1), place.threads)
            if confirm:
                confirm(plan)
            if executor is not None:
                workplace.clear()  # the memory is the workers'
        if not known:
            with no_room_is_an_error(folder):
                folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(folder))
        if plan is not None:
            check_room(folder, plan.disk_bytes, f"the study {folder}")
        record.put(folder / "study.yaml", to_yaml(study))
        stack.callback(place.close)
        _run(study, folder, arms, place, plan)
        failures = _failures(folder)
        claims = judge_claims(study.claims, _rows(study, arms))
        return tables.write(study, folder, arms, failures, claims)


def check_study(study: Study, folder: Path) -> list[Arm]:
    """The arms of a study, once nothing in its folder stands against it; writes nothing."""
    if world().size > 1:
        raise LimbeckError(
            "a study runs in one process", expected="limbeck study without torchrun; single arms can be run with it"
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
                expected="the same settings for arms that are there; new arms may be added",
                hint="--out another folder, or delete the folders of the arms that shall be run anew",
            ) from error
    stale = {arm.name: then for arm in arms if (then := record.other_evaluation(arm))}
    if stale:
        now = next(arm.recipe.evaluation.model_dump(mode="json") for arm in arms if arm.name in stale)
        then = next(iter(stale.values()))
        told = ", ".join(f"{key} {then.get(key)}, now {value}" for key, value in now.items() if then.get(key) != value)
        names = ", ".join(list(stale)[:4]) + (", ..." if len(stale) > 4 else "")
        raise LimbeckError(
            f"{len(stale)} arms were evaluated otherwise ({told}) and have kept nothing to evaluate again: {names}",
            expected="the evaluation that they had, so that a mean is over the same text",
            hint="--out another folder, or delete the folders of these arms",
        )
    check_teachers({arm.path: arm.recipe for arm in arms})
    return arms


def _run(study: Study, folder: Path, arms: list[Arm], executor: Executor, plan: StudyPlan | None) -> None:
    states = {arm.name: record.state(arm, study) for arm in arms}
    _forget(folder, [name for name, state in states.items() if state != "finished"])
    first, later = lists(arms, states, executor.workers)
    watcher = Watcher(first, later, executor.workers, plan)
    failed: set[str] = set()
    for tasks in (first, later):
        for done in executor.run(study, folder, [task for task in tasks if not failed.intersection(task.arms)]):
            failed |= set(done.failures)
            _remember(folder, done.failures)
            watcher.saw(done)
            if done.task.kind == "alone":
                tables.write(study, folder, arms, _failures(folder), claims=[])
    check_teachers({arm.path: arm.recipe for arm in arms})  # one may have been exchanged meanwhile
    for arm in arms:
        if record.state(arm, study) == "finished":
            record.drop(arm, study.save_artifacts)
            if study.measures and record.read_teacher(arm, study) is None:  # its file was deleted
                place = Workplace()
                place.subjects.lend(arm.recipe.teacher, *place.teacher(arm.recipe))
                measure_teacher(arm, study, place)
    if failures := _failures(folder):
        console.print(f"{len(failures)} of {len(arms)} arms failed; the same command tries them again")


def _rows(study: Study, arms: list[Arm]) -> list[dict[str, Any]]:
    """What claims are judged by: the records of finished arms, each with the values of its `teacher`."""
    known = ((record.read(arm, study), record.read_teacher(arm, study)) for arm in arms)
    rows = []
    for arm, (row, teacher) in zip(arms, known):
        if row:
            rows.append({**row, "mixer": arm.recipe.student.mixer, "teacher": teacher["values"] if teacher else {}})
    return rows


def _failures(folder: Path) -> dict[str, str]:
    """By arm, what those said that failed."""
    path = folder / FAILURES
    return (
        read_json(path, f"rm {shlex.quote(str(path))}   (it only holds what failed arms said)") if path.exists() else {}
    )


def _remember(folder: Path, failures: dict[str, str]) -> None:
    if failures:
        record.put(folder / FAILURES, json.dumps({**_failures(folder), **failures}, indent=1) + "\n")


def _forget(folder: Path, names: list[str]) -> None:
    known = _failures(folder)
    if set(known) & set(names):
        left = {name: text for name, text in known.items() if name not in names}
        record.put(folder / FAILURES, json.dumps(left, indent=1) + "\n")
