"""limbeck matrices: a picture of mixing matrices beside the teacher's attention."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from limbeck.cli import app
from limbeck.core.console import console, output
from limbeck.core.storage import check_writable


@app.command()
def matrices(
    out: Annotated[Path, typer.Argument(help="The picture to write: .png, .svg or .pdf.")],
    teacher: Annotated[str, typer.Option(help="'embedded', a local folder or a hub name.")] = "embedded",
    students: Annotated[str, typer.Option(help="Mixers as a,b,c, or a set: paper-v2, paper-v3, all.")] = "all",
    preset: Annotated[str, typer.Option(help="default, published or controlled.")] = "default",
    layer: Annotated[int, typer.Option(help="Which layer.")] = 12,
    head: Annotated[int, typer.Option(help="Which of its heads is drawn.")] = 0,
    data: Annotated[str, typer.Option(help="Text to align on and to show, as in a recipe's data.source.")] = "embedded",
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 96,
    steps: Annotated[int, typer.Option(help="Steps of alignment before the picture; 0 for none.")] = 150,
) -> None:
    """Align each mixer to one layer's attention matrices, and draw what comes out on held-out text."""
    import torch

    from limbeck import mixers
    from limbeck.core.recipe import Data
    from limbeck.data.dataset import open_text_data
    from limbeck.evaluation.matrices import align_mixing_matrices
    from limbeck.models.hooks import load_teacher
    from limbeck.models.loading import resolve_teacher
    from limbeck.report.figures.mixing import draw_matrices

    check_writable(out.parent)
    names = mixers.select_mixers(students)
    model, tokenizer = load_teacher(resolve_teacher(teacher), torch.device("cpu"))
    text = open_text_data(Data(source=data, seq_len=seq_len, held_out=0.1, max_tokens=1_000_000), tokenizer, model)
    train, shown = text.train_sequences(seq_len, 0), text.held_out_sequences(seq_len)
    views = align_mixing_matrices(model, train, shown, layer, names, steps, preset)
    draw_matrices(
        views, head, out, f"layer {layer}, head {head}: distance ‖cM − A‖ / ‖A‖ after {steps} steps of alignment"
    )
    table = Table(box=None, pad_edge=False)
    for column in ("student", "distance, all heads", f"head {head}"):
        table.add_column(column, justify="left" if column == "student" else "right")
    for view in views[1:]:
        table.add_row(view.name, f"{float(view.distance.mean()):.3f}", f"{float(view.distance[head]):.3f}")
    output.print(table)
    console.print(f"picture: {out}")
