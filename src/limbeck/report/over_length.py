"""What was measured over lengths and numbers of pairs, as panels: perplexity, retrieval, speed and memory.

    panels = over_length(lines)            # inside `look`

Read off the names of values (docs/measurements.md), seeds as their mean in a band from least to most. A measure that
is not there gives no panel.
"""

import json
import re
from dataclasses import dataclass
from statistics import fmean

from limbeck.report.figure import colour, marker, new_figure
from limbeck.report.grid import Line, places_of
from limbeck.report.panels import SIZE, Panel, label, one_scale, slug, span, style

_AT = r"@(?P<x>\d+)x(?P<panel>\d+)"


@dataclass(frozen=True)
class Series:
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
SERIES = (
    Series(
        "length", "Perplexity so far", r"positions\.perplexity, first (?P<x>\d+) tokens", OF_TEXT, "perplexity", True
    ),
    Series("length", "Loss by position", r"positions\.loss, tokens \d+ to (?P<x>\d+)", OF_TEXT, "loss, nats a token"),
    Series(
        "retrieval",
        "Needle chosen among candidates",
        r"needle\.niah (?P<panel>\d), (?P<x>\d+) tokens, among \d+",
        OF_TEXT,
        SHARE,
        chance=r"needle\.chance among \d+",
    ),
    Series("retrieval", "Needle written", r"needle\.niah (?P<panel>\d), (?P<x>\d+) tokens", OF_TEXT, SHARE),
    Series(
        "retrieval",
        "Pass key chosen among candidates",
        r"passkey\.passkey, (?P<x>\d+) tokens, among \d+",
        OF_TEXT,
        SHARE,
        chance=r"passkey\.chance among \d+",
    ),
    Series("retrieval", "Pass key written", r"passkey\.passkey, (?P<x>\d+) tokens", OF_TEXT, SHARE),
    Series(
        "retrieval",
        "Pairs recalled",
        r"recall\.recall, (?P<x>\d+) pairs",
        "pairs shown before",
        "share of the queries",
        chance=r"recall\.chance, (?P<x>\d+) pairs",
    ),
    Series("speed", "Time of the next token", rf"speed\.token_milliseconds{_AT}", "tokens of context", "ms", True),
    Series("speed", "Size of the cache", rf"speed\.cache_bytes{_AT}", "tokens of context", "MB", True, 1e-6),
    Series("speed", "Reading a prompt", rf"speed\.prefill_tokens_per_second{_AT}", OF_TEXT, "tokens a second", True),
)
PANELS = {"needle": "S-NIAH-{}", "speed": "batch {}"}  # what the group `panel` says, by measure


def over_length(lines: list[Line]) -> list[Panel]:
    """What was measured over lengths and numbers of pairs, a panel for each place of the grid, all on one scale."""
    panels: list[Panel] = []
    for series in SERIES:
        found: dict[str, list[Panel]] = {}
        for place in places_of(lines):
            mine = [line for line in lines if line.place in (place, {})]
            matches = [m for line in mine for arm in line.members for n in arm.values if (m := _match(series, n))]
            for part in sorted({match.groupdict().get("panel") or "" for match in matches}):
                if len({match["x"] for match in matches if (match.groupdict().get("panel") or "") == part}) > 1:
                    found.setdefault(part, []).append(_over_length(series, part, place, mine))
        for beside in found.values():
            panels += one_scale(beside)
    return panels


def _over_length(series: Series, part: str, place: dict[str, str], lines: list[Line]) -> Panel:
    figure = new_figure(*SIZE)
    axes = figure.subplots()
    chance: dict[int, float] = {}
    ends: dict[str, float] = {}
    longest = 0
    for one in lines:
        points: dict[int, list[float]] = {}
        for arm in one.members:
            for name, value in arm.values.items():
                match = _match(series, name)
                if match and (match.groupdict().get("panel") or "") == part:
                    points.setdefault(int(match["x"]), []).append(value * series.scale)
                if series.chance and (match := re.fullmatch(series.chance, name)):
                    chance[int(match.groupdict().get("x") or 0)] = value
        if not points:
            continue
        xs = sorted(points)
        means = [fmean(points[x]) for x in xs]
        (drawn,) = axes.plot(xs, means, **style(one.student), marker=marker(one.student))
        if one.at:
            drawn.set_gid(json.dumps({"student": one.student}))
        if any(len(numbers) > 1 for numbers in points.values()):
            low, high = [min(points[x]) for x in xs], [max(points[x]) for x in xs]
            band = axes.fill_between(xs, low, high, color=colour(one.student), alpha=0.12, linewidth=0)
            band.set_gid(json.dumps({"student": one.student}))
        longest = max(longest, xs[-1])
        ends[one.student] = means[-1]
    if set(chance) == {0}:
        axes.axhline(chance[0], color="0.5", linestyle=":", linewidth=1.2)
    elif chance:
        axes.plot(sorted(chance), [chance[x] for x in sorted(chance)], color="0.5", linestyle=":", linewidth=1.2)
    label(axes, series.x, series.y, x_log=True, y_log=series.log_y)
    if series.y.startswith("share"):
        axes.set_ylim(-0.03, 1.03)
    measure = series.pattern.partition(r"\.")[0]
    title = series.title + (f", {PANELS[measure].format(part)}" if part else "")
    caption = f"At {longest:,} {span(ends)}{'; chance is dotted' if chance else ''}."
    name = f"{measure}-{slug(place, series.title, part)}"
    return Panel(series.section, name, title, caption, figure, place, list(ends))


def _match(series: Series, name: str) -> re.Match[str] | None:
    return re.fullmatch(series.pattern, name)
