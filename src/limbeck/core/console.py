"""Print to the terminal: messages and progress bars on stderr, results on stdout.

    console.print("message")                                   # stderr
    output.print(table)                                        # stdout, and no digit is ever cut off
    with progress("tokenize", total=n_documents, unit="documents") as advance:
        for document in documents:
            advance(1, note="9.1k tokens")

In a log file the bar becomes a line about every ten percent, in a notebook a line that is redrawn in its place; while
a view of the whole work is on the screen (`limbeck.core.screen`), it is a line of that. Output to a pipe or file has no
width limit: tables are as wide as they need to be and Markdown stays Markdown. On a terminal that is too narrow for a
table, each of its rows becomes a block of lines. NO_COLOR and FORCE_COLOR are followed; into a
pipe the latter brings colors and nothing else.
"""

import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeGuard

from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from limbeck.core.notebook import NotebookPanel, is_notebook

if TYPE_CHECKING:
    from rich.markdown import Markdown

NO_LIMIT = 1_000_000  # columns where there is no terminal
# What takes the place of bars and lines, the last one first; called with the arguments of `progress`.
progress_counters: list[Callable[..., AbstractContextManager[Callable[..., None]]]] = []


class UncroppedConsole(Console):
    """A rich console that never cuts a table or text, whatever the width."""

    def __init__(self, **settings: Any) -> None:
        if os.environ.get("FORCE_COLOR"):
            settings.setdefault("color_system", "standard")
        super().__init__(**settings)

    @property
    def is_terminal(self) -> bool:
        """Whether somebody looks at lines as they come; FORCE_COLOR asks for colors alone."""
        if "FORCE_COLOR" in os.environ and self._force_terminal is None:
            return bool(getattr(self.file, "isatty", bool)())
        return super().is_terminal

    @property
    def size(self) -> Any:
        """The size of the terminal; unlimited width for a file or a pipe."""
        size = super().size
        return size if self.is_terminal else size._replace(width=NO_LIMIT)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print as rich does, but without cutting tables and Markdown."""
        if not self.is_terminal and any(map(_is_markdown, objects)):
            for item in objects:
                if _is_markdown(item):
                    super().print(item.markup.rstrip() + "\n", markup=False, soft_wrap=True)
                else:
                    super().print(item, **settings)
            return
        super().print(*(self.fit_to_width(item) for item in objects), **settings)

    def fit_to_width(self, item: Any) -> Any:
        """Return `item` in a form that fits the terminal: tables that are too wide become blocks of lines."""
        if isinstance(item, Group):
            return Group(*map(self.fit_to_width, item.renderables))
        if _is_markdown(item):
            parts = _split_markdown(item.markup)
            return Group(*(self.fit_to_width(part) if isinstance(part, Table) else part for part in parts))
        if isinstance(item, Table):
            needed = Measurement.get(self, self.options.update(max_width=NO_LIMIT), item).maximum
            return _table_to_blocks(item) if self.width < needed else item
        return item


# No markup: "[/tmp]" or ":x:" in a name is a part of the name. To emphasize, pass a style,
# `console.print(text, style="dim")`, or a `Text` for a part of a line.
panel = NotebookPanel() if is_notebook() else None  # what a notebook has in the place of stderr
_PLAIN: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False, "force_jupyter": False}
if panel is not None:
    _PLAIN |= {"force_terminal": False, "color_system": None}  # kernels ask for colors, which stay as codes when saved
    warnings.filterwarnings("ignore", "IProgress not found")  # tqdm misses widgets, which nothing here needs
console = UncroppedConsole(stderr=True, file=panel, soft_wrap=True, **_PLAIN)
output = UncroppedConsole(**_PLAIN)


@cache
def print_once(line: str) -> None:
    """Print what a process need not say again: a run opens the same text several times."""
    console.print(line, markup=False)


def _is_markdown(item: Any) -> "TypeGuard[Markdown]":
    """Tell whether it is Markdown; without importing that, which takes as long as all else of the console."""
    module = sys.modules.get("rich.markdown")
    return module is not None and isinstance(item, module.Markdown)


def _split_markdown(markup: str) -> Iterator[RenderableType]:
    """Split Markdown into its tables and the text between them."""
    # late, for start-up time
    from rich.markdown import Markdown

    text: list[str] = []
    rows: list[str] = []
    for line in [*markup.splitlines(), ""]:
        if line.startswith("|"):
            rows.append(line)
            continue
        if len(rows) > 2:
            if any(map(str.strip, text)):
                yield Markdown("\n".join(text))
            yield from (Text(""), _parse_table(rows), Text(""))
            text = [""]
        else:
            text += rows
        rows = []
        text.append(line)
    if any(map(str.strip, text)):
        yield Markdown("\n".join(text))


def _parse_table(lines: list[str]) -> Table:
    """Parse a Markdown table, given by its lines."""
    head, alignments, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines)
    table = Table(box=None, pad_edge=False)
    for name, alignment in zip(head, alignments):
        table.add_column(Text(name, style="bold"), justify="right" if alignment.endswith(":") else "left")
    for row in rows:
        table.add_row(
            *(Text(cell.strip("*"), style="bold" if cell.startswith("**") else "") for cell in row[: len(head)])
        )
    return table


def _table_to_blocks(table: Table) -> Group:
    """Turn each row of a table into a block of lines: its first cell, then the others with their column's name."""
    blocks: list[RenderableType] = [Text(str(table.title), style="bold")] if table.title else []
    heads = [_text(column.header) for column in table.columns]
    for cells in zip(*(list(column.cells) for column in table.columns)):
        first, *others = cells
        lines = [_text(first)]
        for head, cell in zip(heads[1:], others):
            value = _text(cell)
            if value.plain:
                lines.append(Text.assemble("  ", (f"{head.plain}: " if head.plain else ""), value))
        blocks += lines
    return Group(*blocks)


def _text(cell: RenderableType) -> Text:
    return cell if isinstance(cell, Text) else Text(str(cell))


@contextmanager
def progress(title: str, total: float | None, unit: str = "", initial: float = 0) -> Iterator[Callable[..., None]]:
    """Show a progress bar on stderr; yields `advance(amount, note="")`.

    Args:
        title: what is being done.
        total: amount of work, in `unit`; None if unknown.
        unit: what is counted.
        initial: amount done before, by a run that is resumed.
    """
    if progress_counters:
        with progress_counters[-1](title, total, unit, initial) as advance:
            yield advance
        return
    if panel is not None:
        with panel.show_bar(title, total, unit, initial) as advance:
            yield advance
        return
    if not console.is_terminal:
        yield from _log_progress(title, total, unit, initial)
        return
    # late, for start-up time
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}", style="bold", markup=False),
        BarColumn(bar_width=28),
        MofNCompleteColumn(),
        TextColumn(unit, markup=False),
        TimeElapsedColumn(),
        TextColumn("eta"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", style="dim", markup=False),
    )
    with Progress(*columns, console=console, transient=False) as bar:
        task = bar.add_task(title, total=total, completed=int(initial), note="")

        def advance(amount: float = 1, note: str = "") -> None:
            bar.update(task, advance=amount, note=note)

        yield advance


def _log_progress(title: str, total: float | None, unit: str, initial: float) -> Iterator[Callable[..., None]]:
    """Print a line about every ten percent, and one at the end."""
    start, now, printed, last_note = time.monotonic(), initial, initial, ""

    def print_line(tail: str) -> None:
        of = f"/{total:,.0f}" if total else ""
        console.print(f"{title}: {now:,.0f}{of} {unit} {tail} {last_note}".rstrip())

    def advance(amount: float = 1, note: str = "") -> None:
        nonlocal now, printed, last_note
        now += amount
        last_note = note or last_note
        if total and now - printed >= total / 10 and now < total:
            printed = now
            seconds = time.monotonic() - start
            print_line(f"[{seconds:.0f}s, eta {seconds * (total - now) / (now - initial):.0f}s]")

    yield advance
    print_line(f"[{time.monotonic() - start:.0f}s]")


def format_bytes(n: float) -> str:
    """Format a size for people: 4.42 MB."""
    for unit in ("B", "kB", "MB"):
        if abs(n) < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB" if n < 1000 else f"{n:,.0f} GB"


def format_duration(seconds: float) -> str:
    """Format a duration for people: 14 min 03 s, 2 h 05 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 100:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
