"""Training curves of a run: a panel per stage, in stages 1 and 2 with a line per layer.

    draw_loss_curves(Path("runs/quickstart/metrics.jsonl"), Path("runs/quickstart/curves.png"))

Layers go from dark (first) to light (last); the bold line is their mean, or the loss of the whole model. The line of a
layer that stopped early ends.
"""

import json
from pathlib import Path
from typing import Any

from limbeck.core.config import format_stage_name
from limbeck.core.errors import LimbeckError
from limbeck.report.figures.style import (
    COLORS,
    check_figure_format,
    create_figure,
    save_figure,
    use_log_scale,
    use_style,
)

MEAN_COLOR = "#000000"
LAYERWISE_STAGES = ("matrix", "hidden")
STAGE_TITLES = {  # in the order shown: the last stage comes first, because students are compared by it
    "logits": ("Stage 3: logits", "loss, nats per token"),
    "hidden": ("Stage 2: hidden states", "loss"),
    "matrix": ("Stage 1: mixing matrices", "loss"),
}


def draw_loss_curves(metrics: Path, path: Path, title: str = "") -> None:
    """Write the figure of a run's metrics.jsonl.

    Args:
        title: names the run.

    Raises:
        LimbeckError: no steps are logged, matplotlib is not installed, or an unsupported format.
    """
    stages = read_metrics(metrics)
    if not stages:
        raise LimbeckError(f"{metrics} contains no steps", expected="the metrics.jsonl of a run with stages 1 to 3")
    check_figure_format(path)
    with use_style():
        figure = create_figure(max(4.2 * len(stages), 5.0), 3.6)
        for axes, ((_, name), steps) in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages.items()):
            _draw_stage(axes, name, steps)
        if title:
            figure.suptitle(title, fontsize=11)
        save_figure(figure, path)


def _draw_stage(axes: Any, name: str, steps: list[dict[str, Any]]) -> None:
    """Draw a stage's training loss, that of each layer where there are several, and the held-out loss."""
    layers: list[str] = []
    if name in LAYERWISE_STAGES:
        layers = list(dict.fromkeys(layer for step in steps for layer in step["losses"]))
    labels = {0: "first layer", len(layers) - 1: "last layer"} if len(layers) > 1 else {}
    for index, layer in enumerate(layers):
        points = [(step["step"], step["losses"][layer]) for step in steps if layer in step["losses"]]
        axes.plot(*zip(*points), color=_get_shade(index, len(layers)), linewidth=0.7, label=labels.get(index))
    total = [step["loss"] for step in steps]
    label = "mean of all layers" if layers else "training"
    axes.plot(
        [step["step"] for step in steps], total, color=MEAN_COLOR if layers else COLORS[0], linewidth=1.6, label=label
    )
    held_out = [(step["step"], step["held_out_loss"]) for step in steps if "held_out_loss" in step]
    if held_out:
        axes.plot(*zip(*held_out), "o--", color=COLORS[1], markersize=3, linewidth=0.8, label="held out")
    if layers and all(loss > 0 for step in steps for loss in step["losses"].values()):
        use_log_scale(axes.yaxis)
    stage_title, unit = STAGE_TITLES.get(name, (format_stage_name(name), "loss"))
    axes.set_xlabel("step")
    axes.set_ylabel(unit)
    axes.set_title(stage_title + (f", {len(layers)} layers" if layers else ""))
    axes.legend()


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
