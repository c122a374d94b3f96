"""One chunk of a recurrence on a CPU, forward and backward, in buffers that are used again and again.

With g the log decays summed from the middle of the chunk, negative after it and positive before:

    Q = q·exp(g),  E = beta·k·exp(g),  K = k·exp(−g),  P = tril(Q Kᵀ),  L = strict_tril(E Kᵀ)
    U = (I + L)⁻¹ (beta·V − E S),  O = P U + Q S,  S ← x·(S + Kᵀ U),  U = V where there is no beta

where S is the state as the middle sees it and x the decay from this middle to the next. Decays need no gradient of an
exponential: everything depends on differences g_i − g_j, so dg = Q·dQ + E·dE − K·dK, summed over the tokens after, and
S·dS of what leaves the chunk. g is summed in fp64: the error of exp(g) is |g| units in the last place of the sum.

    x = Chunk(whole, rows, c, columns)
    x.load(block, n)                          # Q, E, K, P and L of chunk n
    o = x.forward(before, after, u)
    dq, de, dk, du = x.backward(do, before, dstate, u)

The second factor of every product is laid out as it is read: transposed, it takes MKL two to three times as long at
these sizes. Shapes: R rows of the batch, H heads, c tokens, K key width, V value width.

The chunked recurrences on a CPU: one chunk after the other, so that all of its intermediate results stay in cache.

Decays are factored inside each chunk (`cpu_chunk` has the equations), which makes a vector decay as cheap as none but
for one exponential. The factors grow with the decays: `plan_chunks` takes this route only where they stay far from overflow,
with shorter chunks where those help, and leaves the rest to the general path with the exact halvings of `compute_intra_chunk_scores`: near
resets, decays that grow, other devices, torch.compile.

For the backward q, k, v, the gates, U and one state per chunk are kept; all else is computed again while in cache.

    route = plan_chunks(q, log_decay, chunk)                     # None: the general path
    o, state = run_chunks(q, k, v, beta, log_decay, state, segments, route)

Shapes: R rows of the batch that are handled together; the rest as in the package.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from limbeck.ops import common
from limbeck.ops.common import DocumentMasks

if TYPE_CHECKING:
    pass


class Chunk:
    """A chunk of c tokens in R rows: the letters of the module's head, [R·H, c, ·]; `load` fills in those without U."""

    def __init__(self, whole: "_Pass", rows: int, c: int, value: int):
        self.whole, self.rows, self.c, self.value = whole, rows, c, value
        key = whole.key
        self.buffers: dict[str, Tensor] = {}
        self.views: dict[int, dict[int | None, Tensor]] = {}  # of the tensors that `new` made, by their id
        self.kt, self.p, self.read = self.new(key, c), self.new(c, c), self.new(c, value)
        self.l = self.new(c, c) if whole.beta is not None else None
        if whole.width:
            at = torch.arange(c)
            row, column, middle = at[:, None], at, c // 2
            sums = ((column >= middle) & (column <= row)).double()
            self.sums = sums.sub_(((column < middle) & (column > row)).double()).expand(rows, c, c)
            self.log = self.sums.new_empty(rows, c, whole.heads * whole.width)
            self.g = torch.empty_like(self.log)
            self.g_heads = self.g.view(rows, c, whole.heads, whole.width).transpose(1, 2)
            self.up, self.down, self.rate = (self.new(c, whole.width) for _ in range(3))

    def new(self, *shape: int) -> Tensor:
        out = torch.empty(self.rows * self.whole.heads, *shape, dtype=self.whole.dtype)
        self.views[id(out)] = {}
        return out

    def buffer(self, name: str, *shape: int) -> Tensor:
        """[R·H, ·, ·], made when first asked for."""
        if name not in self.buffers:
            self.buffers[name] = self.new(*shape)
        return self.buffers[name]

    def heads(self, x: Tensor, groups: int | None = None) -> Tensor:
        """[R·H, ·, ·] -> the view [R, H, ·, ·], or [R, G, H/G, ·, ·]."""
        known = self.views.get(id(x))
        if known is not None and groups in known:
            return known[groups]
        shape = (self.rows, -1) if groups is None else (self.rows, groups, -1)
        out = x.view(*shape, *x.shape[1:])
        if known is not None:  # a tenth of all time went into making views
            known[groups] = out
        return out

    def own(self, name: str, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """x [R, G, c, D] times factor [R·H, c, ·] as [R·H, c, D]: where that asks for nothing, x itself."""
        if factor is None and self.rows == 1 and x.shape[1] == self.whole.heads and x.dtype == self.whole.dtype:
            return x.squeeze(0)
        out = self.buffer(name, *x.shape[2:])
        if x.shape[1] == self.whole.heads:
            heads = self.heads(out)
            heads.copy_(x) if factor is None else torch.mul(x, self.heads(factor), out=heads)
        else:
            heads, x = self.heads(out, x.shape[1]), x.unsqueeze(2)
            heads.copy_(x) if factor is None else torch.mul(x, self.heads(factor, x.shape[1]), out=heads)
        return out

    def load(self, block: "_Block", n: int) -> None:
        whole = self.whole
        self.docs = None
        if whole.mixed and whole.mixed[n]:
            docs, where, c = whole.docs, block.where, self.c
            masks = (
                docs.within_document[n, where, :, :c, :c],
                docs.reads_state[n, where, :, :c],
                docs.writes_state[n, where, :, :c],
            )
            self.docs = DocumentMasks(*(x.to(whole.dtype) for x in (*masks, docs.carries_state[n, where])))
        self.k_in, self.v_in = block.k[n], block.v[n]
        up = down = None
        if whole.width:
            up, down = self.up, self.down
            torch.bmm(self.sums, self.log.copy_(block.log_decay[n]), out=self.g).exp_()
            self.heads(up).copy_(self.g_heads)
            torch.reciprocal(up, out=down)
        self.q = self.own("q", block.q[n], up)
        self.k = self.own("k", self.k_in, down)
        self.kt.copy_(self.k.mT)
        self.masked(torch.bmm(self.q, self.kt, out=self.p), 0)
        if block.beta is None:
            self.u = self.own("u", self.v_in)
        else:
            self.beta = block.beta[n].reshape(-1, self.c, 1)
            self.e = self.own("e", self.k_in, self.beta if up is None else torch.mul(up, self.beta, out=self.rate))
            self.masked(torch.bmm(self.e, self.kt, out=self.l), -1)

    def masked(self, m: Tensor, diagonal: int) -> Tensor:
        """Pairs of tokens m [R·H, c, c] with the later ones and those of other documents set to zero."""
        m.tril_(diagonal)
        return m if self.docs is None else self.times(m, self.docs.within_document)

    def times(self, x: Tensor, mask: Tensor) -> Tensor:
        self.heads(x).mul_(mask)
        return x

    def solve(self, x: Tensor, *, adjoint: bool = False) -> None:
        """x ← (I + L)⁻¹ x or (I + L)⁻ᵀ x; from the right on transposed views, which LAPACK takes without copies."""
        system = self.l if adjoint else self.l.mT
        torch.linalg.solve_triangular(system, x.mT, upper=not adjoint, left=False, unitriangular=True, out=x.mT)

    def forward(self, before: Tensor, after: Tensor, u: Tensor | None) -> Tensor:
        """Outputs [R·H, c, V]; writes the state, as it is in the middle of this chunk, into `after`, and U into u."""
        read, docs = self.read, self.docs
        if u is not None:
            torch.bmm(self.e, before, out=read)
            self.u = self.own("u", self.v_in, self.beta)
            self.u.sub_(read if docs is None else self.times(read, docs.reads_state))
            self.solve(self.u)
            u.copy_(self.heads(self.u))
        torch.bmm(self.q, before, out=read)
        if docs is None:
            torch.baddbmm(before, self.kt, self.u, out=after)
        else:
            self.times(read, docs.reads_state)
            self.times(after.copy_(before), docs.carries_state).baddbmm_(
                self.kt, self.times(self.u.clone(), docs.writes_state)
            )
        return read.baddbmm_(self.p, self.u)

    def backward(
        self, do: Tensor, before: Tensor, dstate: Tensor, u: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Gradients of Q, E, K and of U (of what (I + L)⁻¹ was applied to), all [R·H, c, ·]; dstate becomes the one
        before."""
        key, value, c, docs, delta = self.whole.key, self.value, self.c, self.docs, u is not None
        do = self.own("do", do)
        u = self.u if u is None else self.own("u", u)
        k = self.k
        ut = self.buffer("ut", value, c).copy_(u.mT)
        st, dst = self.buffer("st", value, key).copy_(before.mT), self.buffer("dst", value, key).copy_(dstate.mT)
        du, dq, dk = self.buffer("du", c, value), self.buffer("dq", c, key), self.buffer("dk", c, key)
        dp, de = self.buffer("dp", c, c), None
        if docs is None:
            torch.bmm(k, dstate, out=du)
        else:
            self.times(torch.bmm(k, dstate, out=du), docs.writes_state)
            self.times(dstate, docs.carries_state)
        du.baddbmm_(self.p.mT, do)
        torch.bmm(do, ut, out=dp)
        if self.whole.width:  # tokens with themselves decay by nothing: `gates` adds them after it is done
            self.diagonal = dp.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clone()
        self.masked(dp, -1 if self.whole.width else 0)
        torch.bmm(dp, k, out=dq)
        torch.bmm(dp.mT, self.q, out=dk)
        if delta:
            self.solve(du, adjoint=True)
            torch.neg(du, out=self.read)
            self.masked(torch.bmm(self.read, ut, out=dp), -1)
            de = torch.bmm(dp, k, out=self.buffer("de", c, key))
            dk.baddbmm_(dp.mT, self.e)
        dread = self.read
        if docs is not None:  # from here on only through the state
            do, u = self.times(do.clone(), docs.reads_state), self.times(u.clone(), docs.writes_state)
            if delta:
                self.times(dread, docs.reads_state)
        dq.baddbmm_(do, st)
        dk.baddbmm_(u, dst)
        dstate.baddbmm_(self.q.mT, do)
        if delta:
            de.baddbmm_(dread, st)
            dstate.baddbmm_(self.e.mT, dread)
        return dq, de, dk, du

    def gates(self, dq: Tensor, de: Tensor | None, dk: Tensor, leaving: Tensor) -> Tensor:
        """Gradient of the log decays [R, c, H·K] or [R, c, H]; completes dq and dk."""
        if "dg" not in self.buffers:
            self.buffers["dg"] = self.up.new_empty(self.g.shape)
            self.since = self.up.new_ones(self.c, self.c).triu_().expand(self.rows, -1, -1)
        dg = self.buffers["dg"].view(self.rows, self.c, self.whole.heads, -1).transpose(1, 2)
        each = torch.mul(self.q, dq, out=self.buffer("each", *dq.shape[1:])).addcmul_(self.k, dk, value=-1)
        if de is not None:
            each.addcmul_(self.e, de)
        dq.addcmul_(self.diagonal, self.k)
        dk.addcmul_(self.diagonal, self.q)
        if self.whole.width == 1:
            torch.sum(self.heads(each), -1, keepdim=True, out=dg)
            leaving = leaving.sum(-1, keepdim=True)
        else:
            dg.copy_(self.heads(each))
        dg[:, :, -1] += self.heads(leaving)
        return torch.bmm(self.since, self.buffers["dg"])

    def finish(self, dq, de, dk, du, into_q, into_k, into_v, into_beta) -> None:
        """From Q, E, K, U to q, k, v, beta."""
        up, down = (self.up, self.down) if self.whole.width else (None, None)
        self.put(into_q, dq, up)
        if into_v is not None:
            self.put(into_v, du, None if de is None else self.beta)
        if de is None:
            self.put(into_k, dk, down)
            return
        if up is not None:
            de.mul_(up)
            dk.mul_(down)
        rates = (self.heads(x, y.shape[1]).mul(y.unsqueeze(2)).sum(-1) for x, y in ((de, self.k_in), (du, self.v_in)))
        into_beta.copy_(sum(x.flatten(1, 2) for x in rates).unsqueeze(-1))
        self.put(into_k, dk.addcmul_(de, self.beta), None)

    def put(self, grad: Tensor, d: Tensor, factor: Tensor | None) -> None:
        """Writes d [R·H, c, ·] times factor [R·H, c, ·], summed over the heads of a group, into grad [R, G, c, ·]."""
        if grad.shape[1] != self.whole.heads:
            torch.sum(self.heads(d if factor is None else d * factor, grad.shape[1]), 2, out=grad)
        elif factor is None:
            grad.copy_(self.heads(d))
        else:
            torch.mul(self.heads(d), self.heads(factor), out=grad)


# How far the log decays of half a chunk may add up: above the diagonal, where it is cut off, Q Kᵀ reaches their square.
LIMITS = {torch.float32: 32.0, torch.float64: 300.0}
CACHE_BYTES = 2**18  # bytes of one [R, H, C, K] buffer and thread; ten of them are in use at a time


class ChunkPlan(NamedTuple):
    """What `plan_chunks` found.

    chunk: its size. halves: the log decays summed over first and second half of each, [N, 2, B, H, K|1], fp64.
    triangular: the caller's promise that v [B,T,·,T] is lower triangular and takes no gradient; then columns that are
    still zero are left out, which is half of all work.
    """

    chunk: int
    halves: Tensor | None
    triangular: bool = False


def plan_chunks(q: Tensor, log_decay: Tensor | None, chunk: int | None) -> ChunkPlan | None:
    """The route of q [B,T,H,K] and log_decay [B,T,H,K|1], or None where it needs the general path."""
    if chunk is not None:
        common.check_chunk_size(chunk)
    if q.device.type != "cpu" or q.shape[1] == 0 or torch.compiler.is_compiling():
        return None
    # 64 takes the least time; threads wait for each other less often in 128
    sizes = (chunk,) if chunk else (64, 32, 16) if torch.get_num_threads() == 1 else (128, 64, 32, 16)
    if log_decay is None:
        return ChunkPlan(min(sizes[0], q.shape[1]), None)
    log_decay = log_decay.detach()
    if log_decay.amax() > 0:
        return None
    for size in sizes:
        halves = _halves(log_decay, size)
        if halves.amin() >= -LIMITS[log_decay.dtype]:
            return ChunkPlan(size, halves)
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


def run_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    segments: Tensor | None,
    route: ChunkPlan,
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
            self.docs = common.DocumentMasks.from_segments(segments, route.chunk)
            self.mixed = (
                ~(self.docs.within_document.flatten(1).all(1) & self.docs.carries_state.flatten(1).all(1))
            ).tolist()
        size = self.heads * self.size * max(self.key, self.value) * dtype.itemsize
        self.rows = max(1, CACHE_BYTES * torch.get_num_threads() // size)

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
    @common.strict_once_differentiable
    def backward(ctx, do, dlast):
        q, k, v, beta, log_decay, segments, updates, *states = ctx.saved_tensors
        with common.disable_autocast(do):
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
