"""The figures of a report as small panels, and the first of them: losses over training.

    with use_style(order_for_colors(collection.students)):
        for panel in build_loss_panels(collection):
            save_figure(panel.figure, folder / f"{panel.name}.svg")

A panel is one figure of one condition of the grid; beside each other on a wide screen, below each other on a phone.
Every student keeps its colour; the teacher is black. Lines carry what they belong to as their id, by which the page
filters.
"""

import json
import re
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from limbeck.report.collection import TEACHER, Run, RunCollection
from limbeck.report.figures import curves
from limbeck.report.figures.style import COLORS, create_figure, get_color, get_linestyle, use_log_scale
from limbeck.report.tables import SeedGroup, format_condition, list_conditions

BLACK_INDEX = COLORS.index("#000000")
MAX_POINTS = 80  # of a loss curve: each the mean of as many steps
PANEL_SIZE = (3.7, 2.8)  # inches
STAGE_TITLES = {  # in the order in which they are shown: students are compared by the last one, so it comes first
    "logits": ("Stage 3: logits", "loss, nats a token"),
    "hidden": ("Stage 2: hidden states", "loss"),
    "matrix": ("Stage 1: mixing matrices", "loss"),
}


@dataclass
class Panel:
    """A figure with its words.

    name: of its file. caption: what is seen, beside the title. axis_values: the condition of the grid that it shows, by
    which it is filtered. series_names: whose. Panels of one section and title show the same at several conditions.
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
        """All that is seen, for those who do not see it."""
        return f"{self.title}{', ' + format_condition(self.axis_values) if self.axis_values else ''}. {self.caption}"


def order_for_colors(students: list[str]) -> list[str]:
    """The order in which names get colours, so that the teacher is black however many students there are."""
    nobody = [f"colour {index}" for index in range(len(students), BLACK_INDEX)]
    return [*students[:BLACK_INDEX], *nobody, TEACHER, *students[BLACK_INDEX:]]


def build_loss_panels(collection: RunCollection) -> list[Panel]:
    """The loss of every run over the tokens of each stage: seeds thin, their mean bold; a stage on one scale."""
    conditions = list_conditions(
        [SeedGroup(run.student, _condition_of(collection, run), [run]) for run in collection.runs]
    )
    logs = {run.name: curves.read_metrics(run.folder / "metrics.jsonl") for run in collection.runs if run.folder}
    panels: list[Panel] = []
    for stage in STAGE_TITLES:
        mine: list[Panel] = []
        for condition in conditions:
            runs = [run for run in collection.runs if _condition_of(collection, run) in (condition, {})]
            runs = [run for run in runs if any(name == stage for _, name in logs.get(run.name, {}))]
            if runs:
                mine.append(_losses(stage, condition, runs, logs))
        panels += share_y_limits(mine)
    return panels


def build_cache_panels(groups: list[SeedGroup]) -> list[Panel]:
    """The cache over length as its shapes give it; the same at all conditions."""
    shown: dict[str, dict[str, float]] = {}
    for group in groups:
        for run in group.runs:
            if "memory.teacher_bytes_per_token" in run.values:
                shown.setdefault(group.student, run.values)
    if not shown:
        return []
    figure = create_figure(*PANEL_SIZE)
    axes = figure.subplots()
    lengths = [2**power for power in range(6, 18)]
    teacher = max(values["memory.teacher_bytes_per_token"] for values in shown.values())
    axes.plot(lengths, [teacher * n / 1e6 for n in lengths], **get_dash_style(TEACHER))
    for student, values in shown.items():
        fixed, growing = values["memory.student_fixed_bytes"], values["memory.student_bytes_per_token"]
        (drawn,) = axes.plot(lengths, [(fixed + growing * n) / 1e6 for n in lengths], **get_dash_style(student))
        drawn.set_gid(json.dumps({"student": student}))
    set_axis_labels(axes, "tokens of context", "MB", x_log=True, y_log=True)
    crossing = [v["memory.break_even_tokens"] for v in shown.values() if "memory.break_even_tokens" in v]
    caption = f"Computed from shapes. The teacher's cache grows by {teacher / 1000:.3g} kB a token"
    if crossing:
        low, high = f"{min(crossing):,.0f}", f"{max(crossing):,.0f}"
        caption += f"; the students' are smaller from {low if low == high else f'{low} to {high}'} tokens on"
    return [
        Panel("speed", "cache", "Size of the cache, by shapes", caption + ".", figure, series_names=[TEACHER, *shown])
    ]


def _losses(stage: str, condition: dict[str, str], runs: list[Run], logs: dict[str, Any]) -> Panel:
    figure = create_figure(*PANEL_SIZE)
    axes = figure.subplots()
    positive, ends = True, {}
    for student in dict.fromkeys(run.student for run in runs):
        found = [_curve(run, stage, logs[run.name]) for run in runs if run.student == student]
        found = [curve for curve in found if curve[0]]
        if not found:
            continue
        at = json.dumps({"student": student})
        if len(found) > 1:
            for x, y in found:
                (thin,) = axes.plot(x, y, color=get_color(student), linewidth=0.5, alpha=0.45)
                thin.set_gid(at)
        count = min(len(x) for x, _ in found)
        mean = [fmean(y[i] for _, y in found) for i in range(count)]
        (bold,) = axes.plot(
            found[0][0][:count], mean, color=get_color(student), linestyle=get_linestyle(student), linewidth=1.5
        )
        bold.set_gid(at)
        positive, ends[student] = positive and min(mean) > 0, mean[-1]
    title, unit = STAGE_TITLES.get(stage, (stage, "loss"))
    set_axis_labels(axes, "tokens, thousands", unit, y_log=positive)
    caption = f"Training loss; at the end {format_range(ends)}."
    return Panel("loss", f"loss-{slugify(condition, stage)}", title, caption, figure, condition, list(ends))


def _curve(run: Run, stage: str, log: dict[tuple[int, str], list[dict[str, Any]]]) -> tuple[list[float], list[float]]:
    """Thousands of tokens, and losses, each the mean of neighbouring steps."""
    for (index, name), steps in log.items():
        if name == stage:
            recipe = run.recipe["stages"][index]
            tokens = recipe["batch_size"] * (recipe.get("seq_len") or run.recipe["data"]["seq_len"]) / 1000
            width = -(-len(steps) // MAX_POINTS)
            parts = [steps[i : i + width] for i in range(0, len(steps), width)]
            return [part[-1]["step"] * tokens for part in parts], [fmean(one["loss"] for one in p) for p in parts]
    return [], []


def share_y_limits(panels: list[Panel]) -> list[Panel]:
    """The same limits of y for all."""
    limits = [panel.figure.axes[0].get_ylim() for panel in panels]
    for panel in panels:
        panel.figure.axes[0].set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    return panels


def format_range(ends: dict[str, float]) -> str:
    """Lowest and highest with their names."""
    low, high = (pick(ends, key=lambda name: ends[name]) for pick in (min, max))
    if len(ends) == 1:
        return f"{ends[low]:.3g}"
    return f"from {ends[low]:.3g} ({low}) to {ends[high]:.3g} ({high})"


def set_axis_labels(axes: Any, x: str, y: str, x_log: bool = False, y_log: bool = False) -> None:
    if x_log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1024 else f"{value / 1024:g}k")
    if y_log:
        use_log_scale(axes.yaxis)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def get_dash_style(name: str) -> dict[str, Any]:
    return {"color": get_color(name), "linestyle": get_linestyle(name)}


def _condition_of(collection: RunCollection, run: Run) -> dict[str, str]:
    return {axis: run.axes[axis] for axis in collection.condition_axes if axis in run.axes}


def slugify(condition: dict[str, str], *words: str) -> str:
    text = " ".join([*words, *([format_condition(condition)] if condition else [])])
    return re.sub(r"[^A-Za-z0-9+]+", "-", text).strip("-").lower()
