"""Scores of all pairs of tokens in a chunk under decay, without a [C, C, K] tensor and without a positive exponent.

    compute_intra_chunk_scores(q, k, log_decay)_ij = Σ_c q_ic k_jc exp(Σ_{j<s≤i} log_decay_sc)   for j ≤ i, zero above

A block is halved again and again. Pairs that straddle the middle of a block split their decay there: from j to the
middle, and from the middle to i. So all blocks of one size are one matrix product, of queries decayed since the middle
with keys decayed until the middle, and log2(C) sizes cover every pair. The exponents are sums of log decays, never
differences of cumulative sums, hence non-positive and exact to rounding whatever the gates and the length: a reset of
−1e4 costs the tokens after it nothing. (The usual secondary chunking, arXiv 2312.06635, takes differences and needs the
three-index sum inside its smallest blocks.)

    scores = compute_intra_chunk_scores(q, k, log_decay)                         # all [..., C, K] -> [..., C, C]
    scores, overlap, since, until = compute_decayed_terms(q, k, log_decay, overlap=True)
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.ops.common import disable_autocast, strict_once_differentiable


def compute_intra_chunk_scores(q: Tensor, k: Tensor, log_decay: Tensor) -> Tensor:
    """Compute the decayed products q kᵀ [..., C, C] of q, k, log_decay [..., C, K], for any C."""
    length = q.shape[-2]
    rest = (1 << (length - 1).bit_length()) - length
    if rest:
        q, k, log_decay = (F.pad(x, (0, 0, 0, rest)) for x in (q, k, log_decay))
    return compute_decayed_terms(q, k, log_decay)[0][..., :length, :length]


def compute_decayed_terms(q: Tensor, k: Tensor, log_decay: Tensor, *, overlap: bool = False) -> tuple[Tensor, ...]:
    """Compute everything that a chunk needs of its vector decays.

    Args:
        q, k, log_decay: [..., C, K] with C a power of two.
        overlap: whether to compute the products of keys with keys too.

    Returns:
        Four tensors: the products of queries with keys [..., C, C]; those of keys with keys, strictly below the
        diagonal, or None; the decay from the start of the block to each token (inclusive) [..., C, K]; and from each
        token (exclusive) to the end of the block [..., C, K].
    """
    return _DecayedTerms.apply(q, k, log_decay, overlap)


def build_decay_matrix(log_decay: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute Γ [..., C, C] of scalar log decays [..., C, 1], C a power of two: the decay between each pair of tokens.

    Also returns the last two results of `compute_decayed_terms`.
    """
    return _DecayMatrix.apply(log_decay)


def iter_halvings(since: Tensor, until: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Iterate over blocks of 2, 4, ..., C tokens.

    Yields half their size, the log decays of the second halves since the middle, and those of the first halves until
    it, both [..., blocks, half, K].

    Args:
        since: starts as the log decays [..., C, K]; ends, in place, as their sums since the start of the chunk.
        until: starts as zeros; ends, in place, as the sums until the end of the chunk.
    """
    half = 1
    while half < since.shape[-2]:
        since_blocks, until_blocks = (x.unflatten(-2, (-1, 2, half)) for x in (since, until))
        yield half, since_blocks[..., 1, :, :], until_blocks[..., 0, :, :]
        until_blocks[..., 0, :, :] += since_blocks[..., 1, -1:, :]
        since_blocks[..., 1, :, :] += since_blocks[..., 0, -1:, :]
        half *= 2


def select_half(x: Tensor, half: int, which: int) -> Tensor:
    """View the first (0) or second (1) halves of the blocks of x [..., C, K] as [..., blocks, half, K]."""
    return x.unflatten(-2, (-1, 2, half))[..., which, :, :]


def view_cross_half(m: Tensor, half: int) -> Tensor:
    """View the pairs (second half, first half) of each block of m [..., C, C] as [..., blocks, half, half]."""
    blocks = m.shape[-1] // (2 * half)
    m = m.unflatten(-1, (blocks, 2, half)).unflatten(-4, (blocks, 2, half))
    return m[..., :, 1, :, :, 0, :].diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """Compute a bᵀ."""
    # Batched products of tiny matrices cost more in calls than in arithmetic, so those are spelled out.
    return (a.unsqueeze(-2) * b.unsqueeze(-3)).sum(-1) if a.shape[-2] <= 4 else a @ b.mT


def matmul_nn(m: Tensor, x: Tensor) -> Tensor:
    """Compute m x, with products of tiny matrices spelled out as in `matmul_nt`."""
    if m.shape[-1] == 1:
        return m * x
    return (m.unsqueeze(-1) * x.unsqueeze(-3)).sum(-2) if m.shape[-1] == 2 else m @ x


def compute_log_decay_grad(dsince: Tensor, duntil: Tensor) -> Tensor:
    """Turn the gradients of the running sums into that of the log decays."""
    # Token s counts in `since` of i ≥ s and in `until` of j < s.
    return dsince.flip(-2).cumsum(-2).flip(-2) + F.pad(duntil[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)


class _DecayedTerms(torch.autograd.Function):
    """Compute `compute_decayed_terms` in log2(C) matrix products; the backward halves the blocks again."""

    @staticmethod
    def forward(ctx, q, k, log_decay, overlap):
        scores = q.new_zeros(*q.shape[:-1], q.shape[-2])
        scores.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
        keys = torch.zeros_like(scores) if overlap else None
        since, until = log_decay.clone(), torch.zeros_like(log_decay)
        for half, late, early in iter_halvings(since, until):
            late = late.exp()
            early = select_half(k, half, 0) * early.exp()
            if keys is not None:
                view_cross_half(keys, half).copy_(matmul_nt(select_half(k, half, 1) * late, early))
            view_cross_half(scores, half).copy_(matmul_nt(late.mul_(select_half(q, half, 1)), early))
        since.exp_()
        until.exp_()
        ctx.save_for_backward(q, k, log_decay, since, until)
        return scores, keys, since, until

    @staticmethod
    @strict_once_differentiable
    def backward(ctx, dscores, dkeys, dsince, duntil):
        q, k, log_decay, since, until = ctx.saved_tensors
        dq, dfirst, dsecond = torch.zeros_like(q), torch.zeros_like(k), None if dkeys is None else torch.zeros_like(k)
        with disable_autocast(q):
            for half, late, early in iter_halvings(log_decay.clone(), torch.zeros_like(log_decay)):
                late, early = late.exp(), early.exp()
                keys = select_half(k, half, 0) * early
                dm = view_cross_half(dscores, half)
                select_half(dq, half, 1).addcmul_(matmul_nn(dm, keys), late)
                dearly = matmul_nn(dm.mT, select_half(q, half, 1) * late)
                if dsecond is not None:
                    dm = view_cross_half(dkeys, half)
                    select_half(dsecond, half, 1).addcmul_(matmul_nn(dm, keys), late)
                    dearly += matmul_nn(dm.mT, select_half(k, half, 1) * late)
                select_half(dfirst, half, 0).addcmul_(dearly, early)
            # A pair (i, j) depends on g_i − g_j, g the cumulative log decay, so dg = q dq − k dk without the diagonal.
            dg = (dsince * since).addcmul_(q, dq).addcmul_(k, dfirst, value=-1)
            if dsecond is not None:
                dg.addcmul_(k, dsecond)
                dfirst += dsecond
            diagonal = dscores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            dlog = compute_log_decay_grad(dg, duntil * until)
            return dq.addcmul_(diagonal, k), dfirst.addcmul_(diagonal, q), dlog, None


class _DecayMatrix(torch.autograd.Function):
    """Compute `build_decay_matrix`."""

    @staticmethod
    def forward(ctx, log_decay):
        out = log_decay.new_zeros(*log_decay.shape[:-1], log_decay.shape[-2])
        since, until = log_decay.clone(), torch.zeros_like(log_decay)
        for half, late, early in iter_halvings(since, until):
            torch.add(late, early.mT, out=view_cross_half(out, half))
        out.exp_().tril_()
        since.exp_()
        until.exp_()
        ctx.save_for_backward(out, since, until)
        return out, since, until

    @staticmethod
    @strict_once_differentiable
    def backward(ctx, dout, dsince, duntil):
        out, since, until = ctx.saved_tensors
        both = (dout * out).tril_(-1)  # without the diagonal: a token does not decay towards itself
        dg = (dsince * since).add_(both.sum(-1, keepdim=True)).sub_(both.sum(-2).unsqueeze(-1))
        return compute_log_decay_grad(dg, duntil * until)
