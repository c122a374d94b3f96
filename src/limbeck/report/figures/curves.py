"""Training curves of a run: a panel per stage, in stages 1 and 2 with a line per layer.

    draw_loss_curves(Path("runs/quickstart/metrics.jsonl"), Path("runs/quickstart/curves.png"))

Layers go from dark (first) to light (last); the bold line is the total loss. The line of a layer that stopped early
ends.
"""

import json
from pathlib import Path
from typing import Any

from limbeck.core.config import format_stage_name
from limbeck.core.errors import LimbeckError
from limbeck.report.figures.style import check_figure_format, create_figure, save_figure

LAYERWISE_STAGES = ("matrix", "hidden")


def draw_loss_curves(metrics: Path, path: Path) -> None:
    """Write the figure of a run's metrics.jsonl.

    Raises:
        LimbeckError: no steps are logged, matplotlib is not installed, or an unsupported format.
    """
    stages = read_metrics(metrics)
    if not stages:
        raise LimbeckError(f"{metrics} contains no steps", expected="the metrics.jsonl of a run with stages 1 to 3")
    check_figure_format(path)
    figure = create_figure(4.2 * len(stages), 3.4)
    for axes, ((_, name), steps) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items()):
        layers: list[str] = []
        if name in LAYERWISE_STAGES:
            layers = list(dict.fromkeys(layer for step in steps for layer in step["losses"]))
        for index, layer in enumerate(layers):
            points = [(step["step"], step["losses"][layer]) for step in steps if layer in step["losses"]]
            axes.plot(*zip(*points), color=_get_shade(index, len(layers)), linewidth=0.7)
        axes.plot([step["step"] for step in steps], [step["loss"] for step in steps], color="black", linewidth=1.6)
        held_out = [(step["step"], step["held_out_loss"]) for step in steps if "held_out_loss" in step]
        if held_out:
            axes.plot(*zip(*held_out), "o--", color="tab:red", markersize=3, linewidth=0.8, label="held out")
            axes.legend(fontsize=7)
        if layers and all(loss > 0 for step in steps for loss in step["losses"].values()):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_title(format_stage_name(name) + (f", {len(layers)} layers" if layers else ""), fontsize=10)
        axes.grid(alpha=0.3)
    save_figure(figure, path)


def read_metrics(metrics: Path) -> dict[tuple[int, str], list[dict[str, Any]]]:
    """Read metrics.jsonl: its steps by index and name of the stage."""
    stages: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        try:
            step = json.loads(line)
        except ValueError:  # a killed run may leave an incomplete line
            continue
        stages.setdefault((step["stage_index"], step["stage"]), []).append(step)
    return stages


def _get_shade(index: int, count: int) -> tuple[float, float, float]:
    """Get a shade of blue, from dark to light."""
    fraction = index / max(count - 1, 1)
    return 0.10 + 0.55 * fraction, 0.25 + 0.55 * fraction, 0.55 + 0.40 * fraction
