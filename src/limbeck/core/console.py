"""What the terminal sees: messages and a progress bar with an ETA on stderr, results on stdout.

    with progress("tokenise", total=n_documents, unit="documents") as advance:
        for document in documents:
            advance(1, note="9.1k tokens")

Without a terminal (a log file, CI) the bar becomes a line at the start, the end and every ten percent.

    output.print(table)          # results: no digit is ever cut off

What is printed to a pipe has no width: tables are as wide as they are, Markdown stays Markdown. On a terminal that is
too narrow for a table each of its rows becomes a block of lines.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markdown import Markdown
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

NO_LIMIT = 1_000_000  # columns of something that is not a terminal


class UncroppedConsole(Console):
    """Standard output, where results go: whole, whatever the width."""

    @property
    def size(self) -> Any:
        """The terminal's; no limit for a file or a pipe."""
        size = super().size
        return size if self.is_terminal else size._replace(width=NO_LIMIT)

    @size.setter
    def size(self, new_size: tuple[int, int]) -> None:
        self._width, self._height = new_size

    def print(self, *objects: Any, **settings: Any) -> None:
        """Print as rich does, tables and Markdown so that nothing is cut."""
        if not self.is_terminal and any(isinstance(one, Markdown) for one in objects):
            for one in objects:
                if isinstance(one, Markdown):
                    super().print(one.markup.rstrip() + "\n", markup=False, soft_wrap=True)
                else:
                    super().print(one, **settings)
            return
        super().print(*(self.fit_to_width(one) for one in objects), **settings)

    def fit_to_width(self, one: Any) -> Any:
        """The same, in a form that fits the terminal: tables that are too wide as blocks of lines."""
        if isinstance(one, Group):
            return Group(*map(self.fit_to_width, one.renderables))
        if isinstance(one, Markdown):
            return Group(*(self.fit_to_width(part) if isinstance(part, Table) else part for part in _parts(one.markup)))
        if isinstance(one, Table) and self.width < _width(one, self):
            return _blocks(one)
        return one


# no markup: "[/tmp]" or ":x:" in a name is a part of the name, in messages and in tables alike; what is to stand out
# gets a style, `console.print(text, style="dim")`, and a part of a line a `Text`
console = UncroppedConsole(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
output = UncroppedConsole(highlight=False, markup=False, emoji=False)


def _width(table: Table, console: Console) -> int:
    """Columns that a table takes without folding or cutting a cell."""
    return Measurement.get(console, console.options.update(max_width=NO_LIMIT), table).maximum


def _parts(markup: str) -> Iterator[RenderableType]:
    """Markdown cut into its tables and what stands between them."""
    text: list[str] = []
    rows: list[str] = []
    for line in [*markup.splitlines(), ""]:
        if line.startswith("|"):
            rows.append(line)
            continue
        if len(rows) > 2:
            if any(map(str.strip, text)):
                yield Markdown("\n".join(text))
            yield from (Text(""), _table(rows), Text(""))
            text = [""]
        else:
            text += rows
        rows = []
        text.append(line)
    if any(map(str.strip, text)):
        yield Markdown("\n".join(text))


def _table(lines: list[str]) -> Table:
    head, sides, *rows = ([cell.strip() for cell in line.strip().strip("|").split("|")] for line in lines)
    table = Table(box=None, pad_edge=False)
    for name, side in zip(head, sides):
        table.add_column(Text(name, style="bold"), justify="right" if side.endswith(":") else "left")
    for row in rows:
        table.add_row(
            *(Text(cell.strip("*"), style="bold" if cell.startswith("**") else "") for cell in row[: len(head)])
        )
    return table


def _blocks(table: Table) -> Group:
    """A table as a block of lines a row: its first cell, then the others with their column's name."""
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
    """A progress bar on stderr; yields `advance(amount, note="")`.

    On something that is not a terminal (a log file, CI) it prints a line at start and end and about every ten percent.

    Args:
        title: what is being done.
        total: how much there is to do, in `unit`; None if unknown.
        unit: what is counted.
        initial: how much was done already (a resumed run).
    """
    if not console.is_terminal:
        yield from _plain(title, total, unit, initial)
        return
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


def _plain(title: str, total: float | None, unit: str, initial: float) -> Iterator[Callable[..., None]]:
    start, now, shown, last_note = time.monotonic(), initial, initial, ""

    def line(tail: str) -> None:
        of = f"/{total:,.0f}" if total else ""
        console.print(f"{title}: {now:,.0f}{of} {unit} {tail} {last_note}".rstrip())

    def advance(amount: float = 1, note: str = "") -> None:
        nonlocal now, shown, last_note
        now += amount
        last_note = note or last_note
        if total and now - shown >= total / 10 and now < total:
            shown = now
            seconds = time.monotonic() - start
            line(f"[{seconds:.0f}s, eta {seconds * (total - now) / (now - initial):.0f}s]")

    yield advance
    line(f"[{time.monotonic() - start:.0f}s]")


def format_bytes(n: float) -> str:
    """A size as people read it: 4.42 MB."""
    for unit in ("B", "kB", "MB"):
        if abs(n) < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB" if n < 1000 else f"{n:,.0f} GB"


def format_duration(seconds: float) -> str:
    """A time as people read it: 14 min 03 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
