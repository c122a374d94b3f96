"""The figure of the measure `agreement`: divergence by position and by frequency, and how long texts stay together.

    save_figure(draw_agreement([measurement_of_one_student, measurement_of_another]), Path("agreement.png"))

Every model is a line; the teacher itself would be the axis, and is left out.

The figure of the measure `hidden`: CKA and cosine with the teacher's states over the layers.

    save_figure(draw_hidden([measurement_of_one_student, measurement_of_another]), Path("hidden.png"))

Every model is a line, dotted before it learnt anything.

The figure of the measure `mixing`: heat maps side by side above, curves over the layers below.

    save_figure(draw_mixing([measurement_of_one_student, measurement_of_another]), Path("mixing.png"))

A heat map is one head of one layer on one document, the head that looks least at the first token in the teacher.
Colour is the share of a row, the root of it so that faint entries show: red where positive, blue where negative. Rows
are queries, columns keys. Curves are means over heads; the teacher is black, an untrained student dotted.

Scores of several models on several tasks as bars, with standard errors and the line of guessing.

save_figure(draw_benchmarks(measurements), Path("tasks.svg"))            # of the measure `tasks`

Pictures of mixing matrices: one panel a student, beside the teacher's.

    draw_matrices(views, head=3, path="matrices.png", title="layer 12, head 3")

Colour is the share of a row: entries over the sum of the row's sizes, red where positive and blue where negative, the
root of it so that faint entries show. Rows are queries, columns keys.
"""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.evaluation.matrices import MixingMatrix
from limbeck.evaluation.measure import Measurement
from limbeck.report.figures.style import check_figure_format, create_figure, save_figure, use_style


def draw_agreement(measurements: list[Measurement]) -> Any:
    """One figure for all models that have been measured."""
    students = [one for one in measurements if one.model != one.teacher] or measurements
    figure = create_figure(10, 5.6)
    panels = figure.subplots(2, 2)
    for one in students:
        _buckets(panels[0, 0], one, "by_position", "kl")
        _buckets(panels[0, 1], one, "by_frequency", "kl")
        _buckets(panels[1, 0], one, "by_frequency", "top1")
        if "together" in one.details:
            steps = range(1, len(one.details["together"]) + 1)
            (line,) = panels[1, 1].plot(steps, one.details["together"], label=_short(one.model))
            panels[1, 1].plot(steps, one.details["equal_share"], color=line.get_color(), linewidth=0.7, alpha=0.5)
    titles = (
        ("KL(teacher ‖ student), nats", "tokens of the document seen before"),
        ("KL(teacher ‖ student), nats", "occurrences of the target in a million tokens of training text"),
        ("same likeliest token", "occurrences of the target in a million tokens of training text"),
        ("free running: same text so far (thin: same token)", "tokens written"),
    )
    for axes, (title, label) in zip(panels.flat, titles):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=7)
    panels[1, 1].set_visible(any("together" in one.details for one in students))
    return figure


def _buckets(axes: Any, one: Measurement, key: str, number: str) -> None:
    """A number over the buckets of one measurement, each named by where it begins."""
    rows = one.details.get(key, [])
    axes.plot(
        [_name(row) for row in rows], [row[number] for row in rows], marker="o", markersize=3, label=_short(one.model)
    )


def _name(row: dict[str, Any]) -> str:
    begin, end = row["from"], row["below"]
    if begin is None:
        return f"< {end:,}"
    return f"{begin:,} +"


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]


ROWS = {"cka": "linear CKA", "cosine": "cosine"}
COLUMNS = {
    "attention": "attention output, teacher-fed",
    "block": "block output, teacher-fed",
    "free": "block output, free-running",
}


def draw_hidden(measurements: list[Measurement]) -> Any:
    """One figure for all models that have been measured."""
    shown = [one for one in measurements if one.model != one.teacher] or measurements
    figure = create_figure(10, 5.2)
    panels = figure.subplots(2, 3, sharex=True)
    for line, (kind, name) in zip(panels, ROWS.items()):
        for axes, (place, title) in zip(line, COLUMNS.items()):
            for index, one in enumerate(shown):
                for whose, style, width in (("student", "-", 1.2), ("fresh", ":", 0.7)):
                    if whose in one.details:
                        values = [row[f"{kind}_{place}"] for row in one.details[whose]]
                        label = _short_hidden(one.model) if whose == "student" else None
                        axes.plot(values, style, color=f"C{index}", linewidth=width, label=label)
            axes.set_title(f"{name}: {title}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel("layer", fontsize=8)
    panels[0, 0].legend(fontsize=7)
    return figure


def _short_hidden(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]


CURVES = {
    "overlap": "overlap with the teacher",
    "distance": "mean attended distance, tokens",
    "first_token": "mass on the first token",
    "window": "mass on the local window",
    "entropy": "entropy, nats",
    "effective_rank": "effective rank",
    "diversity": "head diversity",
    "half_life": "half-life, tokens (median)",
}


def draw_mixing(measurements: list[Measurement]) -> Any:
    """One figure for all models that have been measured."""
    students = [one for one in measurements if one.model != one.teacher]
    shown = students or measurements
    maps = shown[0].details["maps"]
    rows = [(i, whose) for i in range(len(maps)) for whose in (("fresh", "student") if students else ("student",))]
    columns = len(shown) + 1
    figure = create_figure(max(1.35 * columns, 9), 1.45 * len(rows) + 5.2)
    above, below = figure.subfigures(2, 1, height_ratios=[1.45 * len(rows), 5.2])
    panels = above.subplots(len(rows), columns, squeeze=False)
    for (index, whose), line in zip(rows, panels):
        label = f"layer {maps[index]['layer']}" + (", untrained" if whose == "fresh" else "")
        line[0].set_ylabel(label, fontsize=7)
        _heat(line[0], maps[index]["teacher"], "teacher")
        for axes, one in zip(line[1:], shown):
            here = one.details["maps"]
            if index < len(here) and whose in here[index]:
                _heat(axes, here[index][whose], _short_mixing(one.model))
            else:
                axes.set_axis_off()
    grid = below.subplots(2, 4)
    for axes, (name, title) in zip(grid.flat, CURVES.items()):
        _curves(axes, name, shown)
        axes.set_title(title, fontsize=8)
        axes.tick_params(labelsize=6)
        axes.set_xlabel("layer", fontsize=7)
        axes.grid(alpha=0.3)
    handles, labels = grid.flat[1].get_legend_handles_labels()
    below.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), fontsize=7)
    return figure


def _curves(axes: Any, name: str, shown: list[Measurement]) -> None:
    """A statistic over the layers for every model, with the teacher and the untrained students."""
    for index, one in enumerate(shown):
        layers, colour = one.details["layers"], f"C{index}"
        if name == "half_life":
            known = [(row["layer"], [x for x in row.get(name, []) if x]) for row in layers]
            points = [(layer, float(np.median(values))) for layer, values in known if values]
            if points:
                axes.plot(*zip(*points), color=colour, linewidth=1)
                axes.set_yscale("log")
            continue
        for whose, style, width in (("student", "-", 1.2), ("fresh", ":", 0.7)):
            points = [(row["layer"], fmean(row[whose][name])) for row in layers if whose in row]
            if points:
                label = _short_mixing(one.model) if whose == "student" else None
                axes.plot(*zip(*points), style, color=colour, linewidth=width, label=label)
    if name not in ("half_life", "overlap"):
        rows = shown[0].details["layers"]
        points = [(row["layer"], fmean(row["teacher"][name])) for row in rows]
        axes.plot(*zip(*points), color="black", linewidth=1.2, label="teacher")


def _heat(axes: Any, matrix: list[list[float]], title: str) -> None:
    share = np.asarray(matrix)
    axes.imshow(np.sign(share) * np.sqrt(np.abs(share)), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=7)
    axes.set_xticks([])
    axes.set_yticks([])


def _short_mixing(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]


def draw_benchmarks(measurements: list[Measurement]) -> Any:
    """A group of bars a task, a bar a model; guessing is a dashed line across the group."""
    names = list(
        dict.fromkeys(name for one in measurements for name, task in one.details["tasks"].items() if task["metric"])
    )
    figure = create_figure(max(5.0, 1.2 + 0.4 * len(names) * (1 + len(measurements))), 3.4)
    axes = figure.subplots()
    width = 0.8 / len(measurements)
    for at, one in enumerate(measurements):
        tasks = one.details["tasks"]
        keys = {name: f"{name} {tasks[name]['metric']}" for name in names if name in tasks}
        axes.bar(
            [names.index(name) + (at - (len(measurements) - 1) / 2) * width for name in keys],
            [one.values[key] for key in keys.values()],
            width,
            yerr=[one.errors.get(key, 0.0) for key in keys.values()],
            error_kw={"linewidth": 0.8},
            label=one.model,
        )
    metrics = {name: task for one in measurements for name, task in one.details["tasks"].items()}
    for at, name in enumerate(names):
        axes.hlines(metrics[name]["chance"], at - 0.45, at + 0.45, color="black", linestyle="dashed", linewidth=0.8)
    axes.set_xticks(range(len(names)), [f"{name}\n{metrics[name]['metric']}" for name in names], fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("score")
    axes.legend(fontsize=7)
    return figure


def draw_matrices(views: list[MixingMatrix], head: int, path: Path, title: str, columns: int = 6) -> None:
    """Write the picture; its format is that of the file's ending (png, svg, pdf).

    Raises:
        LimbeckError: matplotlib is not installed, no such head, or a format that it does not know.
    """
    heads = len(views[0].matrix)
    if not 0 <= head < heads:
        raise LimbeckError(f"head is {head}, the teacher has {heads}", expected=f"0 to {heads - 1}")
    rows = math.ceil(len(views) / columns)
    check_figure_format(path)
    with use_style():
        figure = create_figure(1.9 * columns, 2.15 * rows + 0.4)
        for index, view in enumerate(views):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.imshow(_shade(view.matrix[head]).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            distance = "" if index == 0 else f"\n{float(view.distance[head]):.2f}"
            axes.set_title(view.name + distance, fontsize=8)
            axes.grid(False)
            axes.spines[:].set_visible(True)
            axes.set_xticks([])
            axes.set_yticks([])
        figure.suptitle(title, fontsize=9)
        save_figure(figure, path)


def _shade(matrix: Tensor) -> Tensor:
    share = matrix / matrix.abs().sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.sign(share) * share.abs().sqrt()
