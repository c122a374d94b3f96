"""Measurements of several models in one table: on the screen, as Markdown, as CSV, with their figures.

    output.print(build_comparison_table(measurements))
    write_comparison(measurements, Path("comparison"))       # table.md, values.csv, <measure>.svg and .png, tradeoff.svg and .png
    measurements = load_measurements([Path("runs")])         # what was measured before, without any model

Rows are numbers, grouped by measure, and columns models; with more than six models rows are models, and each measure
has a table of its own.
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import atomic_write_text
from limbeck.evaluation.measure import Measure, Measurement
from limbeck.report.figures import speed
from limbeck.report.figures.measures import draw_measure
from limbeck.report.figures.style import save_figure, use_style
from limbeck.report.privacy import get_basename, is_local_path
from limbeck.report.values import format_name, format_value

MAX_MODEL_COLUMNS = 6  # models that fit beside each other


def build_comparison_table(measurements: list[Measurement]) -> RenderableType:
    """For the screen: a row a number, a column a model, or the other way round where there are many."""
    models = _models(measurements)
    groups = _groups(measurements)
    if len(models) > MAX_MODEL_COLUMNS:
        parts: list[RenderableType] = []
        for measure, names in groups.items():
            shape = [[model, *(_cell(measurements, measure, name, model) for name in names)] for model in models]
            heads, shape = _with_texts(measurements, measure, models, ["", *map(format_name, names)], shape)
            parts += [Text(measure, style="bold"), _shown(heads, shape), Text("")]
        return Group(*parts, *map(Text, find_text_mismatches(measurements)))
    rows: list[list[Any]] = []
    for measure, names in groups.items():
        rows.append([Text(measure, style="bold")])
        if any(texts := [describe_text(measurements, measure, model) for model in models]):
            rows.append(["  text", *texts])
        rows += [
            [f"  {format_name(name)}", *(_cell(measurements, measure, name, model) for model in models)]
            for name in names
        ]
    return Group(_shown(["", *models], rows), *map(Text, find_text_mismatches(measurements)))


def format_comparison(measurements: list[Measurement]) -> str:
    """The same for documents."""
    models = _models(measurements)
    groups = _groups(measurements)
    if len(models) > MAX_MODEL_COLUMNS:
        parts = []
        for measure, names in groups.items():
            rows = [[model, *(_cell(measurements, measure, name, model) for name in names)] for model in models]
            heads, rows = _with_texts(measurements, measure, models, ["", *map(format_name, names)], rows)
            parts.append(f"**{measure}**\n\n{_pipes(heads, rows)}")
        return "\n".join([*parts, *(f"{line}\n" for line in find_text_mismatches(measurements))])
    rows = []
    for measure, names in groups.items():
        rows.append([f"**{measure}**", *("" for _ in models)])
        if any(texts := [describe_text(measurements, measure, model) for model in models]):
            rows.append(["text", *texts])
        rows += [
            [format_name(name), *(_cell(measurements, measure, name, model) for model in models)] for name in names
        ]
    return _pipes(["", *models], rows) + "".join(f"\n{line}\n" for line in find_text_mismatches(measurements))


def describe_text(measurements: list[Measurement], measure: str, model: str) -> str:
    """What a model was measured on, "corpus.jsonl, held-out part"; nothing for measures that bring their own."""
    for one in measurements:
        if (one.measure, one.model) == (measure, model) and "part" in one.data:
            name = one.data["text"]
            return f"{get_basename(name) if is_local_path(name) else name}, {one.data['part']}"
    return ""


def find_text_mismatches(measurements: list[Measurement]) -> list[str]:
    """A line for each measure of models that stand side by side and were not measured on the same text."""
    lines = []
    for measure in dict.fromkeys(one.measure for one in measurements):
        texts: dict[Any, str] = {}
        for one in measurements:
            if one.measure == measure and "part" in one.data:
                texts.setdefault((one.data["key"], one.data["part"]), one.model)
        if len(texts) > 1:
            lines.append(
                f"{measure}: {' and '.join(texts.values())} were not measured on the same text, so their numbers "
                "cannot be compared; --data names one text for all"
            )
    return lines


def _with_texts(
    measurements: list[Measurement], measure: str, models: list[str], heads: list[str], rows: list[list[str]]
) -> tuple[list[str], list[list[str]]]:
    """Rows of models with a column that says what each was measured on."""
    texts = [describe_text(measurements, measure, model) for model in models]
    if not any(texts):
        return heads, rows
    return [heads[0], "text", *heads[1:]], [[row[0], text, *row[1:]] for row, text in zip(rows, texts)]


def measurements_to_csv(measurements: list[Measurement]) -> str:
    """One line a number: model, measure, name, value, standard error; plain numbers, as in the files."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["model", "measure", "name", "value", "standard_error"])
    for one in measurements:
        writer.writerows([one.model, one.measure, name, v, one.errors.get(name, "")] for name, v in one.values.items())
    return file.getvalue()


def write_comparison(measurements: list[Measurement], folder: Path) -> list[Path]:
    """Table, CSV, the figures of the measures that have one, and accuracy against speed where both were measured."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "table.md", folder / "values.csv"]
    atomic_write_text(paths[0], format_comparison(measurements))
    atomic_write_text(paths[1], measurements_to_csv(measurements))
    with use_style(_models(measurements)):
        figures = {}
        for name in dict.fromkeys(one.measure for one in measurements):
            figure = draw_measure(name, [one for one in measurements if one.measure == name])
            if figure is not None:
                figures[name] = figure
        if speed.can_draw_tradeoff(measurements):
            figures["tradeoff"] = speed.draw_tradeoff(measurements)
        for name, figure in figures.items():
            for ending in ("svg", "png"):
                paths.append(folder / f"{name}.{ending}")
                save_figure(figure, paths[-1])
    return paths


def build_measure_table(measures: list[Measure]) -> Table:
    """What can be measured, and the settings with their defaults."""
    shown = Table(box=None, pad_edge=False)
    for column in ("measure", "what", "settings"):
        shown.add_column(column, overflow="fold")
    for one in measures:
        defaults: dict[str, Any] = one.settings().model_dump(mode="json")
        shown.add_row(one.name, one.description, ", ".join(f"{key}={value}" for key, value in defaults.items()))
    return shown


def load_measurements(paths: list[Path]) -> list[Measurement]:
    """Measurements from files and folders, all folders below included; of one model's measure the newest.

    Raises:
        LimbeckError: no such place, a file that is no measurement, or none in all the places.
    """
    kept: dict[tuple[str, str], Measurement] = {}
    for place in paths:
        if not place.exists():
            raise LimbeckError(f"there is no {place}", expected="a folder with measurements, or a file")
        for path in sorted(place.rglob("*.json")) if place.is_dir() else [place]:
            if place.is_dir() and not _looks_like_one(path):
                continue
            one = Measurement.load(path)
            earlier = kept.get((one.model, one.measure))
            if earlier is not None and earlier != one:
                console.print(f"{one.measure} of {one.model}: found more than once, the newest counts", markup=False)
                one = max(one, earlier, key=lambda m: m.provenance.date)
            kept[one.model, one.measure] = one
    if not kept:
        raise LimbeckError(
            f"no measurements in {', '.join(map(str, paths))}",
            expected="a run directory, or what --out named",
            hint="limbeck eval MODEL",
        )
    return list(kept.values())


def _looks_like_one(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"measure", "model", "values", "provenance"} <= content.keys()


def _models(measurements: list[Measurement]) -> list[str]:
    return list(dict.fromkeys(one.model for one in measurements))


def _groups(measurements: list[Measurement]) -> dict[str, list[str]]:
    """The names of the numbers by measure, each in the order in which models bring them."""
    groups: dict[str, dict[str, None]] = {}
    for one in measurements:
        groups.setdefault(one.measure, {}).update(dict.fromkeys(one.values))
    return {measure: list(names) for measure, names in groups.items()}


def _cell(measurements: list[Measurement], measure: str, name: str, model: str) -> str:
    for one in measurements:
        if (one.measure, one.model) == (measure, model) and name in one.values:
            return format_value(name, one.values[name], one.errors.get(name))
    return ""


def _shown(head: list[str], rows: list[list[Any]]) -> Table:
    made = Table(box=None, pad_edge=False)
    for index, column in enumerate(head):
        made.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    return made


def _pipes(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |\n" for row in lines)
