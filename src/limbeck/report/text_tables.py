"""Tables as Markdown and as CSV, and text from outside (names, prompts, samples) inside Markdown.

format_markdown_table(["student", "perplexity"], [["gla", "21.4"]])     # | student | perplexity |, ...
format_csv(["model", "value"], [["gla", 21.4]])
escape_markdown("a|b")                                                  # "a\\|b"
"""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from typing import Any


def format_markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], num_text_columns: int = 1) -> str:
    """Format a table, one line a row, with a newline at its end.

    Args:
        columns: the heads.
        rows: cells as text that is valid Markdown already; a bare `|`, which would end a cell, becomes `/`.
        num_text_columns: how many of the first columns hold words; the others are aligned to the right.
    """
    sides = ["---" if index < num_text_columns else "---:" for index in range(len(columns))]
    lines = (" | ".join(re.sub(r"(?<!\\)\|", "/", cell) for cell in row) for row in (columns, sides, *rows))
    return "".join(f"| {line} |\n" for line in lines)


def format_csv(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format a table as CSV with lines that end in "\\n" on every system."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(rows)
    return file.getvalue()


def escape_markdown(text: Any) -> str:
    """Escape text so that Markdown shows it as it is, on one line.

    It becomes neither HTML nor an image, a link, a list, code or the end of a table's cell.
    """
    escaped = " ".join(str(text).split())
    escaped = re.sub(r"&(?=#?\w+;)", "&amp;", escaped).replace("<", "&lt;")
    escaped = re.sub(r"([\\`*\[\]|])", r"\\\1", escaped)
    return re.sub(r"^(\d*)([-+#>.)])(?= |$)", r"\1\\\2", escaped)


def format_code_span(text: Any) -> str:
    """Format text as inline code; backquotes in it become apostrophes, so that nothing ends the span early."""
    return f"`{' '.join(str(text).replace('`', chr(39)).split())}`"
