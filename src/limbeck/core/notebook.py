"""What a Jupyter notebook shows while something runs: one block of text under the cell, with its messages and bars.

    if is_notebook():
        console = Console(file=NotebookPanel())                 # messages become lines of the block
        with panel.show_bar("hidden", total=400, unit="tokens") as advance:
            advance(16, note="loss 0.231")                      # the last line, redrawn in place; at the end it stays
    with panel.passing_bars():                                 # what stays of them is what is written
        ...

A block is drawn with IPython's own display, so no widget is needed, and a saved notebook has its last state as plain
text.
"""

import io
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

BAR_WIDTH = 24  # characters
REFRESH_SECONDS = 0.25


def is_notebook() -> bool:
    """Whether this process is the kernel of a notebook, rather than a script or IPython in a terminal."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


class NotebookPanel(io.TextIOBase):
    """The block of the cell that runs now: a text stream for messages, with bars below them."""

    def __init__(self) -> None:
        self._cell: Any = None  # whose block this is, by its number
        self._id: str | None = None  # of the block, once it is drawn
        self._text = ""
        self._bars: list[str] = []
        self._drawn = 0.0
        self._keeps_bars = True

    def writable(self) -> bool:
        """Whether text can be written: always."""
        return True

    def write(self, text: str) -> int:
        """Add text to the block."""
        self._begin_cell()
        self._text += text
        self._draw()
        return len(text)

    @contextmanager
    def show_bar(self, title: str, total: float | None, unit: str, initial: float) -> Iterator[Callable[..., None]]:
        """Show a bar while something runs, and a line of what it came to afterwards; arguments as of `progress`."""
        self._begin_cell()
        start, now, last_note = time.monotonic(), initial, ""
        number = len(self._bars)
        self._bars.append("")

        def describe(done: bool) -> str:
            seconds = time.monotonic() - start
            parts = [f"{now:,.0f}{f'/{total:,.0f}' if total else ''} {unit}".strip(), f"{seconds:.0f} s", last_note]
            bar = ""
            if total and not done:
                filled = round(BAR_WIDTH * min(now / total, 1))
                bar = f"{'█' * filled}{'░' * (BAR_WIDTH - filled)}  "
                if now > initial:
                    parts[1] += f", {seconds * max(total - now, 0) / (now - initial):.0f} s left"
            return f"{title}: {bar}{'  '.join(filter(None, parts))}"

        def advance(amount: float = 1, note: str = "") -> None:
            nonlocal now, last_note
            now, last_note = now + amount, note or last_note
            if time.monotonic() - self._drawn >= REFRESH_SECONDS:
                self._bars[number:] = [describe(done=False)]
                self._draw()

        try:
            yield advance
        finally:
            del self._bars[number:]
            if self._keeps_bars:
                self.write(describe(done=True) + "\n")
            else:
                self._draw()

    @contextmanager
    def passing_bars(self) -> Iterator[None]:
        """Let bars vanish at their end: of a study's hundred bars no reader misses one."""
        before, self._keeps_bars = self._keeps_bars, False
        try:
            yield
        finally:
            self._keeps_bars = before

    def _begin_cell(self) -> None:
        """Begin a new block where another cell runs than before."""
        from IPython import get_ipython  # there, because this is a notebook

        cell = get_ipython().execution_count
        if cell != self._cell:
            self._cell, self._text, self._bars, self._id = cell, "", [], None

    def _draw(self) -> None:
        """Draw the block, or redraw it in its place."""
        from IPython.display import display  # there, because this is a notebook

        content = {"text/plain": "\n".join([*self._text.splitlines(), *self._bars])}
        if self._id is None:
            self._id = display(content, raw=True, display_id=True).display_id
        else:
            display(content, raw=True, display_id=self._id, update=True)
        self._drawn = time.monotonic()
