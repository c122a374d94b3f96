"""Vector decay: a state whose every key channel forgets at its own rate, plus an outer product per token.

    S_t = Diag(a_t) S_{t-1} + k_t v_tᵀ,    o_t = S_tᵀ q_t,    a_t = exp(log_decay_t) ∈ R^K

GLA (arXiv 2312.06635), MetaLA and HGRN2 are this recurrence. As a matrix
M_ij = Σ_c q_ic k_jc exp(Σ_{j<s≤i} log_decay_sc) for j ≤ i.

    o, state = vector_decay.chunked(q, k, v, log_decay)              # a whole sequence
    o, state = vector_decay.recurrent(q1, k1, v1, g1, state=state)   # the next token

Shapes: q [B,T,H,K] scaled by the caller; k [B,T,G,K] and v [B,T,G',V] with G and G' dividing H, head h using group
h // (H/G); log_decay [B,T,H,K] or None; state [B,H,K,V]; segments [B,T] non-decreasing document numbers, the
incoming state belonging to document 0. Shapes that do not fit raise LimbeckError.
"""

import torch
from torch import Tensor

from limbeck.ops import common, cpu, scalar_decay
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
    """The definition, one token after the other: for decoding and as the arbiter.

    Returns o [B,T,H,V] in v's dtype and the state [B,H,K,V] in fp32 (fp64 for fp64 inputs).
    """
    return common.scan_tokens(q, k, v, log_decay, state, segments, vector=True)


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
    """The same in chunks of `chunk` tokens (a power of two; None chooses): for training and prefill.

    Returns o [B,T,H,V] in v's dtype and the state [B,H,K,V] in fp32 (fp64 for fp64 inputs).
    """
    if log_decay is None:
        return scalar_decay.chunked(q, k, v, state=state, segments=segments, chunk=chunk)
    common.check_shapes(q, k, v, segments=segments)
    length, heads, dtype = q.shape[1], q.shape[2], common.compute_dtype(q, k, v, log_decay, state)
    with common.disable_autocast(q):
        first = common.prepare_initial_state(state, q, v.shape[-1], dtype)
        log = common.expand_log_decay(log_decay, q, vector=True, dtype=dtype)
        route = cpu.plan_chunks(q, log, chunk)
        if route:
            return cpu.run_chunks(q, k, v, None, log, first, segments, route)
        chunk = common.resolve_chunk_size(chunk, length)
        values = common.repeat_kv(common.to_chunks(v, chunk, dtype), heads)
        reads, writes, mixing, decay = _terms(q, k, log, segments, chunk, dtype)
        o, last = common.scan_chunks(reads, writes, values, mixing, decay, first)
        return common.from_chunks(o, length, v.dtype), last


def _terms(
    q: Tensor, k: Tensor, log: Tensor, segments: Tensor | None, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What does not depend on v: decayed queries and keys, their products, and the decay of each chunk."""
    reads = common.to_chunks(q, chunk, dtype)
    writes = common.repeat_kv(common.to_chunks(k, chunk, dtype), q.shape[2])
    mixing, _, since, until = compute_decayed_terms(reads, writes, common.to_chunks(log, chunk, dtype))
    reads, writes, decay = reads * since, writes * until, since[..., -1:, :].mT
    return (
        (reads, writes, mixing, decay)
        if segments is None
        else common.mask_documents(segments, chunk, reads, writes, mixing, decay)
    )


def compute_rows(
    q: Tensor, k: Tensor, log_decay: Tensor | None = None, *, rows: Tensor, segments: Tensor | None = None
) -> Tensor:
    """Rows [B, R] of the mixing matrix: [B,H,R,T]."""
    if log_decay is None:
        return scalar_decay.compute_rows(q, k, rows=rows, segments=segments)
    common.check_shapes(q, k, segments=segments)
    dtype, chunk = common.compute_dtype(q, k, log_decay), common.resolve_chunk_size(None, q.shape[1])
    with common.disable_autocast(q):
        log = common.expand_log_decay(log_decay, q, vector=True, dtype=dtype)
        return scan_chunk_rows(*_terms(q, k, log, segments, chunk, dtype), rows, q.shape[1])


def matrix(q: Tensor, k: Tensor, log_decay: Tensor | None = None, *, segments: Tensor | None = None) -> Tensor:
    """The mixing matrix M [B,H,T,T], lower triangular: with a zero initial state o = M v, head by head."""
    if log_decay is None:
        return scalar_decay.matrix(q, k, segments=segments)
    common.check_shapes(q, k, segments=segments)
    dtype = common.compute_dtype(q, k, log_decay)
    with common.disable_autocast(q):
        g = common.expand_log_decay(log_decay, q, vector=True, dtype=dtype).transpose(1, 2)
        keys = common.repeat_kv(k.to(dtype).transpose(1, 2), q.shape[2], 1)
        m = compute_intra_chunk_scores(q.to(dtype).transpose(1, 2), keys, g)
        return m if segments is None else m * common.build_document_mask(segments)
