"""All numbers of a run under flat names, as studies and reports keep them.

    values, errors = values_of(summary, measurements, Path("runs/quickstart/metrics.jsonl"))
    values["agreement.perplexity"], values["held_out.kl"], values["stages.logits.early_loss"]
    Path("values.csv").write_text(as_csv([("gla", {"student": "gla"}, values, errors)]))

Names are `<measure>.<name>` of every measurement, and what every run has: `held_out.*` (its own evaluation), `memory.*`
(cache sizes), `parameters.*` and `stages.<stage>.*` (losses and budgets).
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

from limbeck.evaluate.measurement import Measurement

EARLY = 0.1  # share of a stage's steps over which `early_loss` is the mean
OF_STAGES = ("first_loss", "loss", "early_loss", "unexplained", "held_out_loss", "tokens")


def values_of(
    summary: dict[str, Any], found: list[Measurement], metrics: Path | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Values and standard errors by name.

    Args:
        summary: a run's eval.json; empty for a model that is no run.
        metrics: its metrics.jsonl.
    """
    values: dict[str, float] = {}
    for part in ("held_out", "memory", "parameters"):
        for name, held in summary.get(part, {}).items():
            values |= _number(f"{part}.{name}", held)
    for index, stage in enumerate(summary.get("stages", [])):
        early = _early_loss(metrics, index) if metrics else None
        for name, held in (*stage.items(), ("early_loss", early)):
            if name in OF_STAGES:
                values |= _number(f"stages.{stage['stage']}.{name}", held)
    errors: dict[str, float] = {}
    for one in found:
        values |= {f"{one.measure}.{name}": value for name, value in one.values.items()}
        errors |= {f"{one.measure}.{name}": value for name, value in one.errors.items()}
    return values, errors


def as_csv(rows: list[tuple[str, dict[str, str], dict[str, float], dict[str, float]]]) -> str:
    """One line a number: the arm, its axes, the value's name, the value, its standard error.

    Args:
        rows: name, axes as text, values and errors of each arm.
    """
    axes = list(dict.fromkeys(axis for _, places, _, _ in rows for axis in places))
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["arm", *axes, "name", "value", "standard_error"])
    for arm, places, values, errors in rows:
        told = [places.get(axis, "") for axis in axes]
        writer.writerows([arm, *told, name, value, errors.get(name, "")] for name, value in values.items())
    return file.getvalue()


def _early_loss(metrics: Path, index: int) -> float | None:
    """Mean loss of a stage's first steps; None for a stage without steps."""
    losses = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        one = json.loads(line)
        if one["stage_index"] == index:
            losses.append(one["loss"])
    first = losses[: max(1, round(EARLY * len(losses)))]
    return sum(first) / len(first) if first else None


def _number(name: str, value: Any) -> dict[str, float]:
    return {name: float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else {}
