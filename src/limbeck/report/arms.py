"""What a report is made of: the arms of a study, or runs made one by one, in one form read from their files.

    collection = gather([Path("runs/paper-experiment-1-laptop")])       # a study's folder
    collection = gather([Path("runs/gla"), Path("runs/mlstm"), Path("compared")])    # runs, and what limbeck eval wrote
    collection.arms[0].values["agreement.perplexity"]

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

from limbeck.data.cache import read_json
from limbeck.errors import LimbeckError
from limbeck.evaluate import speed_values
from limbeck.evaluate.measurement import Measurement
from limbeck.publish.privacy import is_local, last_part, without_paths
from limbeck.reading import STAGE_NAMES
from limbeck.recipe import OLD_KEYS, from_old_keys, study_from_old_keys
from limbeck.report.comparison import stored
from limbeck.report.values import values_of
from limbeck.stages.run import manifest_of

FORMAT = 1  # of study.json
TEACHER = "teacher"
ENVIRONMENT = ("limbeck", "python", "torch", "transformers", "platform", "threads", "processes", "gpu")


@dataclass
class Arm:
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
class Collection:
    """All arms of a report, and what is known of them together.

    places: the axes, student and seed left out, on which arms differ: they tell a table's columns and figures apart.
    claims, sharing, environment, study: as in study.json.
    commands: what was typed, where that is on record.
    """

    title: str
    about: str
    arms: list[Arm]
    places: list[str]
    claims: list[dict[str, Any]] = field(default_factory=list)
    sharing: dict[str, float] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    study: dict[str, Any] | None = None
    commands: list[str] = field(default_factory=list)

    @property
    def finished(self) -> list[Arm]:
        """The arms with values."""
        return [arm for arm in self.arms if arm.status == "finished"]

    @property
    def students(self) -> list[str]:
        """Names of lines in the order of the arms, the teacher left out."""
        return list(dict.fromkeys(arm.student for arm in self.arms if arm.student != TEACHER))

    @property
    def seeds(self) -> list[str]:
        """All seeds in the order of the arms."""
        return list(dict.fromkeys(arm.axes["seed"] for arm in self.arms if "seed" in arm.axes))


def gather(places: list[Path]) -> Collection:
    """A study, or runs and measurements.

    Args:
        places: one study's folder or any number of run directories; beside either, folders that `limbeck eval --out`
            wrote. A folder of run directories stands for all of them.

    Raises:
        LimbeckError: no such place, nothing to report in it, two studies, or a study of a format that is not known.
    """
    studies, runs, measured = [], [], []
    for place in places:
        if not place.is_dir():
            raise LimbeckError(f"there is no folder {place}", expected="a study's folder, run directories")
        below = sorted(path.parent for path in place.glob("*/recipe.yaml"))
        if (place / "study.json").is_file():
            studies.append(place)
        elif (place / "recipe.yaml").is_file():
            runs.append(place)
        elif below:
            runs += below
        else:
            measured += stored([place])
    if len(studies) > 1 or (studies and runs):
        raise LimbeckError(
            "a study together with other runs", expected="one study, or runs", hint="limbeck report ONE/RUN OTHER/RUN"
        )
    collection = _of_study(studies[0]) if studies else _of_runs(runs)
    _add(collection, measured)
    _add_rival(collection)
    if not any(arm.values or arm.failure for arm in collection.arms):
        raise LimbeckError(
            f"nothing is finished in {', '.join(map(str, places))}", hint="the command that runs it goes on with it"
        )
    collection.title = collection.title or ", ".join(collection.students[:3]) + " and others" * (
        len(collection.students) > 3
    )
    collection.commands = _commands(collection, places)
    return collection


def _of_study(folder: Path) -> Collection:
    try:
        known = json.loads((folder / "study.json").read_text(encoding="utf-8"))
        assert known["format"] == FORMAT
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise LimbeckError(
            f"{folder / 'study.json'} is not a study of format {FORMAT}", expected="what limbeck study writes"
        ) from error
    arms = []
    for one in known["arms"]:
        arm = Arm(
            one["name"],
            {
                OLD_KEYS["grid"].get(axis, axis): _text(value)
                for axis, value in without_paths(one["axes"]).items()
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
        _read(arm)
        arms.append(arm)
    teachers = [one for one in known.get("teachers", {}).values() if one]
    if len(teachers) == 1 and len(known["teachers"]) == 1:  # of several none stands for all places
        values, errors = teachers[0]["values"], teachers[0]["errors"]
        arms.insert(0, Arm(TEACHER, {"student": TEACHER}, "finished", values=dict(values), errors=dict(errors)))
    study = without_paths(study_from_old_keys(known["study"]))
    title = study["name"] + (f", size {study['size']}" if study.get("size") else "")
    collection = Collection(title, study.get("description", ""), arms, _varied(arms))
    collection.claims, collection.sharing = known["claims"], known["sharing"]
    collection.environment, collection.study = known["environment"], study
    return collection


def _of_runs(folders: list[Path]) -> Collection:
    """Runs as arms: those whose recipes differ by the seed alone are one line."""
    arms: list[Arm] = []
    lines: dict[str, str] = {}  # recipe without its seed -> name
    for folder in folders:
        arm = Arm(folder.resolve().name, {}, "open", folder)
        _read(arm)
        plain = json.dumps({k: v for k, v in arm.recipe.items() if k not in ("seed", "name", "out")}, sort_keys=True)
        name = arm.name if arm.name not in lines.values() else str(folder)
        arm.axes = {"student": lines.setdefault(plain, name), **_axes(arm.recipe)}
        path = folder / "eval.json"
        if path.is_file():
            summary = read_json(path, f"limbeck distill {folder / 'recipe.yaml'} --out {folder}   (evaluates again)")
            arm.status, arm.stages = "finished", summary["stages"]
            arm.seconds = sum(stage["seconds"] for stage in arm.stages)
            arm.values, arm.errors = values_of(summary, list(arm.measurements.values()), folder / "metrics.jsonl")
        arms.append(arm)
    environments = [{key: arm.manifest.get(key) for key in ENVIRONMENT} for arm in arms if arm.manifest]
    return Collection("", "", arms, [], environment=environments[0] if environments else {})


def _axes(recipe: dict[str, Any]) -> dict[str, str]:
    """The axes of a run that belongs to no study."""
    numbers = {name: number for number, name in STAGE_NAMES.items()}
    return {
        "mixer": recipe["student"]["mixer"],
        "stages": "+".join(numbers[stage["stage"]] for stage in recipe["stages"]),
        "teacher": recipe["teacher"],
        "seed": str(recipe["seed"]),
    }


def _read(arm: Arm) -> None:
    """What the run directory holds."""
    assert arm.folder is not None
    recipe, manifest = arm.folder / "recipe.yaml", arm.folder / "manifest.json"
    if recipe.is_file():
        arm.recipe = without_paths(from_old_keys(yaml.safe_load(recipe.read_text(encoding="utf-8"))))
    if manifest.is_file():
        arm.manifest = without_paths(manifest_of(arm.folder))
    for path in sorted((arm.folder / "eval").glob("*.json")):
        one = Measurement.load(path)
        arm.measurements[one.measure] = one


def _add(collection: Collection, measured: list[Measurement]) -> None:
    """Measurements: of arms to their arms; of other models, mostly the teacher, as arms without training."""
    by_folder = {arm.folder.resolve(): arm for arm in collection.arms if arm.folder}
    by_name = {arm.name: arm for arm in collection.arms}
    teachers = {arm.axes.get("teacher") for arm in collection.arms}
    known = {arm.name: arm for arm in collection.arms if arm.student == TEACHER}
    others: dict[str, Arm] = {}
    for one in measured:
        name = last_part(one.model)
        arm = by_folder.get(Path(one.model).resolve()) or by_name.get(name)
        if arm is None:
            name = TEACHER if name in teachers or one.model == one.teacher else name
            arm = known.get(name) or others.setdefault(name, Arm(name, {"student": name}, "finished"))
        arm.measurements[one.measure] = one
        values, errors = values_of({}, [one], None)
        arm.values |= values
        arm.errors |= errors
    collection.arms += others.values()


def _add_rival(collection: Collection) -> None:
    """The teacher's speed as it was measured in turns with its students, mean over them: a fairer one than alone."""
    found: dict[str, list[float]] = {}
    for arm in collection.arms:
        rivals = arm.measurements["speed"].details.get("rivals", {}) if "speed" in arm.measurements else {}
        for points in list(rivals.values())[:1]:
            for name, value in speed_values.values_of(points, 0, {}).items():
                if not name.startswith(("weights", "peak")):
                    found.setdefault(f"speed.{name}", []).append(value)
    if found:
        teacher = next((arm for arm in collection.arms if arm.student == TEACHER), None)
        if teacher is None:
            teacher = Arm(TEACHER, {"student": TEACHER}, "finished")
            collection.arms.append(teacher)
        teacher.values |= {name: fmean(numbers) for name, numbers in found.items()}


def _varied(arms: list[Arm]) -> list[str]:
    """The axes of a study on which its arms differ, but for student and seed."""
    arms = [arm for arm in arms if arm.student != TEACHER]
    axes = dict.fromkeys(axis for arm in arms for axis in arm.axes if axis not in ("student", "seed"))
    return [axis for axis in axes if len({arm.axes.get(axis) for arm in arms}) > 1]


def _text(value: Any) -> str:
    """A value of an axis as people read it."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _commands(collection: Collection, places: list[Path]) -> list[str]:
    """What was typed, as the measurements have it, and what makes this report."""
    typed = [one.provenance.command for arm in collection.arms for one in arm.measurements.values()]
    words = [shlex.split(one) for one in typed]
    if collection.study is not None and not any("study" in one for one in words):
        words.append(["limbeck", "study", "study.yaml"])
    for one in words:
        one[0] = "limbeck" if one[0] == "-c" else one[0]
    told = [" ".join(shlex.quote(last_part(w) if is_local(w) else w) for w in one) for one in words]
    names = shlex.join(place.resolve().name for place in places)
    return [*dict.fromkeys(told), f"limbeck report {names}"]
