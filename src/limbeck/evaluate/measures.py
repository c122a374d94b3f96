"""The measures by name, and the one way in which all of them are taken.

    measure = find("agreement")
    found = take(measure, subject, {"tokens": 4096})       # a Measurement, from its file where nothing has changed

A measure is a module that offers `MEASURE`; what it runs gets a subject and its settings and gives `Found`. Its file is
taken as it is where model, teacher, text and settings are those that it was made with, so a killed evaluation goes on.
"""

import platform
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from pydantic import BaseModel, ConfigDict, ValidationError

from limbeck import __version__
from limbeck.console import console
from limbeck.data.cache import unwritable
from limbeck.data.sources import fingerprint
from limbeck.errors import LimbeckError, closest
from limbeck.evaluate.measurement import Measurement, Provenance
from limbeck.evaluate.subject import Subject
from limbeck.identity import files_in
from limbeck.machine import flushing_denormals
from limbeck.reading import readable

MODULES = {  # name -> module with a MEASURE
    "agreement": "limbeck.evaluate.agreement",
    "tasks": "limbeck.evaluate.tasks",
    "positions": "limbeck.evaluate.positions",
    "needle": "limbeck.evaluate.needle",
    "recall": "limbeck.evaluate.recall",
    "passkey": "limbeck.evaluate.passkey",
    "speed": "limbeck.evaluate.speed",
    "mixing": "limbeck.evaluate.mixing",
    "hidden": "limbeck.evaluate.hidden",
}


class Settings(BaseModel):
    """Base of a measure's settings; every field has a default."""

    model_config = ConfigDict(extra="forbid")


@dataclass
class Found:
    """What a measure gives: see `Measurement`."""

    values: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Measure:
    """A way to measure a model.

    about: one line for the list.
    run: takes the subject and an instance of `settings`.
    draw: one figure for several models' measurements; None where a table says it all.
    check: LimbeckError for settings that are wrong in a way that shows before a model is loaded.
    """

    name: str
    about: str
    settings: type[Settings]
    run: Callable[[Subject, Any], Found]
    draw: Callable[[list[Measurement]], Any] | None = None
    check: Callable[[Any], None] | None = None


def find(name: str) -> Measure:
    """Raises LimbeckError for a name that there is not."""
    if name not in MODULES:
        raise LimbeckError(f"unknown measure '{name}'{closest(name, MODULES)}", expected=", ".join(MODULES))
    return import_module(MODULES[name]).MEASURE


def settings_of(measure: Measure, given: dict[str, Any]) -> Settings:
    """Settings from plain values; LimbeckError instead of pydantic's own."""
    try:
        return measure.settings.model_validate(given)
    except ValidationError as error:
        raise readable(error, measure.name, measure.settings) from error


def take(measure: Measure, subject: Subject, given: dict[str, Any], again: bool = False) -> Measurement:
    """Measure a subject, and keep what was found in its home.

    Args:
        given: settings that differ from the defaults.
        again: measure even where the same has been measured already.

    What cannot be written there is returned all the same, and it is said before anything is measured.
    """
    settings = settings_of(measure, given)
    plain = settings.model_dump(mode="json")
    path = subject.home / f"{measure.name}.json"
    known = _known(path, subject, plain) if not again else None
    if known is not None:
        console.print(f"{measure.name} of {subject.name}: measured already, {path}")
        return known
    if refused := unwritable(subject.home):
        console.print(f"{refused.found}: {measure.name} is shown, not kept; --out FOLDER keeps it", markup=False)
    began = time.monotonic()
    torch.manual_seed(subject.seed)
    subject.again = again
    with flushing_denormals():
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
        provenance=provenance(subject, time.monotonic() - began),
    )
    if refused is None:
        try:
            measurement.save(subject.home)
        except LimbeckError as lost:  # what was measured is worth more than its file
            console.print(f"{lost.found}: {measure.name} is shown, not kept; --out FOLDER keeps it", markup=False)
    return measurement


def provenance(subject: Subject, seconds: float) -> Provenance:
    """Who measured, when, with what."""
    program = Path(sys.argv[0]).name
    return Provenance(
        command=shlex.join(["limbeck" if program in ("limbeck", "__main__.py") else program, *sys.argv[1:]]),
        date=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        seconds=round(seconds, 2),
        seed=subject.seed,
        dtype=str(subject.model.dtype).removeprefix("torch."),
        weights=subject.weights,
        teacher_weights=subject.teacher_weights,
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
    if (made.weights, made.teacher_weights) != (subject.weights, subject.teacher_weights):
        return None
    if not _same_texts(known, subject, settings):
        return None
    return known.model_copy(update={"model": subject.name, "teacher": subject.teacher_name})  # as they are called now


def _same_texts(known: Measurement, subject: Subject, settings: dict[str, Any]) -> bool:
    """Are the texts, by content, still those that were measured on?"""
    data = known.data
    try:
        if any(fingerprint(source) != content for source, content in data.get("contents", {}).items()):
            return False
        if data.get("include") != files_in(settings.get("include")):
            return False
        if "part" not in data:  # it does not read the subject's text
            return True
        length = settings.get("length") or (subject.data.seq_len if subject.data else 512)
        return subject.text_key(length, settings["tokens"]) == (data["part"], data.get("key"))
    except LimbeckError as error:
        console.print(f"{subject.name}: not compared with the text of before: {error.found}", markup=False)
        return True
