"""Scalar decay: a state that forgets at one rate per head and adds an outer product per token.

    S_t = a_t S_{t-1} + k_t v_tᵀ,    o_t = S_tᵀ q_t,    a_t = exp(log_decay_t)

Linear attention (no decay), RetNet (constant decay), Mamba-2 and mLSTM are this recurrence. As a matrix it is
M = (QKᵀ) ⊙ Γ with Γ_ij = exp(Σ_{j<s≤i} log_decay_s) for j ≤ i (state-space duality, arXiv 2405.21060).

    o, state = scalar_decay.chunked(q, k, v, log_decay)              # a whole sequence
    o, state = scalar_decay.recurrent(q1, k1, v1, g1, state=state)   # the next token

Shapes: q [B,T,H,K] scaled by the caller; k [B,T,G,K] and v [B,T,G',V] with G and G' dividing H, head h using group
h // (H/G); log_decay [B,T,H], [H] or None; state [B,H,K,V]; segments [B,T] non-decreasing document numbers, the
incoming state belonging to document 0. Shapes that do not fit raise LimbeckError.
"""

import torch
from torch import Tensor

from limbeck.ops import common, cpu
from limbeck.ops.fla import accelerated
from limbeck.ops.intra_chunk import build_decay_matrix, compute_intra_chunk_scores
from limbeck.ops.matrix_rows import gather_rows


@accelerated("scalar_decay")
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The definition, one token after the other: for decoding and as the arbiter.

    Returns o [B,T,H,V] in v's dtype and the state [B,H,K,V] in fp32 (fp64 for fp64 inputs).
    """
    return common.scan_tokens(q, k, v, log_decay, state, segments, vector=False)


@accelerated("scalar_decay")
def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The same in chunks of `chunk` tokens (a power of two; None chooses): for training and prefill.

    Returns o [B,T,H,V] in v's dtype and the state [B,H,K,V] in fp32 (fp64 for fp64 inputs).
    """
    common.check_shapes(q, k, v, segments=segments)
    length, heads, dtype = q.shape[1], q.shape[2], common.compute_dtype(q, k, v, log_decay, state)
    with common.disable_autocast(q):
        first = common.prepare_initial_state(state, q, v.shape[-1], dtype)
        log = None if log_decay is None else common.expand_log_decay(log_decay, q, vector=False, dtype=dtype)
        route = cpu.plan_chunks(q, log, chunk)
        if route:
            return cpu.run_chunks(q, k, v, None, log, first, segments, route)
        chunk = common.resolve_chunk_size(chunk, length)
        reads = common.to_chunks(q, chunk, dtype)
        writes = common.repeat_kv(common.to_chunks(k, chunk, dtype), heads)
        values = common.repeat_kv(common.to_chunks(v, chunk, dtype), heads)
        mixing, decay = reads @ writes.mT, None
        if log is None:
            mixing = mixing.tril()
        else:
            within, since, until = build_decay_matrix(common.to_chunks(log, chunk, dtype))
            reads, writes, mixing, decay = reads * since, writes * until, mixing * within, since[..., -1:, :]
        if segments is not None:
            reads, writes, mixing, decay = common.mask_documents(segments, chunk, reads, writes, mixing, decay)
        o, last = common.scan_chunks(reads, writes, values, mixing, decay, first)
        return common.from_chunks(o, length, v.dtype), last


def matrix(q: Tensor, k: Tensor, log_decay: Tensor | None = None, *, segments: Tensor | None = None) -> Tensor:
    """The mixing matrix M [B,H,T,T], lower triangular: with a zero initial state o = M v, head by head."""
    common.check_shapes(q, k, segments=segments)
    dtype = common.compute_dtype(q, k, log_decay)
    with common.disable_autocast(q):
        scores = q.to(dtype).transpose(1, 2) @ common.repeat_kv(k.to(dtype).transpose(1, 2), q.shape[2], 1).mT
        return scores * prepare_log_decay(q, log_decay, segments, dtype)


def compute_rows(
    q: Tensor, k: Tensor, log_decay: Tensor | None = None, *, rows: Tensor, segments: Tensor | None = None
) -> Tensor:
    """Rows [B, R] of the mixing matrix: [B,H,R,T]."""
    common.check_shapes(q, k, segments=segments)
    dtype, place = common.compute_dtype(q, k, log_decay), torch.arange(q.shape[1], device=q.device)
    with common.disable_autocast(q):
        keys = common.repeat_kv(k.to(dtype).transpose(1, 2), q.shape[2], 1)
        scores = gather_rows(q.to(dtype).transpose(1, 2), rows, 2) @ keys.mT
        allowed = rows[:, :, None] >= place
        if segments is not None:
            allowed = allowed & (gather_rows(segments, rows, 1)[:, :, None] == segments[:, None])
        if log_decay is None:
            return scores * allowed[:, None]
        # a difference of two long sums: in float64, so that it is exact to float32
        g = common.expand_log_decay(log_decay, q, vector=False, dtype=torch.float64).cumsum(1)[..., 0].transpose(1, 2)
        between = (gather_rows(g, rows, 2)[..., None] - g[:, :, None]).to(dtype)
        return scores * between.masked_fill(~allowed[:, None], -torch.inf).exp()


def prepare_log_decay(q: Tensor, log_decay: Tensor | None, segments: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Γ over the whole sequence: [B,H,T,T], or [1,1,T,T] / [B,1,T,T] without decay."""
    length = q.shape[1]
    if log_decay is None:
        between = torch.ones(1, 1, length, length, dtype=dtype, device=q.device).tril()
    else:
        g = common.expand_log_decay(log_decay, q, vector=False, dtype=dtype).transpose(1, 2)
        between = compute_intra_chunk_scores(torch.ones_like(g), torch.ones_like(g), g)
    return between if segments is None else between * common.build_document_mask(segments)
