"""What one measure found of one model, in the same form for every measure: numbers, and all that made them.

    found = Measurement(measure="agreement", model="runs/quickstart", values={"kl": 0.61}, ...)
    found.save(Path("runs/quickstart/eval"))            # eval/agreement.json
    Measurement.load(Path("runs/quickstart/eval/agreement.json")).values["kl"]

`values` are the numbers of the table, by a name that says the unit where there is one ("milliseconds", "bytes");
`errors` are standard errors under the same names; `details` hold what a figure needs: curves, layers, single tasks.
"""

import json
import math
import os
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from limbeck.data.cache import no_room_is_an_error
from limbeck.errors import LimbeckError


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Provenance(_Part):
    """What made the numbers."""

    command: str
    date: str  # UTC, ISO 8601
    seconds: float
    seed: int
    dtype: str
    weights: str  # fingerprint of the model's files
    versions: dict[str, str]
    platform: str
    device: str
    threads: int


class Measurement(_Part):
    """One measure of one model."""

    format: Literal[1] = 1
    measure: str
    model: str
    teacher: str | None
    settings: dict[str, Any]  # of the measure, defaults included
    data: dict[str, Any]  # which text or tasks, by name, key and count
    values: dict[str, float]
    errors: dict[str, float] = {}
    details: dict[str, Any] = {}
    provenance: Provenance

    def save(self, folder: Path) -> Path:
        """Write `<folder>/<measure>.json`, whole or not at all."""
        path = folder / f"{self.measure}.json"
        with no_room_is_an_error(folder):
            folder.mkdir(parents=True, exist_ok=True)
            aside = folder / f".{path.name}.tmp"
            with open(aside, "w") as file:
                file.write(json.dumps(_finite(self.model_dump(mode="json")), indent=1, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        return path

    @classmethod
    def load(cls, path: Path) -> "Measurement":
        """Raises LimbeckError for a file that is none, or of a format that is not known."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except (OSError, ValidationError, ValueError) as error:
            raise LimbeckError(
                f"{path} holds no measurement: {str(error).splitlines()[0]}", expected="a file that limbeck eval wrote"
            ) from error


def _finite(value: Any) -> Any:
    """JSON knows neither infinity nor NaN: null there."""
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
