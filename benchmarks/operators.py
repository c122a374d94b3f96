"""Forward and backward of the operators on this machine's CPU, beside softmax attention and transformers' torch code.

    python benchmarks/operators.py --length 2048 --heads 9 --threads 2

All contestants take turns in one process after a warm-up, so that a change in the machine's load hits all of them. The
ratio is the peer's median over ours, for the peer that computes the same recurrence (softmax attention for those that
have none; xLSTM's also computes a normaliser). GFLOP/s counts the matrix products of the chunk form, three times for
forward and backward, and is to be read beside the ceiling: one large fp32 matrix product of the same process. Run it on
an idle machine: on a busy one two threads lose far more than half.
"""

import argparse
import importlib
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from limbeck.ops import delta_rule, scalar_decay, vector_decay

PATIENCE = 2.0  # seconds; a contestant whose warm-up takes longer is timed once


@dataclass
class Contestant:
    name: str
    run: Callable[[], torch.Tensor]
    peer: str | None = None
    flops: float | None = None
    times: list[float] = field(default_factory=list)


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.detach().requires_grad_()


def contestants(length: int, heads: int, groups: int, width: int, batch: int, chunk: int) -> tuple[list, list]:
    """The functions to time and the tensors whose gradients they compute."""
    q = leaf(torch.randn(batch, length, heads, width) * width**-0.5)
    k = leaf(F.normalize(torch.randn(batch, length, groups, width), dim=-1))
    v = leaf(torch.randn(batch, length, groups, width))
    beta = leaf(torch.rand(batch, length, heads))
    scalar = leaf(-F.softplus(torch.randn(batch, length, heads) - 3))
    vector = leaf(-F.softplus(torch.randn(batch, length, heads, width) - 3))

    def wide(x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(heads // groups, dim=2)

    def sdpa() -> torch.Tensor:
        args = (x.transpose(1, 2) for x in (q, wide(k), wide(v)))
        return F.scaled_dot_product_attention(*args, is_causal=True).transpose(1, 2)

    tokens = 3.0 * batch * heads * length
    additive = tokens * 2 * width * (2 * chunk + 2 * width)
    delta = tokens * 2 * width * (chunk * groups / heads + 4 * chunk + 3 * width)
    softmax = tokens * 2 * width * length
    entries = [
        Contestant("softmax attention (SDPA)", sdpa, flops=softmax),
        Contestant("scalar_decay, none", lambda: scalar_decay.chunked(q, k, v, chunk=chunk)[0], "SDPA", additive),
        Contestant("scalar_decay", lambda: scalar_decay.chunked(q, k, v, scalar, chunk=chunk)[0], "xLSTM", additive),
        Contestant("vector_decay", lambda: vector_decay.chunked(q, k, v, vector, chunk=chunk)[0], "SDPA", additive),
        Contestant("delta_rule, none", lambda: delta_rule.chunked(q, k, v, beta, chunk=chunk)[0], "Qwen3-Next", delta),
        Contestant(
            "delta_rule, scalar", lambda: delta_rule.chunked(q, k, v, beta, scalar, chunk=chunk)[0], "Qwen3-Next", delta
        ),
        Contestant(
            "delta_rule, vector", lambda: delta_rule.chunked(q, k, v, beta, vector, chunk=chunk)[0], "Kimi", delta
        ),
    ]

    def offer(name: str, module: str, function: str, call: Callable) -> None:
        found = getattr(importlib.import_module(f"transformers.models.{module}.modeling_{module}"), function, None)
        if found is None:
            print(f"left out: this transformers has no {function}")
        else:
            entries.append(Contestant(f"transformers {name}", lambda: call(found)))

    offer(
        "Qwen3-Next gated delta", "qwen3_next", "torch_chunk_gated_delta_rule",
        lambda f: f(q, wide(k), wide(v), scalar, beta, chunk_size=64)[0],
    )  # fmt: skip
    offer(
        "Kimi delta", "kimi_linear", "chunk_kimi_delta_attention",
        lambda f: f(q, wide(k), wide(v), vector, beta)[0],
    )  # fmt: skip
    if length % 64 == 0:
        offer(
            "xLSTM mLSTM", "xlstm", "mlstm_chunkwise_native_autograd",
            lambda f: f(*(x.transpose(1, 2) for x in (q, wide(k), wide(v), torch.zeros_like(beta), scalar))).mT,
        )  # fmt: skip
    return entries, [q, k, v, beta, scalar, vector]


def step(run: Callable[[], torch.Tensor], leaves: list[torch.Tensor]) -> float:
    for x in leaves:
        x.grad = None
    start = time.perf_counter()
    out = run()
    out.backward(torch.ones_like(out))
    return time.perf_counter() - start


def ceiling() -> float:
    """GFLOP/s of a large fp32 matrix product, the best of several."""
    a, best = torch.randn(1536, 1536), float("inf")
    for _ in range(8):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return 2e-9 * 1536**3 / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("length", 2048), ("heads", 9), ("groups", 3), ("width", 64), ("batch", 1), ("chunk", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)

    shape = (args.length, args.heads, args.groups, args.width, args.batch, args.chunk)
    entries, leaves = contestants(*shape)
    slow = set()
    for entry in entries:
        first = step(entry.run, leaves)
        if first > PATIENCE:
            slow.add(entry.name)
            entry.times.append(first)
        else:
            step(entry.run, leaves)
    best = ceiling()
    for _ in range(args.rounds):
        for entry in entries:
            if entry.name not in slow:
                entry.times.append(step(entry.run, leaves))
    best = max(best, ceiling())

    load = f", load average {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    names = ("T", "H", "kv heads", "width", "B", "chunk")
    print(", ".join(f"{name}={x}" for name, x in zip(names, shape)))
    print(f"{args.threads} threads, torch {torch.__version__}{load}")
    print(f"ceiling: {best:.0f} GFLOP/s; times in ms, forward and backward, {args.rounds} rounds\n")
    print(f"{'':34}{'median':>9}{'min..max':>20}{'GFLOP/s':>9}   peer / ours")
    medians = {entry.name: statistics.median(entry.times) for entry in entries}
    for entry in entries:
        middle = medians[entry.name]
        spread = f"{min(entry.times) * 1e3:.1f}..{max(entry.times) * 1e3:.1f}" if len(entry.times) > 1 else "one round"
        rate = f"{entry.flops / middle * 1e-9:.0f}" if entry.flops else ""
        rival = next((n for n in medians if entry.peer and entry.peer in n), None)
        ratio = f"{medians[rival] / middle:.1f}x {entry.peer}" if rival else ""
        print(f"{entry.name:34}{middle * 1e3:9.1f}{spread:>20}{rate:>9}   {ratio}")


if __name__ == "__main__":
    main()
