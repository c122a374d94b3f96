"""What the terminal sees: messages and a progress bar with an ETA on stderr, results on stdout.

    with progress("tokenise", total=n_documents, unit="documents") as advance:
        for document in documents:
            advance(1, note="9.1k tokens")

Without a terminal (a log file, CI) the bar becomes a line at the start, the end and every ten percent.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# no markup: "[/tmp]" or ":x:" in a name is a part of the name, in messages and in tables alike; what is to stand out
# gets a style, `console.print(text, style="dim")`, and a part of a line a `Text`
console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False, emoji=False)
output = Console(highlight=False, markup=False, emoji=False)


@contextmanager
def progress(title: str, total: float | None, unit: str = "", done: float = 0) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; yields `advance(amount, note="")`.

    On something that is not a terminal (a log file, CI) it prints a line at start and end and about every ten percent.

    Args:
        title: what is being done.
        total: how much there is to do, in `unit`; None if unknown.
        unit: what is counted.
        done: how much was done already (a resumed run).
    """
    if not console.is_terminal:
        yield from _plain(title, total, unit, done)
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
        task = bar.add_task(title, total=total, completed=int(done), note="")

        def advance(amount: float = 1, note: str = "") -> None:
            bar.update(task, advance=amount, note=note)

        yield advance


def _plain(title: str, total: float | None, unit: str, done: float) -> Iterator[Callable[..., None]]:
    start, now, shown, last_note = time.monotonic(), done, done, ""

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
            line(f"[{seconds:.0f}s, eta {seconds * (total - now) / (now - done):.0f}s]")

    yield advance
    line(f"[{time.monotonic() - start:.0f}s]")


def as_bytes(n: float) -> str:
    """A size as people read it: 4.42 MB."""
    for unit in ("B", "kB", "MB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} GB"


def as_time(seconds: float) -> str:
    """A time as people read it: 14 min 03 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
