"""What a token costs students in decoding and in stage 3: the student of recipe limbeck, its window alone, and others.

    python benchmarks/token_cost.py decode                        # four minutes, 8 GB at 65,536 tokens
    python benchmarks/token_cost.py train                         # seven minutes, 6 GB
    python benchmarks/token_cost.py decode --window 64 --contexts 512 --students "window,memory,hybrid"
    python benchmarks/token_cost.py decode --out decoding.json    # for benchmarks/picture.py

All have the embedded teacher's weights and untrained gates: what a token costs does not depend on what they learnt. All
run on one thread and take turns. Time is that of the process, so that other work on the machine counts less; ratios
are the median over the turns. Training is a forward and backward pass of stage 3 with the teacher's pass, without
optimizer; its memory is the peak over what was resident before the pass, gradients included in the latter.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import limbeck
from limbeck.core.storage import atomic_write_text
from limbeck.core.system import measure_peak_memory
from limbeck.data.packing import Batch
from limbeck.evaluation.timing import make_dummy_input_ids, prefill_cache
from limbeck.models import build_cache_kwargs, cache_bytes, find_attention_sites, loading
from limbeck.models.hooks import DistillationPair
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights

# The groups of SmolLM2-135M that look furthest back, for embedded teachers without a run of `limbeck select --heads`.
HEADS = "18.2,20.2,7.2,8.0,23.0,19.1,23.2"
UNTIMED = 2  # decoding steps
# Arguments of `convert`; a window is added to all that have one. None is the teacher.
STUDENTS: dict[str, dict[str, Any] | None] = {
    "window": {"mixer": "sliding_window"},
    "recipe": {"mixer": "sliding_window", "softmax_heads": HEADS, "softmax_window": 1024},
    "recipe, growing": {"mixer": "sliding_window", "softmax_heads": HEADS},
    "memory": {"mixer": "window_memory"},
    "memory 64": {"mixer": "window_memory", "options": {"code_rank": 64}},
    "memory, linear": {"mixer": "window_memory", "options": {"linear": "linear_attention"}},
    "hybrid": {"mixer": "hybrid"},
    "gated_deltanet": {"mixer": "gated_deltanet"},
    "teacher": None,
}
DECODE = ("window", "recipe", "recipe, growing", "memory", "gated_deltanet", "teacher")
TRAIN = ("recipe", "window", "gated_deltanet")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["decode", "train"])
    parser.add_argument("--students", help=f"of {', '.join(map(repr, STUDENTS))}; the first is what ratios refer to")
    parser.add_argument("--window", type=int, default=96)
    parser.add_argument("--contexts", default="1024,8192,65536", help="tokens before a decoding step")
    parser.add_argument("--steps", type=int, default=16, help="of decoding")
    parser.add_argument("--length", type=int, default=1024, help="tokens of a training step")
    parser.add_argument("--rounds", type=int, default=3, help="of training")
    parser.add_argument("--out", type=Path, help="a file for the figures of decoding, as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)

    teacher, _ = loading.load_teacher(loading.resolve_teacher("embedded"), torch.device("cpu"))
    default = DECODE if args.what == "decode" else TRAIN
    names = parse_names(args.students) if args.students else list(default)
    if args.what == "train":
        print_training(teacher, names, args.window, args.length, args.rounds)
        return
    models = {name: make_model(teacher, name, args.window, share_weights=True) for name in names}
    print(f"{'context':>8}  {'model':20} {'ms a token':>10} {'ratio':>6} {'cache':>10}")
    rows: list[dict[str, Any]] = []
    for context in (int(n) for n in args.contexts.split(",")):
        rows += print_decoding(models, context, args.steps)
        if args.out:
            atomic_write_text(args.out, json.dumps(rows, indent=1) + "\n")


def parse_names(given: str) -> list[str]:
    """Split names at the commas between them; names have commas too."""
    names, rest = [], given
    while rest:
        name = max((n for n in STUDENTS if rest == n or rest.startswith(f"{n},")), key=len)
        names.append(name)
        rest = rest[len(name) + 1 :]
    return names


def make_model(teacher, name: str, window: int, share_weights: bool):
    """Convert the teacher to the student of this name."""
    settings = STUDENTS[name]
    if settings is None:
        return teacher
    options = settings.get("options", {})
    if name != "gated_deltanet":
        options = {"window": window, **options}
    return limbeck.convert(teacher, **{**settings, "options": options}, share_weights=share_weights)


def take_turns(work: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Run each of `work` once a round; returns the seconds of processor time of each."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(rounds):
        for name, run in work.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return times


def compute_ratio(own: list[float], reference: list[float]) -> float:
    """Return the median of the turns' ratios."""
    return statistics.median(a / b for a, b in zip(own, reference))


@torch.no_grad()
def print_decoding(models: dict[str, Any], context: int, steps: int) -> list[dict[str, Any]]:
    """Print and return time and cache of each model's next token after so many tokens."""
    caches = {name: prefill_cache(model, context) for name, model in models.items()}
    sizes = {name: cache_bytes(cache) / 1e6 for name, cache in caches.items()}
    ids = torch.full((1, 1), 5)

    def decode(name: str) -> None:
        models[name](input_ids=ids, **build_cache_kwargs(models[name], caches[name]))

    work = {name: (lambda name=name: decode(name)) for name in models}
    take_turns(work, UNTIMED)
    times = take_turns(work, steps)
    rows = []
    for name, seconds in times.items():
        ratio, milliseconds = compute_ratio(seconds, next(iter(times.values()))), 1000 * statistics.median(seconds)
        rows.append(
            {"context": context, "model": name, "milliseconds": milliseconds, "ratio": ratio, "cache_mb": sizes[name]}
        )
        print(f"{context:8,}  {name:20} {milliseconds:10.1f} {ratio:6.2f} {sizes[name]:7.1f} MB", flush=True)
    return rows


def print_training(teacher, names: list[str], window: int, length: int, rounds: int) -> None:
    """Print speed and memory of a forward and backward pass of stage 3."""
    teacher.eval().requires_grad_(False)

    def draw(tokens: int) -> Batch:
        ids = make_dummy_input_ids(teacher, tokens)
        return Batch(ids, torch.arange(tokens)[None], ids)

    work, peaks = {}, {}
    for name in names:
        student = make_model(teacher, name, window, share_weights=False).requires_grad_(False)
        pair = DistillationPair(teacher, student, find_attention_sites(teacher), nullcontext)
        stage = LogitsStage(pair, ObjectiveWeights())
        for parameter in stage.parameters().values():
            parameter.requires_grad_(True)

        def step(tokens: int = length, stage=stage) -> None:
            batch = draw(tokens)
            stage.backward(batch, stage.count(batch))

        step(16)  # makes what stays: gradients and the libraries' buffers
        peaks[name] = measure_peak_memory(step, torch.device("cpu"))
        work[name] = step
    times = take_turns(work, rounds)
    print(f"{'student':20} {'tokens/s':>8} {'ratio of times':>14} {'memory':>10}")
    for name, seconds in times.items():
        ratio, peak = compute_ratio(seconds, next(iter(times.values()))), peaks[name]
        memory = "unknown" if peak is None else f"{peak / 1e6:7.0f} MB"
        print(f"{name:20} {length / statistics.median(seconds):8.1f} {ratio:14.2f} {memory:>10}", flush=True)


if __name__ == "__main__":
    main()
