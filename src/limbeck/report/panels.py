"""The figures of a report as small panels, and the first of them: losses over training.

    with look(order_of(collection.students)):
        for panel in losses(collection):
            save(panel.figure, folder / f"{panel.name}.svg")

A panel is one figure of one place of the grid; beside each other on a wide screen, below each other on a phone. Every
student keeps its colour; the teacher is black. Lines carry what they belong to as their id, by which the page filters.
"""

import json
import re
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

from limbeck.report import curves
from limbeck.report.arms import TEACHER, Arm, Collection
from limbeck.report.figure import COLOURS, colour, dashes, logarithmic, new_figure
from limbeck.report.grid import Line, named, places_of

BLACK = COLOURS.index("#000000")
POINTS = 80  # of a loss curve: each the mean of as many steps
SIZE = (3.7, 2.8)  # inches
STAGES = {  # in the order in which they are shown: students are compared by the last one, so it comes first
    "logits": ("Stage 3: logits", "loss, nats a token"),
    "hidden": ("Stage 2: hidden states", "loss"),
    "matrix": ("Stage 1: mixing matrices", "loss"),
}


@dataclass
class Panel:
    """A figure with its words.

    name: of its file. caption: what is seen, beside the title. at: the place of the grid that it shows, by which it is
    filtered. lines: whose. Panels of one section and title show the same at several places.
    """

    section: str
    name: str
    title: str
    caption: str
    figure: Any
    at: dict[str, str] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)

    @property
    def alt(self) -> str:
        """All that is seen, for those who do not see it."""
        return f"{self.title}{', ' + named(self.at) if self.at else ''}. {self.caption}"


def order_of(students: list[str]) -> list[str]:
    """The order in which names get colours, so that the teacher is black however many students there are."""
    nobody = [f"colour {index}" for index in range(len(students), BLACK)]
    return [*students[:BLACK], *nobody, TEACHER, *students[BLACK:]]


def losses(collection: Collection) -> list[Panel]:
    """The loss of every run over the tokens of each stage: seeds thin, their mean bold; a stage on one scale."""
    places = places_of([Line(arm.student, _place(collection, arm), [arm]) for arm in collection.arms])
    logs = {arm.name: curves.read(arm.folder / "metrics.jsonl") for arm in collection.arms if arm.folder}
    panels: list[Panel] = []
    for stage in STAGES:
        mine: list[Panel] = []
        for place in places:
            arms = [arm for arm in collection.arms if _place(collection, arm) in (place, {})]
            arms = [arm for arm in arms if any(name == stage for _, name in logs.get(arm.name, {}))]
            if arms:
                mine.append(_losses(stage, place, arms, logs))
        panels += one_scale(mine)
    return panels


def caches(lines: list[Line]) -> list[Panel]:
    """The cache over length as its shapes give it; the same at all places."""
    shown: dict[str, dict[str, float]] = {}
    for line in lines:
        for arm in line.members:
            if "memory.teacher_bytes_per_token" in arm.values:
                shown.setdefault(line.student, arm.values)
    if not shown:
        return []
    figure = new_figure(*SIZE)
    axes = figure.subplots()
    lengths = [2**power for power in range(6, 18)]
    teacher = max(values["memory.teacher_bytes_per_token"] for values in shown.values())
    axes.plot(lengths, [teacher * n / 1e6 for n in lengths], **style(TEACHER))
    for student, values in shown.items():
        fixed, growing = values["memory.student_fixed_bytes"], values["memory.student_bytes_per_token"]
        (drawn,) = axes.plot(lengths, [(fixed + growing * n) / 1e6 for n in lengths], **style(student))
        drawn.set_gid(json.dumps({"student": student}))
    label(axes, "tokens of context", "MB", x_log=True, y_log=True)
    crossing = [v["memory.break_even_tokens"] for v in shown.values() if "memory.break_even_tokens" in v]
    caption = f"Computed from shapes. The teacher's cache grows by {teacher / 1000:.3g} kB a token"
    if crossing:
        low, high = f"{min(crossing):,.0f}", f"{max(crossing):,.0f}"
        caption += f"; the students' are smaller from {low if low == high else f'{low} to {high}'} tokens on"
    return [Panel("speed", "cache", "Size of the cache, by shapes", caption + ".", figure, lines=[TEACHER, *shown])]


def _losses(stage: str, place: dict[str, str], arms: list[Arm], logs: dict[str, Any]) -> Panel:
    figure = new_figure(*SIZE)
    axes = figure.subplots()
    positive, ends = True, {}
    for student in dict.fromkeys(arm.student for arm in arms):
        found = [_curve(arm, stage, logs[arm.name]) for arm in arms if arm.student == student]
        found = [curve for curve in found if curve[0]]
        if not found:
            continue
        at = json.dumps({"student": student})
        if len(found) > 1:
            for x, y in found:
                (thin,) = axes.plot(x, y, color=colour(student), linewidth=0.5, alpha=0.45)
                thin.set_gid(at)
        count = min(len(x) for x, _ in found)
        mean = [fmean(y[i] for _, y in found) for i in range(count)]
        (bold,) = axes.plot(found[0][0][:count], mean, color=colour(student), linestyle=dashes(student), linewidth=1.5)
        bold.set_gid(at)
        positive, ends[student] = positive and min(mean) > 0, mean[-1]
    title, unit = STAGES.get(stage, (stage, "loss"))
    label(axes, "tokens, thousands", unit, y_log=positive)
    caption = f"Training loss; at the end {span(ends)}."
    return Panel("loss", f"loss-{slug(place, stage)}", title, caption, figure, place, list(ends))


def _curve(arm: Arm, stage: str, log: dict[tuple[int, str], list[dict[str, Any]]]) -> tuple[list[float], list[float]]:
    """Thousands of tokens, and losses, each the mean of neighbouring steps."""
    for (index, name), steps in log.items():
        if name == stage:
            recipe = arm.recipe["stages"][index]
            tokens = recipe["batch_size"] * (recipe.get("seq_len") or arm.recipe["data"]["seq_len"]) / 1000
            width = -(-len(steps) // POINTS)
            parts = [steps[i : i + width] for i in range(0, len(steps), width)]
            return [part[-1]["step"] * tokens for part in parts], [fmean(one["loss"] for one in p) for p in parts]
    return [], []


def one_scale(panels: list[Panel]) -> list[Panel]:
    """The same limits of y for all."""
    limits = [panel.figure.axes[0].get_ylim() for panel in panels]
    for panel in panels:
        panel.figure.axes[0].set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
    return panels


def span(ends: dict[str, float]) -> str:
    """Lowest and highest with their names."""
    low, high = (pick(ends, key=lambda name: ends[name]) for pick in (min, max))
    if len(ends) == 1:
        return f"{ends[low]:.3g}"
    return f"from {ends[low]:.3g} ({low}) to {ends[high]:.3g} ({high})"


def label(axes: Any, x: str, y: str, x_log: bool = False, y_log: bool = False) -> None:
    if x_log:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value < 1024 else f"{value / 1024:g}k")
    if y_log:
        logarithmic(axes.yaxis)
    axes.set_xlabel(x)
    axes.set_ylabel(y)


def style(name: str) -> dict[str, Any]:
    return {"color": colour(name), "linestyle": dashes(name)}


def _place(collection: Collection, arm: Arm) -> dict[str, str]:
    return {axis: arm.axes[axis] for axis in collection.places if axis in arm.axes}


def slug(place: dict[str, str], *words: str) -> str:
    text = " ".join([*words, *([named(place)] if place else [])])
    return re.sub(r"[^A-Za-z0-9+]+", "-", text).strip("-").lower()
