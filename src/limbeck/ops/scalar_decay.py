"""Scalar decay: a state that forgets at one rate per head and adds an outer product per token.

    S_t = a_t S_{t-1} + k_t v_tᵀ,    o_t = S_tᵀ q_t,    a_t = exp(log_decay_t)

Linear attention (no decay), RetNet (constant decay), Mamba-2 and mLSTM are this recurrence. Its mixing matrix is
M = (QKᵀ) ⊙ Γ with Γ_ij = exp(Σ_{j<s≤i} log_decay_s) for j ≤ i (state-space duality, arXiv 2405.21060).

    o, state = scalar_decay.chunked(q, k, v, log_decay)              # a whole sequence
    o, state = scalar_decay.recurrent(q1, k1, v1, g1, state=state)   # the next token

Shapes: q [B,T,H,K] scaled by the caller; k [B,T,G,K] and v [B,T,G',V] with G and G' dividing H, head h using group
h // (H/G); log_decay [B,T,H], [H] or None; state [B,H,K,V]; segments [B,T] non-decreasing document numbers, the
incoming state belonging to document 0. Shapes that do not fit raise LimbeckError.
"""

import torch
from torch import Tensor

from limbeck.ops import common, recurrence
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
    """Run the definition, one token after the other: for decoding, and as the reference of the other forms.

    Returns:
        o [B,T,H,V] in v's dtype and the state [B,H,K,V] in float32 (float64 for float64 inputs).
    """
    return recurrence.scan_tokens(q, k, v, log_decay, state, segments, vector=False)


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
    """Run the same recurrence in chunks of `chunk` tokens, a power of two; None chooses: for training and prefill.

    Returns:
        o [B,T,H,V] in v's dtype and the state [B,H,K,V] in float32 (float64 for float64 inputs).
    """

    def scan(log: Tensor | None, values: Tensor, size: int, dtype: torch.dtype, first: Tensor) -> tuple[Tensor, Tensor]:
        queries = common.to_chunks(q, size, dtype)
        keys = common.repeat_kv(common.to_chunks(k, size, dtype), q.shape[2])
        scores, decay = queries @ keys.mT, None
        if log is None:
            scores = scores.tril()
        else:
            between, since, until = build_decay_matrix(common.to_chunks(log, size, dtype))
            queries, keys, scores, decay = queries * since, keys * until, scores * between, since[..., -1:, :]
        if segments is not None:
            queries, keys, scores, decay = recurrence.mask_documents(segments, size, queries, keys, scores, decay)
        return recurrence.scan_chunks(queries, keys, values, scores, decay, first)

    return recurrence.run_chunked(scan, q, k, v, log_decay, state, segments, chunk, vector=False)


def matrix(q: Tensor, k: Tensor, log_decay: Tensor | None = None, *, segments: Tensor | None = None) -> Tensor:
    """Build the mixing matrix M [B,H,T,T], lower triangular: with a zero initial state o = M v, head by head."""
    common.check_shapes(q, k, segments=segments)
    dtype = common.compute_dtype(q, k, log_decay)
    with common.disable_autocast(q):
        scores = q.to(dtype).transpose(1, 2) @ common.repeat_kv(k.to(dtype).transpose(1, 2), q.shape[2], 1).mT
        return scores * _decay_matrix(q, log_decay, segments, dtype)


def compute_rows(
    q: Tensor, k: Tensor, log_decay: Tensor | None = None, *, rows: Tensor, segments: Tensor | None = None
) -> Tensor:
    """Compute the rows `rows` [B, R] of the mixing matrix: [B,H,R,T]."""
    common.check_shapes(q, k, segments=segments)
    dtype, positions = common.compute_dtype(q, k, log_decay), torch.arange(q.shape[1], device=q.device)
    with common.disable_autocast(q):
        keys = common.repeat_kv(k.to(dtype).transpose(1, 2), q.shape[2], 1)
        scores = gather_rows(q.to(dtype).transpose(1, 2), rows, 2) @ keys.mT
        allowed = rows[:, :, None] >= positions
        if segments is not None:
            allowed = allowed & (gather_rows(segments, rows, 1)[:, :, None] == segments[:, None])
        if log_decay is None:
            return scores * allowed[:, None]
        # In float64, because a difference of two long sums would lose digits that float32 has.
        g = common.expand_log_decay(log_decay, q, vector=False, dtype=torch.float64).cumsum(1)[..., 0].transpose(1, 2)
        between = (gather_rows(g, rows, 2)[..., None] - g[:, :, None]).to(dtype)
        return scores * between.masked_fill(~allowed[:, None], -torch.inf).exp()


def _decay_matrix(q: Tensor, log_decay: Tensor | None, segments: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Build Γ of the whole sequence: [B,H,T,T]; without decay [1,1,T,T], or [B,1,T,T] with documents."""
    length = q.shape[1]
    if log_decay is None:
        between = torch.ones(1, 1, length, length, dtype=dtype, device=q.device).tril()
    else:
        g = common.expand_log_decay(log_decay, q, vector=False, dtype=dtype).transpose(1, 2)
        between = compute_intra_chunk_scores(torch.ones_like(g), torch.ones_like(g), g)
    return between if segments is None else between * common.build_document_mask(segments)
