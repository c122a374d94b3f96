"""An exported student and its teacher in llama.cpp, and our own step beside them: sizes, perplexity, tokens per second.

    python benchmarks/engines.py runs/rwkv7_gguf                       # a quarter of an hour on two threads
    python benchmarks/engines.py students/rwkv7 --teacher embedded --contexts 1024,8192 --json engines.json

The student is one that `limbeck export --to gguf` accepts, the teacher a Llama-like model, which is written to GGUF too
and compared with itself like a student. All contestants take turns, token by token, on the same number of threads.

How a context comes about: of the teacher's, in llama.cpp, `SEED` tokens are read and their cells copied as often as the
context asks for. What a token costs depends on the number of cells and not on what is in them; --read reads all tokens
instead. A student whose layers all have a state of fixed size reads `SEED` tokens at every context; one with a cache
that grows reads all of them. Our own step has its cache filled in the same way (`limbeck.evaluation.timing`).
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.evaluation.exported import HELD_OUT_TEXT, load_text
from limbeck.evaluation.timing import prefill_cache
from limbeck.models import build_cache_kwargs, loading
from limbeck.models.export import check_exportable, get_exporter, gguf_file
from limbeck.models.export.body import check_structure, read_body
from limbeck.models.export.container import Container
from limbeck.models.export.llama_cpp import LlamaCpp, get_version
from limbeck.models.export.llama_cpp_process import compare_in_process, score_in_process
from limbeck.models.export.verification import (
    compare,
    compute_logits,
    compute_step_logits,
    sample_tokens,
    sum_model_losses,
)
from limbeck.report.text_tables import format_markdown_table
from limbeck.report.upload_plan import find_student_folder

SEED = 512  # tokens that are read before cells are copied
WARMUP = 2  # steps that are not timed
CHUNK = 512  # tokens that llama.cpp reads at once


@dataclass(frozen=True)
class Row:
    """A file or a model: its weights, size, perplexity; milliseconds of a token by context: median, least, most."""

    name: str
    weights: str
    megabytes: float
    perplexity: float | None
    milliseconds: dict[int, tuple[float, float, float]]


def main(words: list[str] | None = None) -> list[Row]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("student", type=Path, help="a run, or a student's folder")
    parser.add_argument("--teacher", help="the teacher; by default the run's")
    parser.add_argument("--weights", default="f16,q8_0", help="precisions of the files")
    parser.add_argument("--contexts", default="1024,8192,32768")
    parser.add_argument("--steps", type=int, default=16, help="timed tokens of each contestant and context")
    parser.add_argument("--tokens", type=int, default=2048, help="of the perplexity; 0 for none")
    parser.add_argument("--text", default=HELD_OUT_TEXT, help="of the perplexity")
    parser.add_argument("--read", action="store_true", help="read the teacher's whole context instead of copying cells")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(words)
    torch.set_num_threads(args.threads)

    folder = find_student_folder(args.student)
    student, tokenizer = loading.load_model_and_tokenizer(str(folder), require_student=True)
    teacher, _ = loading.load_teacher(loading.resolve_teacher(args.teacher or _find_teacher(folder)), student.device)
    contexts = sorted(int(context) for context in args.contexts.split(","))
    with tempfile.TemporaryDirectory() as place:
        files = write_files(student, teacher, tokenizer, Path(place), args)
        perplexities = measure_perplexities(student, teacher, tokenizer, files, args)
        timings = time_contestants(student, files, contexts, args)
        sizes = {key: file.stat().st_size for key, file in files.items()}
    sizes["student", "in Limbeck"] = sum(p.numel() * p.element_size() for p in student.parameters())
    sizes["teacher", "in transformers"] = sum(p.numel() * p.element_size() for p in teacher.parameters())
    rows = [
        Row(name, weights, size / 1e6, perplexities.get((name, weights)), timings.get((name, weights), {}))
        for (name, weights), size in sizes.items()
    ]
    print_rows(rows, contexts, args)
    if args.json:
        facts: dict[str, Any] = {"command": sys.argv, "threads": args.threads, "llama.cpp": get_version()}
        facts["rows"] = [asdict(row) for row in rows]
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return rows


def _find_teacher(folder: Path) -> str:
    """Return the teacher of the run around a student's folder."""
    # late: only where no teacher is named
    from limbeck.core.recipe import Recipe

    file = folder.parent / "recipe.yaml"
    if not file.is_file():
        raise LimbeckError(f"{folder} is in no run, so its teacher is unknown", hint="--teacher embedded")
    return Recipe.load(file, stored=True).teacher


# ------------------------------------------------------------------ files


def write_files(
    student: Any, teacher: Any, tokenizer: Any, place: Path, args: argparse.Namespace
) -> dict[tuple[str, str], Path]:
    """Write student and teacher in every precision; files by name and precision."""
    files = {}
    for weights in args.weights.split(","):
        check_exportable(get_exporter("gguf"), student, tokenizer, weights)
        for name, model, write in (("student", student, gguf_file.write), ("teacher", teacher, write_teacher)):
            folder = place / name
            folder.mkdir(exist_ok=True)
            write(model, tokenizer, folder, weights)
            files[name, weights] = folder / gguf_file.file_name(weights)
        check_teacher(teacher, files["teacher", weights], weights, args.threads)
    return files


def write_teacher(teacher: Any, tokenizer: Any, folder: Path, weights: str) -> None:
    """Write a teacher with the body of Llama in llama.cpp's layout `llama`.

    Raises:
        LimbeckError: it has tensors, norms or positions that the layout does not have.
    """
    body, config = None if check_structure(teacher) else read_body(teacher), teacher.config
    rope = getattr(config, "rope_parameters", None) or {}
    if body is None or body.has_qk_norms or rope.get("rope_type", "default") != "default":
        raise LimbeckError(
            f"the teacher, {type(teacher).__name__}, has no place in the layout `llama`",
            expected="the body of Llama, Mistral or SmolLM, without biases, q/k norms and scaled positions",
        )
    container = Container("llama")
    container.keys = {
        "context_length": body.max_positions,
        "embedding_length": body.hidden,
        "block_count": body.layers,
        "feed_forward_length": body.intermediate,
        "attention.head_count": body.heads,
        "attention.head_count_kv": body.kv_heads,
        "attention.key_length": body.head_width,
        "attention.value_length": body.head_width,
        "attention.layer_norm_rms_epsilon": body.norm_eps,
        "rope.dimension_count": body.head_width,
        "rope.freq_base": float(rope.get("rope_theta", 10_000.0)),
    }
    container.add("token_embd.weight", teacher.base_model.embed_tokens.weight)
    if not body.tied:
        container.add("output.weight", teacher.get_output_embeddings().weight)
    container.add("output_norm.weight", teacher.base_model.norm.weight)
    for index, block in enumerate(teacher.base_model.layers):
        attention, mlp = block.self_attn, block.mlp
        tensors = {
            "attn_norm": block.input_layernorm.weight,
            "ffn_norm": block.post_attention_layernorm.weight,
            "attn_q": interleave_pairs(attention.q_proj.weight, body.heads),
            "attn_k": interleave_pairs(attention.k_proj.weight, body.kv_heads),
            "attn_v": attention.v_proj.weight,
            "attn_output": attention.o_proj.weight,
            "ffn_gate": mlp.gate_proj.weight,
            "ffn_up": mlp.up_proj.weight,
            "ffn_down": mlp.down_proj.weight,
        }
        for name, tensor in tensors.items():
            container.add(f"blk.{index}.{name}.weight", tensor)
    file = folder / gguf_file.file_name(weights)
    gguf_file.write_container(container, "teacher", teacher, tokenizer, file, weights)


def interleave_pairs(weight: Tensor, heads: int) -> Tensor:
    """Order a projection's rows as llama.cpp rotates them: channels i and i + K/2 of a head side by side."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def check_teacher(teacher: Any, file: Path, weights: str, threads: int) -> None:
    """Compare the teacher's file with the teacher, as an export is verified; raises LimbeckError above the bound."""
    ids = sample_tokens(teacher)
    run = compare_in_process(file, ids, gguf_file.SAMPLE_TEXT, threads)
    result = compare(
        compute_logits(teacher, ids),
        run.prompt,
        run.steps,
        own_steps=compute_step_logits(teacher, ids),
        engine="llama.cpp",
        version=get_version(),
        bound=gguf_file.BOUNDS[weights],
        rounded=weights != "f32",
    )
    if not result.passed:
        raise LimbeckError(f"the teacher's file is not the teacher: {result}", expected="its own logits")


# ------------------------------------------------------------------ measurements


def measure_perplexities(
    student: Any, teacher: Any, tokenizer: Any, files: dict[tuple[str, str], Path], args: argparse.Namespace
) -> dict[tuple[str, str], float]:
    """Measure the perplexity of every file in llama.cpp, and of both models in torch, on the same tokens."""
    if not args.tokens:
        return {}
    text = load_text(tokenizer, args.tokens, args.text)
    losses = {key: score_in_process(file, text.sequences, args.threads) for key, file in files.items()}
    losses["student", "in Limbeck"] = sum_model_losses(student, text.sequences)
    losses["teacher", "in transformers"] = sum_model_losses(teacher, text.sequences)
    return {key: math.exp(loss / text.targets) for key, loss in losses.items()}


def time_contestants(
    student: Any, files: dict[tuple[str, str], Path], contexts: list[int], args: argparse.Namespace
) -> dict[tuple[str, str], dict[int, tuple[float, float, float]]]:
    """Time a token of every file and of our own step, in turns: milliseconds by contestant and context."""
    found: dict[tuple[str, str], dict[int, tuple[float, float, float]]] = {}
    for context in contexts:
        with ExitStack() as opened:
            steps: dict[tuple[str, str], Callable[[], None]] = {}
            for key, file in files.items():
                engine = opened.enter_context(open_at(file, context, args))
                steps[key] = lambda engine=engine: engine.decode([5], last_only=True)
            steps["student", "in Limbeck"] = make_own_step(student, context, args.steps + WARMUP)
            times: dict[tuple[str, str], list[float]] = {key: [] for key in steps}
            for number in range(args.steps + WARMUP):
                for key, step in steps.items():
                    start = time.perf_counter()
                    step()
                    if number >= WARMUP:
                        times[key].append(1000 * (time.perf_counter() - start))
        for key, milliseconds in times.items():
            found.setdefault(key, {})[context] = (
                statistics.median(milliseconds),
                min(milliseconds),
                max(milliseconds),
            )
    return found


def open_at(file: Path, context: int, args: argparse.Namespace) -> LlamaCpp:
    """Open a file in llama.cpp with a context of so many tokens, and room for the steps."""
    engine = LlamaCpp(file, context + args.steps + WARMUP + SEED, args.threads, exact=False)
    copied = file.parent.name == "teacher" and not args.read
    seed = min(context, SEED) if copied or engine.is_recurrent else context
    vocabulary = engine.vocabulary
    for begin in range(0, seed, CHUNK):
        engine.decode([i % vocabulary for i in range(begin, min(begin + CHUNK, seed))], last_only=True)
    if copied and context > seed:
        times, before = -(-context // seed), engine.state_bytes
        engine.repeat_context(times)
        grown = engine.state_bytes / before
        if abs(grown / times - 1) > 0.01:
            raise LimbeckError(f"the cache grew by {grown:.3f}", expected=f"{times} times: try --read")
    return engine


def make_own_step(student: Any, context: int, steps: int) -> Callable[[], None]:
    """Return a call that decodes a token with Limbeck."""
    cache = prefill_cache(student, context, steps)

    @torch.no_grad()
    def step() -> None:
        student(input_ids=torch.tensor([[5]]), **build_cache_kwargs(student, cache))

    return step


def print_rows(rows: list[Row], contexts: list[int], args: argparse.Namespace) -> None:
    """Print a table of all figures, and the ratios of speed between student and teacher."""
    columns = ["model", "weights", "MB", "perplexity", *(f"tokens/s at {context:,}" for context in contexts)]
    cells = [
        [
            row.name,
            row.weights,
            f"{row.megabytes:,.0f}",
            "" if row.perplexity is None else f"{row.perplexity:.2f}",
            *(_format_rate(row.milliseconds.get(context)) for context in contexts),
        ]
        for row in rows
    ]
    print(format_markdown_table(columns, cells, num_text_columns=2))
    by_key = {(row.name, row.weights): row.milliseconds for row in rows}
    own = by_key["student", "in Limbeck"]
    for weights in args.weights.split(","):
        student, teacher = by_key["student", weights], by_key["teacher", weights]
        ratios = ", ".join(f"{teacher[context][0] / student[context][0]:.2f} at {context:,}" for context in contexts)
        print(f"{weights}: the student's tokens/s over the teacher's, both in llama.cpp: {ratios}")
        ratios = ", ".join(f"{own[context][0] / student[context][0]:.2f} at {context:,}" for context in contexts)
        print(f"{weights}: the student's tokens/s in llama.cpp over those of our own step: {ratios}")
    how = "read" if args.read else f"beyond {SEED:,} tokens copied cells"
    print(f"{get_version()}, {args.threads} thread(s), median of {args.steps} tokens; the teacher's context: {how}")


def _format_rate(milliseconds: tuple[float, float, float] | None) -> str:
    if milliseconds is None:
        return ""
    median, least, most = milliseconds
    return f"{1000 / median:.1f} ({1000 / most:.1f} to {1000 / least:.1f})"


if __name__ == "__main__":
    main()
