"""limbeck select: choose the layers, or the groups of heads, that keep softmax attention."""

import contextlib
import json
from pathlib import Path
from typing import Annotated, Any

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
        "limbeck select softmax_heads.json --heads --num-softmax-heads 9",
        "limbeck distill --set student.softmax_heads=softmax_heads.json",
    )
)
def select(
    out: Annotated[
        Path | None,
        typer.Argument(
            help="The file to write, for a recipe's student.softmax_layers, or student.softmax_heads.",
            show_default="softmax_layers.json, or softmax_heads.json with --heads",
        ),
    ] = None,
    heads: Annotated[
        bool, typer.Option("--heads", help="Choose groups of heads instead of layers, the others having a window.")
    ] = False,
    num_softmax_heads: Annotated[int, typer.Option(help="With --heads: how many groups keep softmax.")] = 9,
    num_softmax_layers: Annotated[int, typer.Option(help="How many layers keep softmax attention.")] = 4,
    by: Annotated[
        str | None,
        typer.Option(
            help="The score to rank layers by: kl, recall, both, halo or uniform; groups of heads: path or swap.",
            show_default="both, or path with --heads",
        ),
    ] = None,
    window: Annotated[int, typer.Option(min=1, help="With --heads: tokens that the other groups see.")] = 64,
    teacher: Teacher = "embedded",
    student: Mixer = "gated_deltanet",
    preset: Preset = "default",
    data: Data = "embedded",
    seq_len: SeqLen = 512,
    tokens: Annotated[int, typer.Option(help="Tokens to calibrate the mixers on.")] = 8192,
    judged: Annotated[
        int, typer.Option(help="Tokens to score on: held-out ones for layers, training text for groups of heads.")
    ] = 2048,
) -> None:
    """Score what each layer, or group of heads, is worth on your text, and write down those worth keeping."""
    if heads:
        _select_heads(
            out or Path("softmax_heads.json"), num_softmax_heads, by or "path", teacher, data, seq_len, judged, window
        )
        return
    _select_layers(
        out or Path("softmax_layers.json"),
        num_softmax_layers,
        by or "both",
        teacher,
        student,
        preset,
        data,
        seq_len,
        tokens,
        judged,
    )


def _select_layers(
    out: Path,
    num_softmax_layers: int,
    by: str,
    teacher: str,
    student: str,
    preset: str,
    data: str,
    seq_len: int,
    tokens: int,
    judged: int,
) -> None:
    """Swap one layer at a time, print the scores and write the selection."""
    # late, for a fast --help
    from limbeck.core import recipe as recipes
    from limbeck.data.dataset import open_text_data
    from limbeck.models import convert, find_attention_sites
    from limbeck.training import layer_selection

    check_writable(out.parent)
    model, tokenizer = _load_teacher(teacher)
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


def _select_heads(
    out: Path, num_softmax_heads: int, by: str, teacher: str, data: str, seq_len: int, judged: int, window: int
) -> None:
    """Price the groups of heads, print those that were chosen and write the selection."""
    # late, for a fast --help
    from limbeck.core import recipe as recipes
    from limbeck.data.dataset import open_text_data
    from limbeck.data.packing import take_sequences_with_targets
    from limbeck.models import find_attention_sites
    from limbeck.training import head_selection

    check_writable(out.parent)
    head_selection.check_criterion(by)
    model, tokenizer = _load_teacher(teacher)
    sites = find_attention_sites(model)
    head_selection.check_count(num_softmax_heads, sum(site.shape.kv_heads for site in sites))
    settings = recipes.Data(source=data, seq_len=seq_len, held_out=0.1, max_tokens=1_000_000)
    text = open_text_data(settings, tokenizer, model).train_sequences(seq_len, 0)
    batch = take_sequences_with_targets(text, 0, max(1, round(judged / seq_len)))[0]
    gated = head_selection.GatedTeacher(model, sites, window)
    texts = head_selection.prepare_texts(batch, model.device)
    chosen, losses = head_selection.select_heads(gated, texts, num_softmax_heads, by)  # type: ignore[arg-type]
    facts = {"by": by, "teacher": teacher, "data": data, "window": window, "tokens": judged, "seq_len": seq_len}
    content = head_selection.head_selection_to_dict(chosen, losses, **facts)
    atomic_write_text(out, json.dumps(content, indent=1) + "\n")
    table = Table(box=None, pad_edge=False)
    for column in ("group", "worth, nats per token"):
        table.add_column(column, justify="right")
    for group, worth in content["worth"].items():
        table.add_row(group, f"{worth:.4f}")
    output.print(table)
    console.print(
        f"loss on repeated text: {losses['softmax']:.3f} with softmax in all {len(gated.groups)} groups, "
        f"{losses['chosen']:.3f} in these, {losses['window']:.3f} in none"
    )
    console.print(f"written to {out}; use it with: limbeck distill --set student.softmax_heads={out}")


def _load_teacher(name: str) -> tuple[Any, Any]:
    """Load the teacher and its tokenizer, on a GPU if there is one."""
    # late, for a fast --help
    import torch

    from limbeck.models.loading import load_teacher, resolve_teacher

    return load_teacher(resolve_teacher(name), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
