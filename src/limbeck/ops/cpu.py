"""The chunked recurrences on a CPU: one chunk after the other, so that all intermediate results stay in cache.

    plan = plan_chunks(q, log_decay, chunk)                     # None: take the general path
    o, state = run_chunks(q, k, v, beta, log_decay, state, segments, plan)

Decays are factored inside each chunk, which makes a vector decay as cheap as none but for one exponential. The factors
grow with the decays: `plan_chunks` takes this route only where they stay far from overflow, with shorter chunks where
those help. It leaves the rest to the general path with the exact halvings of intra_chunk.py: near resets, decays that
grow, other devices, torch.compile.

With g the log decays summed from the middle of the chunk, negative after it and positive before:

    Q = q·exp(g),  E = beta·k·exp(g),  K = k·exp(−g),  P = tril(Q Kᵀ),  L = strict_tril(E Kᵀ)
    U = (I + L)⁻¹ (beta·V − E S),  O = P U + Q S,  S ← x·(S + Kᵀ U),  U = V where there is no beta

where S is the state as the middle sees it and x the decay from this middle to the next. Decays need no gradient of an
exponential: everything depends on differences g_i − g_j, so dg = Q·dQ + E·dE − K·dK, summed over the tokens after, and
S·dS of what leaves the chunk. g is summed in float64: the error of exp(g) is |g| units in the last place of the sum.
The backward pass needs q, k, v, the gates, U and one state per chunk; all else is computed again while in cache.

The second factor of every product is laid out as it is read: transposed, it takes MKL two to three times as long at
these sizes. Shapes: R rows of the batch that are run together, c tokens of a chunk; the rest as in limbeck.ops.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.ops import common
from limbeck.ops.common import DocumentMasks

# Largest sum of -log_decay over half a chunk: above the diagonal, before it is cut off, Q Kᵀ reaches exp of twice that.
LIMITS = {torch.float32: 32.0, torch.float64: 300.0}
CACHE_BYTES = 2**18  # bytes of one [R, H, c, K] buffer per thread; ten of them are in use at a time


class ChunkPlan(NamedTuple):
    """How `run_chunks` cuts a sequence.

    Attributes:
        chunk: tokens of a chunk.
        halves: log decays summed over the first and the second half of each chunk, [N, 2, B, H, K|1] in float64.
        triangular: the caller's promise that v [B,T,·,T] is lower triangular and takes no gradient: columns that are
            still zero are left out, which saves half of the work.
    """

    chunk: int
    halves: Tensor | None
    triangular: bool = False


def plan_chunks(q: Tensor, log_decay: Tensor | None, chunk: int | None) -> ChunkPlan | None:
    """Choose chunks for q [B,T,H,K] and log_decay [B,T,H,K|1]; None where the general path has to be taken."""
    if chunk is not None:
        common.check_chunk_size(chunk)
    if q.device.type != "cpu" or q.shape[1] == 0 or torch.compiler.is_compiling():
        return None
    # A chunk of 64 takes the least time on one thread; threads wait for each other less often with 128.
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
    """Sum the log decays of both halves of each chunk, [N, 2, B, H, K|1]; the last chunk may be shorter."""
    whole = log_decay.shape[1] // chunk * chunk
    sums = []
    if whole:
        blocks = log_decay[:, :whole].unflatten(1, (-1, chunk))
        halves = (blocks[:, :, : chunk // 2], blocks[:, :, chunk // 2 :])
        sums.append(torch.stack([x.sum(2, dtype=torch.float64) for x in halves]).permute(2, 0, 1, 3, 4))
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
    plan: ChunkPlan,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over chunks: outputs [B,T,H,V] in v's dtype and the final state [B,H,K,V].

    Args:
        q, k, v, beta, segments: as in delta_rule.py; beta is None for the additive recurrence.
        log_decay: [B,T,H,K], [B,T,H,1] or None, in the dtype of `state`.
        state: [B,H,K,V]; everything is computed in its dtype.
    """
    return _RunChunks.apply(q, k, v, beta, log_decay, state, segments, plan)


class _RunChunks(torch.autograd.Function):
    """Run the chunks of each block of rows in order; the backward goes from the last chunk to the first."""

    @staticmethod
    def forward(ctx, q, k, v, beta, log_decay, state, segments, plan):
        whole = _Pass(q, k, v, beta, log_decay, segments, plan, state.dtype)
        o, new = v.new_empty(*q.shape[:3], v.shape[3]), state.new_empty
        if plan.triangular:
            o, new = o.zero_(), state.new_zeros
        # Without a backward pass two states take turns, and U is that of one chunk: both stay in cache.
        keeps = any(ctx.needs_input_grad) or plan.triangular
        slots, kept = (whole.count + 1, whole.length) if keeps else (2, whole.size)
        updates = None if beta is None else state.new_empty(len(o), kept, *o.shape[2:])
        states = [new(*state.shape[:3], whole.columns(n)) for n in range(slots)]
        first = state[..., : whole.columns(0)]
        torch.mul(first, 1 if whole.decays is None else whole.decays[0], out=states[0])
        for block in whole.blocks():
            outputs: Any = block.cut_values(o)
            us: Any = [None] * whole.count
            if updates is not None:
                one = block.cut(updates)[0]
                us = block.cut_values(updates) if keeps else [one[:, :, : x.shape[2]] for x in block.q]
            for n in range(whole.count):
                x = block.chunk(n)
                before, into = (block.state(states[i % slots]) for i in (n, n + 1))
                after = into if into.shape == before.shape else torch.empty_like(before)
                outputs[n].copy_(x.heads(x.forward(before, after, us[n])))
                if log_decay is not None:
                    after.mul_(block.decays[n + 1])
                if after is not into:
                    into[..., : after.shape[2]] = after
        last = states[whole.count % slots]
        if not keeps:
            return o, last
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, beta, log_decay, segments, updates, *states)
        return o, last.clone()

    @staticmethod
    @common.strict_once_differentiable
    def backward(ctx, do, dlast):
        q, k, v, beta, log_decay, segments, updates, *states = ctx.saved_tensors
        with common.disable_autocast(do):
            dtype = states[0].dtype
            whole = _Pass(q, k, v, beta, log_decay, segments, ctx.plan, dtype)
            inputs = (q, k, None if ctx.plan.triangular else v, beta, log_decay)
            grads: list[Any] = [None if x is None else states[0].new_empty(x.shape) for x in inputs]
            dfirst = torch.zeros_like(dlast, dtype=dtype)
            absent: Any = [None] * whole.count
            for block in whole.blocks():
                dos, us = block.cut_values(do), absent if updates is None else block.cut_values(updates)
                dqs, dks, dvs = (absent if x is None else block.cut(x) for x in grads[:3])
                dbetas = absent if beta is None else block.cut(grads[3].unsqueeze(-1))
                dlogs = absent if log_decay is None else grads[4][block.batch_slice].flatten(2).split(whole.size, 1)
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
                        dlogs[n].copy_(x.compute_log_decay_grad(dq, de, dk, leaving))
                    x.write_grads(dq, de, dk, du, dqs[n], dks[n], dvs[n], dbetas[n])
                if log_decay is not None:
                    dstate.mul_(block.decays[0])
                block.state(dfirst)[..., : dstate.shape[2]] = dstate
            out = (None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))
            return *out, dfirst, None, None


class _Pass:
    """What all blocks of a forward or backward pass share: inputs, decays between chunks, document masks."""

    def __init__(self, q, k, v, beta, log_decay, segments, plan, dtype):
        self.dtype, self.size, self.triangular = dtype, plan.chunk, plan.triangular
        self.q, self.k, self.v, self.beta, self.log_decay = q, k, v, beta, log_decay
        self.batch, self.length, self.heads, self.key = q.shape
        self.value, self.width = v.shape[3], 0 if log_decay is None else log_decay.shape[3]
        self.count = -(-self.length // self.size)  # of chunks
        self.decays, self.masks, self.mixed = None, None, None
        if log_decay is not None:  # [N+1, B, H, K|1, 1]: to the first middle, from each to the next, to the end
            sums = torch.cat([plan.halves[:, 0], torch.zeros_like(plan.halves[:1, 0])])
            sums[1:] += plan.halves[:, 1]
            self.decays = sums.exp_().to(dtype).unsqueeze(-1)
        if segments is not None:
            self.masks = common.DocumentMasks.from_segments(segments, plan.chunk)
            uniform = self.masks.within_document.flatten(1).all(1) & self.masks.carries_state.flatten(1).all(1)
            self.mixed = (~uniform).tolist()  # by chunk: does a document begin there?
        size = self.heads * self.size * max(self.key, self.value) * dtype.itemsize
        self.rows = max(1, CACHE_BYTES * torch.get_num_threads() // size)

    def columns(self, n: int) -> int:
        """Count the columns of v, U and the state that are in use in chunk n."""
        return min((n + 1) * self.size, self.value) if self.triangular else self.value

    def blocks(self) -> "Iterator[_Block]":
        """Iterate over the batch, as many rows at a time as fit into the cache; buffers are reused."""
        chunks: dict[int, dict[tuple[int, int], Chunk]] = {}  # by the number of rows
        for first in range(0, self.batch, self.rows):
            rows = min(self.rows, self.batch - first)
            yield _Block(self, slice(first, first + rows), rows, chunks.setdefault(rows, {}))


class _Block:
    """Some rows of the batch, with everything cut into chunks and heads before time."""

    def __init__(self, whole: _Pass, batch_slice: slice, rows: int, chunks: "dict[tuple[int, int], Chunk]"):
        self.whole, self.batch_slice, self.rows, self.chunks = whole, batch_slice, rows, chunks
        self.q, self.k, self.v = self.cut(whole.q), self.cut(whole.k), self.cut_values(whole.v)
        self.beta = None if whole.beta is None else self.cut(whole.beta.to(whole.dtype).unsqueeze(-1))
        if whole.log_decay is not None:
            self.log_decay = whole.log_decay[batch_slice].flatten(2).split(whole.size, 1)
            self.decays = [self.state(x) for x in whole.decays]

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """Cut [B, T, G, D] into views [R, G, c, D] of each chunk."""
        return x[self.batch_slice].transpose(1, 2).split(self.whole.size, 2)

    def cut_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """Cut values, or gradients of their shape, to the columns in use."""
        chunks = self.cut(x)
        return tuple(y[..., : self.whole.columns(n)] for n, y in enumerate(chunks)) if self.whole.triangular else chunks

    def state(self, x: Tensor) -> Tensor:
        """View the rows of [B, H, ·, ·] as [R·H, ·, ·]."""
        return x[self.batch_slice].flatten(0, 1)

    def chunk(self, n: int) -> "Chunk":
        """Load chunk n into the buffers of its size."""
        key = (self.q[n].shape[2], self.whole.columns(n))
        if key not in self.chunks:
            if self.whole.triangular:
                self.chunks.clear()
            self.chunks[key] = Chunk(self.whole, self.rows, *key)
        self.chunks[key].load(self, n)
        return self.chunks[key]


class Chunk:
    """One chunk of c tokens in R rows, in buffers that are reused: the letters of the module's head, [R·H, c, ·]."""

    def __init__(self, whole: _Pass, rows: int, c: int, value: int):
        self.whole, self.rows, self.c, self.value = whole, rows, c, value
        key = whole.key
        self.buffers: dict[str, Tensor] = {}
        self.views: dict[int, dict[int | None, Tensor]] = {}  # of the tensors that `new` allocated, by their id
        self.kt, self.p, self.read = self.new(key, c), self.new(c, c), self.new(c, value)
        self.l = self.new(c, c) if whole.beta is not None else None
        if whole.width:
            column, middle = torch.arange(c), c // 2
            row = column[:, None]
            sums = ((column >= middle) & (column <= row)).double()
            self.sums = sums.sub_(((column < middle) & (column > row)).double()).expand(rows, c, c)
            self.log = self.sums.new_empty(rows, c, whole.heads * whole.width)
            self.g = torch.empty_like(self.log)
            self.g_heads = self.g.view(rows, c, whole.heads, whole.width).transpose(1, 2)
            self.exp_g, self.exp_neg_g, self.rate = (self.new(c, whole.width) for _ in range(3))

    def new(self, *shape: int) -> Tensor:
        out = torch.empty(self.rows * self.whole.heads, *shape, dtype=self.whole.dtype)
        self.views[id(out)] = {}
        return out

    def buffer(self, name: str, *shape: int) -> Tensor:
        """Return the buffer [R·H, ·, ·] of that name, allocated on first use."""
        if name not in self.buffers:
            self.buffers[name] = self.new(*shape)
        return self.buffers[name]

    def heads(self, x: Tensor, groups: int | None = None) -> Tensor:
        """View [R·H, ·, ·] as [R, H, ·, ·], or as [R, G, H/G, ·, ·]."""
        # Views of these buffers are cached, because creating them took a tenth of all time.
        cached = self.views.get(id(x))
        if cached is not None and groups in cached:
            return cached[groups]
        shape = (self.rows, -1) if groups is None else (self.rows, groups, -1)
        out = x.view(*shape, *x.shape[1:])
        if cached is not None:
            cached[groups] = out
        return out

    def to_heads(self, name: str, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """Return x [R, G, c, D] times factor [R·H, c, ·] as [R·H, c, D]; x itself where nothing has to be done."""
        if factor is None and self.rows == 1 and x.shape[1] == self.whole.heads and x.dtype == self.whole.dtype:
            return x.squeeze(0)
        out = self.buffer(name, *x.shape[2:])
        groups = None if x.shape[1] == self.whole.heads else x.shape[1]
        heads, x = self.heads(out, groups), x if groups is None else x.unsqueeze(2)
        heads.copy_(x) if factor is None else torch.mul(x, self.heads(factor, groups), out=heads)
        return out

    def load(self, block: _Block, n: int) -> None:
        """Compute Q, E, K, P and L of chunk n; U is still missing where there is a beta."""
        whole = self.whole
        self.masks = None
        if whole.mixed and whole.mixed[n]:
            masks, rows, c = whole.masks, block.batch_slice, self.c
            self.masks = DocumentMasks(
                within_document=masks.within_document[n, rows, :, :c, :c].to(whole.dtype),
                reads_state=masks.reads_state[n, rows, :, :c].to(whole.dtype),
                writes_state=masks.writes_state[n, rows, :, :c].to(whole.dtype),
                carries_state=masks.carries_state[n, rows].to(whole.dtype),
            )
        self.k_in, self.v_in = block.k[n], block.v[n]
        exp_g = exp_neg_g = None
        if whole.width:
            exp_g, exp_neg_g = self.exp_g, self.exp_neg_g
            torch.bmm(self.sums, self.log.copy_(block.log_decay[n]), out=self.g).exp_()
            self.heads(exp_g).copy_(self.g_heads)
            torch.reciprocal(exp_g, out=exp_neg_g)
        self.q = self.to_heads("q", block.q[n], exp_g)
        self.k = self.to_heads("k", self.k_in, exp_neg_g)
        self.kt.copy_(self.k.mT)
        self.mask_(torch.bmm(self.q, self.kt, out=self.p), 0)
        if block.beta is None:
            self.u = self.to_heads("u", self.v_in)
        else:
            self.beta = block.beta[n].reshape(-1, self.c, 1)
            rate = self.beta if exp_g is None else torch.mul(exp_g, self.beta, out=self.rate)
            self.e = self.to_heads("e", self.k_in, rate)
            self.mask_(torch.bmm(self.e, self.kt, out=self.l), -1)

    def mask_(self, m: Tensor, diagonal: int) -> Tensor:
        """Set pairs m [R·H, c, c] with later tokens and with those of other documents to zero, in place."""
        m.tril_(diagonal)
        return m if self.masks is None else self.multiply_(m, self.masks.within_document)

    def multiply_(self, x: Tensor, mask: Tensor) -> Tensor:
        self.heads(x).mul_(mask)
        return x

    def solve(self, x: Tensor, *, adjoint: bool = False) -> None:
        """Replace x by (I + L)⁻¹ x, or by (I + L)⁻ᵀ x where `adjoint`."""
        # From the right on transposed views, which LAPACK takes without copies.
        system = self.l if adjoint else self.l.mT
        torch.linalg.solve_triangular(system, x.mT, upper=not adjoint, left=False, unitriangular=True, out=x.mT)

    def forward(self, before: Tensor, after: Tensor, u: Tensor | None) -> Tensor:
        """Compute outputs [R·H, c, V]; write S + Kᵀ U, not yet decayed to the next middle, to `after`, and U to u."""
        read, masks = self.read, self.masks
        if u is not None:
            torch.bmm(self.e, before, out=read)
            self.u = self.to_heads("u", self.v_in, self.beta)
            self.u.sub_(read if masks is None else self.multiply_(read, masks.reads_state))
            self.solve(self.u)
            u.copy_(self.heads(self.u))
        torch.bmm(self.q, before, out=read)
        if masks is None:
            torch.baddbmm(before, self.kt, self.u, out=after)
        else:
            self.multiply_(read, masks.reads_state)
            self.multiply_(after.copy_(before), masks.carries_state).baddbmm_(
                self.kt, self.multiply_(self.u.clone(), masks.writes_state)
            )
        return read.baddbmm_(self.p, self.u)

    def backward(
        self, do: Tensor, before: Tensor, dstate: Tensor, u: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Compute the gradients of Q, E, K and of what (I + L)⁻¹ was applied to, all [R·H, c, ·].

        dstate, the gradient of the state after, becomes that of the state before, in place.
        """
        key, value, c, masks, delta = self.whole.key, self.value, self.c, self.masks, u is not None
        do = self.to_heads("do", do)
        u = self.u if u is None else self.to_heads("u", u)
        k = self.k
        ut = self.buffer("ut", value, c).copy_(u.mT)
        st, dst = self.buffer("st", value, key).copy_(before.mT), self.buffer("dst", value, key).copy_(dstate.mT)
        du, dq, dk = self.buffer("du", c, value), self.buffer("dq", c, key), self.buffer("dk", c, key)
        dp, de = self.buffer("dp", c, c), None
        if masks is None:
            torch.bmm(k, dstate, out=du)
        else:
            self.multiply_(torch.bmm(k, dstate, out=du), masks.writes_state)
            self.multiply_(dstate, masks.carries_state)
        du.baddbmm_(self.p.mT, do)
        torch.bmm(do, ut, out=dp)
        if self.whole.width:
            # A token does not decay towards itself: `compute_log_decay_grad` adds the diagonal when it is done.
            self.diagonal = dp.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clone()
        self.mask_(dp, -1 if self.whole.width else 0)
        torch.bmm(dp, k, out=dq)
        torch.bmm(dp.mT, self.q, out=dk)
        if delta:
            self.solve(du, adjoint=True)
            torch.neg(du, out=self.read)
            self.mask_(torch.bmm(self.read, ut, out=dp), -1)
            de = torch.bmm(dp, k, out=self.buffer("de", c, key))
            dk.baddbmm_(dp.mT, self.e)
        dread = self.read
        if masks is not None:  # from here on, gradients go through the state only
            do, u = self.multiply_(do.clone(), masks.reads_state), self.multiply_(u.clone(), masks.writes_state)
            if delta:
                self.multiply_(dread, masks.reads_state)
        dq.baddbmm_(do, st)
        dk.baddbmm_(u, dst)
        dstate.baddbmm_(self.q.mT, do)
        if delta:
            de.baddbmm_(dread, st)
            dstate.baddbmm_(self.e.mT, dread)
        return dq, de, dk, du

    def compute_log_decay_grad(self, dq: Tensor, de: Tensor | None, dk: Tensor, leaving: Tensor) -> Tensor:
        """Compute the gradient of the log decays [R, c, H·K] or [R, c, H], and complete dq and dk."""
        if "dg" not in self.buffers:
            self.buffers["dg"] = self.exp_g.new_empty(self.g.shape)
            self.since = self.exp_g.new_ones(self.c, self.c).triu_().expand(self.rows, -1, -1)
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

    def write_grads(self, dq, de, dk, du, into_q, into_k, into_v, into_beta) -> None:
        """Turn the gradients of Q, E, K and U into those of q, k, v and beta."""
        exp_g, exp_neg_g = (self.exp_g, self.exp_neg_g) if self.whole.width else (None, None)
        self.write_grad(into_q, dq, exp_g)
        if into_v is not None:
            self.write_grad(into_v, du, None if de is None else self.beta)
        if de is None:
            self.write_grad(into_k, dk, exp_neg_g)
            return
        if exp_g is not None:
            de.mul_(exp_g)
            dk.mul_(exp_neg_g)
        rates = (self.heads(x, y.shape[1]).mul(y.unsqueeze(2)).sum(-1) for x, y in ((de, self.k_in), (du, self.v_in)))
        into_beta.copy_(sum(x.flatten(1, 2) for x in rates).unsqueeze(-1))
        self.write_grad(into_k, dk.addcmul_(de, self.beta), None)

    def write_grad(self, grad: Tensor, d: Tensor, factor: Tensor | None) -> None:
        """Write d [R·H, c, ·] times factor [R·H, c, ·], summed over the heads of a group, into grad [R, G, c, ·]."""
        if grad.shape[1] != self.whole.heads:
            torch.sum(self.heads(d if factor is None else d * factor, grad.shape[1]), 2, out=grad)
        elif factor is None:
            grad.copy_(self.heads(d))
        else:
            torch.mul(self.heads(d), self.heads(factor), out=grad)
