"""Measurements of several models in one table: on the screen, as Markdown, as CSV, with their figures.

    measurements = load_measurements([Path("runs")])         # what was measured before; no model is loaded
    output.print(build_comparison_table(measurements))
    write_comparison(measurements, Path("comparison"))       # table.md, values.csv, and each figure as .svg and .png

Rows are numbers, grouped by measure, and columns models; with more than six models rows are models, and each measure
has a table of its own.
"""

import json
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.extras import find_missing
from limbeck.core.storage import atomic_write_text
from limbeck.evaluation.baselines import describe_windows
from limbeck.evaluation.measure import Measurement
from limbeck.report.figures import speed
from limbeck.report.figures.measures import draw_measure
from limbeck.report.figures.style import save_figure, use_style
from limbeck.report.privacy import get_basename, is_local_path
from limbeck.report.text_tables import format_csv, format_markdown_table
from limbeck.report.values import format_name, format_value, mark_at_chance

MAX_MODEL_COLUMNS = 6  # models that fit beside each other


def build_comparison_table(measurements: list[Measurement]) -> RenderableType:
    """Build the comparison for the screen: numbers by models, or models by numbers where there are many models."""
    models, groups = _models(measurements), _value_names(measurements)
    remarks = [Text(line) for line in _list_remarks(measurements)]
    if len(models) > MAX_MODEL_COLUMNS:
        parts: list[RenderableType] = []
        for measure, names in groups.items():
            columns, rows = _model_rows(measurements, measure, names, models)
            parts += [Text(measure, style="bold"), _screen_table(columns, rows), Text("")]
        return Group(*parts, *remarks)
    rows = []
    for measure, names in groups.items():
        heading, *body = _value_rows(measurements, measure, names, models)
        rows += [[Text(heading[0], style="bold")], *([f"  {label}", *cells] for label, *cells in body)]
    return Group(_screen_table(["", *models], rows), *remarks)


def format_comparison(measurements: list[Measurement]) -> str:
    """Format the comparison as Markdown, in the layout of `build_comparison_table`."""
    models, groups = _models(measurements), _value_names(measurements)
    remarks = [f"{line}\n" for line in _list_remarks(measurements)]
    if len(models) > MAX_MODEL_COLUMNS:
        tables = []
        for measure, names in groups.items():
            table = format_markdown_table(*_model_rows(measurements, measure, names, models))
            tables.append(f"**{measure}**\n\n{table}")
        return "\n".join([*tables, *remarks])
    rows = []
    for measure, names in groups.items():
        heading, *body = _value_rows(measurements, measure, names, models)
        rows += [[f"**{heading[0]}**", *("" for _ in models)], *body]
    return "\n".join([format_markdown_table(["", *models], rows), *remarks])


def describe_text(measurements: list[Measurement], measure: str, model: str) -> str:
    """Name the text a model was measured on, "corpus.jsonl, held-out part"; "" for measures that bring their own."""
    for one in measurements:
        if (one.measure, one.model) == (measure, model) and "part" in one.data:
            name = one.data["text"]
            return f"{get_basename(name) if is_local_path(name) else name}, {one.data['part']}"
    return ""


def find_text_mismatches(measurements: list[Measurement]) -> list[str]:
    """Write a warning for each measure whose models stand side by side but were measured on different texts."""
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


def _list_remarks(measurements: list[Measurement]) -> list[str]:
    """List the sentences under the table."""
    lines = [*find_text_mismatches(measurements), *describe_windows(measurements)]
    at_chance = {one.measure: _find_at_chance(measurements, one.measure) for one in measurements}
    return lines + [
        f"{measure}: the teacher is at chance on {'; '.join(tasks)}: they are in no mean"
        for measure, tasks in at_chance.items()
        if tasks
    ]


def _find_at_chance(measurements: list[Measurement], measure: str) -> list[str]:
    """Find the tasks of a measure on which some teacher does no better than guessing."""
    named = [one.details.get("teacher_at_chance", []) for one in measurements if one.measure == measure]
    return list(dict.fromkeys(task for tasks in named for task in tasks))


def _label(measurements: list[Measurement], measure: str, name: str) -> str:
    """Name a value in words; marks those of tasks on which the teacher is at chance."""
    return mark_at_chance(format_name(name), name, _find_at_chance(measurements, measure))


def measurements_to_csv(measurements: list[Measurement]) -> str:
    """Format all numbers as CSV, a line a number, unrounded: model, measure, name, value, standard error."""
    rows = [
        [one.model, one.measure, name, value, one.errors.get(name, "")]
        for one in measurements
        for name, value in one.values.items()
    ]
    return format_csv(["model", "measure", "name", "value", "standard_error"], rows)


def write_comparison(measurements: list[Measurement], folder: Path) -> list[Path]:
    """Write table, CSV, the figures of the measures that have one, and accuracy against speed if both were measured.

    Figures are left out, and that is said, where matplotlib is not installed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "table.md", folder / "values.csv"]
    atomic_write_text(paths[0], format_comparison(measurements))
    atomic_write_text(paths[1], measurements_to_csv(measurements))
    if (extra := find_missing("matplotlib")) is not None:
        console.print(f"no figures drawn: they need matplotlib; {extra.command}")
        return paths
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


def load_measurements(paths: list[Path]) -> list[Measurement]:
    """Load measurements from files and folders, all folders below included; of one model's measure the newest.

    Raises:
        LimbeckError: a path does not exist, a file is no measurement, or there is none at all.
    """
    newest: dict[tuple[str, str], Measurement] = {}
    for source in paths:
        if not source.exists():
            raise LimbeckError(f"{source} does not exist", expected="a folder with measurements, or a file")
        for path in sorted(source.rglob("*.json")) if source.is_dir() else [source]:
            if source.is_dir() and not _is_measurement(path):
                continue
            one = Measurement.load(path)
            earlier = newest.get((one.model, one.measure))
            if earlier is not None and earlier != one:
                console.print(f"{one.measure} of {one.model} was found more than once; using the newest")
                one = max(one, earlier, key=lambda m: m.provenance.date)
            newest[one.model, one.measure] = one
    if not newest:
        raise LimbeckError(
            f"no measurements in {', '.join(map(str, paths))}",
            expected="a run directory, or the folder given to --out",
            hint="limbeck eval MODEL",
        )
    return list(newest.values())


def _is_measurement(path: Path) -> bool:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"measure", "model", "values", "provenance"} <= content.keys()


def _models(measurements: list[Measurement]) -> list[str]:
    return list(dict.fromkeys(one.model for one in measurements))


def _value_names(measurements: list[Measurement]) -> dict[str, list[str]]:
    """The names of the numbers by measure, each in the order in which models bring them."""
    groups: dict[str, dict[str, None]] = {}
    for one in measurements:
        groups.setdefault(one.measure, {}).update(dict.fromkeys(one.values))
    return {measure: list(names) for measure, names in groups.items()}


def _value_rows(measurements: list[Measurement], measure: str, names: list[str], models: list[str]) -> list[list[Any]]:
    """A measure's rows where models are columns: its name, the texts where they differ by model, the numbers."""
    rows: list[list[Any]] = [[measure]]
    if any(texts := [describe_text(measurements, measure, model) for model in models]):
        rows.append(["text", *texts])
    cells = ([_cell(measurements, measure, name, model) for model in models] for name in names)
    return rows + [[_label(measurements, measure, name), *row] for name, row in zip(names, cells)]


def _model_rows(
    measurements: list[Measurement], measure: str, names: list[str], models: list[str]
) -> tuple[list[str], list[list[Any]]]:
    """A measure's columns and rows where models are rows; a second column names the texts."""
    columns = ["", *(_label(measurements, measure, name) for name in names)]
    rows = [[model, *(_cell(measurements, measure, name, model) for name in names)] for model in models]
    if any(texts := [describe_text(measurements, measure, model) for model in models]):
        columns.insert(1, "text")
        for row, text in zip(rows, texts):
            row.insert(1, text)
    return columns, rows


def _cell(measurements: list[Measurement], measure: str, name: str, model: str) -> str:
    for one in measurements:
        if (one.measure, one.model) == (measure, model) and name in one.values:
            return format_value(name, one.values[name], one.errors.get(name))
    return ""


def _screen_table(columns: list[str], rows: list[list[Any]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
