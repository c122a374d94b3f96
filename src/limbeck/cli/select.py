"""limbeck select: choose the layers, or the groups of heads, that keep softmax attention."""

import contextlib
import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from limbeck.cli.completion import complete_choices
from limbeck.cli.old_options import take_old_out
from limbeck.cli.options import Data, Json, Mixer, OldOut, Preset, Quiet, SeqLen, Teacher, count_option
from limbeck.cli.results import print_json
from limbeck.cli.verbs import verb
from limbeck.core.console import console, output
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import atomic_write_text, check_writable


@verb(
    "limbeck select --num-softmax-layers 4 --out softmax_layers.json",
    "limbeck distill --softmax-layers softmax_layers.json",
    "limbeck select --heads --num-softmax-heads 9 --out softmax_heads.json",
    "limbeck distill --softmax-heads softmax_heads.json",
)
def select(
    old_out: OldOut = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="The file to write, for --softmax-layers or --softmax-heads.",
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
            autocompletion=complete_choices(("kl", "recall", "both", "halo", "uniform", "path", "swap")),
        ),
    ] = None,
    window: Annotated[int, count_option("With --heads: tokens that the other groups see.")] = 64,
    teacher: Teacher = "embedded",
    student: Mixer = "gated_deltanet",
    preset: Preset = "default",
    data: Data = "embedded",
    seq_len: SeqLen = 512,
    tokens: Annotated[int, count_option("Tokens to calibrate the mixers on.")] = 8192,
    eval_tokens: Annotated[
        int, count_option("Tokens to score on: held-out ones for layers, training text for groups of heads.")
    ] = 2048,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Choose the layers, or groups of heads, that keep softmax.

    Scores what each layer, or group of heads, is worth on your text, and writes down those worth keeping.
    """
    out = take_old_out(old_out, out) or Path("softmax_heads.json" if heads else "softmax_layers.json")
    for option, count in {"window": window, "tokens": tokens, "eval-tokens": eval_tokens}.items():
        if count < 1:
            raise LimbeckError(f"--{option} {count}", expected="1 or more")
    if heads:
        content = _select_heads(out, num_softmax_heads, by or "path", teacher, data, seq_len, eval_tokens, window)
    else:
        content = _select_layers(
            out, num_softmax_layers, by or "both", teacher, student, preset, data, seq_len, tokens, eval_tokens
        )
    if as_json:
        print_json({"file": out, **content})
    elif heads:
        _print_heads(content)
    else:
        _print_layers(content)
    option = "--softmax-heads" if heads else "--softmax-layers"
    console.print(f"written to {out}; use it with: limbeck distill {option} {shlex.quote(str(out))}")


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
    eval_tokens: int,
) -> dict[str, Any]:
    """Swap one layer at a time, and write the selection; returns what is written."""
    # late, for a fast --help
    from limbeck.core import text_settings
    from limbeck.data.dataset import open_text_data
    from limbeck.models import convert, find_attention_sites
    from limbeck.training import layer_selection

    check_writable(out.parent)
    model, tokenizer = _load_teacher(teacher)
    sites = find_attention_sites(model)
    layer_selection.check_selection(num_softmax_layers, by, len(sites))
    settings = text_settings.Data(source=data, seq_len=seq_len, held_out=0.1, max_tokens=1_000_000)
    text = open_text_data(settings, tokenizer, model)
    texts = text.train_sequences(seq_len, 0), text.held_out_sequences(seq_len)
    converted = convert(model, student, preset=preset, share_weights=True).requires_grad_(False)
    scores = layer_selection.score_layers(
        model, converted, sites, *texts, contextlib.nullcontext, tokens=tokens, eval_tokens=eval_tokens
    )
    chosen = layer_selection.select_layers(scores, num_softmax_layers, by)  # type: ignore[arg-type]
    facts = {"by": by, "teacher": teacher, "mixer": student, "preset": preset, "data": data, "tokens": tokens}
    content = layer_selection.selection_to_dict(scores, chosen, **facts)
    atomic_write_text(out, json.dumps(content, indent=1) + "\n")
    return content


def _print_layers(content: dict[str, Any]) -> None:
    """Print the score of each layer."""
    from limbeck.training.layer_selection import LEAST_COST

    table = Table(box=None, pad_edge=False)
    for column in ("layer", "KL", "recall", "unexplained", "attention"):
        table.add_column(column, justify="right")
    for score in content["prices"]:
        numbers = (f"{score[name]:.4f}" for name in ("kl", "recall", "unexplained"))
        table.add_row(str(score["layer"]), *numbers, "softmax" if score["layer"] in content["softmax_layers"] else "")
    output.print(table)
    if max(score["kl"] for score in content["prices"]) < LEAST_COST:
        output.print(
            "KL does not tell the layers apart on this text: less than a thousandth of a nat each. "
            "If the mixer is a window, its documents may be shorter than that; longer ones come with --data."
        )


def _select_heads(
    out: Path, num_softmax_heads: int, by: str, teacher: str, data: str, seq_len: int, eval_tokens: int, window: int
) -> dict[str, Any]:
    """Price the groups of heads, and write the selection; returns what is written."""
    # late, for a fast --help
    from limbeck.core import text_settings
    from limbeck.data.dataset import open_text_data
    from limbeck.data.packing import take_sequences_with_targets
    from limbeck.models import find_attention_sites
    from limbeck.training import head_selection

    check_writable(out.parent)
    head_selection.check_criterion(by)
    model, tokenizer = _load_teacher(teacher)
    sites = find_attention_sites(model)
    head_selection.check_count(num_softmax_heads, sum(site.shape.kv_heads for site in sites))
    settings = text_settings.Data(source=data, seq_len=seq_len, held_out=0.1, max_tokens=1_000_000)
    text = open_text_data(settings, tokenizer, model).train_sequences(seq_len, 0)
    batch = take_sequences_with_targets(text, 0, max(1, round(eval_tokens / seq_len)))[0]
    facts = {"by": by, "teacher": teacher, "data": data, "window": window, "tokens": eval_tokens, "seq_len": seq_len}
    content = head_selection.choose_heads(model, sites, batch, num_softmax_heads, by, window, facts)  # type: ignore[arg-type]
    atomic_write_text(out, json.dumps(content, indent=1) + "\n")
    return content


def _print_heads(content: dict[str, Any]) -> None:
    """Print the groups that were chosen, and what they bring back."""
    table = Table(box=None, pad_edge=False)
    for column in ("group", "worth, nats per token"):
        table.add_column(column, justify="right")
    for group, worth in content["worth"].items():
        table.add_row(group, f"{worth:.4f}")
    output.print(table)
    losses = content["loss_on_repeat"]
    console.print(
        f"loss on repeated text: {losses['softmax']:.3f} with softmax in all groups, {losses['chosen']:.3f} in these, "
        f"{losses['window']:.3f} in none"
    )


def _load_teacher(name: str) -> tuple[Any, Any]:
    """Load the teacher and its tokenizer, on a GPU if there is one."""
    # late, for a fast --help
    import torch

    from limbeck.models.loading import load_teacher, resolve_teacher

    return load_teacher(resolve_teacher(name), torch.device("cuda" if torch.cuda.is_available() else "cpu"))
