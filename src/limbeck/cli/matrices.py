"""limbeck matrices: draw mixing matrices beside the teacher's attention."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from limbeck.cli.completion import complete_mixer_sets
from limbeck.cli.old_options import take_old_out
from limbeck.cli.options import Data, Json, OldOut, Preset, Quiet, SeqLen, Teacher
from limbeck.cli.results import print_json
from limbeck.cli.verbs import verb
from limbeck.core.console import console, output
from limbeck.core.errors import LimbeckError
from limbeck.core.extras import require
from limbeck.core.storage import check_writable

FIGURES = (".png", ".svg", ".pdf")


@verb("limbeck matrices --out matrices.png", "limbeck matrices --students gla,mlstm --layer 3 --out gla.svg")
def matrices(
    old_out: OldOut = None,
    out: Annotated[
        Path | None, typer.Option(help="The figure to write: .png, .svg or .pdf.", show_default="matrices.png")
    ] = None,
    teacher: Teacher = "embedded",
    students: Annotated[
        str,
        typer.Option(help="Mixers as a,b,c, or a set: paper-v2, paper-v3, all.", autocompletion=complete_mixer_sets),
    ] = "all",
    preset: Preset = "default",
    layer: Annotated[int, typer.Option(help="The index of the layer to align to.")] = 12,
    head: Annotated[int, typer.Option(help="The index of the head to draw.")] = 0,
    data: Data = "embedded",
    seq_len: SeqLen = 96,
    steps: Annotated[int, typer.Option(help="Alignment steps before the figure is drawn; 0 for none.")] = 150,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Draw mixing matrices of mixers beside the teacher's attention.

    Each mixer is aligned to the attention matrices of one layer; the figure shows them on held-out text.
    """
    out = take_old_out(old_out, out) or Path("matrices.png")
    if out.suffix.lower() not in FIGURES:
        raise LimbeckError(f"unsupported figure format: {out}", expected="a file name ending in .png, .svg or .pdf")
    if steps < 0:
        raise LimbeckError(f"--steps {steps}", expected="0 or more")
    require("matplotlib", "figures")
    # late, for a fast --help
    import torch

    from limbeck import mixers
    from limbeck.core import text_settings
    from limbeck.data.dataset import open_text_data
    from limbeck.evaluation.matrices import align_mixing_matrices
    from limbeck.models import find_attention_sites
    from limbeck.models.loading import load_teacher, resolve_teacher
    from limbeck.report.figures.mixing import check_head, draw_matrices

    check_writable(out.parent)
    names = mixers.select_mixers(students)
    model, tokenizer = load_teacher(resolve_teacher(teacher), torch.device("cpu"))
    check_head(head, find_attention_sites(model)[0].shape.heads)
    settings = text_settings.Data(source=data, seq_len=seq_len, held_out=0.1, max_tokens=1_000_000)
    text = open_text_data(settings, tokenizer, model)
    train, held_out = text.train_sequences(seq_len, 0), text.held_out_sequences(seq_len)
    views = align_mixing_matrices(model, train, held_out, layer, names, steps, preset)
    draw_matrices(
        views, head, out, f"layer {layer}, head {head}: distance ‖cM − A‖ / ‖A‖ after {steps} steps of alignment"
    )
    distances: list[dict[str, Any]] = [
        {"student": view.name, "all_heads": float(view.distance.mean()), "head": float(view.distance[head])}
        for view in views[1:]
    ]
    console.print(f"written: {out}", style="dim")
    if as_json:
        print_json({"file": out, "layer": layer, "head": head, "distances": distances})
        return
    table = Table(box=None, pad_edge=False)
    for column in ("student", "distance, all heads", f"head {head}"):
        table.add_column(column, justify="left" if column == "student" else "right")
    for one in distances:
        table.add_row(one["student"], f"{one['all_heads']:.3f}", f"{one['head']:.3f}")
    output.print(table)
