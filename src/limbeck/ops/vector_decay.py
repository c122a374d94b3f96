"""Vector decay: a state whose every key channel forgets at its own rate, plus an outer product per token.

    S_t = Diag(a_t) S_{t-1} + k_t v_tᵀ,    o_t = S_tᵀ q_t,    a_t = exp(log_decay_t) ∈ R^K

GLA (arXiv 2312.06635), MetaLA, HGRN2 and RWKV-6 are this recurrence. Its mixing matrix is
M_ij = Σ_c q_ic k_jc exp(Σ_{j<s≤i} log_decay_sc) for j ≤ i.

    o, state = vector_decay.chunked(q, k, v, log_decay)              # a whole sequence
    o, state = vector_decay.recurrent(q1, k1, v1, g1, state=state)   # the next token

Shapes: q [B,T,H,K] scaled by the caller; k [B,T,G,K] and v [B,T,G',V] with G and G' dividing H, head h using group
h // (H/G); log_decay [B,T,H,K] or None; state [B,H,K,V]; segments [B,T] non-decreasing document numbers, the
incoming state belonging to document 0. Shapes that do not fit raise LimbeckError.
"""

import torch
from torch import Tensor

from limbeck.ops import common, recurrence, scalar_decay
from limbeck.ops.fla import accelerated
from limbeck.ops.intra_chunk import compute_decayed_terms, compute_intra_chunk_scores
from limbeck.ops.matrix_rows import scan_chunk_rows


@accelerated("vector_decay")
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
    return recurrence.scan_tokens(q, k, v, log_decay, state, segments, vector=True)


@accelerated("vector_decay")
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
    if log_decay is None:
        return scalar_decay.chunked(q, k, v, state=state, segments=segments, chunk=chunk)

    def scan(log: Tensor, values: Tensor, size: int, dtype: torch.dtype, first: Tensor) -> tuple[Tensor, Tensor]:
        queries, keys, scores, decay = _chunk_terms(q, k, log, segments, size, dtype)
        return recurrence.scan_chunks(queries, keys, values, scores, decay, first)

    return recurrence.run_chunked(scan, q, k, v, log_decay, state, segments, chunk, vector=True)


def _chunk_terms(
    q: Tensor, k: Tensor, log: Tensor, segments: Tensor | None, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute what does not depend on v: Q̂, K̃, P and D of recurrence.py, with documents kept apart."""
    queries = common.to_chunks(q, chunk, dtype)
    keys = common.repeat_kv(common.to_chunks(k, chunk, dtype), q.shape[2])
    scores, _, since, until = compute_decayed_terms(queries, keys, common.to_chunks(log, chunk, dtype))
    terms = queries * since, keys * until, scores, since[..., -1:, :].mT
    return terms if segments is None else recurrence.mask_documents(segments, chunk, *terms)


def compute_rows(
    q: Tensor, k: Tensor, log_decay: Tensor | None = None, *, rows: Tensor, segments: Tensor | None = None
) -> Tensor:
    """Compute the rows `rows` [B, R] of the mixing matrix: [B,H,R,T]."""
    if log_decay is None:
        return scalar_decay.compute_rows(q, k, rows=rows, segments=segments)
    common.check_shapes(q, k, segments=segments)
    dtype, chunk = common.compute_dtype(q, k, log_decay), common.resolve_chunk_size(None, q.shape[1])
    with common.disable_autocast(q):
        log = common.expand_log_decay(log_decay, q, vector=True, dtype=dtype)
        return scan_chunk_rows(*_chunk_terms(q, k, log, segments, chunk, dtype), rows, q.shape[1])


def matrix(q: Tensor, k: Tensor, log_decay: Tensor | None = None, *, segments: Tensor | None = None) -> Tensor:
    """Build the mixing matrix M [B,H,T,T], lower triangular: with a zero initial state o = M v, head by head."""
    if log_decay is None:
        return scalar_decay.matrix(q, k, segments=segments)
    common.check_shapes(q, k, segments=segments)
    dtype = common.compute_dtype(q, k, log_decay)
    with common.disable_autocast(q):
        g = common.expand_log_decay(log_decay, q, vector=True, dtype=dtype).transpose(1, 2)
        keys = common.repeat_kv(k.to(dtype).transpose(1, 2), q.shape[2], 1)
        m = compute_intra_chunk_scores(q.to(dtype).transpose(1, 2), keys, g)
        return m if segments is None else m * common.build_document_mask(segments)
