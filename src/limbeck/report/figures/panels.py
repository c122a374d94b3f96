"""Panels of a report, and the first of them: losses over training and cache sizes.

    with use_style(order_for_colors(collection.students)):
        for panel in build_loss_panels(collection):
            save_figure(panel.figure, folder / f"{panel.name}.svg")

A panel is one small figure of one condition of the grid; panels are side by side on a wide screen, below each other on
a phone. Every student keeps its color; the teacher is black. Lines carry their student as their id, by which the page
filters them.
"""

import json
import re
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from limbeck.report.collection import TEACHER, Run, RunCollection
from limbeck.report.figures import curves
from limbeck.report.figures.curves import STAGE_TITLES
from limbeck.report.figures.style import COLORS, create_figure, get_color, get_linestyle, use_log_scale
from limbeck.report.tables import SeedGroup, format_condition, list_conditions

BLACK_INDEX = COLORS.index("#000000")
MAX_POINTS = 80  # of a loss curve: neighboring steps are averaged
PANEL_SIZE = (3.7, 2.8)  # inches


@dataclass
class Panel:
    """A figure with its texts. Panels with the same section and title show the same at several conditions.

    name: of its file.
    caption: description, next to the title.
    axis_values: condition of the grid, by which the page filters.
    series_names: names of the lines.
    """

    section: str
    name: str
    title: str
    caption: str
    figure: Any
    axis_values: dict[str, str] = field(default_factory=dict)
    series_names: list[str] = field(default_factory=list)

    @property
    def alt(self) -> str:
        """Alternative text."""
        return f"{self.title}{', ' + format_condition(self.axis_values) if self.axis_values else ''}. {self.caption}"


def order_for_colors(students: list[str]) -> list[str]:
    """Order names such that the teacher is black, whatever the number of students."""
    placeholders = [f"colour {index}" for index in range(len(students), BLACK_INDEX)]
    return [*students[:BLACK_INDEX], *placeholders, TEACHER, *students[BLACK_INDEX:]]


def build_loss_panels(collection: RunCollection) -> list[Panel]:
    """Build the panels of the training loss over tokens, per stage: seeds thin, their mean bold, with common limits."""
    conditions = list_conditions(
        [SeedGroup(run.student, _get_condition(collection, run), [run]) for run in collection.runs]
    )
    logs = {run.name: curves.read_metrics(run.folder / "metrics.jsonl") for run in collection.runs if run.folder}
    panels: list[Panel] = []
    for stage in STAGE_TITLES:
        stage_panels: list[Panel] = []
        for condition in conditions:
            runs = [run for run in collection.runs if _get_condition(collection, run) in (condition, {})]
            runs = [run for run in runs if any(name == stage for _, name in logs.get(run.name, {}))]
            if runs:
                stage_panels.append(_build_loss_panel(stage, condition, runs, logs))
        panels += share_y_limits(stage_panels)
    return panels


def build_cache_panels(groups: list[SeedGroup]) -> list[Panel]:
    """Build the panel of the cache size over length, computed from shapes; it is the same for all conditions."""
    by_student: dict[str, dict[str, float]] = {}
    for group in groups:
        for run in group.runs:
            if "memory.teacher_bytes_per_token" in run.values:
                by_student.setdefault(group.student, run.values)
    if not by_student:
        return []
    figure = create_figure(*PANEL_SIZE)
    axes = figure.subplots()
    lengths = [2**power for power in range(6, 18)]
    teacher_bytes = max(values["memory.teacher_bytes_per_token"] for values in by_student.values())
    axes.plot(lengths, [teacher_bytes * n / 1e6 for n in lengths], **get_dash_style(TEACHER))
    for student, values in by_student.items():
        fixed, per_token = values["memory.student_fixed_bytes"], values["memory.student_bytes_per_token"]
        (line,) = axes.plot(lengths, [(fixed + per_token * n) / 1e6 for n in lengths], **get_dash_style(student))
        line.set_gid(json.dumps({"student": student}))
    set_axis_labels(axes, "tokens of context", "MB", x_log=True, y_log=True)
    caption = f"Computed from shapes. The teacher's cache grows by {teacher_bytes / 1000:.3g} kB per token"
    break_evens = [v["memory.break_even_tokens"] for v in by_student.values() if "memory.break_even_tokens" in v]
    if break_evens:
        low, high = f"{min(break_evens):,.0f}", f"{max(break_evens):,.0f}"
        caption += f"; the students' caches are smaller beyond {low if low == high else f'{low} to {high}'} tokens"
    names = [TEACHER, *by_student]
    return [Panel("speed", "cache", "Cache size, computed", caption + ".", figure, series_names=names)]


def _build_loss_panel(stage: str, condition: dict[str, str], runs: list[Run], logs: dict[str, Any]) -> Panel:
    figure = create_figure(*PANEL_SIZE)
    axes = figure.subplots()
    all_positive, last_values = True, {}
    for student in dict.fromkeys(run.student for run in runs):
        seeds = [_read_loss_curve(run, stage, logs[run.name]) for run in runs if run.student == student]
        seeds = [(tokens, losses) for tokens, losses in seeds if tokens]
        if not seeds:
            continue
        gid = json.dumps({"student": student})
        if len(seeds) > 1:
            for tokens, losses in seeds:
                (line,) = axes.plot(tokens, losses, color=get_color(student), linewidth=0.5, alpha=0.45)
                line.set_gid(gid)
        # Seeds may have stopped at different steps: the mean ends with the shortest.
        count = min(len(tokens) for tokens, _ in seeds)
        mean = [fmean(losses[i] for _, losses in seeds) for i in range(count)]
        (line,) = axes.plot(
            seeds[0][0][:count], mean, color=get_color(student), linestyle=get_linestyle(student), linewidth=1.5
        )
        line.set_gid(gid)
        all_positive, last_values[student] = all_positive and min(mean) > 0, mean[-1]
    title, unit = STAGE_TITLES[stage]
    set_axis_labels(axes, "tokens, thousands", unit, y_log=all_positive)
    caption = f"Training loss; at the end {format_range(last_values)}."
    name = f"loss-{slugify(condition, stage)}"
    return Panel("loss", name, title, caption, figure, condition, list(last_values))


def _read_loss_curve(
    run: Run, stage: str, log: dict[tuple[int, str], list[dict[str, Any]]]
) -> tuple[list[float], list[float]]:
    """Read thousands of tokens, and losses averaged over neighboring steps, of a run's first stage of that name."""
    for (index, name), steps in log.items():
        if name == stage:
            recipe = run.recipe["stages"][index]
            step_tokens = recipe["batch_size"] * (recipe.get("seq_len") or run.recipe["data"]["seq_len"]) / 1000
            width = -(-len(steps) // MAX_POINTS)
            chunks = [steps[i : i + width] for i in range(0, len(steps), width)]
            return (
                [chunk[-1]["step"] * step_tokens for chunk in chunks],
                [fmean(step["loss"] for step in chunk) for chunk in chunks],
            )
    return [], []


def share_y_limits(panels: list[Panel]) -> list[Panel]:
    """Give all panels the same limits of y."""
    limits = [panel.figure.axes[0].get_ylim() for panel in panels]
    for panel in panels:
        panel.figure.axes[0].set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    return panels


def format_range(values: dict[str, float]) -> str:
    """Format the lowest and highest value with their names."""
    low, high = min(values, key=lambda name: values[name]), max(values, key=lambda name: values[name])
    if len(values) == 1:
        return _format_number(values[low])
    return f"from {_format_number(values[low])} ({low}) to {_format_number(values[high])} ({high})"


def _format_number(value: float) -> str:
    """Format a number with three digits, a large one with all that it has before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def set_axis_labels(axes: Any, x: str, y: str, x_log: bool = False, y_log: bool = False) -> None:
    """Label both axes and set their scales; powers of two are shown in units of k."""
    if x_log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1024 else f"{value / 1024:g}k")
    if y_log:
        use_log_scale(axes.yaxis)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def get_dash_style(name: str) -> dict[str, Any]:
    """Get color and line style of a line as keyword arguments of `plot`."""
    return {"color": get_color(name), "linestyle": get_linestyle(name)}


def _get_condition(collection: RunCollection, run: Run) -> dict[str, str]:
    return {axis: run.axes[axis] for axis in collection.condition_axes if axis in run.axes}


def slugify(condition: dict[str, str], *words: str) -> str:
    """Build a file name from words and a condition."""
    text = " ".join([*words, *([format_condition(condition)] if condition else [])])
    return re.sub(r"[^A-Za-z0-9+]+", "-", text).strip("-").lower()
