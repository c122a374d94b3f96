"""Panels of measures in a report: values over length or number of pairs, and the figures of single measures.

    with use_style(order_for_colors(collection.students)):
        panels = build_length_panels(groups) + build_analysis_panels(groups)

Length panels are built from the names of values (docs/reference/files.md), with the mean over seeds in a band from
minimum to maximum. Analysis panels are the measures' own figures, a line per model: of a grid one condition is shown,
the one with the lowest perplexity over its students, and of each student the first seed; the captions say so.
Measures without results have no panel.
"""

import json
import re
from dataclasses import dataclass
from statistics import fmean

from limbeck.evaluation.measure import Measurement
from limbeck.report.collection import TEACHER, Run
from limbeck.report.figures.measures import MEASURE_FIGURES
from limbeck.report.figures.panels import (
    PANEL_SIZE,
    Panel,
    format_range,
    get_dash_style,
    set_axis_labels,
    share_y_limits,
    slugify,
)
from limbeck.report.figures.style import create_figure, get_color, get_marker, use_colors
from limbeck.report.tables import HEADLINE_METRICS, SeedGroup, format_condition, list_conditions, select_value_name

_AT = r"@(?P<x>\d+)x(?P<panel>\d+)"


@dataclass(frozen=True)
class LengthCurve:
    """A panel of values whose names contain a number `x`, as lines over that number.

    pattern: of the names, with a group `x` and optionally a group `panel`: one panel for each of its values.
    x, y: axis labels.
    scale: factor of the values.
    chance: pattern of the names of chance levels, with the same `x` or none; drawn as a dotted line.
    """

    section: str
    title: str
    pattern: str
    x: str
    y: str
    log_y: bool = False
    scale: float = 1.0
    chance: str | None = None

    def match(self, name: str) -> re.Match[str] | None:
        """Match the name of a value."""
        return re.fullmatch(self.pattern, name)


QUESTION_SHARE, TEXT_TOKENS, CONTEXT_TOKENS = "share of the questions", "tokens of the text", "tokens of context"
LENGTH_CURVES = (
    LengthCurve(
        "length",
        "Perplexity so far",
        r"positions\.perplexity, first (?P<x>\d+) tokens",
        TEXT_TOKENS,
        "perplexity",
        True,
    ),
    LengthCurve(
        "length", "Loss by position", r"positions\.loss, tokens \d+ to (?P<x>\d+)", TEXT_TOKENS, "loss, nats per token"
    ),
    LengthCurve(
        "retrieval",
        "Needle chosen among candidates",
        r"needle\.niah (?P<panel>\d), (?P<x>\d+) tokens, among \d+",
        TEXT_TOKENS,
        QUESTION_SHARE,
        chance=r"needle\.chance among \d+",
    ),
    LengthCurve(
        "retrieval", "Needle written", r"needle\.niah (?P<panel>\d), (?P<x>\d+) tokens", TEXT_TOKENS, QUESTION_SHARE
    ),
    # The facts alone, length 0, have no place on a logarithmic axis.
    LengthCurve(
        "retrieval",
        "Place chosen among all places",
        r"facts\.facts (?P<panel>\d), (?P<x>[1-9]\d*) tokens, among \d+",
        TEXT_TOKENS,
        QUESTION_SHARE,
        chance=r"facts\.chance among \d+",
    ),
    LengthCurve(
        "retrieval", "Place written", r"facts\.facts (?P<panel>\d), (?P<x>[1-9]\d*) tokens", TEXT_TOKENS, QUESTION_SHARE
    ),
    LengthCurve(
        "retrieval",
        "Pass key chosen among candidates",
        r"passkey\.passkey, (?P<x>\d+) tokens, among \d+",
        TEXT_TOKENS,
        QUESTION_SHARE,
        chance=r"passkey\.chance among \d+",
    ),
    LengthCurve("retrieval", "Pass key written", r"passkey\.passkey, (?P<x>\d+) tokens", TEXT_TOKENS, QUESTION_SHARE),
    LengthCurve(
        "retrieval",
        "Pairs recalled",
        r"recall\.recall, (?P<x>\d+) pairs",
        "pairs shown before",
        "share of the queries",
        chance=r"recall\.chance, (?P<x>\d+) pairs",
    ),
    LengthCurve("speed", "Time of the next token", rf"speed\.token_milliseconds{_AT}", CONTEXT_TOKENS, "ms", True),
    LengthCurve("speed", "Size of the cache", rf"speed\.cache_bytes{_AT}", CONTEXT_TOKENS, "MB", True, 1e-6),
    LengthCurve(
        "speed", "Reading a prompt", rf"speed\.prefill_tokens_per_second{_AT}", TEXT_TOKENS, "tokens per second", True
    ),
)
PANEL_TITLES = {
    "needle": "S-NIAH-{}",
    "facts": "facts needed: {}",
    "speed": "batch {}",
}  # meaning of the group `panel`, by measure


def build_length_panels(groups: list[SeedGroup]) -> list[Panel]:
    """Build the panels of values over length or number of pairs: one per condition of the grid, with common limits."""
    panels: list[Panel] = []
    for curve in LENGTH_CURVES:
        by_part: dict[str, list[Panel]] = {}
        for condition in list_conditions(groups):
            shown = [group for group in groups if group.condition in (condition, {})]
            xs: dict[str, set[str]] = {}
            for name in {name for group in shown for run in group.runs for name in run.values}:
                if match := curve.match(name):
                    xs.setdefault(_get_part(match), set()).add(match["x"])
            for part in sorted(xs):
                if len(xs[part]) > 1:  # a single point is no curve
                    by_part.setdefault(part, []).append(_build_length_panel(curve, part, condition, shown))
        for panels_of_part in by_part.values():
            panels += share_y_limits(panels_of_part)
    return panels


def _get_part(match: re.Match[str]) -> str:
    return match.groupdict().get("panel") or ""


def _build_length_panel(curve: LengthCurve, part: str, condition: dict[str, str], groups: list[SeedGroup]) -> Panel:
    figure = create_figure(*PANEL_SIZE)
    axes = figure.subplots()
    chance: dict[int, float] = {}
    last_values: dict[str, float] = {}
    longest = 0
    for group in groups:
        points: dict[int, list[float]] = {}
        for run in group.runs:
            for name, value in run.values.items():
                match = curve.match(name)
                if match and _get_part(match) == part:
                    points.setdefault(int(match["x"]), []).append(value * curve.scale)
                if curve.chance and (match := re.fullmatch(curve.chance, name)):
                    chance[int(match.groupdict().get("x") or 0)] = value
        if not points:
            continue
        xs = sorted(points)
        means = [fmean(points[x]) for x in xs]
        (line,) = axes.plot(xs, means, **get_dash_style(group.student), marker=get_marker(group.student))
        # The page filters lines by this id.
        gid = json.dumps({"student": group.student})
        if group.axis_values:
            line.set_gid(gid)
        if any(len(values) > 1 for values in points.values()):
            low, high = [min(points[x]) for x in xs], [max(points[x]) for x in xs]
            band = axes.fill_between(xs, low, high, color=get_color(group.student), alpha=0.12, linewidth=0)
            band.set_gid(gid)
        longest = max(longest, xs[-1])
        last_values[group.student] = means[-1]
    if set(chance) == {0}:
        axes.axhline(chance[0], color="0.5", linestyle=":", linewidth=1.2)
    elif chance:
        axes.plot(sorted(chance), [chance[x] for x in sorted(chance)], color="0.5", linestyle=":", linewidth=1.2)
    set_axis_labels(axes, curve.x, curve.y, x_log=True, y_log=curve.log_y)
    if curve.y.startswith("share"):
        axes.set_ylim(-0.03, 1.03)
    measure = curve.pattern.partition(r"\.")[0]
    title = curve.title + (f", {PANEL_TITLES[measure].format(part)}" if part else "")
    caption = f"At {longest:,} {format_range(last_values)}{'; chance is dotted' if chance else ''}."
    name = f"{measure}-{slugify(condition, curve.title, part)}"
    return Panel(curve.section, name, title, caption, figure, condition, list(last_values))


ANALYSIS_PANELS = {  # measure -> title and caption
    "agreement": (
        "Agreement with the teacher",
        "How a student's next token differs from its teacher's: divergence by position and by frequency of the target, "
        "agreement on the likeliest token, and how long their generated texts stay the same",
    ),
    "mixing": (
        "Mixing matrices",
        "Mixing matrices of students beside the teacher's attention: above, one head on one document; below, "
        "statistics over the layers; dotted before training",
    ),
    "hidden": (
        "Hidden states",
        "Similarity of hidden states, layer by layer, as linear CKA and cosine; dotted before training",
    ),
    "tasks": ("Benchmarks", "Scores on benchmarks with standard errors; chance is dashed"),
}


def build_analysis_panels(groups: list[SeedGroup]) -> list[Panel]:
    """Build the figure of each measure of `ANALYSIS_PANELS` that some student has."""
    condition = _select_best_condition(groups)
    shown = [group for group in groups if group.condition in (condition, {})]
    note = f" ({format_condition(condition)})" if condition else ""
    note += "; one seed of each" if any(len(group.runs) > 1 for group in shown) else ""
    panels = []
    for name, (title, caption) in ANALYSIS_PANELS.items():
        runs = {group.student: run for group in shown if (run := _select_run(group, name)) is not None}
        if all(student == TEACHER for student in runs):
            continue
        measurements = [_rename_model(run.measurements[name], student) for student, run in runs.items()]
        with use_colors([get_color(student) for student in runs]):
            figure = MEASURE_FIGURES[name](measurements)
        panels.append(Panel("analysis", name, title, f"{caption}{note}.", figure, series_names=list(runs)))
    return panels


def _select_best_condition(groups: list[SeedGroup]) -> dict[str, str]:
    """Select the condition with the lowest mean of the headline metric, or the first if no run has it."""
    conditions = list_conditions(groups)
    name = select_value_name(HEADLINE_METRICS[0], groups)
    means: list[tuple[float, dict[str, str]]] = []
    for condition in conditions:
        of_groups = [group.mean(name) for group in groups if group.condition == condition] if name else []
        values = [value for value in of_groups if value is not None]
        if values:
            means.append((fmean(values), condition))
    return min(means, key=lambda pair: pair[0])[1] if means else conditions[0]


def _select_run(group: SeedGroup, measure: str) -> Run | None:
    """Select the first seed whose measurement has something to draw."""
    with_measure = [run for run in group.runs if measure in run.measurements]
    return next((run for run in with_measure if run.measurements[measure].details), None)


def _rename_model(measurement: Measurement, student: str) -> Measurement:
    """Name a measurement after its student; a teacher's measurement stays one."""
    teacher = student if measurement.model == measurement.teacher else TEACHER
    return measurement.model_copy(update={"model": student, "teacher": teacher})
