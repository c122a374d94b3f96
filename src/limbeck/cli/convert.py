"""limbeck convert: swap attention for a mixer without training anything."""

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.cli import app
from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import atomic_folder, check_link, check_writable


@app.command()
def convert(
    teacher: Annotated[
        str,
        typer.Argument(help="'embedded', a local folder or a hub name; or a run, for other options of its student."),
    ],
    out: Annotated[Path, typer.Argument(help="New folder for the student.")],
    student: Annotated[
        str | None,
        typer.Option(help="The mixer, or a file with one; see `limbeck students`.", show_default="gated_deltanet"),
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="default, published or controlled; see docs/students.md.", show_default="default"),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="'all' or layer numbers such as 0,2,5-9.", show_default="all")
    ] = None,
    softmax_layers: Annotated[
        str | None,
        typer.Option(help="Of these the layers that keep softmax: 0,9, 'every 4', 'uniform 7' or what select wrote."),
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option(help="Any other key of a recipe's student, e.g. options.window=64.")
    ] = None,
) -> None:
    """Write an untrained student: the teacher with other attention in the chosen layers."""
    check_link(out)
    check_writable(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LimbeckError(f"{out} exists and is not empty", expected="a new folder")
    given = {"mixer": student, "preset": preset, "layers": layers, "softmax_layers": softmax_layers}
    raw: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    from limbeck.core.config import parse_value, set_by_dotted_key

    for text in set or []:
        key, equals, value = text.partition("=")
        if not equals:
            raise LimbeckError(f"--set {text}", expected="--set key=value, for example --set options.window=64")
        set_by_dotted_key(raw, key.removeprefix("student."), parse_value(value))
    import torch

    import limbeck
    from limbeck import mixers
    from limbeck.core import recipe
    from limbeck.models.conversion import count_student_parameters, set_mixer_options
    from limbeck.models.hooks import load_teacher
    from limbeck.models.loading import check_export, is_student, load_model_and_tokenizer, resolve_teacher

    chosen = recipe.Recipe.parse({"student": raw}, "convert").student
    run = Path(teacher).expanduser()
    place = run / "student" if (run / "student").is_dir() else run
    if place.is_dir() and is_student(str(place)):
        if raw.keys() - {"options"}:
            raise LimbeckError(
                f"{teacher} is a student already, and its layers are what they are",
                expected="a softmax teacher, or other options of the student's mixers: --set options.KEY=VALUE",
            )
        model, tokenizer = load_model_and_tokenizer(str(place))
        made, told = set_mixer_options(model, chosen.options), "with the weights that it had"
    else:
        mixers.resolve_options(chosen.mixer, chosen.options, chosen.preset)
        model, tokenizer = load_teacher(resolve_teacher(teacher), torch.device("cpu"))
        made = limbeck.convert(
            model,
            chosen.mixer,
            chosen.layers,
            chosen.options,
            preset=chosen.preset,
            softmax_layers=chosen.softmax_layers,
            rules=[rule.model_dump(exclude_none=True) for rule in chosen.rules],
            copy_projections=chosen.copy_projections,
        )
        told = "not trained yet"
    with atomic_folder(out) as folder:
        made.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        check_export(folder, made, tokenizer)
    report = count_student_parameters(made)
    console.print(f"{out}: {report.total:,} parameters, {report.added:,} of them new; {told}")
