"""What a report is made of: the runs of a study, or single runs, read from their files into one form.

    collection = load_collection([Path("runs/paper-experiment-1-laptop")])                   # a study's folder
    collection = load_collection([Path("runs/gla"), Path("runs/mlstm"), Path("compared")])   # runs, and measurements
    collection.runs[0].values["agreement.perplexity"]

No model is loaded. Values have the names of `limbeck.report.values`, as in study.json (docs/reference/files.md). Local
paths are cut down to their last part, since reports are handed on.
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
from limbeck.evaluation.baselines import find_window
from limbeck.evaluation.measure import Measurement
from limbeck.report.comparison import load_measurements
from limbeck.report.privacy import get_basename, is_local_path, strip_local_paths
from limbeck.report.teacher_info import get_teacher_name
from limbeck.report.values import flatten_values

STUDY_FORMAT = 1  # of study.json
TEACHER = "teacher"
ENVIRONMENT = ("limbeck", "python", "torch", "transformers", "platform", "threads", "processes", "gpu")


@dataclass
class Run:
    """One run: its values on the axes, its numbers, its recipe.

    axes: value by axis as text: those of the study; for a single run mixer, stages, teacher and seed, and its name
        as `student`.
    values, errors: numbers and standard errors by name; empty unless the run is finished.
    stages: what eval.json records of each finished stage.
    recipe, manifest: from the run directory; empty without one.
    windows: measurements of the untrained window of its memory.
    prompt, samples: a text and how each model goes on; empty for the runs of a study.
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
    windows: list[Measurement] = field(default_factory=list)
    prompt: str = ""
    samples: dict[str, str] = field(default_factory=dict)

    @property
    def student(self) -> str:
        """The name of its series in all figures."""
        return self.axes["student"]

    @cached_property
    def tokens(self) -> int:
        """Tokens it was trained on, over all stages."""
        return sum(stage["tokens"] for stage in self.stages)


@dataclass
class RunCollection:
    """All runs of a report, and what belongs to no single one.

    condition_axes: the axes besides student and seed on which runs differ; each combination of their values is a
        condition, which has a column in tables and a figure of its own.
    claims, sharing, environment, study: as in study.json.
    commands: the command lines on record.
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
    def kind(self) -> str:
        """What the report is of."""
        if self.study is not None:
            return "Study"
        return "Run" if len([run for run in self.runs if run.student != TEACHER]) == 1 else "Comparison of runs"

    @property
    def finished_runs(self) -> list[Run]:
        """The runs that have values."""
        return [run for run in self.runs if run.status == "finished"]

    @property
    def sampled_runs(self) -> list[Run]:
        """The runs with samples of text."""
        return [run for run in self.runs if run.samples]

    @property
    def students(self) -> list[str]:
        """Names of the series in the order of the runs, without the teacher."""
        return list(dict.fromkeys(run.student for run in self.runs if run.student != TEACHER))

    @property
    def seeds(self) -> list[str]:
        """All seeds in the order of the runs."""
        return list(dict.fromkeys(run.axes["seed"] for run in self.runs if "seed" in run.axes))


def load_collection(paths: list[Path]) -> RunCollection:
    """Load a study, or runs, and measurements beside either.

    Args:
        paths: one study's folder or any number of run directories; beside either, folders that `limbeck eval --out`
            wrote. A folder that holds run directories stands for all of them.

    Raises:
        LimbeckError: no such folder, nothing to report in it, two studies, or a study of another format.
    """
    studies, runs, measured = [], [], []
    for path in paths:
        if not path.is_dir():
            raise LimbeckError(f"'{path}' is not a folder", expected="a study's folder, or run directories")
        nested = sorted(recipe.parent for recipe in path.glob("*/recipe.yaml"))
        if (path / "study.json").is_file():
            studies.append(path)
        elif (path / "recipe.yaml").is_file():
            runs.append(path)
        elif nested:
            runs += nested
        else:
            measured += load_measurements([path])
    if len(studies) > 1 or (studies and runs):
        raise LimbeckError(
            "a study cannot be combined with another study or with runs",
            expected="one study, or runs",
            hint="limbeck report ONE/RUN OTHER/RUN",
        )
    collection = _load_study(studies[0]) if studies else _load_runs(runs)
    _add_measurements(collection, measured)
    _add_raced_teacher(collection)
    if not any(run.values or run.failure for run in collection.runs):
        raise LimbeckError(
            f"nothing in {', '.join(map(str, paths))} is finished", hint="run the same command again to resume it"
        )
    collection.title = collection.title or ", ".join(collection.students[:3]) + " and others" * (
        len(collection.students) > 3
    )
    collection.commands = _list_commands(collection, paths)
    return collection


def _load_study(folder: Path) -> RunCollection:
    try:
        content = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        assert content["format"] == STUDY_FORMAT
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise LimbeckError(
            f"{folder / 'study.json'} is not a study of format {STUDY_FORMAT}",
            expected="a file written by limbeck study",
        ) from error
    runs = []
    for arm in content["arms"]:
        axes = {axis: value for axis, value in strip_local_paths(arm["axes"]).items() if value is not None}
        run = Run(
            name=arm["name"],
            axes={OLD_KEYS["grid"].get(axis, axis): _format_axis_value(value) for axis, value in axes.items()},
            status=arm["status"],
            folder=folder / arm["run"],
            values=arm.get("values") or {},
            errors=arm.get("errors") or {},
            stages=arm.get("stages") or [],
            seconds=arm.get("seconds"),
            saved_seconds=arm.get("saved_seconds"),
            failure=arm.get("failure"),
        )
        _read_run_directory(run)
        runs.append(run)
    teachers = [one for one in content.get("teachers", {}).values() if one]
    # with several teachers none of them is the baseline of all conditions
    if len(teachers) == 1 and len(content["teachers"]) == 1:
        values, errors = teachers[0]["values"], teachers[0]["errors"]
        runs.insert(0, Run(TEACHER, {"student": TEACHER}, "finished", values=dict(values), errors=dict(errors)))
    study = strip_local_paths(study_from_old_keys(content["study"]))
    title = study["name"] + (f", size {study['size']}" if study.get("size") else "")
    collection = RunCollection(title, study.get("description", ""), runs, _differing_axes(runs))
    collection.claims, collection.sharing = content["claims"], content["sharing"]
    collection.environment, collection.study = content["environment"], study
    return collection


def _load_runs(folders: list[Path]) -> RunCollection:
    """Load single runs; those whose recipes differ by the seed alone become one series."""
    runs: list[Run] = []
    series: dict[str, str] = {}  # recipe without its seed -> name
    for folder in folders:
        run = Run(folder.resolve().name, {}, "open", folder)
        _read_run_directory(run)
        key = json.dumps({k: v for k, v in run.recipe.items() if k not in ("seed", "name", "out")}, sort_keys=True)
        name = run.name if run.name not in series.values() else str(folder)
        run.axes = {"student": series.setdefault(key, name), **_recipe_axes(run.recipe)}
        path = folder / "eval.json"
        if path.is_file():
            again = shlex.join(["limbeck", "distill", str(folder / "recipe.yaml"), "--out", str(folder)])
            summary = read_json(path, f"{again}   (evaluates again)")
            run.status, run.stages = "finished", summary["stages"]
            run.seconds = sum(stage["seconds"] for stage in run.stages)
            run.prompt, run.samples = summary.get("prompt") or "", summary.get("samples") or {}
            measured = [*run.measurements.values(), *run.windows]
            run.values, run.errors = flatten_values(summary, measured, folder / "metrics.jsonl")
        runs.append(run)
    title = about = ""
    if len(runs) == 1 and runs[0].recipe:
        student, teacher = runs[0].axes["mixer"], get_teacher_name(runs[0].axes["teacher"])
        title, about = runs[0].name, f"The {student} student of {teacher}, seed {runs[0].axes['seed']}."
    environments = [{key: run.manifest.get(key) for key in ENVIRONMENT} for run in runs if run.manifest]
    return RunCollection(title, about, runs, [], environment=environments[0] if environments else {})


def _recipe_axes(recipe: dict[str, Any]) -> dict[str, str]:
    """Read the axes of a run that belongs to no study from its recipe."""
    numbers = {name: number for number, name in STAGE_NAMES.items()}
    return {
        "mixer": recipe["student"]["mixer"],
        "stages": "+".join(numbers[stage["stage"]] for stage in recipe["stages"]),
        "teacher": recipe["teacher"],
        "seed": str(recipe["seed"]),
    }


def _read_run_directory(run: Run) -> None:
    """Add recipe, manifest and measurements where the run directory has them."""
    assert run.folder is not None
    recipe, manifest = run.folder / "recipe.yaml", run.folder / "manifest.json"
    if recipe.is_file():
        run.recipe = strip_local_paths(from_old_keys(yaml.safe_load(recipe.read_text(encoding="utf-8"))))
    if manifest.is_file():
        run.manifest = strip_local_paths(read_manifest(run.folder))
    for path in sorted((run.folder / "eval").glob("*.json")):
        measurement = Measurement.load(path)
        run.measurements[measurement.measure] = measurement
    beside = [Measurement.load(path) for path in sorted((run.folder / "eval" / "baselines").glob("*/*.json"))]
    run.windows = [window for one in run.measurements.values() if (window := find_window(one, beside))]


def _add_measurements(collection: RunCollection, measured: list[Measurement]) -> None:
    """Add measurements to their runs; other models, mostly the teacher, become runs without training."""
    by_folder = {run.folder.resolve(): run for run in collection.runs if run.folder}
    by_name = {run.name: run for run in collection.runs}
    teachers = {run.axes.get("teacher") for run in collection.runs}
    teacher_runs = {run.name: run for run in collection.runs if run.student == TEACHER}
    others: dict[str, Run] = {}
    for one in measured:
        if "baseline" in one.data:  # it stands beside its students
            continue
        name = get_basename(one.model)
        run = by_folder.get(Path(one.model).resolve()) or by_name.get(name)
        if run is None:
            name = TEACHER if name in teachers or one.model == one.teacher else name
            run = teacher_runs.get(name) or others.setdefault(name, Run(name, {"student": name}, "finished"))
        run.measurements[one.measure] = one
        window = find_window(one, measured)
        values, errors = flatten_values({}, [one] if window is None else [one, window], None)
        run.values |= values
        run.errors |= errors
    collection.runs += others.values()


def _add_raced_teacher(collection: RunCollection) -> None:
    """Take the teacher's speed from the races with its students, the mean over them: fairer than one measured alone."""
    speeds: dict[str, list[float]] = {}
    for run in collection.runs:
        rivals = run.measurements["speed"].details.get("rivals", {}) if "speed" in run.measurements else {}
        for points in list(rivals.values())[:1]:
            for name, value in speed.summarize_points(points, 0, {}).items():
                if not name.startswith(("weights", "peak")):
                    speeds.setdefault(f"speed.{name}", []).append(value)
    if speeds:
        teacher = next((run for run in collection.runs if run.student == TEACHER), None)
        if teacher is None:
            teacher = Run(TEACHER, {"student": TEACHER}, "finished")
            collection.runs.append(teacher)
        teacher.values |= {name: fmean(numbers) for name, numbers in speeds.items()}


def _differing_axes(runs: list[Run]) -> list[str]:
    """List the axes besides student and seed on which the runs of a study differ."""
    runs = [run for run in runs if run.student != TEACHER]
    axes = dict.fromkeys(axis for run in runs for axis in run.axes if axis not in ("student", "seed"))
    return [axis for axis in axes if len({run.axes.get(axis) for run in runs}) > 1]


def _format_axis_value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _strip_word(word: str) -> str:
    """Cut a local path in a word of a command, `path` or `key=path`, down to its last part."""
    key, equals, value = word.rpartition("=")
    return f"{key}{equals}{get_basename(value)}" if is_local_path(value) else word


def _list_commands(collection: RunCollection, paths: list[Path]) -> list[str]:
    """List the recorded command lines, without local paths, and the one that makes this report."""
    recorded = [command for run in collection.runs for command in run.manifest.get("commands", [])]
    recorded += [one.provenance.command for run in collection.runs for one in run.measurements.values()]
    commands = [shlex.split(command) for command in recorded]
    if collection.study is not None and not any("study" in words for words in commands):
        commands.append(["limbeck", "study", "study.yaml"])
    for words in commands:  # a worker process records "-c" as its program
        words[0] = "limbeck" if words[0] == "-c" else words[0]
    lines = [shlex.join(map(_strip_word, words)) for words in commands]
    return [*dict.fromkeys(lines), shlex.join(["limbeck", "report", *(path.resolve().name for path in paths)])]
