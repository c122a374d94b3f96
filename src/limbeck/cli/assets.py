"""limbeck assets: the embedded teacher and text, and the teachers that are trained here."""

from typing import Annotated

import typer

from limbeck.cli import app
from limbeck.console import output


@app.command()
def assets(
    tier: Annotated[str, typer.Option(help="How much text: quick (3.5 M tokens) or pypi (19.6 M).")] = "quick",
    teacher: Annotated[
        str, typer.Option(help="embedded; small (trained here, under an hour); tiny (two minutes); or a YAML file.")
    ] = "embedded",
    plan: Annotated[bool, typer.Option("--plan", help="Say what training the teacher takes, and stop.")] = False,
    verify: Annotated[bool, typer.Option("--verify", help="Check every file's sha256 again.")] = False,
) -> None:
    """Bring a teacher and text to the cache; does nothing when they are there. Goes on where it was stopped."""
    from limbeck import assets as embedded
    from limbeck.data.corpus import check_tier

    check_tier(tier)
    if teacher == "embedded":
        folder = embedded.teacher_folder(verify=verify)
    else:
        from limbeck.pretrain import planned, trained_teacher

        if plan:
            output.print(str(planned(teacher)), markup=False)
            return
        folder = trained_teacher(teacher, verify=verify)
    output.print(f"teacher: {folder}", markup=False)
    output.print(f"text: {embedded.corpus_file(tier, verify=verify)}", markup=False)
