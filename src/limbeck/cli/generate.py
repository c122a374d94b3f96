"""limbeck generate: text from a student or any causal model, streamed to the terminal."""

import math
import os
import sys
import time
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer

from limbeck.cli import app
from limbeck.cli.options import Seed, examples
from limbeck.core.console import console
from limbeck.core.errors import LimbeckError


@app.command(
    epilog=examples(
        "limbeck generate runs/quickstart 'Once upon a time'",
        "limbeck generate runs/quickstart - --temperature 0.8 --top-p 0.95 < prompt.txt",
    )
)
def generate(
    model: Annotated[
        str, typer.Argument(help="A run directory, a model folder, a Hub name, or 'embedded' for the teacher.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    tokens: Annotated[int, typer.Option(help="The maximum number of new tokens.")] = 100,
    temperature: Annotated[float, typer.Option(help="The sampling temperature; 0 takes the most likely token.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens of this total probability.")] = 1.0,
    seed: Seed = 0,
    fp16: Annotated[
        bool, typer.Option("--fp16", help="Keep weights in float16 on the CPU: faster, and nearly exact.")
    ] = False,
    int8_dynamic: Annotated[
        bool, typer.Option("--int8-dynamic", help="Compute in int8 on the CPU: smaller, and much less exact.")
    ] = False,
) -> None:
    """Continue a text."""
    # late, for a fast --help
    import torch

    from limbeck.models.generation import stream_text
    from limbeck.models.loading import load_model_and_tokenizer, resolve_teacher

    if tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise LimbeckError("invalid setting", expected="tokens >= 1, temperature >= 0, 0 < top-p <= 1")
    # both are UTF-8, whatever the locale
    raw = sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)
    text = raw.decode("utf-8", errors="replace")
    if not text:
        raise LimbeckError("the prompt is empty", expected="some text")
    student_folder = Path(model) / "student"
    is_run = student_folder.is_dir()
    loaded, tokenizer = load_model_and_tokenizer(
        str(student_folder) if is_run else resolve_teacher(model), require_student=is_run
    )
    if fp16 and int8_dynamic:
        raise LimbeckError("--fp16 and --int8-dynamic are given", expected="one of them")
    if fp16 or int8_dynamic:
        # late, for a fast --help
        from limbeck.models import quantization

        loaded = quantization.pack_float16(loaded) if fp16 else quantization.quantize_int8(loaded)
    else:
        loaded.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    console.print(text, end="", style="dim")
    start, num_tokens = time.monotonic(), 0

    def stream() -> Generator[str, None, None]:
        nonlocal num_tokens
        num_tokens = yield from stream_text(loaded, tokenizer, text, tokens, temperature, top_p, seed)

    try:
        with closing(stream()) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except BaseException:
        console.print()  # what ends it is told on a line of its own
        raise
    print()
    console.print(f"{num_tokens} tokens, {num_tokens / (time.monotonic() - start):.1f} tokens/s", style="dim")
