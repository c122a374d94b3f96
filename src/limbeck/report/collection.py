"""What a report is made of: the runs of a study, or runs made one by one, in one form read from their files.

    collection = load_collection([Path("runs/paper-experiment-1-laptop")])       # a study's folder
    collection = load_collection([Path("runs/gla"), Path("runs/mlstm"), Path("compared")])    # runs, and what limbeck eval wrote
    collection.runs[0].values["agreement.perplexity"]

No model is loaded. Values have the names of study.json (docs/studies.md): `<measure>.<name>`, `held_out.*`, `memory.*`,
`parameters.*`, `stages.<stage>.*`. Local paths are cut down to their last part, since reports are handed on.
"""

import json
import shlex
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from limbeck.core.config import STAGE_NAMES
from limbeck.core.errors import LimbeckError
from limbeck.core.old_keys import OLD_KEYS, from_old_keys, study_from_old_keys
from limbeck.core.storage import read_json, read_manifest
from limbeck.evaluation import speed
from limbeck.evaluation.measure import Measurement
from limbeck.report.comparison import load_measurements
from limbeck.report.privacy import get_basename, is_local_path, strip_local_paths
from limbeck.report.values import flatten_values

STUDY_FORMAT = 1  # of study.json
TEACHER = "teacher"
ENVIRONMENT = ("limbeck", "python", "torch", "transformers", "platform", "threads", "processes", "gpu")


@dataclass
class Run:
    """One run: where it stands on the axes, and what was found.

    axes: value by axis as text; a study's, or for runs made one by one the name as `student`, stages and seed.
    values, errors: numbers and standard errors by name; empty unless the run is finished.
    stages: the recipe of each finished stage with its facts.
    recipe, manifest: as the run directory has them; empty where it is not there.
    """

    name: str
    axes: dict[str, str]
    status: str
    folder: Path | None = None
    values: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    seconds: float | None = None
    saved_seconds: float | None = None
    failure: str | None = None
    recipe: dict[str, Any] = field(default_factory=dict)
    manifest: dict[str, Any] = field(default_factory=dict)
    measurements: dict[str, Measurement] = field(default_factory=dict)

    @property
    def student(self) -> str:
        """The name of its line in all figures."""
        return self.axes["student"]

    @cached_property
    def tokens(self) -> int:
        """How many it was trained on, over all stages."""
        return sum(stage["tokens"] for stage in self.stages)


@dataclass
class RunCollection:
    """All runs of a report, and what is known of them together.

    condition_axes: the axes, student and seed left out, on which runs differ: they tell a table's columns and figures apart.
    claims, sharing, environment, study: as in study.json.
    commands: what was typed, where that is on record.
    """

    title: str
    about: str
    runs: list[Run]
    condition_axes: list[str]
    claims: list[dict[str, Any]] = field(default_factory=list)
    sharing: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    study: dict[str, Any] | None = None
    commands: list[str] = field(default_factory=list)

    @property
    def finished_runs(self) -> list[Run]:
        """The runs with values."""
        return [run for run in self.runs if run.status == "finished"]

    @property
    def students(self) -> list[str]:
        """Names of lines in the order of the runs, the teacher left out."""
        return list(dict.fromkeys(run.student for run in self.runs if run.student != TEACHER))

    @property
    def seeds(self) -> list[str]:
        """All seeds in the order of the runs."""
        return list(dict.fromkeys(run.axes["seed"] for run in self.runs if "seed" in run.axes))


def load_collection(paths: list[Path]) -> RunCollection:
    """A study, or runs and measurements.

    Args:
        paths: one study's folder or any number of run directories; beside either, folders that `limbeck eval --out`
            wrote. A folder of run directories stands for all of them.

    Raises:
        LimbeckError: no such place, nothing to report in it, two studies, or a study of a format that is not known.
    """
    studies, runs, measured = [], [], []
    for path in paths:
        if not path.is_dir():
            raise LimbeckError(f"there is no folder {path}", expected="a study's folder, run directories")
        below = sorted(recipe.parent for recipe in path.glob("*/recipe.yaml"))
        if (path / "study.json").is_file():
            studies.append(path)
        elif (path / "recipe.yaml").is_file():
            runs.append(path)
        elif below:
            runs += below
        else:
            measured += load_measurements([path])
    if len(studies) > 1 or (studies and runs):
        raise LimbeckError(
            "a study together with other runs", expected="one study, or runs", hint="limbeck report ONE/RUN OTHER/RUN"
        )
    collection = _of_study(studies[0]) if studies else _of_runs(runs)
    _add(collection, measured)
    _add_rival(collection)
    if not any(run.values or run.failure for run in collection.runs):
        raise LimbeckError(
            f"nothing is finished in {', '.join(map(str, paths))}", hint="the command that runs it goes on with it"
        )
    collection.title = collection.title or ", ".join(collection.students[:3]) + " and others" * (
        len(collection.students) > 3
    )
    collection.commands = _commands(collection, paths)
    return collection


def _of_study(folder: Path) -> RunCollection:
    try:
        known = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        assert known["format"] == STUDY_FORMAT
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise LimbeckError(
            f"{folder / 'study.json'} is not a study of format {STUDY_FORMAT}", expected="what limbeck study writes"
        ) from error
    runs = []
    for one in known["arms"]:
        run = Run(
            one["name"],
            {
                OLD_KEYS["grid"].get(axis, axis): _text(value)
                for axis, value in strip_local_paths(one["axes"]).items()
                if value is not None
            },
            one["status"],
            folder / one["run"],
            one.get("values") or {},
            one.get("errors") or {},
            one.get("stages") or [],
            one.get("seconds"),
            one.get("saved_seconds"),
            one.get("failure"),
        )
        _read(run)
        runs.append(run)
    teachers = [one for one in known.get("teachers", {}).values() if one]
    if len(teachers) == 1 and len(known["teachers"]) == 1:  # of several none stands for all places
        values, errors = teachers[0]["values"], teachers[0]["errors"]
        runs.insert(0, Run(TEACHER, {"student": TEACHER}, "finished", values=dict(values), errors=dict(errors)))
    study = strip_local_paths(study_from_old_keys(known["study"]))
    title = study["name"] + (f", size {study['size']}" if study.get("size") else "")
    collection = RunCollection(title, study.get("description", ""), runs, _varied(runs))
    collection.claims, collection.sharing = known["claims"], known["sharing"]
    collection.environment, collection.study = known["environment"], study
    return collection


def _of_runs(folders: list[Path]) -> RunCollection:
    """Runs made one by one: those whose recipes differ by the seed alone are one line."""
    runs: list[Run] = []
    lines: dict[str, str] = {}  # recipe without its seed -> name
    for folder in folders:
        run = Run(folder.resolve().name, {}, "open", folder)
        _read(run)
        plain = json.dumps({k: v for k, v in run.recipe.items() if k not in ("seed", "name", "out")}, sort_keys=True)
        name = run.name if run.name not in lines.values() else str(folder)
        run.axes = {"student": lines.setdefault(plain, name), **_axes(run.recipe)}
        path = folder / "eval.json"
        if path.is_file():
            summary = read_json(path, f"limbeck distill {folder / 'recipe.yaml'} --out {folder}   (evaluates again)")
            run.status, run.stages = "finished", summary["stages"]
            run.seconds = sum(stage["seconds"] for stage in run.stages)
            run.values, run.errors = flatten_values(summary, list(run.measurements.values()), folder / "metrics.jsonl")
        runs.append(run)
    environments = [{key: run.manifest.get(key) for key in ENVIRONMENT} for run in runs if run.manifest]
    return RunCollection("", "", runs, [], environment=environments[0] if environments else {})


def _axes(recipe: dict[str, Any]) -> dict[str, str]:
    """The axes of a run that belongs to no study."""
    numbers = {name: number for number, name in STAGE_NAMES.items()}
    return {
        "mixer": recipe["student"]["mixer"],
        "stages": "+".join(numbers[stage["stage"]] for stage in recipe["stages"]),
        "teacher": recipe["teacher"],
        "seed": str(recipe["seed"]),
    }


def _read(run: Run) -> None:
    """What the run directory holds."""
    assert run.folder is not None
    recipe, manifest = run.folder / "recipe.yaml", run.folder / "manifest.json"
    if recipe.is_file():
        run.recipe = strip_local_paths(from_old_keys(yaml.safe_load(recipe.read_text(encoding="utf-8"))))
    if manifest.is_file():
        run.manifest = strip_local_paths(read_manifest(run.folder))
    for path in sorted((run.folder / "eval").glob("*.json")):
        one = Measurement.load(path)
        run.measurements[one.measure] = one


def _add(collection: RunCollection, measured: list[Measurement]) -> None:
    """Measurements: of runs go to their runs; those of other models, mostly the teacher, as runs without training."""
    by_folder = {run.folder.resolve(): run for run in collection.runs if run.folder}
    by_name = {run.name: run for run in collection.runs}
    teachers = {run.axes.get("teacher") for run in collection.runs}
    known = {run.name: run for run in collection.runs if run.student == TEACHER}
    others: dict[str, Run] = {}
    for one in measured:
        name = get_basename(one.model)
        run = by_folder.get(Path(one.model).resolve()) or by_name.get(name)
        if run is None:
            name = TEACHER if name in teachers or one.model == one.teacher else name
            run = known.get(name) or others.setdefault(name, Run(name, {"student": name}, "finished"))
        run.measurements[one.measure] = one
        values, errors = flatten_values({}, [one], None)
        run.values |= values
        run.errors |= errors
    collection.runs += others.values()


def _add_rival(collection: RunCollection) -> None:
    """The teacher's speed as it was measured in turns with its students, mean over them: a fairer one than alone."""
    found: dict[str, list[float]] = {}
    for run in collection.runs:
        rivals = run.measurements["speed"].details.get("rivals", {}) if "speed" in run.measurements else {}
        for points in list(rivals.values())[:1]:
            for name, value in speed.summarize_points(points, 0, {}).items():
                if not name.startswith(("weights", "peak")):
                    found.setdefault(f"speed.{name}", []).append(value)
    if found:
        teacher = next((run for run in collection.runs if run.student == TEACHER), None)
        if teacher is None:
            teacher = Run(TEACHER, {"student": TEACHER}, "finished")
            collection.runs.append(teacher)
        teacher.values |= {name: fmean(numbers) for name, numbers in found.items()}


def _varied(runs: list[Run]) -> list[str]:
    """The axes of a study on which its runs differ, but for student and seed."""
    runs = [run for run in runs if run.student != TEACHER]
    axes = dict.fromkeys(axis for run in runs for axis in run.axes if axis not in ("student", "seed"))
    return [axis for axis in axes if len({run.axes.get(axis) for run in runs}) > 1]


def _text(value: Any) -> str:
    """A value of an axis as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _commands(collection: RunCollection, paths: list[Path]) -> list[str]:
    """What was typed, as the measurements have it, and what makes this report."""
    typed = [one.provenance.command for run in collection.runs for one in run.measurements.values()]
    words = [shlex.split(one) for one in typed]
    if collection.study is not None and not any("study" in one for one in words):
        words.append(["limbeck", "study", "study.yaml"])
    for one in words:
        one[0] = "limbeck" if one[0] == "-c" else one[0]
    told = [" ".join(shlex.quote(get_basename(w) if is_local_path(w) else w) for w in one) for one in words]
    names = shlex.join(path.resolve().name for path in paths)
    return [*dict.fromkeys(told), f"limbeck report {names}"]
