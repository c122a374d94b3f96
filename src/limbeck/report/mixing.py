"""The figure of the measure `mixing`: heat maps side by side above, curves over the layers below.

    save(draw([measurement_of_one_student, measurement_of_another]), Path("mixing.png"))

A heat map is one head of one layer on one document, the head that looks least at the first token in the teacher.
Colour is the share of a row, the root of it so that faint entries show: red where positive, blue where negative. Rows
are queries, columns keys. Curves are means over heads; the teacher is black, an untrained student dotted.
"""

from statistics import fmean
from typing import Any

import numpy as np

from limbeck.evaluate.measurement import Measurement
from limbeck.report.figure import new_figure

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


def draw(found: list[Measurement]) -> Any:
    """One figure for all models that have been measured."""
    students = [one for one in found if one.model != one.teacher]
    shown = students or found
    maps = shown[0].details["maps"]
    rows = [(i, whose) for i in range(len(maps)) for whose in (("fresh", "student") if students else ("student",))]
    columns = len(shown) + 1
    figure = new_figure(max(1.35 * columns, 9), 1.45 * len(rows) + 5.2)
    above, below = figure.subfigures(2, 1, height_ratios=[1.45 * len(rows), 5.2])
    panels = above.subplots(len(rows), columns, squeeze=False)
    for (index, whose), line in zip(rows, panels):
        label = f"layer {maps[index]['layer']}" + (", untrained" if whose == "fresh" else "")
        line[0].set_ylabel(label, fontsize=7)
        _heat(line[0], maps[index]["teacher"], "teacher")
        for axes, one in zip(line[1:], shown):
            here = one.details["maps"]
            if index < len(here) and whose in here[index]:
                _heat(axes, here[index][whose], _short(one.model))
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
                label = _short(one.model) if whose == "student" else None
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


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]
