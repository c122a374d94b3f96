"""What was measured over lengths and numbers of pairs, as panels: perplexity, retrieval, speed and memory.

    panels = build_length_panels(groups)            # inside `use_style`

Read off the names of values (docs/measurements.md), seeds as their mean in a band from least to most. A measure that
is not there gives no panel.

The figures of measures that look inside: agreement, mixing matrices, hidden states, scores on tasks.

    panels = build_analysis_panels(groups)               # inside `use_style`

A measure draws its own figure, one line a model. Of a grid one condition is shown, the one with the lowest perplexity
over its students, and of each student the first seed; the captions say so.
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
    """Values whose names have a number in them (`x`), as lines over that number.

    pattern: of the names, with groups `x` and, for a panel each, `panel`.
    chance: a value whose name has the same `x` or none, dotted.
    """

    section: str
    title: str
    pattern: str
    x: str
    y: str
    log_y: bool = False
    scale: float = 1.0
    chance: str | None = None


SHARE, OF_TEXT = "share of the questions", "tokens of the text"
LENGTH_CURVES = (
    LengthCurve(
        "length", "Perplexity so far", r"positions\.perplexity, first (?P<x>\d+) tokens", OF_TEXT, "perplexity", True
    ),
    LengthCurve(
        "length", "Loss by position", r"positions\.loss, tokens \d+ to (?P<x>\d+)", OF_TEXT, "loss, nats a token"
    ),
    LengthCurve(
        "retrieval",
        "Needle chosen among candidates",
        r"needle\.niah (?P<panel>\d), (?P<x>\d+) tokens, among \d+",
        OF_TEXT,
        SHARE,
        chance=r"needle\.chance among \d+",
    ),
    LengthCurve("retrieval", "Needle written", r"needle\.niah (?P<panel>\d), (?P<x>\d+) tokens", OF_TEXT, SHARE),
    LengthCurve(
        "retrieval",
        "Pass key chosen among candidates",
        r"passkey\.passkey, (?P<x>\d+) tokens, among \d+",
        OF_TEXT,
        SHARE,
        chance=r"passkey\.chance among \d+",
    ),
    LengthCurve("retrieval", "Pass key written", r"passkey\.passkey, (?P<x>\d+) tokens", OF_TEXT, SHARE),
    LengthCurve(
        "retrieval",
        "Pairs recalled",
        r"recall\.recall, (?P<x>\d+) pairs",
        "pairs shown before",
        "share of the queries",
        chance=r"recall\.chance, (?P<x>\d+) pairs",
    ),
    LengthCurve("speed", "Time of the next token", rf"speed\.token_milliseconds{_AT}", "tokens of context", "ms", True),
    LengthCurve("speed", "Size of the cache", rf"speed\.cache_bytes{_AT}", "tokens of context", "MB", True, 1e-6),
    LengthCurve(
        "speed", "Reading a prompt", rf"speed\.prefill_tokens_per_second{_AT}", OF_TEXT, "tokens a second", True
    ),
)
PANEL_TITLES = {"needle": "S-NIAH-{}", "speed": "batch {}"}  # what the group `panel` says, by measure


def build_length_panels(groups: list[SeedGroup]) -> list[Panel]:
    """What was measured over lengths and numbers of pairs, a panel for each condition of the grid, all on one scale."""
    panels: list[Panel] = []
    for series in LENGTH_CURVES:
        found: dict[str, list[Panel]] = {}
        for condition in list_conditions(groups):
            mine = [group for group in groups if group.condition in (condition, {})]
            matches = [m for group in mine for run in group.runs for n in run.values if (m := _match(series, n))]
            for part in sorted({match.groupdict().get("panel") or "" for match in matches}):
                if len({match["x"] for match in matches if (match.groupdict().get("panel") or "") == part}) > 1:
                    found.setdefault(part, []).append(_over_length(series, part, condition, mine))
        for beside in found.values():
            panels += share_y_limits(beside)
    return panels


def _over_length(series: LengthCurve, part: str, condition: dict[str, str], groups: list[SeedGroup]) -> Panel:
    figure = create_figure(*PANEL_SIZE)
    axes = figure.subplots()
    chance: dict[int, float] = {}
    ends: dict[str, float] = {}
    longest = 0
    for one in groups:
        points: dict[int, list[float]] = {}
        for run in one.runs:
            for name, value in run.values.items():
                match = _match(series, name)
                if match and (match.groupdict().get("panel") or "") == part:
                    points.setdefault(int(match["x"]), []).append(value * series.scale)
                if series.chance and (match := re.fullmatch(series.chance, name)):
                    chance[int(match.groupdict().get("x") or 0)] = value
        if not points:
            continue
        xs = sorted(points)
        means = [fmean(points[x]) for x in xs]
        (drawn,) = axes.plot(xs, means, **get_dash_style(one.student), marker=get_marker(one.student))
        if one.axis_values:
            drawn.set_gid(json.dumps({"student": one.student}))
        if any(len(numbers) > 1 for numbers in points.values()):
            low, high = [min(points[x]) for x in xs], [max(points[x]) for x in xs]
            band = axes.fill_between(xs, low, high, color=get_color(one.student), alpha=0.12, linewidth=0)
            band.set_gid(json.dumps({"student": one.student}))
        longest = max(longest, xs[-1])
        ends[one.student] = means[-1]
    if set(chance) == {0}:
        axes.axhline(chance[0], color="0.5", linestyle=":", linewidth=1.2)
    elif chance:
        axes.plot(sorted(chance), [chance[x] for x in sorted(chance)], color="0.5", linestyle=":", linewidth=1.2)
    set_axis_labels(axes, series.x, series.y, x_log=True, y_log=series.log_y)
    if series.y.startswith("share"):
        axes.set_ylim(-0.03, 1.03)
    measure = series.pattern.partition(r"\.")[0]
    title = series.title + (f", {PANEL_TITLES[measure].format(part)}" if part else "")
    caption = f"At {longest:,} {format_range(ends)}{'; chance is dotted' if chance else ''}."
    name = f"{measure}-{slugify(condition, series.title, part)}"
    return Panel(series.section, name, title, caption, figure, condition, list(ends))


def _match(series: LengthCurve, name: str) -> re.Match[str] | None:
    return re.fullmatch(series.pattern, name)


CAPTIONS = {
    "agreement": "How a student's next token differs from its teacher's: divergence by position and by frequency "
    "of the target, agreement on the likeliest token, and how long texts that both write stay the same",
    "mixing": "Mixing matrices of students beside the teacher's attention: above one head on one document, below "
    "statistics over the layers; dotted before training",
    "hidden": "How alike hidden states are, layer by layer, as linear CKA and cosine; dotted before training",
    "tasks": "Scores on benchmarks with standard errors; guessing is dashed",
}
TITLES = {
    "agreement": "Agreement with the teacher",
    "mixing": "Mixing matrices",
    "hidden": "Hidden states",
    "tasks": "Benchmarks",
}


def build_analysis_panels(groups: list[SeedGroup]) -> list[Panel]:
    """A figure for each of these measures that some run has."""
    condition = _best_condition(groups)
    shown = [group for group in groups if group.condition in (condition, {})]
    panels = []
    for name, caption in CAPTIONS.items():
        runs = {group.student: run for group in shown if (run := _first(group, name)) is not None}
        if not any(student != TEACHER for student in runs):
            continue
        found = [_renamed(run.measurements[name], student) for student, run in runs.items()]
        with use_colors([get_color(student) for student in runs]):
            figure = MEASURE_FIGURES[name](found)
        told = f" ({format_condition(condition)})" if condition else ""
        told += "; one seed of each" if any(len(group.runs) > 1 for group in shown) else ""
        panels.append(Panel("analysis", name, TITLES[name], f"{caption}{told}.", figure, series_names=list(runs)))
    return panels


def _best_condition(groups: list[SeedGroup]) -> dict[str, str]:
    name = select_value_name(HEADLINE_METRICS[0], groups)
    means: list[tuple[float, dict[str, str]]] = []
    for condition in list_conditions(groups):
        found = [
            mean for group in groups if group.condition == condition and name and (mean := group.mean(name)) is not None
        ]
        if found:
            means.append((fmean(found), condition))
    return min(means, key=lambda pair: pair[0])[1] if means else list_conditions(groups)[0]


def _first(group: SeedGroup, measure: str) -> Run | None:
    """The first seed that has a measurement with something to draw."""
    having = [run for run in group.runs if measure in run.measurements]
    return next((run for run in having if run.measurements[measure].details), None)


def _renamed(one: Measurement, student: str) -> Measurement:
    """Under the name of its line; a measurement of the teacher stays one."""
    return one.model_copy(update={"model": student, "teacher": student if one.model == one.teacher else TEACHER})
