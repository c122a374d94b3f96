"""CPU time of a decoding step of students with two branches in every layer, relative to the window alone.

    python benchmarks/branches.py                        # one minute, 4 GB
    python benchmarks/branches.py --window 128 --steps 80

All have the embedded teacher's weights and untrained gates, the same window and no padding, and take turns. Time is
that of the process, so that other work on the machine counts less; the ratio is the median over the steps.
"""

import argparse
import statistics
import time

import torch

import limbeck
from limbeck.evaluation.timing import prefill_cache
from limbeck.models import build_cache_kwargs, cache_bytes, loading
from limbeck.models.hooks import load_teacher

STUDENTS = {
    "sliding_window": ("sliding_window", {}),
    "window_memory": ("window_memory", {}),
    "window_memory, code_rank 64": ("window_memory", {"code_rank": 64}),
    "window_memory, linear_attention": ("window_memory", {"linear": "linear_attention"}),
    "hybrid": ("hybrid", {}),
}
CONTEXT = 512  # tokens before the first step
UNTIMED = 2  # steps


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)

    teacher, _ = load_teacher(loading.resolve_teacher(args.teacher), torch.device("cpu"))
    students = {
        name: limbeck.convert(teacher, mixer, options={"window": args.window, **options}, share_weights=True)
        for name, (mixer, options) in STUDENTS.items()
    }
    caches = {name: prefill_cache(student, CONTEXT) for name, student in students.items()}
    times: dict[str, list[float]] = {name: [] for name in students}
    for step in range(UNTIMED + args.steps):
        for name, student in students.items():
            start = time.process_time()
            student(input_ids=torch.full((1, 1), 5), **build_cache_kwargs(student, caches[name]))
            if step >= UNTIMED:
                times[name].append(1000 * (time.process_time() - start))
    print(f"{'student':34} {'ms a token':>10} {'ratio':>6} {'cache':>9}")
    for name, milliseconds in times.items():
        ratio = statistics.median(own / window for own, window in zip(milliseconds, times["sliding_window"]))
        size = cache_bytes(caches[name]) / 1e6
        print(f"{name:34} {statistics.median(milliseconds):10.1f} {ratio:6.2f} {size:6.2f} MB")


if __name__ == "__main__":
    main()
