"""limbeck convert: swap attention for a mixer without training anything."""

from pathlib import Path
from typing import Annotated

import typer

from limbeck.cli import app
from limbeck.console import console
from limbeck.data.cache import check_link, check_writable, made_aside
from limbeck.errors import LimbeckError


@app.command()
def convert(
    teacher: Annotated[str, typer.Argument(help="'embedded', a local folder or a hub name.")],
    out: Annotated[Path, typer.Argument(help="New folder for the student.")],
    student: Annotated[
        str, typer.Option(help="The mixer, or a file with one; see `limbeck students`.")
    ] = "gated_deltanet",
    preset: Annotated[str, typer.Option(help="default, published or controlled; see docs/students.md.")] = "default",
    layers: Annotated[str, typer.Option(help="'all' or layer numbers such as 0,2,5-9.")] = "all",
) -> None:
    """Write an untrained student: the teacher with other attention in the chosen layers."""
    check_link(out)
    check_writable(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LimbeckError(f"{out} exists and is not empty", expected="a new folder")
    import torch

    import limbeck
    from limbeck import assets, mixers
    from limbeck.model.convert import parameter_report
    from limbeck.model.exported import check_export
    from limbeck.stages.teacher import load_teacher

    mixers.options(student, preset=preset)
    model, tokenizer = load_teacher(assets.resolve_teacher(teacher), torch.device("cpu"))
    made = limbeck.convert(model, student, layers, preset=preset)
    with made_aside(out) as folder:
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        check_export(folder, made, tokenizer)
    report = parameter_report(made)
    console.print(f"{out}: {report.total:,} parameters, {report.added:,} of them new; not trained yet")
