"""Names and numbers of measurements as people read them: units from the names, bytes as MB, shares as percent.

    format_name("token_milliseconds@4096x1")                  # "token at 4,096 tokens, ms"
    format_value("cache_bytes@4096x1", 188743680.0)            # "189 MB"
    format_value("top1_agreement", 0.528, 0.004)               # "52.8 ± 0.4 %"

What a name ends with says its unit (docs/measurements.md); files and CSV keep the plain numbers.

All numbers of a run under flat names, as studies and reports keep them.

    values, errors = flatten_values(summary, measurements, Path("runs/quickstart/metrics.jsonl"))
    values["agreement.perplexity"], values["held_out.kl"], values["stages.logits.early_loss"]
    Path("values.csv").write_text(values_to_csv([("gla", {"student": "gla"}, values, errors)]))

Names are `<measure>.<name>` of every measurement, and what every run has: `held_out.*` (its own evaluation), `memory.*`
(cache sizes), `parameters.*` and `stages.<stage>.*` (losses and budgets).
"""

import csv
import io
import json
import math
import re
from pathlib import Path
from typing import Any

from limbeck.evaluation.measure import Measurement

WORDS = {"kl": "KL", "js": "JS", "ce": "CE", "cka": "CKA", "top1": "top-1", "top5": "top-5", "acc": "accuracy"}
UNITS = {"milliseconds": "ms", "seconds": "s", "per_second": "a second"}
FRACTION_NAMES = ("agreement", "share", "accuracy", "acc", "acc_norm", "overlap", "mass")
_AT = re.compile(r"(?P<name>[^@]+)@((?P<length>\d+)x(?P<batch>\d+)|batch(?P<alone>\d+)|(?P<tokens>\d+))")


def format_name(name: str) -> str:
    """A row's name: words, at which length and batch size, the unit where the cells do not say it."""
    match = _AT.fullmatch(name)
    place = ""
    if match:
        name, length = match["name"], match["length"] or match["tokens"]
        batch = match["batch"] or match["alone"]
        place = f" at {int(length):,} tokens" if length else ""
        place += f", batch {batch}" if batch and batch != "1" else ""
    unit = ""
    for ending, short in UNITS.items():
        if re.search(rf"(^|_){ending}(_|$)", name):
            if ending != "per_second":
                name = re.sub(rf"_?{ending}", "", name, count=1)
                unit = f", {short}"
            break
    words = [WORDS.get(word, word) for word in name.removesuffix("_bytes").strip("_").split("_")]
    return " ".join(words).replace("per second", "a second") + place + unit


def format_value(name: str, value: float, error: float | None = None) -> str:
    """A number with its standard error, in the unit that its name says."""
    name = name.split("@")[0]
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e9 and not name.endswith(("bytes", "tokens")):  # a student that diverged
        return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.2g}"
    if name.endswith("bytes"):
        return format_size(value)
    if is_fraction(name) and abs(value) <= 1:
        return f"{100 * value:.1f} %" if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"
    if name.endswith("tokens") or abs(value) >= 10000:
        return f"{value:,.0f}" if error is None else f"{value:,.0f} ± {error:,.0f}"
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def escape_markdown(text: Any) -> str:
    """Text of somebody else's (names, prompts, samples) as Markdown that shows it as it is, on one line.

    It becomes neither HTML nor an image, a link, a list, code or the end of a table's cell.
    """
    plain = " ".join(str(text).split())
    plain = re.sub(r"&(?=#?\w+;)", "&amp;", plain).replace("<", "&lt;")
    plain = re.sub(r"([\\`*\[\]|])", r"\\\1", plain)
    return re.sub(r"^(\d*)([-+#>.)])(?= |$)", r"\1\\\2", plain)


def format_code_span(text: Any) -> str:
    """The same as code: nothing in it ends the span."""
    return f"`{' '.join(str(text).replace('`', chr(39)).split())}`"


def is_fraction(name: str) -> bool:
    """Whether a name stands for a part of a whole."""
    return any(name == share or name.endswith(f"_{share}") or f"_{share}_" in f"_{name}_" for share in FRACTION_NAMES)


def format_size(count: float) -> str:
    """Bytes with three digits."""
    for unit in ("B", "kB", "MB"):
        if abs(count) < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB" if count < 1000 else f"{count:,.0f} GB"


EARLY_FRACTION = 0.1  # share of a stage's steps over which `early_loss` is the mean
STAGE_VALUES = ("first_loss", "loss", "early_loss", "unexplained", "held_out_loss", "tokens")


def flatten_values(
    summary: dict[str, Any], measurements: list[Measurement], metrics: Path | None
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
            if name in STAGE_VALUES:
                values |= _number(f"stages.{stage['stage']}.{name}", held)
    errors: dict[str, float] = {}
    for one in measurements:
        values |= {f"{one.measure}.{name}": value for name, value in one.values.items()}
        errors |= {f"{one.measure}.{name}": value for name, value in one.errors.items()}
    return values, errors


def values_to_csv(rows: list[tuple[str, dict[str, str], dict[str, float], dict[str, float]]]) -> str:
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
    first = losses[: max(1, round(EARLY_FRACTION * len(losses)))]
    return sum(first) / len(first) if first else None


def _number(name: str, value: Any) -> dict[str, float]:
    return {name: float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else {}
