"""limbeck generate: text from a student or any causal model, streamed to the terminal."""

import math
import os
import sys
import time
from collections.abc import Generator
from contextlib import closing
from typing import Annotated

import typer

from limbeck.cli.options import Model, NewTokens, Quiet, Seed, Temperature, TopP
from limbeck.cli.verbs import verb
from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.extras import require


@verb(
    "limbeck generate runs/quickstart 'Once upon a time' --new-tokens 200",
    "limbeck generate runs/quickstart - --temperature 0.8 --top-p 0.95 < prompt.txt",
)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue; - reads it from standard input.")],
    new_tokens: NewTokens = 100,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    int8: Annotated[
        bool, typer.Option("--int8", help="Store weights in int8 on the CPU: a third of the memory.")
    ] = False,
    int8_dynamic: Annotated[
        bool, typer.Option("--int8-dynamic", help="Also compute with int8 activations: faster, less exact.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text with a student or any other model."""
    # late, for a fast --help
    import torch

    from limbeck.models.generation import stream_text
    from limbeck.models.loading import load_model_and_tokenizer, resolve_model

    if new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise LimbeckError("invalid setting", expected="new-tokens >= 1, temperature >= 0, 0 < top-p <= 1")
    # both are UTF-8, whatever the locale
    raw = sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)
    text = raw.decode("utf-8", errors="replace")
    if not text:
        raise LimbeckError("the prompt is empty", expected="some text")
    if int8 and not int8_dynamic:
        require("torchao", "weights in int8")
    checkpoint, is_run = resolve_model(model)
    loaded, tokenizer = load_model_and_tokenizer(checkpoint, require_student=is_run)
    if int8 or int8_dynamic:
        # late: quantization needs the optional torchao
        from limbeck.models import quantization

        loaded = quantization.quantize_int8(loaded, quantize_activations=int8_dynamic)
    else:
        loaded.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    console.print(text, end="", style="dim")
    start, num_tokens = time.monotonic(), 0

    def stream() -> Generator[str, None, None]:
        nonlocal num_tokens
        num_tokens = yield from stream_text(loaded, tokenizer, text, new_tokens, temperature, top_p, seed)

    try:
        with closing(stream()) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    except BaseException:
        console.print()  # what ends it is told on a line of its own
        raise
    print()
    console.print(f"{num_tokens} tokens, {num_tokens / (time.monotonic() - start):.1f} tokens/s", style="dim")
