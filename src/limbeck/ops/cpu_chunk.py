"""One chunk of a recurrence on a CPU, forward and backward, in buffers that stay in cache: the arithmetic of cpu.py.

    for block in Pass(q, k, v, beta, log_decay, segments, plan, dtype).blocks():
        chunk = block.chunk(n)                                  # a Chunk, or the one of limbeck.ops.cpu_rank_one
        o = chunk.forward(before, after, None)                  # [R·H, c, V]; writes the state to `after`

With g the log decays summed from the middle of the chunk, negative after it and positive before:

    Q = q·exp(g),  E = beta·k·exp(g),  K = k·exp(−g),  P = tril(Q Kᵀ),  L = strict_tril(E Kᵀ)
    U = (I + L)⁻¹ (beta·V − E S),  O = P U + Q S,  S ← x·(S + Kᵀ U),  U = V where there is no beta

where S is the state as the middle sees it and x the decay from this middle to the next. Decays need no gradient of an
exponential: everything depends on differences g_i − g_j, so dg = Q·dQ + E·dE − K·dK, summed over the tokens after, and
S·dS of what leaves the chunk. g is summed in float64: the error of exp(g) is |g| units in the last place of the sum.

The second factor of every product is laid out as it is read: transposed, it takes MKL two to three times as long at
these sizes. Shapes: R rows of the batch that are run together, c tokens of a chunk; the rest as in limbeck.ops.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from limbeck.ops import common
from limbeck.ops.common import DocumentMasks

CACHE_BYTES = 2**18  # bytes of one [R, H, c, K] buffer per thread; ten of them are in use at a time


class Pass:
    """What all blocks of a forward or backward pass share: inputs, decays between chunks, document masks."""

    def __init__(self, q, k, v, beta, log_decay, segments, plan, dtype, pair=(None, None)):
        self.dtype, self.size, self.triangular = dtype, plan.chunk, plan.triangular
        self.q, self.k, self.v, self.beta, self.log_decay, self.pair = q, k, v, beta, log_decay, pair
        self.batch, self.length, self.heads, self.key = q.shape
        self.value, self.width = v.shape[3], 0 if log_decay is None else log_decay.shape[3]
        self.count = -(-self.length // self.size)  # of chunks
        self.decays, self.masks, self.mixed = None, None, None
        self.kind = plan.kind
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

    def blocks(self) -> "Iterator[Block]":
        """Iterate over the batch, as many rows at a time as fit into the cache; buffers are reused."""
        chunks: dict[int, dict[tuple[int, int], Chunk]] = {}  # by the number of rows
        for first in range(0, self.batch, self.rows):
            rows = min(self.rows, self.batch - first)
            yield Block(self, slice(first, first + rows), rows, chunks.setdefault(rows, {}))


class Block:
    """Some rows of the batch, with everything cut into chunks and heads before time."""

    def __init__(self, whole: Pass, batch_slice: slice, rows: int, chunks: "dict[tuple[int, int], Chunk]"):
        self.whole, self.batch_slice, self.rows, self.chunks = whole, batch_slice, rows, chunks
        self.q, self.k, self.v = self.cut(whole.q), self.cut(whole.k), self.cut_values(whole.v)
        self.beta = None if whole.beta is None else self.cut(whole.beta.to(whole.dtype).unsqueeze(-1))
        self.pair = tuple(self.cut(x) for x in whole.pair if x is not None)
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
            self.chunks[key] = self.whole.kind(self.whole, self.rows, *key)
        self.chunks[key].load(self, n)
        return self.chunks[key]


class Chunk:
    """One chunk of c tokens in R rows, in buffers that are reused: the letters of the module's head, [R·H, c, ·]."""

    def __init__(self, whole: Pass, rows: int, c: int, value: int):
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

    def load(self, block: Block, n: int) -> None:
        """Compute Q, E, K, P and L of chunk n; U is still missing where there is a beta."""
        self.load_masks(block, n)
        exp_g, exp_neg_g = self.load_decays(block, n)
        self.k_in, self.v_in = block.k[n], block.v[n]
        self.load_pairs(block.q[n], exp_g, exp_neg_g)
        if block.beta is None:
            self.u = self.to_heads("u", self.v_in)
        else:
            self.beta = block.beta[n].reshape(-1, self.c, 1)
            rate = self.beta if exp_g is None else torch.mul(exp_g, self.beta, out=self.rate)
            self.e = self.to_heads("e", self.k_in, rate)
            self.mask_(torch.bmm(self.e, self.kt, out=self.l), -1)

    def load_masks(self, block: Block, n: int) -> None:
        """Find the masks of chunk n, None where no document begins in it."""
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

    def load_decays(self, block: Block, n: int) -> tuple[Tensor | None, Tensor | None]:
        """Compute exp(g) and exp(−g) of chunk n; None without decays."""
        if not self.whole.width:
            return None, None
        torch.bmm(self.sums, self.log.copy_(block.log_decay[n]), out=self.g).exp_()
        self.heads(self.exp_g).copy_(self.g_heads)
        return self.exp_g, torch.reciprocal(self.exp_g, out=self.exp_neg_g)

    def load_pairs(self, q: Tensor, exp_g: Tensor | None, exp_neg_g: Tensor | None) -> None:
        """Compute Q, K and P."""
        self.q, self.k = self.to_heads("q", q, exp_g), self.to_heads("k", self.k_in, exp_neg_g)
        self.kt.copy_(self.k.mT)
        self.mask_(torch.bmm(self.q, self.kt, out=self.p), 0)

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
        masks = self.masks
        if u is not None:
            read = self.read
            torch.bmm(self.e, before, out=read)
            self.u = self.to_heads("u", self.v_in, self.beta)
            self.u.sub_(read if masks is None else self.multiply_(read, masks.reads_state))
            self.solve(self.u)
            u.copy_(self.heads(self.u))
        if masks is None:
            torch.baddbmm(before, self.kt, self.u, out=after)
        else:
            self.multiply_(after.copy_(before), masks.carries_state).baddbmm_(
                self.kt, self.multiply_(self.u.clone(), masks.writes_state)
            )
        return self.compute_outputs(before)

    def compute_outputs(self, before: Tensor) -> Tensor:
        """Compute P U + Q S."""
        read = torch.bmm(self.q, before, out=self.read)
        if self.masks is not None:
            self.multiply_(read, self.masks.reads_state)
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
        each = torch.mul(self.q, dq, out=self.buffer("each", *dq.shape[1:])).addcmul_(self.k, dk, value=-1)
        if de is not None:
            each.addcmul_(self.e, de)
        dq.addcmul_(self.diagonal, self.k)
        dk.addcmul_(self.diagonal, self.q)
        return self.sum_log_decay_grad(each, leaving)

    def sum_log_decay_grad(self, each: Tensor, leaving: Tensor) -> Tensor:
        """Sum the gradients of g [R·H, c, ·] over the tokens after, with that of what leaves the chunk."""
        if "dg" not in self.buffers:
            self.buffers["dg"] = self.exp_g.new_empty(self.g.shape)
            self.since = self.exp_g.new_ones(self.c, self.c).triu_().expand(self.rows, -1, -1)
        dg = self.buffers["dg"].view(self.rows, self.c, self.whole.heads, -1).transpose(1, 2)
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
