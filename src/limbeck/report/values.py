"""Numbers of measurements: flat names for files, and units, percent and mean ± deviation for readers.

    format_name("token_milliseconds@4096x1")                  # "token at 4,096 tokens, ms"
    format_value("cache_bytes@4096x1", 188743680.0)            # "189 MB"
    format_value("top1_agreement", 0.528, 0.004)               # "52.8 ± 0.4 %"
    values, errors = flatten_values(summary, measurements, Path("runs/quickstart/metrics.jsonl"))
    values["agreement.perplexity"], values["held_out.kl"], values["stages.logits.early_loss"]
    values[get_window_name("agreement.perplexity")]            # of the untrained window beside the student

What a name ends with says its unit (docs/reference/files.md); files and CSV hold the plain numbers. Flat names are
`<measure>.<name>` of every measurement, `<measure>.window_<name>` of the untrained window beside it, and what every run
has: `held_out.*` and `exam.*` (its own evaluation, `teacher_`, `student_` and `window_` before a value's name),
`window.*`, `memory.*` (cache sizes), `parameters.*` and `stages.<stage>.*` (losses and budgets).
"""

import json
import math
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from limbeck.core.console import format_bytes
from limbeck.evaluation.measure import Measurement
from limbeck.report.text_tables import format_csv

WORDS = {"kl": "KL", "js": "JS", "ce": "CE", "cka": "CKA", "top1": "top-1", "top5": "top-5", "acc": "accuracy"}
UNITS = {"milliseconds": "ms", "seconds": "s", "per_second": "a second"}
FRACTION_NAMES = ("agreement", "share", "accuracy", "acc", "acc_norm", "overlap", "mass")
# a number of tokens; names of other values may end with the word too: "perplexity, first 512 tokens"
COUNT = re.compile(r"(.*_)?tokens")
WORKLOAD = re.compile(r"(?P<name>[^@]+)@((?P<length>\d+)x(?P<batch>\d+)|batch(?P<only_batch>\d+)|(?P<tokens>\d+))")

EARLY_FRACTION = 0.1  # part of a stage's steps over which `early_loss` is the mean
STAGE_VALUES = ("first_loss", "loss", "early_loss", "unexplained", "held_out_loss", "tokens")


def format_name(name: str) -> str:
    """Name a value in words: what it is, at which length and batch size, and the unit where the cells lack it."""
    match = WORKLOAD.fullmatch(name)
    workload = ""
    if match:
        name, length = match["name"], match["length"] or match["tokens"]
        batch = match["batch"] or match["only_batch"]
        workload = f" at {int(length):,} tokens" if length else ""
        workload += f", batch {batch}" if batch and batch != "1" else ""
    unit = ""
    for ending, short in UNITS.items():
        if re.search(rf"(^|_){ending}(_|$)", name):
            if ending != "per_second":
                name = re.sub(rf"_?{ending}", "", name, count=1)
                unit = f", {short}"
            break
    words = [WORDS.get(word, word) for word in name.removesuffix("_bytes").strip("_").split("_")]
    return " ".join(words).replace("per second", "a second") + workload + unit


def format_value(name: str, value: float, error: float | None = None) -> str:
    """Format a number, with its standard error where there is one, in the unit that its name says."""
    name = name.split("@")[0]
    if not math.isfinite(value):
        return "not finite"
    if abs(value) >= 1e9 and not (name.endswith("bytes") or COUNT.fullmatch(name)):  # a student that diverged
        return f"{value:.3g}" if error is None else f"{value:.3g} ± {error:.2g}"
    if name.endswith("bytes"):
        return format_bytes(value)
    if is_fraction(name) and abs(value) <= 1:
        return f"{100 * value:.1f} %" if error is None else f"{100 * value:.1f} ± {100 * error:.1f} %"
    if COUNT.fullmatch(name) or abs(value) >= 10000:
        return f"{value:,.0f}" if error is None else f"{value:,.0f} ± {error:,.0f}"
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"


def format_mean_std(name: str, numbers: list[float]) -> str:
    """Format the mean and the standard deviation over seeds, in the unit that the name says.

    Returns:
        "" without numbers; "diverged" or "diverged in 1 of 3" where some are not finite; the number alone for one seed.
    """
    if not numbers:
        return ""
    diverged = sum(not math.isfinite(number) for number in numbers)
    if diverged:
        return "diverged" if len(numbers) == 1 else f"diverged in {diverged} of {len(numbers)}"
    mean, std = statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None
    name = name.rpartition(".")[2]
    if not std or is_fraction(name) or name.endswith("bytes"):
        return format_value(name, mean, std or None)
    # the mean is shown to the deviation's second digit, so that no digit of it is noise
    decimals = min(max(0, 1 - math.floor(math.log10(std))), 8)
    return f"{mean:,.{decimals}f} ± {std:.{decimals}f}"


def is_fraction(name: str) -> bool:
    """Whether a name stands for a part of a whole, which is shown in percent."""
    return any(name == part or name.endswith(f"_{part}") or f"_{part}_" in f"_{name}_" for part in FRACTION_NAMES)


def mark_at_chance(label: str, name: str, tasks: Iterable[str]) -> str:
    """Mark the label of a value that belongs to one of the tasks on which the teacher is at chance."""
    marked = any(name == task or name.startswith(f"{task} ") for task in tasks)
    return f"{label} (teacher at chance)" if marked else label


def flatten_values(
    summary: dict[str, Any], measurements: list[Measurement], metrics: Path | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Collect values and standard errors under flat names.

    Args:
        summary: a run's eval.json; empty for a model that is no run.
        measurements: of the run, and of the untrained window of its memory; the control arm is left out.
        metrics: its metrics.jsonl.
    """
    values: dict[str, float] = {}
    for section in ("held_out", "exam", "window", "memory", "parameters"):
        for name, value in (summary.get(section) or {}).items():
            values |= _number(f"{section}.{name}", value)
    for index, stage in enumerate(summary.get("stages", [])):
        early = _early_loss(metrics, index) if metrics else None
        for name, value in (*stage.items(), ("early_loss", early)):
            if name in STAGE_VALUES:
                values |= _number(f"stages.{stage['stage']}.{name}", value)
    exam_errors = (summary.get("exam") or {}).get("errors", {})
    errors: dict[str, float] = {f"exam.{name}": error for name, error in exam_errors.items()}
    for one in measurements:
        baseline = one.data.get("baseline", {}).get("kind")
        if baseline == "softmax":
            continue
        prefix = f"{one.measure}.window_" if baseline else f"{one.measure}."
        values |= {f"{prefix}{name}": value for name, value in one.values.items()}
        errors |= {f"{prefix}{name}": value for name, value in one.errors.items()}
        if baseline:
            values[f"{prefix}tokens"] = float(one.data["baseline"]["window"])
    return values, errors


def get_window_name(name: str) -> str:
    """Return the name of the untrained window's value that stands beside a student's value, both flat."""
    section, _, value = name.partition(".")
    return f"{section}.window_{value.removeprefix('student_')}"


def get_window_tokens(name: str, values: Mapping[str, float]) -> int | None:
    """Return the tokens of the untrained window beside a student's value; None where that was not measured.

    A hybrid's window depends on the length, so a measure may have another than the run's own evaluation.
    """
    if get_window_name(name) not in values:
        return None
    tokens = values.get(f"{name.partition('.')[0]}.window_tokens", values.get("window.tokens"))
    return None if tokens is None else int(tokens)


def _early_loss(metrics: Path, index: int) -> float | None:
    """Average the loss over a stage's first steps; None for a stage without steps."""
    records = map(json.loads, metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else [])
    losses = [record["loss"] for record in records if record["stage_index"] == index]
    first = losses[: max(1, round(EARLY_FRACTION * len(losses)))]
    return sum(first) / len(first) if first else None


def _number(name: str, value: Any) -> dict[str, float]:
    return {name: float(value)} if isinstance(value, int | float) and not isinstance(value, bool) else {}


def values_to_csv(runs: list[tuple[str, dict[str, str], dict[str, float], dict[str, float]]]) -> str:
    """Format runs as CSV, a line a number: the run, its axes, the value's name, the value, its standard error.

    Args:
        runs: name, axes as text, values and errors of each.
    """
    axes = list(dict.fromkeys(axis for _, run_axes, _, _ in runs for axis in run_axes))
    rows = [
        [run, *(run_axes.get(axis, "") for axis in axes), name, value, errors.get(name, "")]
        for run, run_axes, values, errors in runs
        for name, value in values.items()
    ]
    return format_csv(["arm", *axes, "name", "value", "standard_error"], rows)
