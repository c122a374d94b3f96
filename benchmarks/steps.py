"""How fast stages, prompts and decoding are, beside the floor that the machine sets in the same run.

    python benchmarks/steps.py                                            # the default student: ten minutes, 5 GB
    python benchmarks/steps.py --student gated_deltanet --parts decode,prefill --rounds 15
    python benchmarks/steps.py --before ../before --parts decode          # two checkouts in turns, and their ratio
    python benchmarks/steps.py --parts decode,compiled --sequences 8      # each decoder block as one compiled function
    python benchmarks/steps.py --parts decode --peer                      # beside llama.cpp, with a student that fits

A step of a stage is whole: teacher's pass, forward, backward, clipping, AdamW. Beside each are two floors, measured in
the same rounds: its operations at the speed of the products of the model's own shapes on as many tokens, and its bytes
at the speed of one read of the model's weights. Only products with weights are counted, so a mixer's own work is above
the floor. The larger floor is the one that counts; `share` is what part of the time it is. `family` is a decoded token
without attention and cache: what transformers' own modules take, which no mixer can change. `mixer` is the mixer of one
layer alone, forward and backward. `compiled` is `decode` with compiled blocks (benchmarks/compiling.py).

Everything runs on one thread, in child processes that wait for each other: one a checkout, and all parts take turns, so
that other work on the machine meets all alike. Times are those of the processor, medians over the rounds. Weights are
the embedded teacher's and gates untrained: what a step costs does not depend on what was learned.

    git worktree add ../before HEAD~5                                     # a checkout to compare with
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from step_parts import PARTS, WEIGHTS, make_works

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", default="limbeck", help="limbeck, a mixer's name, or teacher for softmax")
    parser.add_argument("--options", type=json.loads, default={}, help="of the mixer, as JSON")
    parser.add_argument("--teacher", default="embedded", help="also tiny, a random model of two layers")
    parser.add_argument("--parts", default=",".join(part for part in PARTS if part not in ("mixer", "compiled")))
    parser.add_argument("--length", type=int, default=1024, help="tokens of a training step")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of a prefill")
    parser.add_argument("--context", type=int, default=1024, help="tokens before a decoded one")
    parser.add_argument("--sequences", type=int, default=1, help="decoded at once")
    parser.add_argument("--weights", default="float32", choices=WEIGHTS, help="in prefill and decode")
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    parser.add_argument("--before", type=Path, help="a checkout to compare with")
    parser.add_argument("--peer", action="store_true", help="decode with llama.cpp too, as far as its package is there")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.parts = args.parts.split(",")
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"--parts {','.join(unknown)}: expected some of {','.join(PARTS)}")
    if args.worker:
        serve(args)
        return
    # Without its source a child would take the installed Limbeck, and compare it with itself.
    if args.before and not (args.before / "src" / "limbeck" / "__init__.py").is_file():
        parser.error(f"--before {args.before}: found no src/limbeck there, expected a checkout (git worktree add)")
    checkouts = {"before": args.before, "now": ROOT} if args.before else {"now": ROOT}
    workers = {name: Worker(path) for name, path in checkouts.items()}
    rows = measure(workers, args.rounds)
    print(f"{args.student}, weights in {args.weights}, {args.rounds} rounds on one thread")
    print_table(rows)
    if args.json:
        args.json.write_text(json.dumps({"command": sys.argv, "rows": rows}, indent=1) + "\n", encoding="utf-8")


# ------------------------------------------------------------------ in the parent


class Worker:
    """A child process that has the models and runs one part when it is told to."""

    def __init__(self, checkout: Path):
        environment = {**os.environ, "PYTHONPATH": str(checkout.resolve() / "src"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--worker"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.child = subprocess.Popen(command, env=environment, **pipes)
        self.parts: dict[str, dict[str, Any]] = self._read()

    def run(self, part: str) -> float:
        """Run a part once; returns its seconds."""
        assert self.child.stdin is not None
        self.child.stdin.write(part + "\n")
        self.child.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Let the child end."""
        assert self.child.stdin is not None
        self.child.stdin.close()
        self.child.wait()

    def _read(self) -> Any:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            sys.exit(f"a child process ended with code {self.child.wait()}; its message is above")
        return json.loads(line)


def measure(workers: dict[str, Worker], rounds: int) -> list[dict[str, Any]]:
    """Run all parts of all checkouts in turns; returns a row for each part."""
    times: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):
        for part in next(iter(workers.values())).parts:
            for name, worker in workers.items():
                seconds = worker.run(part)
                if turn:  # the first one warms up
                    times.setdefault((part, name), []).append(seconds)
    for worker in workers.values():
        worker.close()
    own = workers["now"].parts
    operation = statistics.median(times["operations", "now"]) / own["operations"]["operations"]
    byte = statistics.median(times["bytes", "now"]) / own["bytes"]["read_bytes"]
    rows = []
    for part, facts in own.items():
        seconds = times[part, "now"]
        median = statistics.median(seconds)
        row = {"part": part, **facts, "seconds": median, "min": min(seconds), "max": max(seconds)}
        if part not in ("operations", "bytes"):
            row["floor_operations"], row["floor_bytes"] = facts["operations"] * operation, facts["read_bytes"] * byte
            row["share"] = max(row["floor_operations"], row["floor_bytes"]) / median
        else:
            row["rate"] = max(facts["operations"], facts["read_bytes"]) / median
        if "before" in workers:
            row["before"] = statistics.median(times[part, "before"])
            row["ratio"] = statistics.median(b / n for b, n in zip(times[part, "before"], seconds))
        rows.append(row)
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """Print speed, floors and shares, and how many times as fast as before."""
    for row in rows:
        if "rate" in row:
            print(f"{row['part']}: {row['rate'] / 1e9:.1f} G a second")
    print(
        f"{'part':12} {'tokens/s':>9} {'ms':>9} {'min':>9} {'max':>9} {'operations':>10} {'bytes':>8} {'share':>6}",
        end="",
    )
    print(f" {'before':>9} {'times as fast':>13}" if "ratio" in rows[0] else "")
    for row in rows:
        if "rate" in row:
            continue
        spread = " ".join(f"{1000 * row[name]:9.1f}" for name in ("seconds", "min", "max"))
        floors = f"{1000 * row['floor_operations']:10.1f} {1000 * row['floor_bytes']:8.1f} {row['share']:6.0%}"
        print(f"{row['part']:12} {row['tokens'] / row['seconds']:9.1f} {spread} {floors}", end="")
        print(f" {1000 * row['before']:9.1f} {row['ratio']:13.2f}" if "ratio" in row else "")


# ------------------------------------------------------------------ in a child


def serve(args: argparse.Namespace) -> None:
    """Say what parts there are, then run those whose names come in, one a line."""
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    works = make_works(args)
    facts = {
        name: {"tokens": w.tokens, "operations": w.operations, "read_bytes": w.read_bytes} for name, w in works.items()
    }
    print(json.dumps(facts), file=answers, flush=True)
    for line in sys.stdin:
        start = time.process_time()
        works[line.strip()].run()
        print(json.dumps(time.process_time() - start), file=answers, flush=True)


if __name__ == "__main__":
    main()
