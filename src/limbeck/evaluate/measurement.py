"""What one measure found of one model, in the same form for every measure: numbers, and all that made them.

    found = Measurement(measure="agreement", model="runs/quickstart", values={"kl": 0.61}, ...)
    found.save(Path("runs/quickstart/eval"))            # eval/agreement.json
    Measurement.load(Path("runs/quickstart/eval/agreement.json")).values["kl"]

`values` are the numbers of the table, by a name that says the unit where there is one ("milliseconds", "bytes");
`errors` are standard errors under the same names; `details` hold what a figure needs: curves, layers, single tasks.
"""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from limbeck.data.cache import write_text
from limbeck.errors import LimbeckError, sentences


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
        write_text(path, json.dumps(_finite(self.model_dump(mode="json")), indent=1, ensure_ascii=False) + "\n")
        return path

    @classmethod
    def load(cls, path: Path) -> "Measurement":
        """Raises LimbeckError for a file that is none, or of a format that is not known."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError, ValueError) as error:
            raise LimbeckError(
                f"{path} holds no measurement: {sentences(error)}", expected="a file that limbeck eval wrote"
            ) from error


def describe() -> str:
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
