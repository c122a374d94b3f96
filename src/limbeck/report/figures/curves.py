"""The losses of a run over its steps: one panel a stage, and in stages 1 and 2 one line a layer.

    draw_loss_curves(Path("runs/quickstart/metrics.jsonl"), Path("runs/quickstart/curves.png"))

Layers go from dark (the first) to light (the last); the thick line is the loss of all. A layer that stopped early ends.
"""

import json
from pathlib import Path
from typing import Any

from limbeck.core.config import format_stage_name
from limbeck.core.errors import LimbeckError
from limbeck.report.figures.style import check_figure_format, create_figure, save_figure

LAYERED = ("matrix", "hidden")


def draw_loss_curves(metrics: Path, path: Path) -> None:
    """Write the picture.

    Raises:
        LimbeckError: no steps are logged there, matplotlib is not installed, or a format that it does not know.
    """
    stages = read_metrics(metrics)
    if not stages:
        raise LimbeckError(f"{metrics} holds no steps", expected="the metrics.jsonl of a run with stages 1 to 3")
    check_figure_format(path)
    figure = create_figure(4.2 * len(stages), 3.4)
    for axes, ((_, name), lines) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items()):
        parts = list(dict.fromkeys(part for line in lines for part in line["losses"])) if name in LAYERED else []
        for number, part in enumerate(parts):
            points = [(line["step"], line["losses"][part]) for line in lines if part in line["losses"]]
            axes.plot(*zip(*points), color=_shade(number, len(parts)), linewidth=0.7)
        axes.plot([line["step"] for line in lines], [line["loss"] for line in lines], color="black", linewidth=1.6)
        held = [(line["step"], line["held_out_loss"]) for line in lines if "held_out_loss" in line]
        if held:
            axes.plot(*zip(*held), "o--", color="tab:red", markersize=3, linewidth=0.8, label="held out")
            axes.legend(fontsize=7)
        if parts and all(value > 0 for line in lines for value in line["losses"].values()):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        layers = f", {len(parts)} layers" if parts else ""
        axes.set_title(f"{format_stage_name(name)}{layers}", fontsize=10)
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def read_metrics(metrics: Path) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """The lines of metrics.jsonl by stage; the one that a kill cut short is left out."""
    stages: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for text in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        stages.setdefault((line["stage_index"], line["stage"]), []).append(line)
    return stages


def _shade(number: int, count: int) -> tuple[float, float, float]:
    along = number / max(count - 1, 1)
    return 0.10 + 0.55 * along, 0.25 + 0.55 * along, 0.55 + 0.40 * along
