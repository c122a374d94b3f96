"""limbeck chat: a conversation in the terminal, with a student or with an exported file in llama.cpp."""

import math
import shlex
import sys
import time
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from limbeck.cli.completion import complete_choices
from limbeck.cli.options import Compiled, Fp16, Model, NewTokens, Quiet, Seed, Temperature, TopP, count_option
from limbeck.cli.verbs import verb
from limbeck.core.console import console
from limbeck.core.errors import LimbeckError

ENGINES = ("limbeck", "llama.cpp")


@verb("limbeck chat runs/quickstart --temperature 0.7 --top-p 0.9", "limbeck chat runs/rwkv7_gguf --engine llama.cpp")
def chat(
    model: Model,
    engine: Annotated[
        str,
        typer.Option(
            help="limbeck, or llama.cpp for the GGUF file that `limbeck export` wrote in the run.",
            autocompletion=complete_choices(ENGINES),
        ),
    ] = "limbeck",
    system: Annotated[str | None, typer.Option(help="A system message.", show_default=False)] = None,
    new_tokens: NewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    context: Annotated[int, count_option("With llama.cpp: tokens of the whole conversation.")] = 4096,
    fp16: Fp16 = False,
    compiled: Compiled = False,
    seed: Seed = 0,
    quiet: Quiet = False,
) -> None:
    """Talk to a student in the terminal.

    An empty line or the end of the input ends it. The student's state is carried over, never read again.
    """
    # late, for a fast --help
    from limbeck.models.compiled_decoding import compile_decoding
    from limbeck.models.conversation import Conversation, Sampling

    if new_tokens < 1 or context < 1 or not 0 <= temperature < math.inf or not 0 < top_p <= 1:
        raise LimbeckError("invalid setting", expected="new-tokens, context >= 1, temperature >= 0, 0 < top-p <= 1")
    if engine not in ENGINES:
        raise LimbeckError(f"unknown engine '{engine}'", expected=" or ".join(ENGINES))
    if fp16 and engine != "limbeck":
        raise LimbeckError(f"--fp16 with --engine {engine}", expected="the file's own precision", hint="leave it out")
    if compiled and engine != "limbeck":
        raise LimbeckError(f"--compile with --engine {engine}", expected="the engine's own code", hint="leave it out")
    is_file = engine == "llama.cpp"
    backend, tokenizer, ends = _open_llama_cpp(Path(model), context) if is_file else _open_model(model, fp16, compiled)
    talk = Conversation(
        backend, tokenizer, Sampling(temperature, top_p, new_tokens), system=system, ends=ends, seed=seed
    )
    with compile_decoding(backend.model) if compiled else nullcontext():
        if compiled:
            # compiles now and not in the first answer
            for ids in ([0, 0], [0]):
                backend.read(ids)
            backend.reset()
        while message := _read_message():
            start = time.monotonic()
            num_tokens = _print_answer(talk, message)
            rate = num_tokens / (time.monotonic() - start)
            again = f", read again {talk.rereadings} times" if talk.rereadings else ""
            console.print(
                f"{num_tokens} tokens, {rate:.1f} tokens/s; {talk.num_tokens} in the state{again}", style="dim"
            )


def _open_model(name: str, fp16: bool, compiled: bool) -> tuple[Any, Any, list[int]]:
    """Load a model: engine, tokenizer, end tokens."""
    # late, for a fast --help
    from limbeck.models.conversation import StudentEngine, list_end_tokens
    from limbeck.models.loading import load_for_generation

    model, tokenizer = load_for_generation(name, fp16, compiled=compiled)
    return StudentEngine(model), tokenizer, list_end_tokens(model)


def _open_llama_cpp(run: Path, context: int) -> tuple[Any, Any, list[int]]:
    """Open the newest GGUF file of a run: engine, the student's tokenizer, end tokens."""
    # late, for a fast --help
    import torch
    from transformers import GenerationConfig

    from limbeck.models.conversation import LlamaCppEngine
    from limbeck.models.export.llama_cpp import LlamaCpp
    from limbeck.models.loading import load_tokenizer
    from limbeck.report.upload_plan import find_student_folder

    folder = find_student_folder(run)
    files = sorted(run.glob("export/*/*.gguf"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise LimbeckError(
            f"{run} has no GGUF file",
            expected="one under export/",
            hint=f"limbeck export {shlex.quote(str(run))} --to gguf",
        )
    config = GenerationConfig.from_pretrained(folder)
    ends = [config.eos_token_id] if isinstance(config.eos_token_id, int) else list(config.eos_token_id or [])
    return LlamaCppEngine(LlamaCpp(files[-1], context, torch.get_num_threads())), load_tokenizer(str(folder)), ends


def _read_message() -> str:
    """Read a line from the terminal or a pipe; an empty text at its end."""
    try:
        return input("\n> " if sys.stdin.isatty() else "")
    except EOFError:
        return ""


def _print_answer(talk: Any, message: str) -> int:
    """Print an answer as it comes; return its number of tokens."""
    count = 0

    def stream() -> Any:
        nonlocal count
        count = yield from talk.reply(message)

    try:
        with closing(stream()) as pieces:
            for piece in pieces:
                print(piece, end="", flush=True)
    finally:
        print()  # what ends it is told on a line of its own
    return count
