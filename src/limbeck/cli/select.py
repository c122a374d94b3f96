"""limbeck select: which layers to keep as softmax."""

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from limbeck.cli import app
from limbeck.core.console import console, output
from limbeck.core.storage import check_writable


@app.command()
def select(
    out: Annotated[Path, typer.Argument(help="The file to write, for student.softmax_layers of a recipe.")] = Path(
        "softmax_layers.json"
    ),
    num_softmax_layers: Annotated[int, typer.Option(help="How many layers keep softmax.")] = 4,
    by: Annotated[str, typer.Option(help="kl, recall, both, halo or uniform.")] = "both",
    teacher: Annotated[str, typer.Option(help="'embedded', a local folder or a hub name.")] = "embedded",
    student: Annotated[str, typer.Option(help="The mixer; `limbeck students` lists them.")] = "gated_deltanet",
    preset: Annotated[str, typer.Option(help="default, published or controlled.")] = "default",
    data: Annotated[str, typer.Option(help="Text, as in a recipe's data.source.")] = "embedded",
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence.")] = 512,
    tokens: Annotated[int, typer.Option(help="Tokens for the calibration of the mixers.")] = 8192,
    judged: Annotated[int, typer.Option(help="Held-out tokens that each swap is measured on.")] = 2048,
) -> None:
    """Swap one layer at a time on your own text, read what it costs, and write down the layers worth keeping."""
    import torch

    from limbeck.core.recipe import Data
    from limbeck.data.dataset import open_text_data
    from limbeck.models import convert, find_attention_sites
    from limbeck.models.hooks import load_teacher
    from limbeck.models.loading import resolve_teacher
    from limbeck.training import layer_selection as keeping

    check_writable(out.parent)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_teacher(resolve_teacher(teacher), device)
    sites = find_attention_sites(model)
    keeping.check_selection(num_softmax_layers, by, len(sites))
    text = open_text_data(Data(source=data, seq_len=seq_len, held_out=0.1, max_tokens=1_000_000), tokenizer, model)
    texts = text.train_sequences(seq_len, 0), text.held_out_sequences(seq_len)
    arm = convert(model, student, preset=preset, share_weights=True).requires_grad_(False)
    scores = keeping.score_layers(model, arm, sites, *texts, contextlib.nullcontext, tokens=tokens, eval_tokens=judged)
    chosen = keeping.select_layers(scores, num_softmax_layers, by)  # type: ignore[arg-type]
    facts = {"by": by, "teacher": teacher, "mixer": student, "preset": preset, "data": data, "tokens": tokens}
    out.write_text(json.dumps(keeping.selection_to_dict(scores, chosen, **facts), indent=1) + "\n", encoding="utf-8")
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "KL", "recall", "unexplained", "kept"):
        table.add_column(column, justify="right")
    for score in scores:
        numbers = (f"{x:.4f}" for x in (score.kl, score.recall, score.unexplained))
        table.add_row(str(score.layer), *numbers, "softmax" if score.layer in chosen else "")
    output.print(table)
    console.print(f"written to {out}; use it with: limbeck distill --set student.softmax_layers={out}")
