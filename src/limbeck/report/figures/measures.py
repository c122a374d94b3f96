"""Figures of measures: one function per measure from its measurements, one for each model, to a figure.

    with use_style(models):
        figure = draw_measure("agreement", measurements)             # None for a measure without a figure
        save_figure(figure, Path("agreement.svg"))

To add the figure of a measure, write a function and add it to `MEASURE_FIGURES`.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from statistics import fmean
from typing import Any

from limbeck.evaluation.measure import Measurement
from limbeck.evaluation.stories import PLACES
from limbeck.report.figures.mixing import draw_mixing
from limbeck.report.figures.speed import draw_speed
from limbeck.report.figures.style import create_figure
from limbeck.report.privacy import get_basename


def draw_measure(name: str, measurements: list[Measurement]) -> Any | None:
    """Draw the figure of a measure; None if it has none."""
    draw = MEASURE_FIGURES.get(name)
    return draw(measurements) if draw is not None else None


def draw_agreement(measurements: list[Measurement]) -> Any:
    """Draw divergence by position and frequency, and how long free-running texts stay the same; a line per student."""
    students = _select_students(measurements)
    figure = create_figure(10, 5.6)
    panels = figure.subplots(2, 2)
    for student in students:
        _plot_buckets(panels[0, 0], student, "by_position", "kl")
        _plot_buckets(panels[0, 1], student, "by_frequency", "kl")
        _plot_buckets(panels[1, 0], student, "by_frequency", "top1")
        if "together" in student.details:
            steps = range(1, len(student.details["together"]) + 1)
            (line,) = panels[1, 1].plot(steps, student.details["together"], label=get_basename(student.model))
            panels[1, 1].plot(steps, student.details["equal_share"], color=line.get_color(), linewidth=0.7, alpha=0.5)
    labels = (
        ("KL(teacher ‖ student), nats", "preceding tokens of the document"),
        ("KL(teacher ‖ student), nats", "occurrences of the target per million tokens of training text"),
        ("same likeliest token", "occurrences of the target per million tokens of training text"),
        ("free running: same text so far (thin: same token)", "tokens generated"),
    )
    for axes, (title, label) in zip(panels.flat, labels):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=7)
    panels[1, 1].set_visible(any("together" in student.details for student in students))
    return figure


def _select_students(measurements: list[Measurement]) -> list[Measurement]:
    """Leave out the teacher, which has no divergence from itself, unless there is nothing else."""
    return [one for one in measurements if one.model != one.teacher] or measurements


def _plot_buckets(axes: Any, measurement: Measurement, key: str, metric: str) -> None:
    """Plot a metric over buckets, each labeled by where it begins."""
    rows = measurement.details.get(key, [])
    labels = [f"< {row['below']:,}" if row["from"] is None else f"{row['from']:,} +" for row in rows]
    values = [row[metric] for row in rows]
    axes.plot(labels, values, marker="o", markersize=3, label=get_basename(measurement.model))


HIDDEN_ROWS = {"cka": "linear CKA", "cosine": "cosine"}
HIDDEN_COLUMNS = {
    "attention": "attention output, teacher-fed",
    "block": "block output, teacher-fed",
    "free": "block output, free-running",
}


def draw_hidden(measurements: list[Measurement]) -> Any:
    """Draw CKA and cosine with the teacher's states over the layers; dotted before training."""
    figure = create_figure(10, 5.2)
    panels = figure.subplots(2, 3, sharex=True)
    for row, (metric, metric_title) in zip(panels, HIDDEN_ROWS.items()):
        for axes, (output, output_title) in zip(row, HIDDEN_COLUMNS.items()):
            for index, one in enumerate(_select_students(measurements)):
                for model, style, width in (("student", "-", 1.2), ("fresh", ":", 0.7)):
                    if model in one.details:
                        values = [layer[f"{metric}_{output}"] for layer in one.details[model]]
                        label = get_basename(one.model) if model == "student" else None
                        axes.plot(values, style, color=f"C{index}", linewidth=width, label=label)
            axes.set_title(f"{metric_title}: {output_title}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel("layer", fontsize=8)
    panels[0, 0].legend(fontsize=7)
    return figure


def draw_tasks(measurements: list[Measurement]) -> Any:
    """Draw scores as bars with standard errors, a group per task; a dashed line marks chance."""
    tasks = {name: task for one in measurements for name, task in one.details["tasks"].items() if task["metric"]}
    names = list(tasks)
    figure = create_figure(max(5.0, 1.2 + 0.4 * len(names) * (1 + len(measurements))), 3.4)
    axes = figure.subplots()
    width = 0.8 / len(measurements)
    for index, one in enumerate(measurements):
        keys = {name: f"{name} {task['metric']}" for name, task in one.details["tasks"].items() if name in tasks}
        axes.bar(
            [names.index(name) + (index - (len(measurements) - 1) / 2) * width for name in keys],
            [one.values[key] for key in keys.values()],
            width,
            yerr=[one.errors.get(key, 0.0) for key in keys.values()],
            error_kw={"linewidth": 0.8},
            label=one.model,
        )
    for index, task in enumerate(tasks.values()):
        axes.hlines(task["chance"], index - 0.45, index + 0.45, color="black", linestyle="dashed", linewidth=0.8)
    axes.set_xticks(range(len(names)), [f"{name}\n{task['metric']}" for name, task in tasks.items()], fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("score")
    axes.legend(fontsize=7)
    return figure


def draw_positions(measurements: list[Measurement]) -> Any:
    """Draw loss by position, and perplexity of all tokens so far; a dotted line marks the context length."""
    figure = create_figure(9, 3.6)
    by_position, so_far = figure.subplots(1, 2)
    for one in measurements:
        curve = one.details["curve"]
        ends = [point[0] for point in curve]
        losses = [point[1] for point in curve]
        # Smoothed: most differences between blocks come from the text and are the same for all models.
        smoothed = [fmean(losses[max(0, i - 4) : i + 5]) for i in range(len(losses))]
        (line,) = by_position.plot(ends, losses, alpha=0.2, linewidth=0.7)
        by_position.plot(ends, smoothed, color=line.get_color(), label=one.model)
        so_far.plot(ends, [math.exp(min(point[2], 700)) for point in curve], color=line.get_color(), label=one.model)
    titles = ("loss by position, nats per token", "perplexity of all tokens so far")
    for axes, title in zip((by_position, so_far), titles):
        for context in {one.details["context"] for one in measurements} - {None}:
            axes.axvline(context, color="grey", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    so_far.set_yscale("log")
    by_position.legend(fontsize=7)
    return figure


def draw_exam(measurements: list[Measurement]) -> Any:
    """Draw loss by position in the document, and on the repeated passage by distance, with standard errors."""
    figure = create_figure(9, 3.4)
    by_position, by_distance = figure.subplots(1, 2)
    for one in measurements:
        edges = one.details["edges"]
        names = [f"loss, tokens {begin + 1} to {end}" for begin, end in pairwise(edges)]
        _plot_with_errors(by_position, one, edges[1:], names)
        distances = one.details["distances"]
        _plot_with_errors(by_distance, one, distances, [f"repeat_loss@{distance}" for distance in distances])
    labels = (
        ("loss by position, nats per token", "tokens of the document, up to"),
        ("loss on a passage read before", "tokens since then"),
    )
    for axes, (title, label) in zip((by_position, by_distance), labels):
        axes.set_xscale("log", base=2)
        axes.set_xlabel(label)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    by_distance.set_ylim(bottom=0)
    by_position.legend(fontsize=7)
    return figure


def draw_needle(measurements: list[Measurement]) -> Any:
    """Draw heat maps over length and depth: a column per model, two rows per task, by generation and by likelihood."""
    tasks = list(dict.fromkeys(cell["task"] for one in measurements for cell in one.details["cells"]))
    rows = [(task, score) for task in tasks for score in ("generated", "chosen")]
    figure = create_figure(0.9 + 1.9 * len(measurements), 0.6 + 1.25 * len(rows))
    panels = figure.subplots(len(rows), len(measurements), squeeze=False)
    for column, one in enumerate(measurements):
        for row, (task, score) in enumerate(rows):
            cells = [cell for cell in one.details["cells"] if cell["task"] == task]
            lengths = sorted({cell["length"] for cell in cells})
            depths = sorted({cell["depth"] for cell in cells})
            scores = {(cell["depth"], cell["length"]): cell[score] for cell in cells}
            axes = panels[row][column]
            image = axes.imshow(
                [[scores[depth, length] for length in lengths] for depth in depths],
                vmin=0, vmax=1, aspect="auto", cmap="viridis",
            )  # fmt: skip
            axes.set_xticks(range(len(lengths)), lengths if row == len(rows) - 1 else [], fontsize=6)
            axes.set_yticks(range(len(depths)), depths if column == 0 else [], fontsize=6)
            if row == 0:
                axes.set_title(one.model, fontsize=7)
            if column == 0:
                axes.set_ylabel(f"{task}\n{score}\ndepth", fontsize=6)
    figure.supxlabel("tokens", fontsize=7)
    figure.colorbar(image, ax=panels, fraction=0.03).ax.tick_params(labelsize=6)
    return figure


def draw_passkey(measurements: list[Measurement]) -> Any:
    """Draw the share of pass keys generated, and of those likeliest among the candidates, over length."""
    figure = create_figure(8, 3.2)
    generated, chosen = figure.subplots(1, 2, sharey=True)
    for one in measurements:
        lengths = sorted({cell["length"] for cell in one.details["cells"]})
        candidates = one.settings["distractors"] + 1
        for axes, ending in ((generated, ""), (chosen, f", among {candidates}")):
            _plot_with_errors(axes, one, lengths, [f"passkey, {length} tokens{ending}" for length in lengths])
    for candidates in {one.settings["distractors"] + 1 for one in measurements}:
        chosen.axhline(1 / candidates, color="grey", linestyle=":", linewidth=1)
    for axes, title in ((generated, "generated"), (chosen, "likeliest of the candidates")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    generated.set_ylabel("share of pass keys")
    generated.legend(fontsize=7)
    return figure


def draw_facts(measurements: list[Measurement]) -> Any:
    """Draw the share of answers written, and of those likeliest of all places, over length: a row for each task."""
    tasks = list(dict.fromkeys(cell["task"] for one in measurements for cell in one.details["cells"]))
    lengths = sorted({cell["length"] for one in measurements for cell in one.details["cells"]})
    candidates = len(PLACES)
    figure = create_figure(8, 0.6 + 2.4 * len(tasks))
    panels = figure.subplots(len(tasks), 2, sharey=True, squeeze=False)
    for row, task in zip(panels, tasks):
        for axes, ending in zip(row, ("", f", among {candidates}")):
            for one in measurements:
                asked = [length for length in lengths if f"{task}, {length} tokens{ending}" in one.values]
                names = [f"{task}, {length} tokens{ending}" for length in asked]
                # By place, not by length: the first length is 0, the facts alone.
                _plot_with_errors(axes, one, [lengths.index(length) for length in asked], names)
            axes.set_xticks(range(len(lengths)), [f"{length:,}" if length else "alone" for length in lengths])
            axes.grid(alpha=0.3)
        row[0].set_ylabel(f"{task}: share of questions", fontsize=8)
        row[1].axhline(1 / candidates, color="grey", linestyle=":", linewidth=1)
    for axes, title in zip(panels[0], ("written", "likeliest of the places")):
        axes.set_title(title, fontsize=10)
    for axes in panels[-1]:
        axes.set_xlabel("tokens")
    panels[0, 0].legend(fontsize=7)
    return figure


def draw_recall(measurements: list[Measurement]) -> Any:
    """Draw recall over the number of pairs, with chance dotted, and over the bytes of the state after them."""
    figure = create_figure(9, 3.4)
    by_pairs, by_state = figure.subplots(1, 2, sharey=True)
    for one in measurements:
        names = [f"recall, {n} pairs" for n in one.details["pairs"]]
        color = _plot_with_errors(by_pairs, one, one.details["pairs"], names)
        sizes = [size / 1e6 for size in one.details["state_bytes"]]
        recalls = [one.values[name] for name in names]
        by_state.plot(sizes, recalls, marker="o", markersize=3, color=color, label=one.model)
    pairs = sorted({n for one in measurements for n in one.details["pairs"]})
    by_pairs.plot(pairs, [1 / n for n in pairs], color="grey", linestyle=":", linewidth=1, label="chance")
    for axes, label in ((by_pairs, "pairs"), (by_state, "state after these pairs, MB")):
        axes.set_xscale("log", base=2)
        axes.set_xlabel(label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    by_pairs.set_ylabel("recall among the values shown")
    return figure


def _plot_with_errors(axes: Any, measurement: Measurement, xs: list[int], names: list[str]) -> str:
    """Plot named values with their standard errors; returns the color of the line."""
    bars = axes.errorbar(
        xs,
        [measurement.values[name] for name in names],
        [measurement.errors.get(name, 0.0) for name in names],
        marker="o",
        markersize=3,
        capsize=2,
        label=measurement.model,
    )
    return bars.lines[0].get_color()


MEASURE_FIGURES: dict[str, Callable[[list[Measurement]], Any]] = {
    "agreement": draw_agreement,
    "exam": draw_exam,
    "tasks": draw_tasks,
    "positions": draw_positions,
    "needle": draw_needle,
    "facts": draw_facts,
    "recall": draw_recall,
    "passkey": draw_passkey,
    "speed": draw_speed,
    "mixing": draw_mixing,
    "hidden": draw_hidden,
}
