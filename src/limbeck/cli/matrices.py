"""limbeck matrices: draw mixing matrices beside the teacher's attention."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from limbeck.cli import app
from limbeck.cli.options import Data, Preset, SeqLen, Teacher, examples
from limbeck.core.console import console, output
from limbeck.core.storage import check_writable


@app.command(
    epilog=examples("limbeck matrices matrices.png", "limbeck matrices gla.svg --students gla,mlstm --layer 3")
)
def matrices(
    out: Annotated[Path, typer.Argument(help="The figure to write: .png, .svg or .pdf.")],
    teacher: Teacher = "embedded",
    students: Annotated[str, typer.Option(help="Mixers as a,b,c, or a set: paper-v2, paper-v3, all.")] = "all",
    preset: Preset = "default",
    layer: Annotated[int, typer.Option(help="The index of the layer to align to.")] = 12,
    head: Annotated[int, typer.Option(help="The index of the head to draw.")] = 0,
    data: Data = "embedded",
    seq_len: SeqLen = 96,
    steps: Annotated[int, typer.Option(help="Alignment steps before the figure is drawn; 0 for none.")] = 150,
) -> None:
    """Align each mixer to the attention matrices of one layer, and draw the results on held-out text."""
    # late, for a fast --help
    import torch

    from limbeck import mixers
    from limbeck.core import recipe as recipes
    from limbeck.data.dataset import open_text_data
    from limbeck.evaluation.matrices import align_mixing_matrices
    from limbeck.models.loading import load_teacher, resolve_teacher
    from limbeck.report.figures.mixing import draw_matrices

    check_writable(out.parent)
    names = mixers.select_mixers(students)
    model, tokenizer = load_teacher(resolve_teacher(teacher), torch.device("cpu"))
    settings = recipes.Data(source=data, seq_len=seq_len, held_out=0.1, max_tokens=1_000_000)
    text = open_text_data(settings, tokenizer, model)
    train, held_out = text.train_sequences(seq_len, 0), text.held_out_sequences(seq_len)
    views = align_mixing_matrices(model, train, held_out, layer, names, steps, preset)
    draw_matrices(
        views, head, out, f"layer {layer}, head {head}: distance ‖cM − A‖ / ‖A‖ after {steps} steps of alignment"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("student", "distance, all heads", f"head {head}"):
        table.add_column(column, justify="left" if column == "student" else "right")
    for view in views[1:]:
        table.add_row(view.name, f"{float(view.distance.mean()):.3f}", f"{float(view.distance[head]):.3f}")
    output.print(table)
    console.print(f"written: {out}", style="dim")
