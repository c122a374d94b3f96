"""Measurements of several models in one table: on the screen, as Markdown, as CSV, with their figures.

output.print(table(found))
write(found, Path("comparison"))       # table.md, values.csv, <measure>.svg and .png
"""

import csv
import io
from pathlib import Path
from typing import Any

from rich.table import Table

from limbeck.evaluate.measurement import Measurement
from limbeck.evaluate.measures import Measure, find
from limbeck.report.figure import save


def table(found: list[Measurement]) -> Table:
    """A row a number, a column a model."""
    rows, models = _rows(found)
    shown = Table(box=None, pad_edge=False)
    for column in ("", *models):
        shown.add_column(column, justify="right" if column else "left", overflow="fold")
    for row in rows:
        shown.add_row(*row)
    return shown


def markdown(found: list[Measurement]) -> str:
    """The same as a Markdown table."""
    rows, models = _rows(found)
    head = ["| | " + " | ".join(models) + " |", "|---|" + "---|" * len(models)]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def as_csv(found: list[Measurement]) -> str:
    """One line a number: model, measure, name, value, standard error."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["model", "measure", "name", "value", "standard_error"])
    for one in found:
        writer.writerows([one.model, one.measure, name, v, one.errors.get(name, "")] for name, v in one.values.items())
    return file.getvalue()


def write(found: list[Measurement], folder: Path) -> list[Path]:
    """Table, CSV and the figures of the measures that have one."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "table.md", folder / "values.csv"]
    paths[0].write_text(markdown(found))
    paths[1].write_text(as_csv(found))
    for name in dict.fromkeys(one.measure for one in found):
        draw = find(name).draw
        if draw is None:
            continue
        figure = draw([one for one in found if one.measure == name])
        for ending in ("svg", "png"):
            paths.append(folder / f"{name}.{ending}")
            save(figure, paths[-1])
    return paths


def listing(measures: list[Measure]) -> Table:
    """What can be measured, and the settings with their defaults."""
    shown = Table(box=None, pad_edge=False)
    for column in ("measure", "what", "settings"):
        shown.add_column(column, overflow="fold")
    for one in measures:
        defaults: dict[str, Any] = one.settings().model_dump(mode="json")
        shown.add_row(one.name, one.about, ", ".join(f"{key}={value}" for key, value in defaults.items()))
    return shown


def _rows(found: list[Measurement]) -> tuple[list[list[str]], list[str]]:
    models = list(dict.fromkeys(one.model for one in found))
    names = dict.fromkeys((one.measure, name) for one in found for name in one.values)
    cells = {(one.measure, name, one.model): _cell(one, name) for one in found for name in one.values}
    rows = [[f"{m}: {name}".replace("_", " "), *(cells.get((m, name, one), "") for one in models)] for m, name in names]
    return rows, models


def _cell(one: Measurement, name: str) -> str:
    value, error = one.values[name], one.errors.get(name)
    return f"{value:.4g}" if error is None else f"{value:.4g} ± {error:.2g}"
