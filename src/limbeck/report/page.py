"""The report of a study or of several runs: one HTML page that needs no network; Markdown, CSV and figures beside it.

    write_report([Path("runs/paper-experiment-1-laptop")])       # report.html, report.md, report_files/
    write_report([Path("runs/gla"), Path("runs/mlstm")], Path("compared.html"))

Nothing is measured here, and no model is loaded: everything comes from the files that runs and studies leave. A
section without data is left out. The page works without JavaScript; with it, tables sort and everything can be
filtered.
"""

import re
import shlex
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError
from limbeck.core.extras import require
from limbeck.core.storage import convert_write_errors, find_write_error
from limbeck.core.version import __version__
from limbeck.report.claims import ClaimView, build_claim_views
from limbeck.report.collection import TEACHER, RunCollection, load_collection
from limbeck.report.figures.over_length import build_analysis_panels, build_length_panels
from limbeck.report.figures.panels import Panel, build_cache_panels, build_loss_panels, order_for_colors
from limbeck.report.figures.students import build_exam_panels
from limbeck.report.figures.style import COLOR_NAMES, COLORS, use_style
from limbeck.report.figures.svg import embed_svg, render_svg
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
    describe_windows,
    format_axis,
    format_condition,
    get_teacher_values,
    group_seeds,
    list_conditions,
    select_value_name,
)
from limbeck.report.teacher_info import get_teacher_name
from limbeck.report.text_tables import escape_markdown
from limbeck.report.values import values_to_csv

VERDICTS = {
    "holds": ("holds", "hold"),
    "does not hold": ("does not hold", "do not hold"),
    "undecided": ("is undecided", "are undecided"),
}
BREAK_EVEN_BY_SHAPES = "memory.break_even_tokens"
BREAK_EVEN = re.compile(r"speed\.break_even_(time|memory)_tokens@batch(\d+)")

TEMPLATES = Path(__file__).parent / "templates"
SECTIONS = ("loss", "length", "retrieval", "speed", "analysis")


@dataclass
class RenderedPanel:
    """A panel with its figure: as an element of the page, and as a file."""

    panel: Panel
    svg: str
    file: str


@dataclass
class PanelGroup:
    """Panels side by side: one for each condition under a common title, or panels without conditions."""

    title: str
    panels: list[RenderedPanel]


@dataclass
class PanelSection:
    """The panels of a section, and the names of their series for the legend."""

    groups: list[PanelGroup]
    series_names: list[str]


@dataclass
class Report:
    """Everything that the templates show."""

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
        out: the page, or a folder for its report.html; by default the folder that is reported on if it is one, else
            the current one. Markdown and a folder with CSV and figures are written beside the page.

    Returns:
        The page, the Markdown, the folder.

    Raises:
        LimbeckError: nothing to report, `out` cannot be written, or jinja2 or matplotlib is not installed.
    """
    page = out or (paths[0] / "report.html" if len(paths) == 1 else Path("report.html"))
    if page.is_dir() or not page.suffix:
        page = page / "report.html"
    if page.suffix != ".html":
        raise LimbeckError(
            f"cannot write the report to {page}",
            expected="a folder, or a file name that ends in .html",
            hint=f"limbeck report {shlex.join(map(str, paths))} --out {shlex.quote(str(page.with_suffix('.html')))}",
        )
    if error := find_write_error(page.parent):
        raise LimbeckError(
            f"cannot write the report: {error.found}",
            expected="a folder with write permission",
            hint=f"limbeck report {shlex.join(map(str, paths))} --out report.html",
        )
    templates = _load_templates()
    collection = load_collection(paths)
    files = page.with_name(f"{page.stem}_files")
    with convert_write_errors(page.parent):
        files.mkdir(parents=True, exist_ok=True)
        csv = files / "values.csv"
        rows = [(run.name, run.axes, run.values, run.errors) for run in collection.finished_runs]
        csv.write_text(values_to_csv(rows), encoding="utf-8")
        report = _build_report(collection, group_seeds(collection), files)
        for path, template in ((page, "page.html"), (page.with_suffix(".md"), "report.md")):
            path.write_text(templates.get_template(template).render(vars(report)), encoding="utf-8")
    return [page, page.with_suffix(".md"), files]


def _build_report(collection: RunCollection, groups: list[SeedGroup], files: Path) -> Report:
    """Draw the figures into `files` and gather everything that the templates show."""
    order = order_for_colors(collection.students)
    with use_style(order):
        panels = [
            *build_loss_panels(collection),
            *build_exam_panels(groups),
            *build_length_panels(groups),
            *build_cache_panels(groups),
            *build_analysis_panels(groups),
        ]
        rendered = []
        with progress("figures", len(panels), "figures") as advance:
            for number, panel in enumerate(panels, 1):
                path, svg = files / f"{panel.name}.svg", render_svg(panel.figure)
                path.write_text(svg, encoding="utf-8")
                element = embed_svg(svg, f"f{number}", panel.alt)
                rendered.append(RenderedPanel(panel, element, f"{files.name}/{path.name}"))
                advance(1)
    sections = {name: [one for one in rendered if one.panel.section == name] for name in SECTIONS}
    failures = [(run.name, run.failure) for run in collection.runs if run.failure]
    return Report(
        collection=collection,
        summary=summarize_collection(collection, groups),
        key_figures=build_key_figures(collection, groups),
        filters=list_filters(collection),
        color_indices={name: index % len(COLORS) for index, name in enumerate(order)},
        claims=build_claim_views(collection.claims),
        tables=build_headline_tables(groups),
        break_even=build_break_even_table(groups),
        figures={name: _build_section(panels, order) for name, panels in sections.items()},
        failures=[(name, text.partition("\nTraceback")[0].strip()) for name, text in failures],
        numbers=build_measure_tables(groups),
        provenance=build_provenance(collection),
        csv=f"{files.name}/values.csv",
        generated_note=f"Made by limbeck {__version__} on {time.strftime('%Y-%m-%d at %H:%M UTC', time.gmtime())}",
    )


def _build_section(rendered: list[RenderedPanel], order: list[str]) -> PanelSection | None:
    """Group the panels of a section by title; None without panels."""
    if not rendered:
        return None
    groups: list[PanelGroup] = []
    for one in rendered:
        title = one.panel.title if one.panel.axis_values else ""
        if not groups or groups[-1].title != title:
            groups.append(PanelGroup(title, []))
        groups[-1].panels.append(one)
    names = {name for one in rendered for name in one.panel.series_names}
    return PanelSection(groups, [name for name in order if name in names])


def _load_templates() -> Any:
    require("jinja2", "report pages")
    # late: an optional dependency
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=select_autoescape(["html"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {"place": format_condition, "format_axis": format_axis, "words": COLOR_NAMES}
    environment.filters["pipe"] = escape_markdown
    return environment


# what a report says first: a paragraph, the numbers at a glance, what can be filtered, break-even lengths


def summarize_collection(collection: RunCollection, groups: list[SeedGroup]) -> list[str]:
    """Say in sentences what ran: teacher, students, conditions, seeds, tokens, time, failures, claims that hold,
    and which students beat the untrained window of their memory.
    """
    runs = [run for run in collection.runs if run.student != TEACHER]
    trained = [run for run in runs if run.stages]
    teachers = list(dict.fromkeys(get_teacher_name(run.axes["teacher"]) for run in runs if "teacher" in run.axes))
    students, seeds, conditions = collection.students, collection.seeds, list_conditions(groups)
    subject = _count(len(students), "student")
    if teachers:
        subject += f" of the teacher{'s' * (len(teachers) > 1)} {_list(teachers)}"
    if len(conditions) > 1:
        axes = _list([format_axis(axis) for axis in collection.condition_axes])
        subject += f" under {len(conditions)} conditions ({axes})"
    subject += f" with {_count(len(seeds), 'seed')}" if seeds else ""
    sentences = [f"{subject}: {_count(len(runs), 'run')}."]
    if trained:
        tokens = sorted(run.tokens for run in trained)
        sentences.append(f"Each was trained on {_range(tokens)} tokens.")
    refused = sum(not stage["guard"]["kept"] for run in trained for stage in run.stages if "guard" in stage)
    if refused:
        sentences.append(f"{_count(refused, 'stage')} not taken: the student was worse on held-out text after it.")
    seconds = sum(run.seconds or 0 for run in runs)
    if seconds:
        saved = sum(run.saved_seconds or 0 for run in runs)
        share = f"; sharing the teacher's passes saved {_time(saved)} more" if saved >= 0.5 else ""
        sentences.append(f"Training took {_time(seconds)} in all{share}.")
    status = Counter(run.status for run in runs)
    if status["failed"] or status["open"]:
        counts = [f"{status[s]} {s}" for s in ("finished", "failed", "open") if status[s]]
        sentences.append(f"{_list(counts)}.")
    verdicts = Counter(claim["verdict"] for claim in collection.claims)
    if verdicts:
        parts = [f"{verdicts[v]} {words[verdicts[v] > 1]}" for v, words in VERDICTS.items() if verdicts[v]]
        sentences.append(f"Of {_count(len(collection.claims), 'claim')} {_list(parts)}.")
    return [*sentences, *describe_windows(groups)]


def build_key_figures(collection: RunCollection, groups: list[SeedGroup]) -> list[tuple[str, str, str]]:
    """List label, number and a remark of the most important numbers."""
    figures = []
    metric = HEADLINE_METRICS[0]
    name = select_value_name(metric, groups) or ""
    means = [(mean, group) for group in groups if group.student != TEACHER and (mean := group.mean(name)) is not None]
    if means:
        mean, best = min(means, key=lambda pair: pair[0])
        figures.append(
            (
                "lowest perplexity",
                f"{mean:.4g}",
                ", ".join(filter(None, [best.student, format_condition(best.condition)])),
            )
        )
        if teacher := get_teacher_values(metric, name, groups):
            figures.append(("teacher's perplexity", f"{fmean(teacher):.4g}", "same text"))
    runs = [run for run in collection.runs if run.student != TEACHER]
    done = sum(run.status == "finished" for run in runs)
    figures.append(("finished", f"{done} of {len(runs)}", "runs"))
    verdicts = Counter(claim["verdict"] for claim in collection.claims)
    if verdicts:
        rest = f"{verdicts['does not hold']} do not, {verdicts['undecided']} undecided"
        figures.append(("claims that hold", f"{verdicts['holds']} of {len(collection.claims)}", rest))
    seconds = sum(run.seconds or 0 for run in runs)
    if seconds:
        figures.append(("training", _time(seconds), f"{sum(run.tokens for run in runs):,} tokens"))
    return figures


def list_filters(collection: RunCollection) -> dict[str, list[str]]:
    """List the values by axis, of axes with more than one value."""
    values_by_axis = {"student": collection.students}
    for axis in collection.condition_axes:
        values_by_axis[axis] = list(dict.fromkeys(run.axes[axis] for run in collection.runs if axis in run.axes))
    return {axis: values for axis, values in values_by_axis.items() if len(values) > 1}


def build_break_even_table(groups: list[SeedGroup]) -> ReportTable | None:
    """Build the table of lengths beyond which students are smaller and faster; None where that was not measured."""
    names = dict.fromkeys(name for group in groups for run in group.runs for name in run.values)
    measured = [match for name in names if (match := BREAK_EVEN.match(name))]
    columns = [TableColumn("student"), TableColumn("smaller cache, by shapes")]
    for match in measured:
        gain = "faster token" if match[1] == "time" else "smaller cache"
        columns.append(TableColumn(f"{gain}, measured, batch {match[2]}"))
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
    note = "Tokens of context beyond which a student is smaller or faster than its teacher."
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
