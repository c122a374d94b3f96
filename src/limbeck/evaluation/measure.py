"""The measures by name, and the one way in which all of them are taken.

    measure = get_measure("agreement")
    found = run_measure(measure, subject, {"tokens": 4096})       # a Measurement, from its file where nothing has changed

A measure is a module that offers `MEASURE`; what it runs gets a subject and its settings and gives `MeasureResult`. Its file is
taken as it is where model, teacher, text and settings are those that it was made with, so a killed evaluation goes on.

What one measure found of one model, in the same form for every measure: numbers, and all that made them.

    found = Measurement(measure="agreement", model="runs/quickstart", values={"kl": 0.61}, ...)
    found.save(Path("runs/quickstart/eval"))            # eval/agreement.json
    Measurement.load(Path("runs/quickstart/eval/agreement.json")).values["kl"]

`values` are the numbers of the table, by a name that says the unit where there is one ("milliseconds", "bytes");
`errors` are standard errors under the same names; `details` hold what a figure needs: curves, layers, single tasks.
"""

import json
import math
import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from limbeck.core.config import format_validation_error
from limbeck.core.console import console
from limbeck.core.errors import LimbeckError, suggest_closest, summarize_error
from limbeck.core.storage import atomic_write_text, find_write_error
from limbeck.core.system import flush_denormals
from limbeck.core.version import __version__
from limbeck.data.documents import fingerprint_source
from limbeck.evaluation.subject import Subject
from limbeck.models.fingerprint import fingerprint_folder


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _said(meaning: str, **more: Any) -> Any:
    return Field(description=meaning, **more)


def _number(value: Any) -> Any:
    """JSON knows no NaN: it is null there."""
    return math.nan if value is None else value


Number = Annotated[float, BeforeValidator(_number)]


class Provenance(_Part):
    """What made the numbers."""

    command: str = _said("the command line")
    date: str = _said("when it ended: UTC, ISO 8601")
    seconds: float = _said("how long it took")
    seed: int = _said("of all that is drawn")
    dtype: str = _said("of the model's weights")
    weights: str = _said("fingerprint of the model's files")
    teacher_weights: str | None = _said("the same of the model it was compared with", default=None)
    versions: dict[str, str] = _said("of limbeck, torch, transformers and python")
    platform: str = _said("the operating system and processor family")
    device: str = _said("cpu, or the accelerator's name")
    threads: int = _said("of the CPU")


class Measurement(_Part):
    """One measure of one model."""

    format: Literal[1] = _said("of this file", default=1)
    measure: str = _said("its name; the file is `<measure>.json`")
    model: str = _said("as it was asked for: a run, a folder, a name")
    teacher: str | None = _said("the model it was compared with; its own name for a teacher, null for none")
    settings: dict[str, Any] = _said("of the measure, defaults included (`limbeck eval --list`)")
    data: dict[str, Any] = _said("which text or tasks: name, part, key, counts")
    values: dict[str, Number] = _said("the numbers of the table by name; null stands for one that is no number")
    errors: dict[str, Number] = _said("standard errors of values, by the same names", default={})
    details: dict[str, Any] = _said("what figures need: curves, layers, single tasks", default={})
    provenance: Provenance = _said("what made the numbers: see the second table")

    def save(self, folder: Path) -> Path:
        """Write `<folder>/<measure>.json`, whole or not at all."""
        path = folder / f"{self.measure}.json"
        atomic_write_text(path, json.dumps(_finite(self.model_dump(mode="json")), indent=1, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> "Measurement":
        """Raises LimbeckError for a file that is none, or of a format that is not known."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError, ValueError) as error:
            raise LimbeckError(
                f"{path} holds no measurement: {summarize_error(error)}", expected="a file that limbeck eval wrote"
            ) from error


def render_schema_tables() -> str:
    """The two tables of docs/measurements.md, from the classes."""
    parts = []
    for cls in (Measurement, Provenance):
        schema = cls.model_json_schema()
        rows = [
            f"| `{name}` | {_type(field)} | {field['description']} |" for name, field in schema["properties"].items()
        ]
        title = "A file" if cls is Measurement else "Provenance"
        parts.append("\n".join([f"## {title}", "", "| field | type | what it is |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _type(field: dict[str, Any]) -> str:
    """A field's type in JSON's words."""
    if "anyOf" in field:
        return " or ".join(_type(one) for one in field["anyOf"])
    if "const" in field:
        return f"{field['const']}"
    if "$ref" in field or "allOf" in field:
        return "object"
    inner = field.get("additionalProperties")
    return f"object of {inner['type']}s" if isinstance(inner, dict) and "type" in inner else field["type"]


def _finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN: null there."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


MEASURE_MODULES = {  # name -> module with a MEASURE
    "agreement": "limbeck.evaluation.agreement",
    "tasks": "limbeck.evaluation.lm_eval_tasks",
    "positions": "limbeck.evaluation.long_text",
    "needle": "limbeck.evaluation.needle",
    "recall": "limbeck.evaluation.associative_recall",
    "passkey": "limbeck.evaluation.passkey",
    "speed": "limbeck.evaluation.speed",
    "mixing": "limbeck.evaluation.mixing",
    "hidden": "limbeck.evaluation.hidden_states",
}


class MeasureSettings(BaseModel):
    """Base of a measure's settings; every field has a default."""

    model_config = ConfigDict(extra="forbid")


@dataclass
class MeasureResult:
    """What a measure gives: see `Measurement`."""

    values: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """A way to measure a model.

    description: one line for the list.
    run: takes the subject and an instance of `settings`.
    draw: one figure for several models' measurements; None where a table says it all.
    check_settings: LimbeckError for settings that are wrong in a way that shows before a model is loaded.
    """

    name: str
    description: str
    settings: type[MeasureSettings]
    run: Callable[[Subject, Any], MeasureResult]
    draw: Callable[[list[Measurement]], Any] | None = None
    check_settings: Callable[[Any], None] | None = None


def get_measure(name: str) -> Measure:
    """Raises LimbeckError for a name that there is not."""
    if name not in MEASURE_MODULES:
        raise LimbeckError(
            f"unknown measure '{name}'{suggest_closest(name, MEASURE_MODULES)}", expected=", ".join(MEASURE_MODULES)
        )
    return import_module(MEASURE_MODULES[name]).MEASURE


def parse_settings(measure: Measure, overrides: dict[str, Any]) -> MeasureSettings:
    """Settings from plain values; LimbeckError instead of pydantic's own."""
    try:
        return measure.settings.model_validate(overrides)
    except ValidationError as error:
        raise format_validation_error(error, measure.name, measure.settings) from error


def run_measure(
    measure: Measure, subject: Subject, overrides: dict[str, Any], ignore_cache: bool = False
) -> Measurement:
    """Measure a subject, and keep what was found in its home.

    Args:
        overrides: settings that differ from the defaults.
        ignore_cache: measure even where the same has been measured already.

    What cannot be written there is returned all the same, and it is said before anything is measured.
    """
    settings = parse_settings(measure, overrides)
    plain = settings.model_dump(mode="json")
    path = subject.output_dir / f"{measure.name}.json"
    known = _known(path, subject, plain) if not ignore_cache else None
    if known is not None:
        console.print(f"{measure.name} of {subject.name}: measured already, {path}")
        return known
    if refused := find_write_error(subject.output_dir):
        console.print(f"{refused.found}: {measure.name} is shown, not kept; --out FOLDER keeps it", markup=False)
    began = time.monotonic()
    torch.manual_seed(subject.seed)
    subject.ignore_cache = ignore_cache
    with flush_denormals():
        found = measure.run(subject, settings)
    measurement = Measurement(
        measure=measure.name,
        model=subject.name,
        teacher=subject.teacher_name,
        settings=plain,
        data=found.data,
        values=found.values,
        errors=found.errors,
        details=found.details,
        provenance=collect_provenance(subject, time.monotonic() - began),
    )
    if refused is None:
        try:
            measurement.save(subject.output_dir)
        except LimbeckError as lost:  # what was measured is worth more than its file
            console.print(f"{lost.found}: {measure.name} is shown, not kept; --out FOLDER keeps it", markup=False)
    return measurement


def collect_provenance(subject: Subject, seconds: float) -> Provenance:
    """Who measured, when, with what."""
    program = Path(sys.argv[0]).name
    return Provenance(
        command=shlex.join(["limbeck" if program in ("limbeck", "__main__.py") else program, *sys.argv[1:]]),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=round(seconds, 2),
        seed=subject.seed,
        dtype=str(subject.model.dtype).removeprefix("torch."),
        weights=subject.fingerprint_source,
        teacher_weights=subject.teacher_fingerprint,
        versions={
            "limbeck": __version__,
            "torch": str(torch.__version__),
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        platform=platform.platform(),
        device=torch.cuda.get_device_name() if subject.device.type == "cuda" else "cpu",
        threads=torch.get_num_threads(),
    )


def _known(path: Path, subject: Subject, settings: dict[str, Any]) -> Measurement | None:
    """What was measured before with the same model, teacher, text, settings and version."""
    if not path.is_file():
        return None
    try:
        known = Measurement.load(path)
    except LimbeckError:
        return None
    made, version = known.provenance, known.provenance.versions.get("limbeck")
    if known.settings != settings or (made.seed, version) != (subject.seed, __version__):
        return None
    if (made.weights, made.teacher_weights) != (subject.fingerprint_source, subject.teacher_fingerprint):
        return None
    if not _same_texts(known, subject, settings):
        return None
    return known.model_copy(update={"model": subject.name, "teacher": subject.teacher_name})  # as they are called now


def _same_texts(known: Measurement, subject: Subject, settings: dict[str, Any]) -> bool:
    """Are the texts, by content, still those that were measured on?"""
    data = known.data
    try:
        if any(fingerprint_source(source) != content for source, content in data.get("contents", {}).items()):
            return False
        if data.get("include") != fingerprint_folder(settings.get("include")):
            return False
        if "part" not in data:  # it does not read the subject's text
            return True
        length = settings.get("length") or (subject.data.seq_len if subject.data else 512)
        return subject.held_out_key(length, settings["tokens"]) == (data["part"], data.get("key"))
    except LimbeckError as error:
        console.print(f"{subject.name}: not compared with the text of before: {error.found}", markup=False)
        return True
