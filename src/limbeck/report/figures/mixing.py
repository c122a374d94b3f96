"""Figures of mixing matrices: of the measure `mixing`, and of mixers aligned to one layer (`limbeck matrices`).

    save_figure(draw_mixing([measurement_of_one_student, measurement_of_another]), Path("mixing.png"))
    draw_matrices(matrices, head=3, path=Path("matrices.png"), title="layer 12, head 3")

Colors show entries divided by the sum of their row's absolute values, red where positive and blue where negative. They
are scaled by the square root, so that faint entries are visible. Rows are queries, columns keys.
"""

import math
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from limbeck.core.errors import LimbeckError
from limbeck.evaluation.matrices import MixingMatrix
from limbeck.evaluation.measure import Measurement
from limbeck.evaluation.mixing_statistics import normalize_rows
from limbeck.report.figures.style import (
    check_figure_format,
    create_figure,
    save_figure,
    use_style,
)
from limbeck.report.privacy import get_basename

MIXING_CURVES = {
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
    """Draw heat maps of one head on one document above, and statistics over the layers below.

    The head is the one with the least mass on the first token in the teacher. Curves are means over heads; the teacher
    is black, an untrained student dotted.
    """
    students = [one for one in measurements if one.model != one.teacher]
    shown = students or measurements
    maps = shown[0].details["maps"]
    models = ("fresh", "student") if students else ("student",)
    rows = [(index, model) for index in range(len(maps)) for model in models]
    columns = len(shown) + 1
    figure = create_figure(max(1.35 * columns, 9), 1.45 * len(rows) + 5.2)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1.45 * len(rows), 5.2])
    panels = upper.subplots(len(rows), columns, squeeze=False)
    for (index, model), row in zip(rows, panels):
        label = f"layer {maps[index]['layer']}" + (", untrained" if model == "fresh" else "")
        row[0].set_ylabel(label, fontsize=7)
        _plot_matrix(row[0], maps[index]["teacher"], "teacher")
        for axes, one in zip(row[1:], shown):
            own_maps = one.details["maps"]
            if index < len(own_maps) and model in own_maps[index]:
                _plot_matrix(axes, own_maps[index][model], get_basename(one.model))
            else:
                axes.set_axis_off()
    grid = lower.subplots(2, 4)
    for axes, (name, title) in zip(grid.flat, MIXING_CURVES.items()):
        if name == "half_life":
            _plot_half_lives(axes, shown)
        else:
            _plot_statistic(axes, name, shown)
        axes.set_title(title, fontsize=8)
        axes.tick_params(labelsize=6)
        axes.set_xlabel("layer", fontsize=7)
        axes.grid(alpha=0.3)
    handles, labels = grid.flat[1].get_legend_handles_labels()
    lower.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 8), fontsize=7)
    return figure


def check_head(head: int, heads: int) -> None:
    """Raise LimbeckError unless a teacher with so many heads has one of this number."""
    if not 0 <= head < heads:
        raise LimbeckError(f"head is {head}, the teacher has {heads}", expected=f"0 to {heads - 1}")


def draw_matrices(matrices: list[MixingMatrix], head: int, path: Path, title: str, columns: int = 6) -> None:
    """Write a figure with one panel per mixer, after the teacher's; its format is that of the file's suffix.

    Raises:
        LimbeckError: matplotlib is not installed, no such head, or an unsupported format.
    """
    check_head(head, len(matrices[0].matrix))
    rows = math.ceil(len(matrices) / columns)
    check_figure_format(path)
    with use_style():
        figure = create_figure(1.9 * columns, 2.15 * rows + 0.4)
        for index, mixing in enumerate(matrices):
            axes = figure.add_subplot(rows, columns, index + 1)
            distance = "" if index == 0 else f"\n{float(mixing.distance[head]):.2f}"
            _plot_matrix(axes, normalize_rows(mixing.matrix[head], signed=True), mixing.name + distance, 8)
            axes.grid(False)
            axes.spines[:].set_visible(True)
        figure.suptitle(title, fontsize=9)
        save_figure(figure, path)


def _plot_matrix(axes: Any, normalized: Any, title: str, fontsize: int = 7) -> None:
    """Plot a matrix of normalized signed rows."""
    values = np.asarray(normalized)
    axes.imshow(np.sign(values) * np.sqrt(np.abs(values)), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
    axes.set_title(title, fontsize=fontsize)
    axes.set_xticks([])
    axes.set_yticks([])


def _plot_statistic(axes: Any, name: str, shown: list[Measurement]) -> None:
    """Plot the mean of a statistic over heads for each layer of every student, untrained student and the teacher."""
    for index, one in enumerate(shown):
        for model, style, width in (("student", "-", 1.2), ("fresh", ":", 0.7)):
            points = [(row["layer"], fmean(row[model][name])) for row in one.details["layers"] if model in row]
            if points:
                label = get_basename(one.model) if model == "student" else None
                axes.plot(*zip(*points), style, color=f"C{index}", linewidth=width, label=label)
    if name != "overlap":  # the teacher's with itself is 1
        points = [(row["layer"], fmean(row["teacher"][name])) for row in shown[0].details["layers"]]
        axes.plot(*zip(*points), color="black", linewidth=1.2, label="teacher")


def _plot_half_lives(axes: Any, shown: list[Measurement]) -> None:
    """Plot the median half-life of the heads for each layer that has one."""
    for index, one in enumerate(shown):
        # Infinite half-lives are stored as null.
        half_lives = [(row["layer"], [x for x in row.get("half_life", []) if x]) for row in one.details["layers"]]
        points = [(layer, float(np.median(values))) for layer, values in half_lives if values]
        if points:
            axes.plot(*zip(*points), color=f"C{index}", linewidth=1)
            axes.set_yscale("log")
