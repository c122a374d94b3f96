"""limbeck generate: text from a student (or any causal model), streamed to the terminal."""

import math
import os
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from limbeck.cli import app
from limbeck.core.console import console
from limbeck.core.errors import LimbeckError


@app.command()
def generate(
    model: Annotated[
        str,
        typer.Argument(help="A run, a student's folder, a hub name, or 'embedded' for the teacher."),
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads it from standard input.")],
    tokens: Annotated[int, typer.Option(help="How many tokens at most.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample among the tokens that have this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=2**62)] = 0,
    int8: Annotated[bool, typer.Option("--int8", help="Weights in int8 on a CPU: a third of the memory.")] = False,
    int8_dynamic: Annotated[
        bool, typer.Option("--int8-dynamic", help="Activations in int8 too: faster, less exact.")
    ] = False,
) -> None:
    """Continue a text."""
    import time

    import torch

    from limbeck.models.generation import stream_text
    from limbeck.models.loading import load_model_and_tokenizer, resolve_teacher

    if tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise LimbeckError("impossible setting", expected="tokens >= 1, temperature >= 0, 0 < top-p <= 1")
    # both in UTF-8, whatever the locale
    raw = sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)
    text = raw.decode("utf-8", errors="replace")
    if not text:
        raise LimbeckError("the prompt is empty", expected="some text")
    folder = Path(model) / "student"
    of_a_run = folder.is_dir()
    name = str(folder) if of_a_run else resolve_teacher(model)
    loaded, tokenizer = load_model_and_tokenizer(name, require_student=of_a_run)
    if int8 or int8_dynamic:
        from limbeck.models import quantization

        loaded = quantization.quantize_int8(loaded, quantize_activations=int8_dynamic)
    else:
        loaded.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    console.print(text, end="", style="dim")
    began, count = time.monotonic(), 0

    def said() -> Generator[str, None, None]:
        nonlocal count
        count = yield from stream_text(loaded, tokenizer, text, tokens, temperature, top_p, seed)

    with closing(said()) as pieces:
        for piece in pieces:
            print(piece, end="", flush=True)
    print()
    console.print(f"{count} tokens, {count / (time.monotonic() - began):.1f} tokens/s", style="dim")
