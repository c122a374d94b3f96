"""Time and memory of the next token after 1 k to 64 k tokens of context: teacher, hybrid, pure student.

    python benchmarks/decoding.py                                          # ten minutes, 12 GB at 65,536 tokens
    python benchmarks/decoding.py --lengths 1024,4096 --student mlstm --keep 0,9 --picture decoding.png

The teacher runs as transformers runs it, by SDPA, once with the cache that grows (copied whole for each token) and
once with a static one, and so does the hybrid; the better of the two is what counts. The students have the teacher's
weights and untrained gates: what a token costs does not depend on what they learnt. All contestants take turns.
Models in folders, prompts, batches and int8 are for `limbeck bench`.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

import limbeck
from limbeck.evaluation.timing import SEED_TOKENS, TimedModel, TokenTiming, find_break_even, time_decoding
from limbeck.models import loading, select_converted_layers
from limbeck.report.figures.speed import draw_decoding, format_break_even_length

TEXT = Path(__file__).parent.parent / "LICENSE"
LENGTHS = "1024,2048,4096,8192,16384,32768,65536"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="embedded")
    parser.add_argument("--student", default="gated_deltanet")
    parser.add_argument("--keep", default="uniform 7", help="layers that the hybrid keeps as softmax")
    parser.add_argument("--lengths", default=LENGTHS)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--picture", type=Path, help="a .png or .svg to draw")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    teacher, tokenizer = loading.load_teacher(loading.resolve_teacher(args.teacher), torch.device("cpu"))
    text = tokenizer(TEXT.read_text(encoding="utf-8"), return_tensors="pt").input_ids[:, :SEED_TOKENS]
    count = teacher.config.get_text_config().num_hidden_layers
    kept = count - len(select_converted_layers("all", args.keep, count))
    pure = limbeck.convert(teacher, args.student, share_weights=True)
    hybrid = limbeck.convert(teacher, args.student, softmax_layers=args.keep, share_weights=True)
    timed_models = [
        TimedModel("teacher, growing cache", teacher),
        TimedModel("teacher, static cache", teacher, static=True),
        TimedModel(f"hybrid, {kept} of {count} softmax, growing", hybrid),
        TimedModel(f"hybrid, {kept} of {count} softmax, static", hybrid, static=True),
        TimedModel(f"{args.student} in all layers", pure),
    ]
    lengths = [int(length) for length in args.lengths.split(",")]
    print(f"{'context':>8}  {'model':36} {'ms a token':>10} {'min to max':>20} {'cache':>10}")
    points: list[TokenTiming] = []
    for length in lengths:
        for p in time_decoding(timed_models, length, args.steps, text):
            points.append(p)
            spread = f"{p.min_milliseconds:.1f} to {p.max_milliseconds:.1f}"
            print(f"{length:8,}  {p.name:36} {p.milliseconds:10.1f} {spread:>20} {p.bytes / 1e6:7.1f} MB", flush=True)
    series = {c.name: [p for p in points if p.name == c.name] for c in timed_models}
    growing, static, mixed, mixed_static, alone = series.values()
    best, held = _better(growing, static), [p.bytes for p in growing]
    print()
    for name, own in (("hybrid", _better(mixed, mixed_static)), (args.student, [p.milliseconds for p in alone])):
        size = [p.bytes for p in (mixed if name == "hybrid" else alone)]
        when, bytes_when = find_break_even(lengths, best, own), find_break_even(lengths, held, size)
        print(f"{name}: a token is cheaper than the teacher's {format_break_even_length(when, lengths)}; ", end="")
        print(f"memory {format_break_even_length(bytes_when, lengths)}")
        faster, smaller = best[-1] / own[-1], held[-1] / size[-1]
        print(f"  at {lengths[-1]:,}: {faster:.1f} x as fast, 1/{smaller:.0f} of the memory")
    if args.picture:
        draw_decoding(series, args.picture)
    if args.json:
        facts = {"command": sys.argv, "threads": args.threads, "points": [vars(p) for p in points]}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


def _better(first: list[TokenTiming], second: list[TokenTiming]) -> list[float]:
    return [min(a.milliseconds, b.milliseconds) for a, b in zip(first, second)]


if __name__ == "__main__":
    main()
