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
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from limbeck.ops.common import Documents

if TYPE_CHECKING:
    from limbeck.ops.cpu import _Block, _Pass


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
            masks = docs.same[n, where, :, :c, :c], docs.reads[n, where, :, :c], docs.writes[n, where, :, :c]
            self.docs = Documents(*(x.to(whole.dtype) for x in (*masks, docs.keeps[n, where])))
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
        return m if self.docs is None else self.times(m, self.docs.same)

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
            self.u.sub_(read if docs is None else self.times(read, docs.reads))
            self.solve(self.u)
            u.copy_(self.heads(self.u))
        torch.bmm(self.q, before, out=read)
        if docs is None:
            torch.baddbmm(before, self.kt, self.u, out=after)
        else:
            self.times(read, docs.reads)
            self.times(after.copy_(before), docs.keeps).baddbmm_(self.kt, self.times(self.u.clone(), docs.writes))
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
            self.times(torch.bmm(k, dstate, out=du), docs.writes)
            self.times(dstate, docs.keeps)
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
            do, u = self.times(do.clone(), docs.reads), self.times(u.clone(), docs.writes)
            if delta:
                self.times(dread, docs.reads)
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
