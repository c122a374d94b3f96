"""A figure as SVG inside a page: it follows the page's light and dark colours, and its lines can be filtered.

    svg = render_svg(figure)                                          # the file
    html = embed_svg(svg, "f3", "Training loss over ...")           # the element

Colours of `limbeck.report.figures.style` become variables of the page, black the colour of its text, white nothing. Ids get a
prefix, so that several figures live on one page; an id that is JSON (`panels`) becomes the attribute `data-at`.

What a report says first: a paragraph, the numbers at a glance, what can be filtered, and break-even lengths.

" ".join(summarize_collection(collection, groups))

The report of a study or of several runs: one HTML page that needs no network; Markdown, CSV and figures beside it.

    write_report([Path("runs/paper-experiment-1-laptop")])          # report.html, report.md, report_files/*.svg, values.csv
    write_report([Path("runs/gla"), Path("runs/mlstm")], Path("compared.html"))

Nothing is measured here, and no model is loaded: all comes from the files that runs and studies leave. A section
without data is left out. The page works without JavaScript; with it tables sort and everything can be filtered.
"""

import io
import re
import shlex
import time
from collections import Counter
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import convert_write_errors, find_write_error
from limbeck.core.version import __version__
from limbeck.report.claims import ClaimView, build_claim_views
from limbeck.report.collection import TEACHER, RunCollection, load_collection
from limbeck.report.figures.over_length import build_analysis_panels, build_length_panels
from limbeck.report.figures.panels import Panel, build_cache_panels, build_loss_panels, order_for_colors
from limbeck.report.figures.style import COLOR_NAMES, COLORS, RC_PARAMS, use_style
from limbeck.report.provenance import ReportProvenance, build_provenance
from limbeck.report.tables import (
    HEADLINE_METRICS,
    ReportTable,
    SeedGroup,
    TableCell,
    TableColumn,
    TableRow,
    build_headline_tables,
    build_measure_tables,
    format_axis,
    format_condition,
    get_teacher_values,
    group_seeds,
    list_conditions,
    select_value_name,
)
from limbeck.report.values import escape_markdown, values_to_csv

_BLACK = "#000000"
_GRID = "#" + f"{round(float(str(RC_PARAMS['grid.color'])) * 255):02x}" * 3
_NOISE = re.compile(r"<metadata>.*?</metadata>|<!--.*?-->|<defs>\s*<style.*?</style>\s*</defs>", re.DOTALL)
_ID = re.compile(r""" id=(?P<quote>["'])(?P<text>.+?)(?P=quote)""")
_LINK = re.compile(r'(url\(|href=")#')
_FONT = re.compile(r"font-family: [^;\"]+")


def render_svg(figure: Any) -> str:
    """A figure as the text of an SVG file, the same for the same figure."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


def embed_svg(svg: str, name: str, caption: str) -> str:
    """An <svg> element from the text of a file.

    Args:
        name: the prefix of its ids.
        caption: what is seen, for those who do not see it.
    """
    svg = _NOISE.sub("", svg[svg.index("<svg") :])
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg)[1])  # type: ignore[index]
    head = f'<svg role="img" aria-label="{escape(caption)}" style="--width: {width:.0f}" '
    svg = re.sub(r'^<svg [^>]*?(viewBox="[^"]+")[^>]*>', lambda match: f"{head}{match[1]}>", svg)
    linked = set(re.findall(r'(?:url\(|href=")#([^)"]+)', svg))
    svg = _ID.sub(lambda match: _identity(match["text"], name, linked), svg)
    svg = _LINK.sub(lambda match: f"{match[1]}#{name}-", svg).replace("xlink:href", "href")
    svg = _FONT.sub("font-family: var(--sans)", svg)
    for index, colour in enumerate(COLORS):
        if colour != _BLACK:
            svg = re.sub(colour, f"var(--c{index})", svg, flags=re.IGNORECASE)
    svg = svg.replace("fill: #ffffff", "fill: none").replace(_BLACK, "currentColor").replace(_GRID, "var(--grid)")
    return re.sub(r">\s+<", "><", svg).replace("\n", " ")


def _identity(text: str, name: str, linked: set[str]) -> str:
    """What an element is filtered by; its id in this figure alone, where something links to it; else nothing."""
    if text.startswith("{"):
        return f" data-at='{text}'"
    return f' id="{name}-{text}"' if text in linked else ""


VERDICTS = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not hold", "do not hold"),
    "undecided": ("is undecided", "are undecided"),
}
BREAK_EVEN_BY_SHAPES = "memory.break_even_tokens"
BREAK_EVEN = re.compile(r"speed\.break_even_(time|memory)_tokens@batch(\d+)")


def summarize_collection(collection: RunCollection, groups: list[SeedGroup]) -> list[str]:
    """What ran: teacher, students, conditions, seeds, tokens, time, what failed, how many claims hold."""
    runs = [run for run in collection.runs if run.student != TEACHER]
    trained = [run for run in runs if run.stages]
    teachers = list(dict.fromkeys(run.axes["teacher"] for run in runs if "teacher" in run.axes))
    students, seeds, conditions = collection.students, collection.seeds, list_conditions(groups)
    told = _count(len(students), "student")
    if teachers:
        told += f" of the teacher{'s' * (len(teachers) > 1)} {_list(teachers)}"
    if len(conditions) > 1:
        told += f" at {len(conditions)} places of the grid ({_list([format_axis(axis) for axis in collection.condition_axes])})"
    told += f" with {_count(len(seeds), 'seed')}" if seeds else ""
    found = [f"{told}: {_count(len(runs), 'arm' if collection.study else 'run')}."]
    if trained:
        tokens = sorted(run.tokens for run in trained)
        found.append(f"Each was trained on {_range(tokens)} tokens.")
    seconds = sum(run.seconds or 0 for run in runs)
    if seconds:
        saved = sum(run.saved_seconds or 0 for run in runs)
        share = f"; sharing the teacher's passes saved {_time(saved)} more" if saved >= 0.5 else ""
        found.append(f"Training took {_time(seconds)} in all{share}.")
    status = Counter(run.status for run in runs)
    if status["failed"] or status["open"]:
        counts = [f"{status[s]} {s}" for s in ("finished", "failed", "open") if status[s]]
        found.append(f"{_list(counts)}.")
    verdicts = Counter(claim["verdict"] for claim in collection.claims)
    if verdicts:
        parts = [f"{verdicts[v]} {words[verdicts[v] > 1]}" for v, words in VERDICTS.items() if verdicts[v]]
        found.append(f"Of {_count(len(collection.claims), 'claim')} {_list(parts)}.")
    return found


def build_key_figures(collection: RunCollection, groups: list[SeedGroup]) -> list[tuple[str, str, str]]:
    """Label, number and a remark, for the most important numbers."""
    found = []
    metric = HEADLINE_METRICS[0]
    name = select_value_name(metric, groups) or ""
    means = [(mean, group) for group in groups if group.student != TEACHER and (mean := group.mean(name)) is not None]
    if means:
        mean, best = min(means, key=lambda pair: pair[0])
        found.append(
            (
                "lowest perplexity",
                f"{mean:.4g}",
                ", ".join(filter(None, [best.student, format_condition(best.condition)])),
            )
        )
        if teacher := get_teacher_values(metric, name, groups):
            found.append(("the teacher's", f"{fmean(teacher):.4g}", "same text"))
    runs = [run for run in collection.runs if run.student != TEACHER]
    done = sum(run.status == "finished" for run in runs)
    found.append(("finished", f"{done} of {len(runs)}", "arms" if collection.study else "runs"))
    verdicts = Counter(claim["verdict"] for claim in collection.claims)
    if verdicts:
        rest = f"{verdicts['does not hold']} do not, {verdicts['undecided']} undecided"
        found.append(("claims that hold", f"{verdicts['holds']} of {len(collection.claims)}", rest))
    seconds = sum(run.seconds or 0 for run in runs)
    if seconds:
        found.append(("training", _time(seconds), f"{sum(run.tokens for run in runs):,} tokens"))
    return found


def list_filters(collection: RunCollection) -> dict[str, list[str]]:
    """Axis -> values, of those with more than one."""
    found = {"student": collection.students}
    for axis in collection.condition_axes:
        found[axis] = list(dict.fromkeys(run.axes[axis] for run in collection.runs if axis in run.axes))
    return {axis: values for axis, values in found.items() if len(values) > 1}


def build_break_even_table(groups: list[SeedGroup]) -> ReportTable | None:
    """From which length on a student is smaller and faster than its teacher; None where that was not measured."""
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.values)
    measured = [match for name in names if (match := BREAK_EVEN.match(name))]
    columns = [TableColumn("student"), TableColumn("smaller cache, by shapes")]
    for match in measured:
        told = "faster token" if match[1] == "time" else "smaller cache"
        columns.append(TableColumn(f"{told}, measured, batch {match[2]}"))
    rows: dict[str, TableRow] = {}
    for group in groups:
        raced = any(name.startswith("speed.token_milliseconds@") for run in group.runs for name in run.values)
        means = [group.mean(BREAK_EVEN_BY_SHAPES), *(group.mean(match[0]) for match in measured)]
        if group.student != TEACHER and (raced or means[0] is not None):
            never = ["", *("never" if raced else "" for _ in measured)]
            cells = [TableCell(text if mean is None else f"{mean:,.0f}", mean) for mean, text in zip(means, never)]
            rows.setdefault(
                group.student, TableRow([TableCell(group.student, group.student), *cells], {"student": group.student})
            )
    note = "Tokens of context from which on a student is smaller or faster than its teacher."
    return ReportTable("Break-even lengths", note, columns, list(rows.values())) if rows else None


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _list(words: list[str]) -> str:
    return words[0] if len(words) == 1 else " and ".join([", ".join(words[:-1]), words[-1]]) if words else ""


def _range(numbers: list[int]) -> str:
    return f"{numbers[0]:,}" if numbers[0] == numbers[-1] else f"{numbers[0]:,} to {numbers[-1]:,}"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = ("loss", "length", "retrieval", "speed", "analysis")


@dataclass
class RenderedPanel:
    """A panel with its picture: as an element of the page, and as a file."""

    panel: Panel
    svg: str
    file: str


@dataclass
class PanelGroup:
    """Panels beside each other: those of one title under it, where each is a place of the grid."""

    title: str
    panels: list[RenderedPanel]


@dataclass
class PanelSection:
    """Panels with whose lines they have, for the legend."""

    groups: list[PanelGroup]
    series_names: list[str]


@dataclass
class Report:
    """What the templates are filled with."""

    collection: RunCollection
    summary: list[str]
    key_figures: list[tuple[str, str, str]]
    filters: dict[str, list[str]]
    color_indices: dict[str, int]
    claims: list[ClaimView]
    tables: list[ReportTable]
    break_even: ReportTable | None
    figures: dict[str, PanelSection | None]
    failures: list[tuple[str, str]]
    numbers: list[ReportTable]
    provenance: ReportProvenance
    csv: str
    generated_note: str


def write_report(paths: list[Path], out: Path | None = None) -> list[Path]:
    """Write a report.

    Args:
        paths: see `limbeck.report.collection.load_collection`.
        out: the page; report.html in the folder where there is one folder, else in the current one. Markdown and a
            folder with CSV and figures are written beside it.

    Returns:
        The page, the Markdown, the folder.

    Raises:
        LimbeckError: nothing to report, a place to write that is none, jinja2 or matplotlib is not installed.
    """
    page = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    if page.suffix != ".html" or page.is_dir():
        raise LimbeckError(f"cannot write the report to {page}", expected="a file's name that ends in .html")
    if refused := find_write_error(page.parent):
        raise LimbeckError(
            f"cannot write the report: {refused.found}",
            expected="a folder that this user may write to",
            hint=f"limbeck report {' '.join(map(shlex.quote, map(str, paths)))} --out report.html",
        )
    templates = _environment()
    collection = load_collection(paths)
    files = page.with_name(f"{page.stem}_files")
    with convert_write_errors(page.parent):
        files.mkdir(parents=True, exist_ok=True)
        csv = files / "values.csv"
        rows = [(run.name, run.axes, run.values, run.errors) for run in collection.finished_runs]
        csv.write_text(values_to_csv(rows), encoding="utf-8")
        report = _report(collection, group_seeds(collection), files)
        for path, template in ((page, "page.html"), (page.with_suffix(".md"), "report.md")):
            path.write_text(templates.get_template(template).render(vars(report)), encoding="utf-8")
    return [page, page.with_suffix(".md"), files]


def _report(collection: RunCollection, groups: list[SeedGroup], files: Path) -> Report:
    order = order_for_colors(collection.students)
    with use_style(order):
        panels = [
            *build_loss_panels(collection),
            *build_length_panels(groups),
            *build_cache_panels(groups),
            *build_analysis_panels(groups),
        ]
        shown = []
        with progress("figures", len(panels), "figures") as advance:
            for number, panel in enumerate(panels, 1):
                path, svg = files / f"{panel.name}.svg", render_svg(panel.figure)
                path.write_text(svg, encoding="utf-8")
                shown.append(RenderedPanel(panel, embed_svg(svg, f"f{number}", panel.alt), f"{files.name}/{path.name}"))
                advance(1)
    return Report(
        collection=collection,
        summary=summarize_collection(collection, groups),
        key_figures=build_key_figures(collection, groups),
        filters=list_filters(collection),
        color_indices={name: index % len(COLORS) for index, name in enumerate(order)},
        claims=build_claim_views(collection.claims),
        tables=build_headline_tables(groups),
        break_even=build_break_even_table(groups),
        figures={name: _section([one for one in shown if one.panel.section == name], order) for name in SECTIONS},
        failures=[(run.name, _said(run.failure)) for run in collection.runs if run.failure],
        numbers=build_measure_tables(groups),
        provenance=build_provenance(collection),
        csv=f"{files.name}/values.csv",
        generated_note=f"Made by limbeck {__version__} on {time.strftime('%Y-%m-%d at %H:%M UTC', time.gmtime())}",
    )


def _section(shown: list[RenderedPanel], order: list[str]) -> PanelSection | None:
    if not shown:
        return None
    groups: list[PanelGroup] = []
    for one in shown:
        title = one.panel.title if one.panel.axis_values else ""
        if not groups or groups[-1].title != title:
            groups.append(PanelGroup(title, []))
        groups[-1].panels.append(one)
    names = {name for one in shown for name in one.panel.series_names}
    return PanelSection(groups, [name for name in order if name in names])


def _said(failure: str) -> str:
    """What a failed run said, without where in the code it was."""
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
    made.globals |= {"place": format_condition, "format_axis": format_axis, "words": COLOR_NAMES}
    made.filters["pipe"] = escape_markdown
    return made
