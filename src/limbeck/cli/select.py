"""limbeck select: choose the layers that keep softmax attention."""

import contextlib
import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from limbeck.cli import app
from limbeck.cli.options import Data, Mixer, Preset, SeqLen, Teacher, examples
from limbeck.core.console import console, output
from limbeck.core.storage import atomic_write_text, check_writable


@app.command(
    epilog=examples(
        "limbeck select softmax_layers.json --num-softmax-layers 4",
        "limbeck distill --set student.softmax_layers=softmax_layers.json",
    )
)
def select(
    out: Annotated[Path, typer.Argument(help="The file to write, for a recipe's student.softmax_layers.")] = Path(
        "softmax_layers.json"
    ),
    num_softmax_layers: Annotated[int, typer.Option(help="How many layers keep softmax attention.")] = 4,
    by: Annotated[str, typer.Option(help="The score to rank layers by: kl, recall, both, halo or uniform.")] = "both",
    teacher: Teacher = "embedded",
    student: Mixer = "gated_deltanet",
    preset: Preset = "default",
    data: Data = "embedded",
    seq_len: SeqLen = 512,
    tokens: Annotated[int, typer.Option(help="Tokens to calibrate the mixers on.")] = 8192,
    judged: Annotated[int, typer.Option(help="Held-out tokens to score each swapped layer on.")] = 2048,
) -> None:
    """Swap one layer at a time, score what that costs on your text, and write down the layers worth keeping."""
    # late, for a fast --help
    import torch

    from limbeck.core import recipe as recipes
    from limbeck.data.dataset import open_text_data
    from limbeck.models import convert, find_attention_sites
    from limbeck.models.loading import load_teacher, resolve_teacher
    from limbeck.training import layer_selection

    check_writable(out.parent)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, tokenizer = load_teacher(resolve_teacher(teacher), device)
    sites = find_attention_sites(model)
    layer_selection.check_selection(num_softmax_layers, by, len(sites))
    settings = recipes.Data(source=data, seq_len=seq_len, held_out=0.1, max_tokens=1_000_000)
    text = open_text_data(settings, tokenizer, model)
    texts = text.train_sequences(seq_len, 0), text.held_out_sequences(seq_len)
    converted = convert(model, student, preset=preset, share_weights=True).requires_grad_(False)
    scores = layer_selection.score_layers(
        model, converted, sites, *texts, contextlib.nullcontext, tokens=tokens, eval_tokens=judged
    )
    chosen = layer_selection.select_layers(scores, num_softmax_layers, by)  # type: ignore[arg-type]
    facts = {"by": by, "teacher": teacher, "mixer": student, "preset": preset, "data": data, "tokens": tokens}
    content = layer_selection.selection_to_dict(scores, chosen, **facts)
    atomic_write_text(out, json.dumps(content, indent=1) + "\n")
    table = Table(box=None, pad_edge=False)
    for column in ("layer", "KL", "recall", "unexplained", "attention"):
        table.add_column(column, justify="right")
    for score in scores:
        numbers = (f"{x:.4f}" for x in (score.kl, score.recall, score.unexplained))
        table.add_row(str(score.layer), *numbers, "softmax" if score.layer in chosen else "")
    output.print(table)
    console.print(f"written to {out}; use it with: limbeck distill --set student.softmax_layers={out}")
