"""Value decay: a state whose every value channel forgets at its own rate, plus an outer product per token.

    S_t = S_{t-1} Diag(a_t) + k_t v_tᵀ,    o_t = S_tᵀ q_t,    a_t = exp(log_decay_t) ∈ R^V

The first half of gated slot attention (GSA, arXiv 2409.07146), with the slots' write weights for values. There is no
mixing matrix, each value channel has its own: o_im = Σ_{j≤i} (q_i·k_j) v_jm exp(Σ_{j<s≤i} log_decay_sm).

    o, state = value_decay.chunked(q, k, v, log_decay)              # a whole sequence
    o, state = value_decay.recurrent(q1, k1, v1, g1, state=state)   # the next token

Shapes: q [B,T,H,K] scaled by the caller; k [B,T,G,K] and v [B,T,G',V] with G and G' dividing H, head h using group
h // (H/G); log_decay [B,T,H,V]; state [B,H,K,V]; segments [B,T] non-decreasing document numbers, the incoming state
belonging to document 0. Shapes that do not fit raise LimbeckError.
"""

import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.ops import common
from limbeck.ops.intra_chunk import (
    compute_log_decay_grad,
    iter_halvings,
    matmul_nn,
    matmul_nt,
    select_half,
    view_cross_half,
)


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the definition, one token after the other: for decoding, and as the reference of the other forms.

    Returns:
        o [B,T,H,V] in v's dtype and the state [B,H,K,V] in float32 (float64 for float64 inputs).
    """
    dtype = _check(q, k, v, log_decay, state, segments)
    heads = q.shape[2]
    with common.disable_autocast(q):
        current = common.prepare_initial_state(state, q, v.shape[-1], dtype)
        queries = q.to(dtype).unsqueeze(-2)  # [B, T, H, 1, K]
        keys = common.repeat_kv(k.to(dtype), heads).unsqueeze(-1)  # [B, T, H, K, 1]
        values = common.repeat_kv(v.to(dtype), heads).unsqueeze(-2)  # [B, T, H, 1, V]
        decay = log_decay.to(dtype).exp().unsqueeze(-2)
        if segments is not None:
            decay = decay * (~common.find_document_starts(segments)).to(dtype)[:, :, None, None, None]
        outputs = []
        for t in range(q.shape[1]):
            current = decay[:, t] * current + keys[:, t] * values[:, t]
            outputs.append(queries[:, t] @ current)
        return common.stack_outputs(outputs, q, v), current


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Run the same recurrence in chunks of `chunk` tokens, a power of two: for training and prefill.

    Returns:
        o [B,T,H,V] in v's dtype and the state [B,H,K,V] in float32 (float64 for float64 inputs).
    """
    dtype = _check(q, k, v, log_decay, state, segments)
    length, heads = q.shape[1], q.shape[2]
    chunk = common.resolve_chunk_size(chunk, length)
    with common.disable_autocast(q):
        first = common.prepare_initial_state(state, q, v.shape[-1], dtype)
        queries = common.to_chunks(q, chunk, dtype)
        keys = common.repeat_kv(common.to_chunks(k, chunk, dtype), heads)
        values = common.repeat_kv(common.to_chunks(v, chunk, dtype), heads)
        log = common.to_chunks(log_decay, chunk, dtype)
        scores, carries = (queries @ keys.mT).tril(), None
        if segments is not None:
            masks = common.DocumentMasks.from_segments(segments, chunk)
            scores, carries = scores * masks.within_document, masks.carries_state
            queries, keys = queries * masks.reads_state, keys * masks.writes_state
        if common.has_bounded_decay(log):
            # Decays are factored about half of the chunk's, to where the state is decayed too: one product does it all.
            g = log.cumsum(-2)
            half = 0.5 * g[..., -1:, :]
            values, first = values * (half - g).exp(), first * half[0].exp()
            to_next = half + torch.cat([half[1:], torch.zeros_like(half[:1])])
            o, last = _ScanValueChunks.apply(queries, keys, values, scores, None, to_next, carries, first)
            o = o * (g - half).exp()
        else:
            within, since, until = _IntraChunkOutput.apply(scores, values, log)
            total = log.sum(-2, keepdim=True)
            o, last = _ScanValueChunks.apply(queries, keys, values * until, None, total, None, carries, first)
            o = torch.addcmul(within, o, since)
        return common.from_chunks(o, length, v.dtype), last


def _check(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, state: Tensor | None, segments: Tensor | None
) -> torch.dtype:
    """Return the working precision; raise LimbeckError unless all shapes fit together."""
    common.check_shapes(q, k, v, segments=segments)
    expected = [*q.shape[:3], v.shape[-1]]
    if list(log_decay.shape) != expected:
        raise LimbeckError(f"log_decay has shape {list(log_decay.shape)}", expected=f"[B, T, H, V] = {expected}")
    return common.compute_dtype(q, k, v, log_decay, state)


class _ScanValueChunks(torch.autograd.Function):
    """Run the recurrence from chunk to chunk.

        O_n = Q_n S_n + P_n V_n,    S_{n+1} = exp(after_n) ⊙ (exp(before_n) ⊙ S_n + K_nᵀ V_n)

    with `before` and `after` log decays [N,B,H,1,V], zero where None; P (`scores`) left out where None; and S_n taken
    as zero where `carries` is False.
    """

    @staticmethod
    def forward(ctx, queries, keys, v, scores, before, after, carries, state):
        decay, decay_after = _factors(before, after, carries, v.dtype)
        states = state.new_empty(queries.shape[0] + 1, *state.shape)
        states[0] = state
        for n in range(queries.shape[0]):
            common.apply_decay(states[n], decay, n, into=states[n + 1])
            common.add_matmul_(states[n + 1], keys[n].mT, v[n])
            if decay_after is not None:
                states[n + 1].mul_(decay_after[n])
        o = queries @ states[:-1] if scores is None else common.add_matmul_(scores @ v, queries, states[:-1])
        ctx.save_for_backward(queries, keys, v, scores, before, after, carries, states)
        return o, states[-1].clone()

    @staticmethod
    @common.strict_once_differentiable
    def backward(ctx, do, dlast):
        queries, keys, v, scores, before, after, carries, states = ctx.saved_tensors
        with common.disable_autocast(do):
            do = do.contiguous()
            decay, decay_after = _factors(before, after, carries, v.dtype)
            dstates = torch.empty_like(states)
            dstates[-1] = dlast
            dafter = None if after is None else torch.empty_like(after)
            for n in reversed(range(queries.shape[0])):
                if decay_after is not None and dafter is not None:
                    torch.sum(states[n + 1] * dstates[n + 1], -2, keepdim=True, out=dafter[n])
                    dstates[n + 1].mul_(decay_after[n])
                common.apply_decay(dstates[n + 1], decay, n, into=dstates[n])
                common.add_matmul_(dstates[n], queries[n].mT, do[n])
            dbefore = None if before is None else (states[:-1] * dstates[1:]).sum(-2, keepdim=True).mul_(decay)
            dv = keys @ dstates[1:] if scores is None else common.add_matmul_(scores.mT @ do, keys, dstates[1:])
            dscores = None if scores is None else do @ v.mT
            return do @ states[:-1].mT, v @ dstates[1:].mT, dv, dscores, dbefore, dafter, None, dstates[0]


def _factors(
    before: Tensor | None, after: Tensor | None, carries: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor | None, Tensor | None]:
    """Compute what multiplies the state before a chunk's writes, and after them."""
    decay = None if before is None else before.exp()
    if carries is not None:
        decay = carries.to(dtype) if decay is None else decay * carries
    return decay, None if after is None else after.exp()


class _IntraChunkOutput(torch.autograd.Function):
    """Compute Σ_{j≤i} scores_ij v_j exp(Σ_{j<s≤i} log_decay_s) by halving blocks, as intra_chunk.py does.

    Also returns the decays since the start of a chunk and until its end. scores [...,C,C] is lower triangular, v and
    log_decay are [...,C,V].
    """

    @staticmethod
    def forward(ctx, scores, v, log_decay):
        out = scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1) * v
        since, until = log_decay.clone(), torch.zeros_like(log_decay)
        for half, late, early in iter_halvings(since, until):
            select_half(out, half, 1).addcmul_(
                matmul_nn(view_cross_half(scores, half), select_half(v, half, 0) * early.exp()), late.exp()
            )
        since.exp_()
        until.exp_()
        ctx.save_for_backward(scores, v, log_decay, out, since, until)
        return out, since, until

    @staticmethod
    @common.strict_once_differentiable
    def backward(ctx, dout, dsince, duntil):
        scores, v, log_decay, out, since, until = ctx.saved_tensors
        dscores, dv = torch.zeros_like(scores), torch.zeros_like(v)
        diagonal = scores.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        with common.disable_autocast(dout):
            for half, late, early in iter_halvings(log_decay.clone(), torch.zeros_like(log_decay)):
                early, dlate = early.exp(), select_half(dout, half, 1) * late.exp()
                view_cross_half(dscores, half).copy_(matmul_nt(dlate, select_half(v, half, 0) * early))
                select_half(dv, half, 0).addcmul_(matmul_nn(view_cross_half(scores, half).mT, dlate), early)
            # A pair (i, j) depends on g_i − g_j, g the cumulative log decay: dg = o do − v dv without the diagonal.
            dg = (dsince * since).addcmul_(dout, out - diagonal * v).addcmul_(v, dv, value=-1)
            dscores.diagonal(dim1=-2, dim2=-1).copy_((dout * v).sum(-1))
            return dscores, dv.addcmul_(diagonal, dout), compute_log_decay_grad(dg, duntil * until)
