"""Sweeps of learning rates: a table for the screen, every number as CSV, and their curves.

output.print(table(sweeps))
write(sweeps, Path("runs/mine-rates"))       # rates.csv, and rates.png where matplotlib is installed
"""

import csv
import importlib.util
from pathlib import Path

from rich.table import Table

from limbeck.data.cache import no_room_is_an_error
from limbeck.reading import stage_label
from limbeck.report.figure import new_figure, save
from limbeck.stages.sweep import Sweep


def table(sweeps: list[Sweep]) -> Table:
    """A row a stage: the recipe's rate, the suggested one, and where the loss was lowest."""
    shown = Table(title="learning rates", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "starts after", "recipe", "suggested", "lowest loss at", "loss from", "to"):
        shown.add_column(column, justify="left" if column.startswith("sta") else "right")
    for sweep in sweeps:
        suggested = "none: it never falls" if sweep.suggested is None else f"{sweep.suggested:.1e}"
        lowest = sweep.smooth[sweep.lowest]
        shown.add_row(
            stage_label(sweep.stage), sweep.begun_from, f"{sweep.given:.1e}", suggested,
            f"{sweep.rates[sweep.lowest]:.1e}", f"{sweep.losses[0]:.4g}", f"{lowest:.4g}",
        )  # fmt: skip
    return shown


def write(sweeps: list[Sweep], folder: Path) -> list[Path]:
    """Write the numbers, and the picture where matplotlib is installed; the paths."""
    with no_room_is_an_error(folder):
        return _write(sweeps, folder)


def _write(sweeps: list[Sweep], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "rates.csv"]
    with open(paths[0], "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["stage_index", "stage", "rate", "loss", "smooth_loss"])
        for sweep in sweeps:
            rows = zip(sweep.rates, sweep.losses, sweep.smooth)
            writer.writerows([sweep.index, sweep.stage, *row] for row in rows)
    if importlib.util.find_spec("matplotlib"):
        paths.append(folder / "rates.png")
        draw(sweeps, paths[1])
    return paths


def draw(sweeps: list[Sweep], path: Path) -> None:
    """The loss over the rate, a panel a stage; the dashed line is the recipe's rate, the solid one the suggested."""
    figure = new_figure(4 * len(sweeps), 3.2)
    for axes, sweep in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps):
        axes.plot(sweep.rates, sweep.losses, ".", markersize=3, alpha=0.5)
        axes.plot(sweep.rates, sweep.smooth)
        axes.axvline(sweep.given, linestyle="--", color="grey", linewidth=0.8)
        if sweep.suggested is not None:
            axes.axvline(sweep.suggested, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_title(stage_label(sweep.stage), fontsize=10)
        axes.grid(alpha=0.3)
    save(figure, path)
