"""A small picture of a run for the terminal, in braille characters: loss by position, or the training loss.

output.print(plot_run(result, width=80))                  # result: what limbeck.training.pipeline.distill returns
plot_lines({"teacher": [(64, 3.9), (256, 3.1)]}, "loss by position", "tokens", width=80)
"""

import math
from pathlib import Path
from typing import Any

from rich.text import Text

from limbeck.core.screen import average_neighbors
from limbeck.report.figures.curves import read_metrics

Series = dict[str, list[tuple[float, float]]]
STYLES = ("default", "blue", "red", "green", "magenta", "yellow")
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of a braille character, row by row
ROWS = 9  # of characters
LABEL_WIDTH = 7  # of the numbers at the y axis


def plot_run(result: dict[str, Any], width: int) -> Text | None:
    """Plot the exam's loss by position for all models; without an exam the loss of the last trained stage.

    Args:
        result: a run's eval.json.
        width: columns of the terminal.
    """
    by_position = (result.get("exam") or {}).get("by_position")
    if by_position:
        series = {
            model: [(float(name.rpartition(" ")[2]), loss) for name, loss in losses.items()]
            for model, losses in by_position.items()
        }
        return plot_lines(series, "exam: loss by position, nats a token", "tokens, up to", width, log_x=True)
    stages = read_metrics(Path(result["run"]) / "metrics.jsonl")
    if not stages:
        return None
    (_, name), steps = list(stages.items())[-1]
    count = min(len(steps), width)
    numbers, losses = (average_neighbors([float(step[key]) for step in steps], count) for key in ("step", "loss"))
    return plot_lines({name: list(zip(numbers, losses))}, f"training loss of stage {name}", "step", width)


def plot_lines(series: Series, title: str, x_label: str, width: int, log_x: bool = False) -> Text | None:
    """Plot points (x, y) of each series, joined by straight lines and named at their ends; None if there are too few.

    Args:
        log_x: a logarithmic x axis.
    """
    lines = {
        name: [(math.log2(x) if log_x else x, y) for x, y in points if y is not None and math.isfinite(y)]
        for name, points in series.items()
    }
    lines = {name: line for name, line in lines.items() if line}  # a model that diverged has no finite loss
    points = [point for line in lines.values() for point in line]
    if max(map(len, lines.values()), default=0) < 2:
        return None
    (x_low, x_high), (y_low, y_high) = ((min(axis), max(axis)) for axis in zip(*points))
    columns = max(min(width, 100) - LABEL_WIDTH - max(map(len, lines)) - 4, 10)
    x_scale = (2 * columns - 1) / ((x_high - x_low) or 1.0)
    y_scale = (4 * ROWS - 1) / ((y_high - y_low) or 1.0)
    bits = [[0] * columns for _ in range(ROWS)]
    styles = [[""] * columns for _ in range(ROWS)]
    ends: dict[int, tuple[str, str]] = {}  # by row: the name that stands behind it, and its style
    for (name, line), style in zip(lines.items(), STYLES):
        dots = [(round((x - x_low) * x_scale), round((y_high - y) * y_scale)) for x, y in line]
        for (x0, y0), (x1, y1) in zip(dots, dots[1:] or dots):
            length = max(abs(x1 - x0), abs(y1 - y0), 1)
            for i in range(length + 1):
                x, y = round(x0 + (x1 - x0) * i / length), round(y0 + (y1 - y0) * i / length)
                bits[y // 4][x // 2] |= DOTS[y % 4][x % 2]
                styles[y // 4][x // 2] = style
        row = min((r for r in range(ROWS) if r not in ends), key=lambda r: abs(r - dots[-1][1] // 4))
        ends[row] = (name, style)
    text = Text.assemble((f"{title}\n", "bold"))
    for row in range(ROWS):
        y = {0: y_high, ROWS - 1: y_low}.get(row)
        text.append(f"{'' if y is None else f'{y:.4g}':>{LABEL_WIDTH}} ┤", "dim")
        for cell, style in zip(bits[row], styles[row]):
            text.append(chr(0x2800 + cell) if cell else " ", style)
        name, style = ends.get(row, ("", ""))
        text.append(f" {name}".rstrip() + "\n", style)
    low, high = (f"{2**x if log_x else x:,.0f}" for x in (x_low, x_high))
    gap = max(columns - len(low) - len(high), 1)
    return text.append(f"{'':{LABEL_WIDTH + 2}}{low}{f' {x_label} ':^{gap}}{high}\n", "dim")
