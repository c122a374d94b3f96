"""limbeck convert: replace attention by a mixer without training."""

from pathlib import Path
from typing import Annotated

import typer

from limbeck.cli.old_options import take_old_out
from limbeck.cli.options import (
    Json,
    Layers,
    OldOut,
    OptionalMixer,
    OptionalPreset,
    Quiet,
    SoftmaxHeads,
    SoftmaxLayers,
    SoftmaxWindow,
    collect_student,
    split_assignments,
)
from limbeck.cli.results import print_json
from limbeck.cli.verbs import verb
from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import atomic_folder, check_link, check_writable


@verb(
    "limbeck convert embedded --student gla --softmax-layers 'every 4' --out students/gla",
    "limbeck convert embedded --student hybrid --set options.window=64 --out students/window",
    "limbeck convert runs/hybrid --set options.branches=window --out students/window",
)
def convert(
    teacher: Annotated[
        str,
        typer.Argument(help="'embedded', a local folder or a Hub name; or a run, to change options of its student."),
    ],
    old_out: OldOut = None,
    out: Annotated[Path | None, typer.Option(help="The new folder for the student; always needed.")] = None,
    student: OptionalMixer = None,
    preset: OptionalPreset = None,
    layers: Layers = None,
    softmax_layers: SoftmaxLayers = None,
    softmax_heads: SoftmaxHeads = None,
    softmax_window: SoftmaxWindow = None,
    set: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Any other key of a recipe's student, e.g. options.window=64."),
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Put a mixer in the place of attention, without training.

    Writes an untrained student: the teacher with another attention in the chosen layers. A run's student keeps its
    weights and gets other options of its mixers.
    """
    out = take_old_out(old_out, out)
    if out is None:
        raise LimbeckError("no folder to write to", expected="--out FOLDER")
    check_link(out)
    check_writable(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise LimbeckError(f"{out} exists and is not empty", expected="a new folder")
    raw = collect_student(
        mixer=student,
        preset=preset,
        layers=layers,
        softmax_layers=softmax_layers,
        softmax_heads=softmax_heads,
        softmax_window=softmax_window,
    )
    # late, for a fast --help
    from limbeck.core.config import set_by_dotted_key

    for key, value in split_assignments(set or [], "options.window=64").items():
        set_by_dotted_key(raw, key.removeprefix("student."), value)
    import torch

    from limbeck import mixers, models
    from limbeck.core.recipe import Recipe
    from limbeck.models.conversion import count_student_parameters, set_mixer_options
    from limbeck.models.head_groups import describe_softmax_heads
    from limbeck.models.loading import (
        is_student,
        load_model_and_tokenizer,
        load_teacher,
        resolve_model,
        resolve_teacher,
    )
    from limbeck.models.saved_check import check_export

    chosen = Recipe.parse({"student": raw}, "convert").student
    given = Path(teacher).expanduser()
    folder = resolve_model(teacher)[0] if given.is_dir() else teacher
    if given.is_dir() and is_student(folder):
        if raw.keys() - {"options"}:
            raise LimbeckError(
                f"{teacher} is already a student, whose layers cannot be converted again",
                expected="a softmax teacher, or other options of the student's mixers: --set options.KEY=VALUE",
            )
        model, tokenizer = load_model_and_tokenizer(folder)
        converted, state = set_mixer_options(model, chosen.options), "weights unchanged"
    else:
        mixers.resolve_options(chosen.mixer, chosen.options, chosen.preset)
        model, tokenizer = load_teacher(resolve_teacher(teacher), torch.device("cpu"))
        converted = models.convert(model, **chosen.collect_placement(), copy_projections=chosen.copy_projections)
        state = "untrained"
    with atomic_folder(out) as staging:
        converted.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        check_export(staging, converted, tokenizer)
    counts = count_student_parameters(converted)
    heads = describe_softmax_heads(converted.config.limbeck)
    if as_json:
        document = {"folder": out, "parameters": counts.total, "new_parameters": counts.added, "state": state}
        print_json({**document, "layers": converted.config.limbeck["layers"]})
        return
    console.print(f"{out}: {counts.total:,} parameters, {counts.added:,} of them new; {state}")
    if heads:
        console.print(heads)
