"""limbeck eval: perplexity and agreement with the teacher on held-out text."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from limbeck.cli import app
from limbeck.console import output
from limbeck.errors import LimbeckError


@app.command()
def eval(
    student: Annotated[Path, typer.Argument(help="A student's folder, or a run directory.")],
    teacher: Annotated[str | None, typer.Option(help="The teacher; by default the one of the run.")] = None,
    data: Annotated[str | None, typer.Option(help="Text; by default the held-out part of the run's.")] = None,
    tokens: Annotated[int, typer.Option(help="How many tokens to measure on.")] = 8192,
    length: Annotated[int | None, typer.Option(help="Tokens in a sequence; by default the run's.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the numbers here as JSON.")] = None,
) -> None:
    """Measure a student beside its teacher on text that it was not trained on."""
    folder = student / "student" if (student / "student").is_dir() else student
    recipe_file = folder.parent / "recipe.yaml"
    if not (folder / "config.json").is_file():
        raise LimbeckError(f"{folder} holds no model", expected="a folder made by `limbeck distill` or save_pretrained")
    from limbeck.evaluate.standalone import evaluate_folder
    from limbeck.recipe import Recipe

    recipe = Recipe.load(recipe_file) if recipe_file.is_file() else None
    if recipe is None and (teacher is None or data is None):
        raise LimbeckError(f"{folder} is in no run directory", expected="--teacher to compare with, and --data")
    run = recipe or Recipe()
    result = evaluate_folder(
        folder, teacher or run.teacher, data or run.data.source, tokens, length or run.data.length, recipe
    )
    table = Table(box=None, pad_edge=False)
    for column in ("", "teacher", "student"):
        table.add_column(column, justify="left" if not column else "right")
    table.add_row("perplexity", f"{result['teacher_perplexity']:.3f}", f"{result['student_perplexity']:.3f}")
    table.add_row("same most likely token", "", f"{100 * result['top1_agreement']:.2f} %")
    table.add_row("KL(teacher ‖ student)", "", f"{result['kl']:.4f}")
    table.add_row("KL(student ‖ teacher)", "", f"{result['reverse_kl']:.4f}")
    output.print(table)
    output.print(
        f"{result['targets']:,} tokens in sequences of {result['length']}: {result['part']} of {result['text']}"
    )
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")
