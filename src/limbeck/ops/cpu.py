"""The chunked recurrences on a CPU: one chunk after the other, so that all of its intermediate results stay in cache.

Decays are factored inside each chunk (`cpu_chunk` has the equations), which makes a vector decay as cheap as none but
for one exponential. The factors grow with the decays: `plan` takes this route only where they stay far from overflow,
with shorter chunks where those help, and leaves the rest to the general path with the exact halvings of `pairs`: near
resets, decays that grow, other devices, torch.compile.

For the backward q, k, v, the gates, U and one state per chunk are kept; all else is computed again while in cache.

    route = plan(q, log_decay, chunk)                     # None: the general path
    o, state = run(q, k, v, beta, log_decay, state, segments, route)

Shapes: R rows of the batch that are handled together; the rest as in the package.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.ops import common
from limbeck.ops.cpu_chunk import Chunk

# How far the log decays of half a chunk may add up: above the diagonal, where it is cut off, Q Kᵀ reaches their square.
LIMITS = {torch.float32: 32.0, torch.float64: 300.0}
CACHE = 2**18  # bytes of one [R, H, C, K] buffer and thread; ten of them are in use at a time


class Route(NamedTuple):
    """What `plan` found.

    chunk: its size. halves: the log decays summed over first and second half of each, [N, 2, B, H, K|1], fp64.
    triangular: the caller's promise that v [B,T,·,T] is lower triangular and takes no gradient; then columns that are
    still zero are left out, which is half of all work.
    """

    chunk: int
    halves: Tensor | None
    triangular: bool = False


def plan(q: Tensor, log_decay: Tensor | None, chunk: int | None) -> Route | None:
    """The route of q [B,T,H,K] and log_decay [B,T,H,K|1], or None where it needs the general path."""
    if chunk is not None:
        common.check_chunk(chunk)
    if q.device.type != "cpu" or q.shape[1] == 0 or torch.compiler.is_compiling():
        return None
    # 64 takes the least time; threads wait for each other less often in 128
    sizes = (chunk,) if chunk else (64, 32, 16) if torch.get_num_threads() == 1 else (128, 64, 32, 16)
    if log_decay is None:
        return Route(min(sizes[0], q.shape[1]), None)
    log_decay = log_decay.detach()
    if log_decay.amax() > 0:
        return None
    for size in sizes:
        halves = _halves(log_decay, size)
        if halves.amin() >= -LIMITS[log_decay.dtype]:
            return Route(size, halves)
    return None


def _halves(log_decay: Tensor, chunk: int) -> Tensor:
    """What the log decays of both halves of each chunk add up to, [N, 2, B, H, K|1]; the last chunk may be shorter."""
    whole = log_decay.shape[1] // chunk * chunk
    sums = []
    if whole:
        blocks = log_decay[:, :whole].unflatten(1, (-1, chunk))
        sums = [
            torch.stack(
                [x.sum(2, dtype=torch.float64) for x in (blocks[:, :, : chunk // 2], blocks[:, :, chunk // 2 :])]
            )
        ]
        sums[0] = sums[0].permute(2, 0, 1, 3, 4)
    if whole < log_decay.shape[1]:
        middle = whole + (log_decay.shape[1] - whole) // 2
        halves = (log_decay[:, whole:middle], log_decay[:, middle:])
        sums.append(torch.stack([x.sum(1, dtype=torch.float64) for x in halves]).unsqueeze(0))
    return torch.cat(sums)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    segments: Tensor | None,
    route: Route,
) -> tuple[Tensor, Tensor]:
    """Outputs [B,T,H,V] in v's dtype and the final state [B,H,K,V].

    Args:
        q: [B,T,H,K]. k: [B,T,G,K]. v: [B,T,G',V]. beta: [B,T,H] or None. segments: [B,T] or None.
        log_decay: [B,T,H,K], [B,T,H,1] or None, in the dtype of `state` [B,H,K,V], which everything is computed in.
    """
    return _Chunks.apply(q, k, v, beta, log_decay, state, segments, route)


class _Pass:
    """What a whole pass shares: the inputs, the decays between the chunks, the documents."""

    def __init__(self, q, k, v, beta, log_decay, segments, route, dtype):
        self.dtype, self.size, self.triangular = dtype, route.chunk, route.triangular
        self.q, self.k, self.v, self.beta, self.log_decay = q, k, v, beta, log_decay
        self.batch, self.length, self.heads, self.key = q.shape
        self.value, self.width = v.shape[3], 0 if log_decay is None else log_decay.shape[3]
        self.decays, self.docs, self.mixed = None, None, None
        if log_decay is not None:  # [N+1, B, H, K|1, 1]: to the first middle, from each to the next, to the end
            sums = torch.cat([route.halves[:, 0], torch.zeros_like(route.halves[:1, 0])])
            sums[1:] += route.halves[:, 1]
            self.decays = sums.exp_().to(dtype).unsqueeze(-1)
        if segments is not None:
            self.docs = common.Documents.of(segments, route.chunk)
            self.mixed = (~(self.docs.same.flatten(1).all(1) & self.docs.keeps.flatten(1).all(1))).tolist()
        size = self.heads * self.size * max(self.key, self.value) * dtype.itemsize
        self.rows = max(1, CACHE * torch.get_num_threads() // size)

    @property
    def count(self) -> int:
        return -(-self.length // self.size)

    def columns(self, n: int) -> int:
        """How many columns of v, U and the state are in use in chunk n."""
        return min((n + 1) * self.size, self.value) if self.triangular else self.value

    def blocks(self) -> "Iterator[_Block]":
        made: dict[int, dict[tuple[int, int], Chunk]] = {}  # buffers are used again and again
        for first in range(0, self.batch, self.rows):
            rows = min(self.rows, self.batch - first)
            yield _Block(self, slice(first, first + rows), rows, made.setdefault(rows, {}))


class _Block:
    """Some rows of the batch, everything cut into chunks, heads ahead of time."""

    def __init__(self, whole: _Pass, where: slice, rows: int, made: dict[tuple[int, int], Chunk]):
        self.whole, self.where, self.rows, self.made = whole, where, rows, made
        self.q, self.k, self.v = self.cut(whole.q), self.cut(whole.k), self.cut_values(whole.v)
        self.beta = None if whole.beta is None else self.cut(whole.beta.to(whole.dtype).unsqueeze(-1))
        if whole.log_decay is not None:
            self.log_decay = whole.log_decay[where].flatten(2).split(whole.size, 1)
            self.decays = [self.state(x) for x in whole.decays]

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """[B, T, G, D] -> views [R, G, c, D] of each chunk."""
        return x[self.where].transpose(1, 2).split(self.whole.size, 2)

    def cut_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """The same of values, with the columns in use."""
        chunks = self.cut(x)
        return tuple(y[..., : self.whole.columns(n)] for n, y in enumerate(chunks)) if self.whole.triangular else chunks

    def state(self, x: Tensor) -> Tensor:
        """[B, H, ·, ·] -> the view [R·H, ·, ·]."""
        return x[self.where].flatten(0, 1)

    def chunk(self, n: int) -> Chunk:
        key = (self.q[n].shape[2], self.whole.columns(n))
        if key not in self.made:
            if self.whole.triangular:
                self.made.clear()
            self.made[key] = Chunk(self.whole, self.rows, *key)
        self.made[key].load(self, n)
        return self.made[key]


class _Chunks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, beta, log_decay, state, segments, route):
        whole = _Pass(q, k, v, beta, log_decay, segments, route, state.dtype)
        o, new = v.new_empty(*q.shape[:3], v.shape[3]), state.new_empty
        if route.triangular:
            o, new = o.zero_(), state.new_zeros
        updates = None if beta is None else state.new_empty(o.shape)
        states = [new(*state.shape[:3], whole.columns(n)) for n in range(whole.count + 1)]
        first = state[..., : whole.columns(0)]
        torch.mul(first, 1 if whole.decays is None else whole.decays[0], out=states[0])
        for block in whole.blocks():
            outputs: Any = block.cut_values(o)
            us: Any = [None] * whole.count if updates is None else block.cut_values(updates)
            for n in range(whole.count):
                x, before, into = block.chunk(n), block.state(states[n]), block.state(states[n + 1])
                after = into if into.shape == before.shape else torch.empty_like(before)
                outputs[n].copy_(x.heads(x.forward(before, after, us[n])))
                if log_decay is not None:
                    after.mul_(block.decays[n + 1])
                if after is not into:
                    into[..., : after.shape[2]] = after
        ctx.route = route
        ctx.save_for_backward(q, k, v, beta, log_decay, segments, updates, *states)
        return o, states[-1].clone()

    @staticmethod
    @common.once
    def backward(ctx, do, dlast):
        q, k, v, beta, log_decay, segments, updates, *states = ctx.saved_tensors
        with common.full_precision(do):
            dtype = states[0].dtype
            whole = _Pass(q, k, v, beta, log_decay, segments, ctx.route, dtype)
            inputs = (q, k, None if ctx.route.triangular else v, beta, log_decay)
            grads: list[Any] = [None if x is None else states[0].new_empty(x.shape) for x in inputs]
            dfirst = torch.zeros_like(dlast, dtype=dtype)
            absent: Any = [None] * whole.count
            for block in whole.blocks():
                dos, us = block.cut_values(do), absent if updates is None else block.cut_values(updates)
                dqs, dks, dvs = (absent if x is None else block.cut(x) for x in grads[:3])
                dbetas = absent if beta is None else block.cut(grads[3].unsqueeze(-1))
                dlogs = absent if log_decay is None else grads[4][block.where].flatten(2).split(whole.size, 1)
                dstate = block.state(dlast).to(dtype, copy=True)
                for n in reversed(range(whole.count)):
                    x, before = block.chunk(n), block.state(states[n])
                    dstate = dstate[..., : x.value].contiguous()
                    if log_decay is not None:
                        after = block.state(states[n + 1])[..., : x.value]
                        leaving = torch.mul(after, dstate, out=x.buffer("leaving", *dstate.shape[1:])).sum(-1)
                        dstate.mul_(block.decays[n + 1])
                    dq, de, dk, du = x.backward(dos[n], before, dstate, us[n])
                    if log_decay is not None:
                        dlogs[n].copy_(x.gates(dq, de, dk, leaving))
                    x.finish(dq, de, dk, du, dqs[n], dks[n], dvs[n], dbetas[n])
                if log_decay is not None:
                    dstate.mul_(block.decays[0])
                block.state(dfirst)[..., : dstate.shape[2]] = dstate
            out = (None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))
            return *out, dfirst, None, None
