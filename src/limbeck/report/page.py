"""The report of a study or of several runs: one HTML page that needs no network; Markdown, CSV and figures beside it.

    write([Path("runs/paper-experiment-1-laptop")])          # report.html, report.md, report_files/*.svg, values.csv
    write([Path("runs/gla"), Path("runs/mlstm")], Path("compared.html"))

Nothing is measured here, and no model is loaded: all comes from the files that runs and studies leave. A section
without data is left out. The page works without JavaScript; with it tables sort and everything can be filtered.
"""

import shlex
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck import __version__
from limbeck.console import progress
from limbeck.data.cache import no_room_is_an_error, unwritable
from limbeck.errors import LimbeckError
from limbeck.report.analysis import analysis
from limbeck.report.arms import Collection, gather
from limbeck.report.claims import Claim, claims_of
from limbeck.report.figure import COLOUR_WORDS, COLOURS, look
from limbeck.report.grid import Line, Table, by_measure, headline, in_words, lines_of, named
from limbeck.report.inline import drawn, inline
from limbeck.report.naming import literal
from limbeck.report.over_length import over_length
from limbeck.report.panels import Panel, caches, losses, order_of
from limbeck.report.provenance import Provenance, provenance_of
from limbeck.report.summary import break_even, filters, glance, sentences
from limbeck.report.values import as_csv

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = ("loss", "length", "retrieval", "speed", "analysis")


@dataclass
class Shown:
    """A panel with its picture: as an element of the page, and as a file."""

    panel: Panel
    svg: str
    file: str


@dataclass
class Group:
    """Panels beside each other: those of one title under it, where each is a place of the grid."""

    title: str
    shown: list[Shown]


@dataclass
class Section:
    """Panels with whose lines they have, for the legend."""

    groups: list[Group]
    lines: list[str]


@dataclass
class Report:
    """What the templates are filled with."""

    collection: Collection
    summary: list[str]
    glance: list[tuple[str, str, str]]
    filters: dict[str, list[str]]
    colours: dict[str, int]
    claims: list[Claim]
    tables: list[Table]
    break_even: Table | None
    figures: dict[str, Section | None]
    failures: list[tuple[str, str]]
    numbers: list[Table]
    provenance: Provenance
    csv: str
    made: str


def write(places: list[Path], out: Path | None = None) -> list[Path]:
    """Write a report.

    Args:
        places: see `limbeck.report.arms.gather`.
        out: the page; report.html in the folder where there is one folder, else in the current one. Markdown and a
            folder with CSV and figures are written beside it.

    Returns:
        The page, the Markdown, the folder.

    Raises:
        LimbeckError: nothing to report, a place to write that is none, jinja2 or matplotlib is not installed.
    """
    page = out or (places[0] / "report.html" if len(places) == 1 else Path("report.html"))
    if page.suffix != ".html" or page.is_dir():
        raise LimbeckError(f"cannot write the report to {page}", expected="a file's name that ends in .html")
    if refused := unwritable(page.parent):
        raise LimbeckError(
            f"cannot write the report: {refused.found}",
            expected="a folder that this user may write to",
            hint=f"limbeck report {' '.join(map(shlex.quote, map(str, places)))} --out report.html",
        )
    templates = _environment()
    collection = gather(places)
    files = page.with_name(f"{page.stem}_files")
    with no_room_is_an_error(page.parent):
        files.mkdir(parents=True, exist_ok=True)
        csv = files / "values.csv"
        rows = [(arm.name, arm.axes, arm.values, arm.errors) for arm in collection.finished]
        csv.write_text(as_csv(rows), encoding="utf-8")
        report = _report(collection, lines_of(collection), files)
        for path, template in ((page, "page.html"), (page.with_suffix(".md"), "report.md")):
            path.write_text(templates.get_template(template).render(vars(report)), encoding="utf-8")
    return [page, page.with_suffix(".md"), files]


def _report(collection: Collection, lines: list[Line], files: Path) -> Report:
    order = order_of(collection.students)
    with look(order):
        panels = [*losses(collection), *over_length(lines), *caches(lines), *analysis(lines)]
        shown = []
        with progress("figures", len(panels), "figures") as advance:
            for number, panel in enumerate(panels, 1):
                path, svg = files / f"{panel.name}.svg", drawn(panel.figure)
                path.write_text(svg, encoding="utf-8")
                shown.append(Shown(panel, inline(svg, f"f{number}", panel.alt), f"{files.name}/{path.name}"))
                advance(1)
    return Report(
        collection=collection,
        summary=sentences(collection, lines),
        glance=glance(collection, lines),
        filters=filters(collection),
        colours={name: index % len(COLOURS) for index, name in enumerate(order)},
        claims=claims_of(collection.claims),
        tables=headline(lines),
        break_even=break_even(lines),
        figures={name: _section([one for one in shown if one.panel.section == name], order) for name in SECTIONS},
        failures=[(arm.name, _said(arm.failure)) for arm in collection.arms if arm.failure],
        numbers=by_measure(lines),
        provenance=provenance_of(collection),
        csv=f"{files.name}/values.csv",
        made=f"Made by limbeck {__version__} on {time.strftime('%Y-%m-%d at %H:%M UTC', time.gmtime())}",
    )


def _section(shown: list[Shown], order: list[str]) -> Section | None:
    if not shown:
        return None
    groups: list[Group] = []
    for one in shown:
        title = one.panel.title if one.panel.at else ""
        if not groups or groups[-1].title != title:
            groups.append(Group(title, []))
        groups[-1].shown.append(one)
    names = {name for one in shown for name in one.panel.lines}
    return Section(groups, [name for name in order if name in names])


def _said(failure: str) -> str:
    """What a failed arm said, without where in the code it was."""
    return failure.partition("\nTraceback")[0].strip()


def _environment() -> Any:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
    except ImportError as error:
        raise LimbeckError("reports need jinja2", hint="pip install 'limbeck[report]'") from error
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.globals |= {"place": named, "in_words": in_words, "words": COLOUR_WORDS}
    made.filters["pipe"] = literal
    return made
