"""Registry of measures, the one way to run them, and the file format of their results.

    measure = get_measure("agreement")
    result = run_measure(measure, subject, {"tokens": 4096})             # a Measurement, cached in eval/agreement.json
    result.values["kl"], result.errors["kl"]
    Measurement.load(Path("runs/quickstart/eval/agreement.json"))        # the same one

To add a measure: write a module with a subclass of `MeasureSettings` (every field has a default), a function from a
`Subject` and these settings to a `MeasureResult`, and a `Measure` that names them; then add it to `MEASURE_MODULES`.
`limbeck eval`, studies and reports find it there. A figure is optional: `limbeck.report.figures.measures`.
"""

import json
import math
import platform
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from limbeck.core.config import format_validation_error
from limbeck.core.console import console
from limbeck.core.digests import digest_facts
from limbeck.core.errors import LimbeckError, suggest_closest, summarize_error
from limbeck.core.live import Phase, View, current
from limbeck.core.storage import atomic_write_text, cache_root, find_write_error
from limbeck.core.system import flush_denormals, get_command_line
from limbeck.core.version import __version__
from limbeck.data.documents import fingerprint_source
from limbeck.evaluation.stored_answers import has_identity
from limbeck.evaluation.subject import Subject
from limbeck.models.fingerprint import fingerprint_folder

SHOWN_VALUES = 3  # of a measurement in the live view


class _StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid")


def _described(description: str, **options: Any) -> Any:
    return Field(description=description, **options)


# JSON has no NaN; `Measurement.save` writes null instead.
Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Provenance(_StrictModel):
    """How the numbers of a measurement were produced."""

    command: str = _described("command line")
    date: str = _described("end of the measurement: UTC, ISO 8601")
    seconds: float = _described("duration")
    seed: int = _described("seed of everything that is sampled")
    dtype: str = _described("dtype of the model's weights")
    weights: str = _described("fingerprint of the model's files")
    teacher_weights: str | None = _described("fingerprint of the model it was compared with", default=None)
    versions: dict[str, str] = _described("versions of limbeck, torch, transformers and python")
    platform: str = _described("operating system and processor family")
    device: str = _described("cpu, or the accelerator's name")
    threads: int = _described("number of CPU threads")


class Measurement(_StrictModel):
    """The result of one measure on one model: numbers, and everything that determined them."""

    format: Literal[1] = _described("version of this file format", default=1)
    measure: str = _described("name of the measure; the file is `<measure>.json`")
    model: str = _described("model as given on the command line: a run, a folder, a name")
    teacher: str | None = _described("model it was compared with; a teacher's own name, null for none")
    settings: dict[str, Any] = _described("settings of the measure, defaults included (`limbeck eval --list`)")
    data: dict[str, Any] = _described("text or tasks: name, part, key, counts")
    values: dict[str, Number] = _described("numbers of the table by name; null stands for NaN or infinity")
    errors: dict[str, Number] = _described("standard errors of values, by the same names", default={})
    details: dict[str, Any] = _described("data of figures: curves, layers, single tasks", default={})
    provenance: Provenance = _described("how the numbers were produced: see the second table")

    def save(self, folder: Path) -> Path:
        """Write `<folder>/<measure>.json` atomically."""
        path = folder / f"{self.measure}.json"
        content = _replace_non_finite(self.model_dump(mode="json"))
        atomic_write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> "Measurement":
        """Read a file of `save`; raises LimbeckError for anything else."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            problem = summarize_error(error)
            if isinstance(error, ValidationError):
                first = error.errors()[0]
                problem = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
            raise LimbeckError(f"{path} is not a measurement: {problem}", expected="a file of limbeck eval") from error


def _replace_non_finite(value: Any) -> Any:
    """Replace NaN and infinity, which JSON cannot represent, by None."""
    if isinstance(value, dict):
        return {key: _replace_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_non_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# name -> "module:attribute"; modules are imported on demand, since some need optional dependencies
MEASURE_MODULES = {
    "agreement": "limbeck.evaluation.agreement:MEASURE",
    "exam": "limbeck.evaluation.exam:MEASURE",
    "tasks": "limbeck.evaluation.lm_eval_tasks:MEASURE",
    "letters": "limbeck.evaluation.letters:MEASURE",
    "generated": "limbeck.evaluation.generated:MEASURE",
    "sampled": "limbeck.evaluation.sampled_text:MEASURE",
    "positions": "limbeck.evaluation.long_text:MEASURE",
    "needle": "limbeck.evaluation.retrieval:NEEDLE",
    "facts": "limbeck.evaluation.facts:MEASURE",
    "recall": "limbeck.evaluation.associative_recall:MEASURE",
    "passkey": "limbeck.evaluation.retrieval:PASSKEY",
    "speed": "limbeck.evaluation.speed:MEASURE",
    "mixing": "limbeck.evaluation.mixing:MEASURE",
    "hidden": "limbeck.evaluation.hidden_states:MEASURE",
}


class MeasureSettings(BaseModel):
    """Base class of a measure's settings; every field has a default."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


@dataclass
class MeasureResult:
    """What the function of a measure returns; fields as in `Measurement`."""

    values: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """A way to measure a model.

    description: one line for `limbeck eval --list`.
    run: takes the subject and an instance of `settings`.
    check_settings: raises LimbeckError for settings that can be rejected before a model is loaded.
    baseline_length: given the same, the tokens of context at which a student's memory is that of its untrained window
        (`limbeck.evaluation.baselines`); None where baselines are not measured.
    """

    name: str
    description: str
    settings: type[MeasureSettings]
    run: Callable[[Subject, Any], MeasureResult]
    check_settings: Callable[[Any], None] | None = None
    baseline_length: Callable[[Subject, Any], int] | None = None


def get_measure(name: str) -> Measure:
    """Look up a measure by name; raises LimbeckError for an unknown one."""
    if name not in MEASURE_MODULES:
        raise LimbeckError(
            f"unknown measure '{name}'{suggest_closest(name, MEASURE_MODULES)}", expected=", ".join(MEASURE_MODULES)
        )
    module, _, attribute = MEASURE_MODULES[name].partition(":")
    return getattr(import_module(module), attribute)


def parse_settings(measure: Measure, overrides: dict[str, Any]) -> MeasureSettings:
    """Validate settings given as plain values; raises LimbeckError where they are invalid."""
    try:
        return measure.settings.model_validate(overrides)
    except ValidationError as error:
        raise format_validation_error(error, measure.name, measure.settings) from error


def complete_settings(
    measures: Sequence[Measure], settings: dict[str, dict[str, Any]], tokens: int | None, length: int | None
) -> dict[str, dict[str, Any]]:
    """Add what holds for all measures to the settings of each, and check them before a model is loaded.

    Args:
        settings: of each measure by name, those that differ from the defaults.
        tokens, length: for the measures that have such a setting and no value for it; None: their defaults.

    Raises:
        LimbeckError: an unknown setting or an invalid value.
    """
    for one in measures:
        for key, value in (("tokens", tokens), ("length", length)):
            if value is not None and key in one.settings.model_fields:
                settings[one.name].setdefault(key, value)
        parsed = parse_settings(one, settings[one.name])
        if one.check_settings is not None:
            one.check_settings(parsed)
    return settings


def run_measure(
    measure: Measure, subject: Subject, overrides: dict[str, Any], ignore_cache: bool = False
) -> Measurement:
    """Measure a subject and save the result in its output folder, unless the same result is there already.

    Of teachers and baselines some results are kept for all their students (`_get_shared_folder`).
    A folder that cannot be written is reported before anything is computed; the result is returned all the same.

    Args:
        overrides: settings that differ from the defaults.
        ignore_cache: measure even if the output folder has the result.
    """
    settings = parse_settings(measure, overrides)
    plain_settings = settings.model_dump(mode="json")
    shared = _get_shared_folder(measure, subject, plain_settings)
    folders = [folder for folder in (subject.output_dir, shared) if folder is not None]
    view, row = current(), _name_row(measure, subject.name)
    view.add(row)
    cached = None if ignore_cache else _find_cached(folders, measure, subject, plain_settings)
    if cached is not None:
        view.finish(row, describe_values(cached.values))
        return cached
    write_error = find_write_error(subject.output_dir)
    if write_error:
        _warn_not_saved(write_error, measure)
    start = time.monotonic()
    torch.manual_seed(subject.seed)
    subject.ignore_cache = ignore_cache
    with flush_denormals():
        result = measure.run(subject, settings)
    measurement = Measurement(
        measure=measure.name,
        model=subject.name,
        teacher=subject.teacher_name,
        settings=plain_settings,
        data=result.data | ({"baseline": asdict(subject.baseline)} if subject.baseline else {}),
        values=result.values,
        errors=result.errors,
        details=result.details,
        provenance=collect_provenance(subject, time.monotonic() - start),
    )
    view.finish(row, describe_values(result.values))
    if write_error is None:
        try:
            measurement.save(subject.output_dir)
        except LimbeckError as error:  # the disk may be full by now; hours of work should still be shown
            _warn_not_saved(error, measure)
    if shared is not None:
        with suppress(LimbeckError):  # it is measured again for the next student
            measurement.save(shared)
    return measurement


def make_view(measures: Sequence[Measure], models: Sequence[str]) -> View:
    """Make a live view with a row for each measure of each model; baselines add theirs when they are measured."""
    names = [_name_row(measure, model) for model in models for measure in measures]
    return View("evaluation", [Phase(name, name, 1.0) for name in names], in_seconds=False, collects=True)


def _name_row(measure: Measure, model: str) -> str:
    return f"{measure.name} of {model}"


def describe_values(values: dict[str, float]) -> str:
    """Name the first values of a measurement, for a line of the live view."""
    return ", ".join(f"{name} {value:.4g}" for name, value in list(values.items())[:SHOWN_VALUES])


def _warn_not_saved(error: LimbeckError, measure: Measure) -> None:
    console.print(
        f"{error.found}: the result of {measure.name} is shown but not saved; --out FOLDER saves it", markup=False
    )


def collect_provenance(subject: Subject, seconds: float) -> Provenance:
    """Collect the command, versions, seeds and fingerprints behind a measurement that took `seconds`."""
    return Provenance(
        command=get_command_line(),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=round(seconds, 2),
        seed=subject.seed,
        dtype=str(subject.model.dtype).removeprefix("torch."),
        weights=subject.fingerprint,
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


def _get_shared_folder(measure: Measure, subject: Subject, settings: dict[str, Any]) -> Path | None:
    """Return where a result is kept for all students; None for a student's own, or where the time is measured.

    Teachers and the baselines made from them stand beside many students, each with an output folder of its own.
    """
    is_own = subject.is_student and subject.baseline is None
    if measure.baseline_length is None or is_own or not has_identity(subject):
        return None
    text = [subject.data.model_dump(mode="json") if subject.data else None, subject.trained_on_data]
    libraries = [str(torch.__version__), transformers.__version__]
    machine = [subject.device.type, str(subject.model.dtype)]
    asked = [measure.name, settings, text, subject.seed, subject.teacher_fingerprint, machine, libraries, __version__]
    digest = digest_facts(asked, 16)
    return cache_root() / "scores" / subject.fingerprint / digest


def _find_cached(
    folders: Sequence[Path], measure: Measure, subject: Subject, settings: dict[str, Any]
) -> Measurement | None:
    """Load the result from the first folder that has it, and save it in the first one."""
    for folder in folders:
        path = folder / f"{measure.name}.json"
        cached = _load_cached(path, subject, settings)
        if cached is not None:
            console.print(f"{measure.name} of {subject.name}: using the cached result {path}", markup=False)
            if folder != folders[0] and not find_write_error(folders[0]):
                cached.save(folders[0])
            return cached
    return None


def _load_cached(path: Path, subject: Subject, settings: dict[str, Any]) -> Measurement | None:
    """Load a result of the same model, teacher, text, settings and version; None if there is none."""
    if not path.is_file():
        return None
    try:
        cached = Measurement.load(path)
    except LimbeckError:
        return None
    provenance = cached.provenance
    if cached.settings != settings:
        return None
    if (provenance.seed, provenance.versions.get("limbeck")) != (subject.seed, __version__):
        return None
    if (provenance.weights, provenance.teacher_weights) != (subject.fingerprint, subject.teacher_fingerprint):
        return None
    if not _has_same_texts(cached, subject, settings):
        return None
    # The same models may be given under other names now.
    return cached.model_copy(update={"model": subject.name, "teacher": subject.teacher_name})


def _has_same_texts(cached: Measurement, subject: Subject, settings: dict[str, Any]) -> bool:
    """Whether the texts of a cached result still have the same content."""
    data = cached.data
    try:
        if any(fingerprint_source(source) != content for source, content in data.get("contents", {}).items()):
            return False
        if data.get("include") != fingerprint_folder(settings.get("include")):
            return False
        if "part" not in data:  # the measure does not read the subject's text
            return True
        length = settings.get("length") or (subject.data.seq_len if subject.data else 512)
        return subject.held_out_key(length, settings["tokens"]) == (data["part"], data.get("key"))
    except LimbeckError as error:
        # A text that is no longer available is no reason to discard the result.
        console.print(f"{subject.name}: cannot check the text of the cached result: {error.found}", markup=False)
        return True


def render_schema_tables() -> str:
    """Render the two tables of docs/reference/files.md from the classes."""
    tables = []
    for title, cls in (("Fields of a measurement", Measurement), ("Provenance", Provenance)):
        rows = [
            f"| `{name}` | {_format_json_type(schema)} | {schema['description']} |"
            for name, schema in cls.model_json_schema()["properties"].items()
        ]
        tables.append("\n".join([f"## {title}", "", "| field | type | what it is |", "|---|---|---|", *rows]))
    return "\n\n".join(tables) + "\n"


def _format_json_type(schema: dict[str, Any]) -> str:
    """Name the JSON type of a field's schema."""
    if "anyOf" in schema:
        return " or ".join(_format_json_type(option) for option in schema["anyOf"])
    if "const" in schema:
        return f"{schema['const']}"
    if "$ref" in schema or "allOf" in schema:
        return "object"
    inner = schema.get("additionalProperties")
    return f"object of {inner['type']}s" if isinstance(inner, dict) and "type" in inner else schema["type"]
