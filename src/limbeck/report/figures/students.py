"""Figures that compare students: the exam over bytes of state, a repeated passage by distance, two orders of students.

    with use_style(order_for_colors(collection.students)):
        panels = build_exam_panels(groups)                       # for a report, whose page has the legend
        figure = create_figure(7, 3.6)                           # for any other page
        add_legend(figure, draw_exam_over_state(figure.subplots(), groups))

The exam is the run's own (`limbeck.evaluation.exam`): documents that are longer than a window, and a passage that comes
again some hundred tokens after it was read. Values are means over seeds; bars are standard errors over documents.
"""

import json
import re
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from limbeck.report.collection import TEACHER
from limbeck.report.figures.panels import PANEL_SIZE, Panel, get_dash_style, set_axis_labels, slugify
from limbeck.report.figures.style import create_figure, get_color, get_marker
from limbeck.report.tables import SeedGroup, list_conditions

EXAM_PERPLEXITY = "exam.student_perplexity"
WINDOW = "untrained window"
_REPEAT = re.compile(r"exam\.student_repeat_loss@(\d+)")
_WINDOW_STYLE: dict[str, Any] = {"color": "0.45", "linestyle": "--", "linewidth": 1.2}


def build_exam_panels(groups: list[SeedGroup]) -> list[Panel]:
    """Build the panels of the exam under each condition; none where no run sat one."""
    panels: list[Panel] = []
    for title, name, draw, caption in (
        ("Exam over memory", "exam-memory", draw_exam_over_state, "Dashed: the untrained window of each memory."),
        ("Repeated passage", "exam-repeat", draw_repeat_by_distance, "Dashed: the largest untrained window."),
    ):
        for condition in list_conditions(groups):
            members = [group for group in groups if group.condition == condition and group.student != TEACHER]
            figure = create_figure(*PANEL_SIZE)
            if drawn := draw(figure.subplots(), members):
                names = [one for one in drawn if one != WINDOW]
                panels.append(Panel("length", slugify(condition, name), title, caption, figure, condition, names))
    return panels


def rank_by_exam(groups: Iterable[SeedGroup]) -> list[SeedGroup]:
    """List the students that sat the exam in all seeds without diverging, the lowest perplexity first."""
    means = [(group.mean(EXAM_PERPLEXITY), group) for group in groups if group.student != TEACHER]
    return [group for mean, group in sorted(((m, g) for m, g in means if m is not None), key=lambda pair: pair[0])]


def read_state_bytes(group: SeedGroup) -> float:
    """Compute the bytes of a student's state at the end of a document of the exam."""
    fixed, growth = (group.mean(f"memory.student_{name}") or 0.0 for name in ("fixed_bytes", "bytes_per_token"))
    return fixed + growth * (group.mean("exam.length") or 0.0)


def draw_exam_over_state(axes: Any, groups: list[SeedGroup]) -> list[str]:
    """Draw perplexity over the bytes of a student's state, beside the untrained windows and the teacher.

    Returns:
        The names of what was drawn: the best student first, then teacher and windows; [] without an exam.
    """
    ranked = rank_by_exam(groups)
    if not ranked:
        return []
    runs = [run for group in ranked for run in group.runs]
    for group in ranked:
        color, marker = get_color(group.student), get_marker(group.student)
        errors = [run.errors[EXAM_PERPLEXITY] for run in group.runs if EXAM_PERPLEXITY in run.errors]
        height = group.mean(EXAM_PERPLEXITY)
        bars = axes.errorbar(
            [read_state_bytes(group) / 1e6], [height], [fmean(errors)] if errors else None, color=color, marker=marker
        )
        for artist in (bars[0], *bars[1], *bars[2]):
            artist.set_gid(json.dumps({"student": group.student}))
    axes.axhline(fmean(run.values["exam.teacher_perplexity"] for run in runs), **get_dash_style(TEACHER))
    names = ("window.state_bytes", "exam.window_perplexity")
    windows = sorted({(run.values[names[0]], run.values[names[1]]) for run in runs if run.values.keys() >= set(names)})
    if windows:
        axes.plot([x / 1e6 for x, _ in windows], [y for _, y in windows], marker="|", **_WINDOW_STYLE)
    set_axis_labels(axes, "state at the end of a document, MB", "perplexity of the exam", x_log=True, y_log=True)
    return [*(group.student for group in ranked), TEACHER, *([WINDOW] if windows else [])]


def draw_repeat_by_distance(axes: Any, groups: list[SeedGroup]) -> list[str]:
    """Draw the loss on a passage that comes again, over the tokens since it began; returns names as above.

    Of the untrained windows only the one with the most memory is drawn.
    """
    ranked = [group for group in rank_by_exam(groups) if list_distances(group)]
    if not ranked:
        return []
    for group in ranked:
        distances = list_distances(group)
        losses = [group.mean(f"exam.student_repeat_loss@{at}") for at in distances]
        (line,) = axes.plot(distances, losses, marker=get_marker(group.student), **get_dash_style(group.student))
        line.set_gid(json.dumps({"student": group.student}))
    drawn = [group.student for group in ranked]
    largest = max(ranked, key=lambda group: group.mean("window.state_bytes") or 0.0)
    for name, label, style in (("teacher", TEACHER, get_dash_style(TEACHER)), ("window", WINDOW, _WINDOW_STYLE)):
        points = [(at, largest.mean(f"exam.{name}_repeat_loss@{at}")) for at in list_distances(largest)]
        points = [(at, loss) for at, loss in points if loss is not None]
        if points:
            axes.plot(*zip(*points), **style)
            drawn.append(label)
    set_axis_labels(axes, "tokens since the passage began", "loss on the passage, nats a token")
    axes.set_xticks(list_distances(ranked[0]))
    return drawn


def list_distances(group: SeedGroup) -> list[int]:
    """List the distances in tokens at which a student's loss on a repeated passage was measured."""
    names = {name for run in group.runs for name in run.values}
    return sorted(int(match[1]) for name in names if (match := _REPEAT.fullmatch(name)))


def draw_orders(axes: Any, titles: tuple[str, str], orders: tuple[list[str], list[str]]) -> None:
    """Draw two orders of the same students as columns, the best on top, with a line for each student between them."""
    first, second = orders
    for name in first:
        places = [first.index(name) + 1, second.index(name) + 1]
        axes.plot([0, 1], places, marker=get_marker(name), **get_dash_style(name))
        for x, place, side in ((-0.04, places[0], "right"), (1.04, places[1], "left")):
            axes.text(x, place, f"{name}  {place}" if side == "right" else f"{place}  {name}", ha=side, va="center")
    axes.set_xlim(-0.9, 1.9)
    axes.set_ylim(len(first) + 0.6, 0.4)
    axes.set_xticks([0, 1], titles)
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.set_yticks([])
    axes.grid(False)
    for spine in axes.spines.values():
        spine.set_visible(False)


def add_legend(figure: Any, names: list[str]) -> None:
    """Add the names of what was drawn, in this order, at the right of a figure; use it inside `use_style`."""
    # late: an optional dependency
    from matplotlib.lines import Line2D

    handles = []
    for name in names:
        if name == WINDOW:
            handles.append(Line2D([], [], marker="|", label=name, **_WINDOW_STYLE))
        else:
            marker = "" if name == TEACHER else get_marker(name)
            handles.append(Line2D([], [], marker=marker, label=name, **get_dash_style(name)))
    figure.legend(handles=handles, loc="outside right upper")
