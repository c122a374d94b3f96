"""limbeck report: a page about a study or about single runs."""

from pathlib import Path
from typing import Annotated

import typer

from limbeck.cli.options import Quiet
from limbeck.cli.verbs import verb
from limbeck.core.console import console
from limbeck.core.extras import require


@verb("limbeck report runs/paper-experiment-1-laptop", "limbeck report runs/gla runs/mlstm --out both.html")
def report(
    paths: Annotated[
        list[Path],
        typer.Argument(help="A study's folder, or run directories; also folders written by limbeck eval --out."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The page to write, NAME.html, or a folder for it.", show_default="report.html in the folder"
        ),
    ] = None,
    quiet: Quiet = False,
) -> None:
    """Write a page about a study, or about runs.

    It has tables, figures, claims and provenance; Markdown, CSV and figures go beside it.
    """
    for module in ("jinja2", "matplotlib"):
        require(module, "report pages")
    # late, for a fast --help
    from limbeck.report.page import write_report

    for path in write_report(paths, out):
        console.print(f"written: {path}", style="dim")
