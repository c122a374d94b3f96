"""One chunk of diagonal plus rank one on a CPU, forward and backward, as `limbeck.ops.cpu_chunk` has it for the others.

    plan = cpu.plan_chunks(q, log_decay, chunk)
    o, state = cpu.run_chunks(q, k, v, None, log_decay, state, segments, plan._replace(kind=RankOneChunk), (a, b))

With the letters and buffers of that module: token i reads R_i through `a` before its own decay and writes it back
through b, so

    A = a·exp(g − log_decay),  B = b·exp(−g),  P' = tril(Q Bᵀ),  X = strict_tril(A Kᵀ),  Y = strict_tril(A Bᵀ)
    R = (I − Y)⁻¹ (A S + X V),  O = P V + P' R + Q S,  S ← x·(S + Kᵀ V + Bᵀ R)
    dg = Q·dQ + A·dA − K·dK − B·dB, and −A·dA for the token's own log decay
"""

import torch
from torch import Tensor

from limbeck.ops.cpu_chunk import Block, Chunk, Pass


class RankOneChunk(Chunk):
    """One chunk of diagonal plus rank one; log decays are of all key channels."""

    def __init__(self, whole: Pass, rows: int, c: int, value: int):
        super().__init__(whole, rows, c, value)
        self.bt, self.l, self.pb, self.x = self.new(whole.key, c), self.new(c, c), self.new(c, c), self.new(c, c)
        self.exp_before, self.r = self.new(c, whole.key), self.new(c, value)

    def load(self, block: Block, n: int) -> None:
        """Compute Q, K, A, B, P, P', X and −Y of chunk n; R is still missing."""
        self.load_masks(block, n)
        exp_g, exp_neg_g = self.load_decays(block, n)
        self.k_in, self.v_in = block.k[n], block.v[n]
        self.load_pairs(block.q[n], exp_g, exp_neg_g)
        self.u = self.to_heads("u", self.v_in)
        a, b = block.pair
        self.exp_before[:, 1:].copy_(self.exp_g[:, :-1])
        own = block.log_decay[n][:, 0].unflatten(-1, (self.whole.heads, -1)).neg().exp()
        torch.mul(self.heads(self.exp_g)[:, :, 0], own, out=self.heads(self.exp_before)[:, :, 0])
        self.a, self.b = self.to_heads("a", a[n], self.exp_before), self.to_heads("b", b[n], exp_neg_g)
        self.bt.copy_(self.b.mT)
        self.mask_(torch.bmm(self.q, self.bt, out=self.pb), 0)
        self.mask_(torch.bmm(self.a, self.kt, out=self.x), -1)
        self.mask_(torch.bmm(self.a, self.bt, out=self.l), -1).neg_()

    def forward(self, before: Tensor, after: Tensor, u: Tensor | None) -> Tensor:
        """Compute outputs [R·H, c, V]; write S + Kᵀ V + Bᵀ R to `after`, and R to u."""
        masks, r, v, written = self.masks, torch.bmm(self.a, before, out=self.r), self.u, self.r
        if masks is None:
            after.copy_(before)
        else:
            self.multiply_(r, masks.reads_state)
            self.multiply_(after.copy_(before), masks.carries_state)
        r.baddbmm_(self.x, v)
        self.solve(r)
        assert u is not None
        u.copy_(self.heads(r))
        if masks is not None:
            v, written = (self.multiply_(x.clone(), masks.writes_state) for x in (v, r))
        after.baddbmm_(self.kt, v).baddbmm_(self.bt, written)
        return self.compute_outputs(before).baddbmm_(self.pb, r)

    def backward(
        self, do: Tensor, before: Tensor, dstate: Tensor, u: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Compute the gradients of Q, K and V, and keep those of A and B; dstate as in `Chunk`."""
        key, value, c, masks, dp = self.whole.key, self.value, self.c, self.masks, self.buffer("dp", self.c, self.c)
        assert u is not None
        do, v, r = self.to_heads("do", do), self.u, self.to_heads("r", u)
        vt, rt = (self.buffer(name, value, c).copy_(x.mT) for name, x in (("vt", v), ("rt", r)))
        st, dst = (self.buffer(name, value, key).copy_(x.mT) for name, x in (("st", before), ("dst", dstate)))
        dv, dr = (self.buffer(name, c, value) for name in ("dv", "dr"))
        dq, dk, da, db = (self.buffer(name, c, key) for name in ("dq", "dk", "da", "db"))
        torch.bmm(self.k, dstate, out=dv)
        torch.bmm(self.b, dstate, out=dr)
        if masks is not None:
            self.multiply_(dv, masks.writes_state)
            self.multiply_(dr, masks.writes_state)
            self.multiply_(dstate, masks.carries_state)
        dv.baddbmm_(self.p.mT, do)
        dr.baddbmm_(self.pb.mT, do)
        self.solve(dr, adjoint=True)
        dv.baddbmm_(self.x.mT, dr)
        torch.bmm(do, vt, out=dp)
        self.diagonal = dp.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clone()
        torch.bmm(self.mask_(dp, -1), self.k, out=dq)
        torch.bmm(dp.mT, self.q, out=dk)
        torch.bmm(do, rt, out=dp)
        self.diagonal_b = dp.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).clone()
        dq.baddbmm_(self.mask_(dp, -1), self.b)
        torch.bmm(dp.mT, self.q, out=db)
        torch.bmm(self.mask_(torch.bmm(dr, vt, out=dp), -1), self.k, out=da)
        dk.baddbmm_(dp.mT, self.a)
        da.baddbmm_(self.mask_(torch.bmm(dr, rt, out=dp), -1), self.b)
        db.baddbmm_(dp.mT, self.a)
        if masks is not None:  # from here on, gradients go through the state only
            do, dr = (self.multiply_(x.clone(), masks.reads_state) for x in (do, dr))
            v, r = (self.multiply_(x.clone(), masks.writes_state) for x in (v, r))
        for gradient, first, second in ((dq, do, st), (da, dr, st), (dk, v, dst), (db, r, dst)):
            gradient.baddbmm_(first, second)
        dstate.baddbmm_(self.q.mT, do).baddbmm_(self.a.mT, dr)
        self.da, self.db = da, db
        return dq, None, dk, dv

    def compute_log_decay_grad(self, dq: Tensor, de: Tensor | None, dk: Tensor, leaving: Tensor) -> Tensor:
        """Compute the gradient of the log decays [R, c, H·K], and complete dq, dk and dB."""
        own = torch.mul(self.a, self.da, out=self.buffer("own", *dq.shape[1:]))
        each = torch.addcmul(own, self.q, dq, out=self.buffer("each", *dq.shape[1:]))
        each.addcmul_(self.k, dk, value=-1).addcmul_(self.b, self.db, value=-1)
        dq.addcmul_(self.diagonal, self.k).addcmul_(self.diagonal_b, self.b)
        dk.addcmul_(self.diagonal, self.q)
        self.db.addcmul_(self.diagonal_b, self.q)
        return self.sum_log_decay_grad(each, leaving) - self.heads(own).transpose(1, 2).flatten(2)

    def write_grads(self, dq, de, dk, du, into_q, into_k, into_v, into_others) -> None:
        """Turn the gradients of Q, K, V, A and B into those of q, k, v, a and b."""
        factors = (self.exp_g, self.exp_neg_g, None, self.exp_before, self.exp_neg_g)
        for into, gradient, factor in zip(
            (into_q, into_k, into_v, *into_others), (dq, dk, du, self.da, self.db), factors, strict=True
        ):
            self.write_grad(into, gradient, factor)
