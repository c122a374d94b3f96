"""Measurements of several models in one table: on the screen, as Markdown, as CSV, with their figures.

    output.print(table(found))
    write(found, Path("comparison"))       # table.md, values.csv, <measure>.svg and .png, tradeoff.svg and .png
    found = stored([Path("runs")])         # what was measured before, without any model

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

from limbeck.console import console
from limbeck.data.cache import write_text
from limbeck.errors import LimbeckError
from limbeck.evaluate.measurement import Measurement
from limbeck.evaluate.measures import MODULES, Measure, find
from limbeck.publish.privacy import is_local, last_part
from limbeck.report import tradeoff
from limbeck.report.figure import look, save
from limbeck.report.naming import label, shown

WIDE = 6  # models that fit beside each other


def table(found: list[Measurement]) -> RenderableType:
    """For the screen: a row a number, a column a model, or the other way round where there are many."""
    models = _models(found)
    groups = _groups(found)
    if len(models) > WIDE:
        parts: list[RenderableType] = []
        for measure, names in groups.items():
            shape = [[model, *(_cell(found, measure, name, model) for name in names)] for model in models]
            heads, shape = _with_texts(found, measure, models, ["", *map(label, names)], shape)
            parts += [Text(measure, style="bold"), _shown(heads, shape), Text("")]
        return Group(*parts, *map(Text, differing_texts(found)))
    rows: list[list[Any]] = []
    for measure, names in groups.items():
        rows.append([Text(measure, style="bold")])
        if any(texts := [text_of(found, measure, model) for model in models]):
            rows.append(["  text", *texts])
        rows += [[f"  {label(name)}", *(_cell(found, measure, name, model) for model in models)] for name in names]
    return Group(_shown(["", *models], rows), *map(Text, differing_texts(found)))


def markdown(found: list[Measurement]) -> str:
    """The same for documents."""
    models = _models(found)
    groups = _groups(found)
    if len(models) > WIDE:
        parts = []
        for measure, names in groups.items():
            rows = [[model, *(_cell(found, measure, name, model) for name in names)] for model in models]
            heads, rows = _with_texts(found, measure, models, ["", *map(label, names)], rows)
            parts.append(f"**{measure}**\n\n{_pipes(heads, rows)}")
        return "\n".join([*parts, *(f"{line}\n" for line in differing_texts(found))])
    rows = []
    for measure, names in groups.items():
        rows.append([f"**{measure}**", *("" for _ in models)])
        if any(texts := [text_of(found, measure, model) for model in models]):
            rows.append(["text", *texts])
        rows += [[label(name), *(_cell(found, measure, name, model) for model in models)] for name in names]
    return _pipes(["", *models], rows) + "".join(f"\n{line}\n" for line in differing_texts(found))


def text_of(found: list[Measurement], measure: str, model: str) -> str:
    """What a model was measured on, "corpus.jsonl, held-out part"; nothing for measures that bring their own."""
    for one in found:
        if (one.measure, one.model) == (measure, model) and "part" in one.data:
            name = one.data["text"]
            return f"{last_part(name) if is_local(name) else name}, {one.data['part']}"
    return ""


def differing_texts(found: list[Measurement]) -> list[str]:
    """A line for each measure of models that stand side by side and were not measured on the same text."""
    lines = []
    for measure in dict.fromkeys(one.measure for one in found):
        texts: dict[Any, str] = {}
        for one in found:
            if one.measure == measure and "part" in one.data:
                texts.setdefault((one.data["key"], one.data["part"]), one.model)
        if len(texts) > 1:
            lines.append(
                f"{measure}: {' and '.join(texts.values())} were not measured on the same text, so their numbers "
                "cannot be compared; --data names one text for all"
            )
    return lines


def _with_texts(
    found: list[Measurement], measure: str, models: list[str], heads: list[str], rows: list[list[str]]
) -> tuple[list[str], list[list[str]]]:
    """Rows of models with a column that says what each was measured on."""
    texts = [text_of(found, measure, model) for model in models]
    if not any(texts):
        return heads, rows
    return [heads[0], "text", *heads[1:]], [[row[0], text, *row[1:]] for row, text in zip(rows, texts)]


def as_csv(found: list[Measurement]) -> str:
    """One line a number: model, measure, name, value, standard error; plain numbers, as in the files."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["model", "measure", "name", "value", "standard_error"])
    for one in found:
        writer.writerows([one.model, one.measure, name, v, one.errors.get(name, "")] for name, v in one.values.items())
    return file.getvalue()


def write(found: list[Measurement], folder: Path) -> list[Path]:
    """Table, CSV, the figures of the measures that have one, and accuracy against speed where both were measured."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "table.md", folder / "values.csv"]
    write_text(paths[0], markdown(found))
    write_text(paths[1], as_csv(found))
    with look(_models(found)):
        figures = {}
        for name in dict.fromkeys(one.measure for one in found):
            draw = find(name).draw if name in MODULES else None
            if draw is not None:
                figures[name] = draw([one for one in found if one.measure == name])
        if tradeoff.possible(found):
            figures["tradeoff"] = tradeoff.draw(found)
        for name, figure in figures.items():
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


def stored(places: list[Path]) -> list[Measurement]:
    """Measurements from files and folders, all folders below included; of one model's measure the newest.

    Raises:
        LimbeckError: no such place, a file that is no measurement, or none in all the places.
    """
    kept: dict[tuple[str, str], Measurement] = {}
    for place in places:
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
            f"no measurements in {', '.join(map(str, places))}",
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


def _models(found: list[Measurement]) -> list[str]:
    return list(dict.fromkeys(one.model for one in found))


def _groups(found: list[Measurement]) -> dict[str, list[str]]:
    """The names of the numbers by measure, each in the order in which models bring them."""
    groups: dict[str, dict[str, None]] = {}
    for one in found:
        groups.setdefault(one.measure, {}).update(dict.fromkeys(one.values))
    return {measure: list(names) for measure, names in groups.items()}


def _cell(found: list[Measurement], measure: str, name: str, model: str) -> str:
    for one in found:
        if (one.measure, one.model) == (measure, model) and name in one.values:
            return shown(name, one.values[name], one.errors.get(name))
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
