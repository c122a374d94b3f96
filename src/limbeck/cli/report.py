"""limbeck report: a page about a study, or about runs that were made one by one."""

from pathlib import Path
from typing import Annotated

import typer

from limbeck.cli import app
from limbeck.core.console import console


@app.command()
def report(
    places: Annotated[
        list[Path],
        typer.Argument(help="A study's folder, or run directories; beside them what limbeck eval --out wrote."),
    ],
    out: Annotated[Path | None, typer.Option(help="The page, NAME.html; report.html in the folder by default.")] = None,
) -> None:
    """Write one page with tables, figures, claims and provenance, and Markdown, CSV and figures beside it."""
    from limbeck.report.page import write_report

    for path in write_report(places, out):
        console.print(f"written: {path}", style="dim")
