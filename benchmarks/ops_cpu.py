"""The operators on this machine's CPU, beside softmax attention and the best other torch code for the same recurrence.

    python benchmarks/ops_cpu.py --lengths 512 2048 8192 --threads 2 --rounds 7

Forward and backward, fp32. All contestants take turns in one process after a warm-up, so that a change in the machine's
load hits all of them; ratios are of medians. Who needs more than PATIENCE seconds is timed once, who would need more
than LIMIT seconds or half of the free memory (from the growth so far) is left out. Peak memory is what a contestant
adds to the process, outputs and gradients included, on Linux. GFLOP/s counts the products of the chunk form (C = 64),
three times for forward and backward, and is to be read beside the ceiling: one large product of the same process. The
second table is a step of decoding. xLSTM also computes a normaliser, Mamba-2 also scales v. Run it on an idle machine.
"""

import argparse
import contextlib
import ctypes
import gc
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from limbeck.ops import delta_rule, scalar_decay, vector_decay
from peers import Inputs, Peer, chunked_peers, step_peers

PATIENCE, LIMIT = 3.0, 40.0  # seconds
OURS: dict[str, Callable] = {
    "scalar_decay, none": lambda f, x, **o: f(scalar_decay)(x.q, x.k, x.v, **o),
    "scalar_decay, scalar": lambda f, x, **o: f(scalar_decay)(x.q, x.k, x.v, x.scalar, **o),
    "vector_decay, vector": lambda f, x, **o: f(vector_decay)(x.q, x.k, x.v, x.vector, **o),
    "delta_rule, none": lambda f, x, **o: f(delta_rule)(x.q, x.k, x.v, x.beta, **o),
    "delta_rule, scalar": lambda f, x, **o: f(delta_rule)(x.q, x.k, x.v, x.beta, x.scalar, **o),
    "delta_rule, vector": lambda f, x, **o: f(delta_rule)(x.q, x.k, x.v, x.beta, x.vector, **o),
}


@dataclass
class Contestant:
    """Someone's code for an operator; `run` does all of it."""

    name: str
    operator: str
    run: Callable
    same: bool = True
    times: list[float] = field(default_factory=list)
    peak: float | None = None  # MB
    history: dict[int, tuple[float, float]] = field(default_factory=dict)  # T: seconds, MB

    @property
    def median(self) -> float:
        return statistics.median(self.times)


def sdpa(x: Inputs) -> torch.Tensor:
    return F.scaled_dot_product_attention(*x.heads_first("q", "k", "v"), is_causal=True).transpose(1, 2)


def flops(operator: str, length: int, heads: int, width: int, batch: int, chunk: int = 64) -> float:
    products = 4 * chunk + 3 * width if operator.startswith("delta") else 2 * chunk + 2 * width
    return 3 * 2.0 * batch * length * heads * width * products


def forward_backward(run: Callable, x: Inputs) -> tuple[float, torch.Tensor]:
    for leaf in x.leaves:
        leaf.grad = None
    start = time.perf_counter()
    out = run(x)
    out.backward(torch.ones_like(out))
    return time.perf_counter() - start, out.detach()


def resident(name: str) -> float | None:
    """VmHWM or VmRSS in MB."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(name)), None)


def first_run(run: Callable, x: Inputs) -> tuple[float, torch.Tensor, float | None]:
    """Seconds, outputs and the MB that forward and backward add to the process at their peak."""
    for leaf in x.leaves:
        leaf.grad = None
    gc.collect()
    before = None
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
        before = resident("VmRSS")
    seconds, out = forward_backward(run, x)
    after = resident("VmHWM")
    return seconds, out, None if before is None or after is None else after - before


def ceiling() -> float:
    """GFLOP/s of a large fp32 matrix product, the best of several."""
    a, best = torch.randn(1536, 1536), math.inf
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2e-9 * 1536**3 / best


def too_much(entry: Contestant, length: int) -> str | None:
    """Why not to run it at this length, judged by its growth so far."""
    if not entry.history:
        return None
    last = max(entry.history)
    seconds, memory = entry.history[last]
    power = exponent([(t, found[0]) for t, found in entry.history.items()]) if len(entry.history) > 1 else 1.0
    seconds, memory = seconds * (length / last) ** max(power, 1.0), memory * length / last
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20 if hasattr(os, "sysconf") else math.inf
    if seconds > LIMIT:
        return f"about {seconds:.0f} s"
    return f"about {memory / 1024:.0f} GB" if memory > free / 2 else None


def measure(entries: list[Contestant], x: Inputs, length: int, rounds: int) -> list[Contestant]:
    """Those that took part, with times and peaks; outputs are compared on the way."""
    running, outputs = [], {}
    for entry in entries:
        entry.times, reason = [], too_much(entry, length)
        if reason:
            print(f"left out at T={length}: {entry.operator}, {entry.name} ({reason})")
            continue
        first, out, entry.peak = first_run(entry.run, x)
        if entry.name == "ours":
            outputs[entry.operator] = out
        elif entry.same and entry.operator in outputs:  # up to the factor that some apply to q
            error = (F.normalize(out.flatten(), dim=0) - F.normalize(outputs[entry.operator].flatten(), dim=0)).norm()
            if error > 1e-4:
                print(f"differs from ours by {error:.1e} at T={length}: {entry.operator}, {entry.name}")
        entry.history[length] = (first, entry.peak or 0.0)
        if first > PATIENCE:
            entry.times.append(first)
        running.append(entry)
    for _ in range(rounds):
        for entry in running:
            if entry.history[length][0] <= PATIENCE:
                if entry.history[length][0] < PATIENCE / 10:  # or the one before decides what is in cache
                    forward_backward(entry.run, x)
                entry.times.append(forward_backward(entry.run, x)[0])
    return running


def spread(times: list[float], unit: float) -> str:
    return f"{min(times) * unit:.1f}..{max(times) * unit:.1f}" if len(times) > 1 else "once"


def exponent(points: list[tuple[int, float]]) -> float:
    """Slope of log time over log T."""
    xs, ys = [math.log(t) for t, _ in points], [math.log(s) for _, s in points]
    x0, y0 = statistics.mean(xs), statistics.mean(ys)
    return sum((x - x0) * (y - y0) for x, y in zip(xs, ys)) / sum((x - x0) ** 2 for x in xs)


def table_of_operators(args: argparse.Namespace) -> list[float]:
    peers = chunked_peers()
    run_ours = lambda call: lambda x: call(lambda op: op.chunked, x)[0]  # noqa: E731
    entries = [Contestant("softmax", "SDPA", sdpa)]
    for operator, call in OURS.items():
        entries.append(Contestant("ours", operator, run_ours(call)))
        entries += [Contestant(p.name, operator, p.run, p.same) for p in peers[operator]]
    best, rows, ratios, slower = ceiling(), [], [], []
    curves: dict[str, list[tuple[int, float]]] = {}
    for length in args.lengths:
        torch.manual_seed(0)
        x = Inputs.random(length, args.heads, args.width, args.batch)
        running = measure(entries, x, length, args.rounds)
        softmax = next((e for e in running if e.operator == "SDPA"), None)
        for operator in OURS:
            ours = next(e for e in running if e.operator == operator and e.name == "ours")
            rivals = [e for e in running if e.operator == operator and e is not ours]
            rival = min(rivals, key=lambda e: e.median, default=None)
            curves.setdefault(operator, []).append((length, ours.median))
            rate = flops(operator, length, args.heads, args.width, args.batch) / ours.median * 1e-9
            row = [operator, length, f"{ours.median * 1e3:.1f}", spread(ours.times, 1e3)]
            if rival:
                ratios.append(rival.median / ours.median)
                row += [rival.name, f"{rival.median * 1e3:.1f}", f"{ratios[-1]:.2f}"]
                slower += [f"{operator} T={length}: {rival.name}"] if ratios[-1] < 1 else []
            else:
                row += ["none left", "", ""]
            row.append(f"{softmax.median / ours.median:.2f}" if softmax else "")
            slower += [f"{operator} T={length}: SDPA"] if softmax and softmax.median < ours.median else []
            row += ["" if e is None or e.peak is None else f"{e.peak:.0f}" for e in (ours, rival)]
            rows.append([*row, f"{rate:.0f}"])
    head = [
        "operator",
        "T",
        "ours ms",
        "min..max",
        "best peer",
        "ms",
        "peer/ours",
        "SDPA/ours",
        "MB",
        "peer MB",
        "GFLOP/s",
    ]
    show(head, rows)
    print(f"ceiling {max(best, ceiling()):.0f} GFLOP/s")
    print("slower than someone: " + ("; ".join(slower) or "never"))
    if len(args.lengths) > 1:
        print("growth, T to the power of: " + ", ".join(f"{op} {exponent(c):.2f}" for op, c in curves.items()))
    return ratios


def table_of_steps(args: argparse.Namespace) -> list[float]:
    rows, ratios = [], []
    x = Inputs.random(1, args.heads, args.width, args.batch, grad=False)
    start = torch.randn(args.batch, args.heads, args.width, args.width)

    def steps(run: Callable, count: int = 100) -> float:
        state, begin = start.clone(), time.perf_counter()
        for _ in range(count):
            _, state = run(x, state)
        return (time.perf_counter() - begin) / count

    def ours(call: Callable, x: Inputs, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return call(lambda op: op.recurrent, x, state=state)

    peers = step_peers()
    with torch.no_grad():
        for operator, call in OURS.items():
            entries = [Contestant("ours", operator, partial(ours, call))]
            entries += [Contestant(p.name, operator, p.run) for p in peers[operator] if isinstance(p, Peer)]
            for entry in entries:
                steps(entry.run, 10)
            for _ in range(max(args.rounds, 3)):
                for entry in entries:
                    entry.times.append(steps(entry.run))
            first, rivals = entries[0], entries[1:]
            row = [operator, f"{first.median * 1e6:.0f}", spread(first.times, 1e6)]
            if rivals:
                rival = min(rivals, key=lambda e: e.median)
                ratios.append(rival.median / first.median)
                row += [rival.name, f"{rival.median * 1e6:.0f}", f"{ratios[-1]:.2f}"]
            rows.append(row)
    show(["one step", "ours µs", "min..max", "best peer", "µs", "peer/ours"], rows)
    return ratios


def show(head: list[str], rows: list[list]) -> None:
    table = [head, *([str(x) for x in row] + [""] * (len(head) - len(row)) for row in rows)]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    print()
    for row in table:
        print("  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, widths))))
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="multiples of 64")
    for name, default in (("heads", 9), ("width", 64), ("batch", 1), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    def load() -> str:
        return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"

    print(f"B={args.batch}, H={args.heads}, K=V={args.width}, {args.threads} threads, torch {torch.__version__}")
    print(f"load average before: {load()}")
    ratios, steps = table_of_operators(args), table_of_steps(args)
    for name, found in (("forward and backward", ratios), ("one step", steps)):
        if found:
            mean = statistics.geometric_mean(found)
            print(f"{name}: {mean:.2f} times as fast as the best peer (geometric mean), at worst {min(found):.2f}")
    print(f"load average after: {load()}")


if __name__ == "__main__":
    main()
