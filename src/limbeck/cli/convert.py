"""limbeck convert: replace attention by a mixer without training."""

from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.cli import app
from limbeck.cli.options import MIXER_HELP, examples, split_assignment
from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import atomic_folder, check_link, check_writable


@app.command(
    epilog=examples(
        "limbeck convert embedded students/gla --student gla --softmax-layers 'every 4'",
        "limbeck convert runs/hybrid students/window --set options.window=64",
    )
)
def convert(
    teacher: Annotated[
        str,
        typer.Argument(help="'embedded', a local folder or a Hub name; or a run, to change options of its student."),
    ],
    out: Annotated[Path, typer.Argument(help="The new folder for the student.")],
    student: Annotated[
        str | None, typer.Option(help=f"{MIXER_HELP} Or a file with one.", show_default="gated_deltanet")
    ] = None,
    preset: Annotated[
        str | None,
        typer.Option(help="The mixer's settings: default, published or controlled.", show_default="default"),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="The layers to convert: 'all' or numbers such as 0,2,5-9.", show_default="all")
    ] = None,
    softmax_layers: Annotated[
        str | None,
        typer.Option(
            help="Layers among them that keep softmax: 0,9, 'every 4', 'uniform 7', or a file from limbeck select."
        ),
    ] = None,
    softmax_heads: Annotated[
        str | None,
        typer.Option(
            help="Groups of heads in other layers that keep softmax: 18.2,20.0 (layer.group), or a file from limbeck "
            "select --heads."
        ),
    ] = None,
    softmax_window: Annotated[
        int | None, typer.Option(help="Tokens that those groups see, so that their cache does not grow.")
    ] = None,
    set: Annotated[
        list[str] | None, typer.Option(help="Any other key of a recipe's student, e.g. options.window=64.")
    ] = None,
) -> None:
    """Write an untrained student: the teacher with another attention in the chosen layers."""
    check_link(out)
    check_writable(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LimbeckError(f"{out} exists and is not empty", expected="a new folder")
    options: dict[str, Any] = {"mixer": student, "preset": preset, "layers": layers, "softmax_layers": softmax_layers}
    options |= {"softmax_heads": softmax_heads, "softmax_window": softmax_window}
    raw: dict[str, Any] = {key: value for key, value in options.items() if value is not None}
    # late, for a fast --help
    from limbeck.core.config import set_by_dotted_key

    for text in set or []:
        key, value = split_assignment(text, "options.window=64")
        set_by_dotted_key(raw, key.removeprefix("student."), value)
    import torch

    from limbeck import mixers, models
    from limbeck.core import recipe
    from limbeck.models.conversion import count_student_parameters, set_mixer_options
    from limbeck.models.head_groups import describe_softmax_heads
    from limbeck.models.loading import (
        check_export,
        is_student,
        load_model_and_tokenizer,
        load_teacher,
        resolve_teacher,
    )

    chosen = recipe.Recipe.parse({"student": raw}, "convert").student
    run = Path(teacher).expanduser()
    folder = run / "student" if (run / "student").is_dir() else run
    if folder.is_dir() and is_student(str(folder)):
        if raw.keys() - {"options"}:
            raise LimbeckError(
                f"{teacher} is already a student, whose layers cannot be converted again",
                expected="a softmax teacher, or other options of the student's mixers: --set options.KEY=VALUE",
            )
        model, tokenizer = load_model_and_tokenizer(str(folder))
        converted, state = set_mixer_options(model, chosen.options), "weights unchanged"
    else:
        mixers.resolve_options(chosen.mixer, chosen.options, chosen.preset)
        model, tokenizer = load_teacher(resolve_teacher(teacher), torch.device("cpu"))
        converted = models.convert(
            model,
            chosen.mixer,
            chosen.layers,
            chosen.options,
            preset=chosen.preset,
            softmax_layers=chosen.softmax_layers,
            softmax_heads=chosen.softmax_heads,
            softmax_window=chosen.softmax_window,
            rules=[rule.model_dump(exclude_none=True) for rule in chosen.rules],
            copy_projections=chosen.copy_projections,
        )
        state = "untrained"
    with atomic_folder(out) as staging:
        converted.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        check_export(staging, converted, tokenizer)
    counts = count_student_parameters(converted)
    console.print(f"{out}: {counts.total:,} parameters, {counts.added:,} of them new; {state}")
    if heads := describe_softmax_heads(converted.config.limbeck):
        console.print(heads)
