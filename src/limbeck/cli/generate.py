"""limbeck generate: text from a student or any causal model, streamed to the terminal."""

import math
import os
import sys
import time
from collections.abc import Generator
from contextlib import closing, nullcontext
from typing import Annotated

import typer

from limbeck.cli.options import Compiled, Fp16, Model, NewTokens, Quiet, Seed, Temperature, TopP
from limbeck.cli.verbs import verb
from limbeck.core.console import console
from limbeck.core.errors import LimbeckError


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
    fp16: Fp16 = False,
    int8_dynamic: Annotated[
        bool, typer.Option("--int8-dynamic", help="Compute in int8 on the CPU: smaller, and much less exact.")
    ] = False,
    compiled: Compiled = False,
    quiet: Quiet = False,
) -> None:
    """Continue a text with a student or any other model."""
    # late, for a fast --help
    from limbeck.models.compiled_decoding import compile_decoding
    from limbeck.models.generation import stream_text
    from limbeck.models.loading import load_for_generation

    if new_tokens < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise LimbeckError("invalid setting", expected="new-tokens >= 1, temperature >= 0, 0 < top-p <= 1")
    # both are UTF-8, whatever the locale
    raw = sys.stdin.buffer.read() if prompt == "-" else os.fsencode(prompt)
    text = raw.decode("utf-8", errors="replace")
    if not text:
        raise LimbeckError("the prompt is empty", expected="some text")
    if fp16 and int8_dynamic:
        raise LimbeckError("--fp16 and --int8-dynamic are given", expected="one of them")
    if compiled and int8_dynamic:
        raise LimbeckError(
            "--compile and --int8-dynamic are given, and weights packed for int8 are no tensors that a compiler reads",
            expected="one of them",
            hint="--compile --fp16",
        )
    loaded, tokenizer = load_for_generation(model, fp16, int8_dynamic, compiled)
    with compile_decoding(loaded) if compiled else nullcontext():
        if compiled:
            # compiles now, so that what is told of it does not stand within the text
            list(stream_text(loaded, tokenizer, "a", 2))
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
