"""The delta rule: each token replaces what the state holds for its key, after an optional decay.

    S' = Diag(a_t) S_{t-1},    S_t = S' + beta_t k_t (v_t − S'ᵀ k_t)ᵀ,    o_t = S_tᵀ q_t,    a_t = exp(log_decay_t)

DeltaNet (no decay, arXiv 2406.06484), Gated DeltaNet (scalar, arXiv 2412.06464) and Kimi Delta Attention (vector, arXiv
2510.26692) are this recurrence. Its mixing matrix is M = P (I + Diag(beta) strict_tril(G))⁻¹ Diag(beta), with P and G
the decayed products of queries with keys and of keys with keys.

    o, state = delta_rule.chunked(q, k, v, beta, log_decay)                  # a whole sequence
    o, state = delta_rule.recurrent(q1, k1, v1, beta1, g1, state=state)      # the next token

Shapes: q [B,T,H,K] scaled by the caller; k [B,T,G,K] (unit length, or the recurrence may grow) and v [B,T,G',V] with G
and G' dividing H, head h using group h // (H/G); beta [B,T,H]; log_decay [B,T,H], [B,T,H,K] or None; state [B,H,K,V];
segments [B,T] non-decreasing document numbers, the incoming state belonging to document 0. Shapes that do not fit raise
LimbeckError.
"""

import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.ops import common, recurrence
from limbeck.ops.fla import accelerated
from limbeck.ops.intra_chunk import build_decay_matrix, compute_decayed_terms
from limbeck.ops.matrix_rows import scan_chunk_rows


@accelerated("delta_rule")
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the definition, one token after the other: for decoding, and as the reference of the other forms.

    Returns:
        o [B,T,H,V] in v's dtype and the state [B,H,K,V] in float32 (float64 for float64 inputs).
    """
    _check_beta(beta, q)
    vector = log_decay is not None and log_decay.dim() == 4
    return recurrence.scan_tokens(q, k, v, log_decay, state, segments, vector=vector, beta=beta)


@accelerated("delta_rule")
def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
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
    return _chunked(q, k, v, beta, log_decay, state, segments, chunk)


def _chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    chunk: int | None,
    *,
    triangular: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run `chunked`; `triangular` as in `recurrence.run_chunked`."""
    _check_beta(beta, q)

    def scan(log: Tensor | None, values: Tensor, size: int, dtype: torch.dtype, first: Tensor) -> tuple[Tensor, Tensor]:
        queries, erase_keys, keys, scores, overlap, rate, decay = _chunk_terms(q, k, beta, log, segments, size, dtype)
        return _ScanDeltaChunks.apply(
            queries, rate * erase_keys, keys, rate * values, scores, rate * overlap, decay, first
        )

    vector = log_decay is not None and log_decay.dim() == 4
    return recurrence.run_chunked(
        scan, q, k, v, log_decay, state, segments, chunk, vector=vector, beta=beta, triangular=triangular
    )


def _chunk_terms(
    q: Tensor, k: Tensor, beta: Tensor, log: Tensor | None, segments: Tensor | None, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Compute what does not depend on v, in chunks and with documents kept apart.

    Returns:
        Decayed queries Q̂, keys that read what is erased (k·exp(g)), keys that write K̃, scores P of queries with keys,
        overlap of keys with keys, write strengths beta [N,B,H,C,1], and the decay D of each chunk.
    """
    heads = q.shape[2]
    queries = common.to_chunks(q, chunk, dtype)
    grouped_keys = common.to_chunks(k, chunk, dtype)
    keys = common.repeat_kv(grouped_keys, heads)
    rate = common.to_chunks(beta.unsqueeze(-1), chunk, dtype)
    decay, erase_keys = None, keys
    if log is not None and log.shape[-1] > 1:
        scores, overlap, since, until = compute_decayed_terms(
            queries, keys, common.to_chunks(log, chunk, dtype), overlap=True
        )
    else:
        # Keys meet keys before the groups are repeated: a group's heads share these products.
        scores, overlap = queries @ keys.mT, common.repeat_kv(grouped_keys @ grouped_keys.mT, heads)
        if log is None:
            scores = scores.tril()
        else:
            between, since, until = build_decay_matrix(common.to_chunks(log, chunk, dtype))
            scores, overlap = scores * between, overlap * between
    if log is not None:
        queries, erase_keys, keys, decay = queries * since, keys * since, keys * until, since[..., -1:, :].mT
    if segments is not None:
        masks = common.DocumentMasks.from_segments(segments, chunk)
        overlap, erase_keys = overlap * masks.within_document, erase_keys * masks.reads_state
        queries, keys, scores, decay = recurrence.mask_documents(segments, chunk, queries, keys, scores, decay)
    return queries, erase_keys, keys, scores, overlap, rate, decay


def compute_rows(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    rows: Tensor,
    segments: Tensor | None = None,
) -> Tensor:
    """Compute the rows `rows` [B, R] of the mixing matrix: [B,H,R,T]."""
    _check_beta(beta, q)
    common.check_shapes(q, k, segments=segments)
    dtype, chunk, log = common.compute_dtype(q, k, beta, log_decay), common.resolve_chunk_size(None, q.shape[1]), None
    with common.disable_autocast(q):
        if log_decay is not None:
            log = common.expand_log_decay(log_decay, q, vector=log_decay.dim() == 4, dtype=dtype)
        queries, erase_keys, keys, scores, overlap, rate, decay = _chunk_terms(q, k, beta, log, segments, chunk, dtype)
        corrections = rate, rate * erase_keys, rate * overlap
        return scan_chunk_rows(queries, keys, scores, decay, rows, q.shape[1], corrections)


def matrix(
    q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, segments: Tensor | None = None
) -> Tensor:
    """Build the mixing matrix M [B,H,T,T], lower triangular: with a zero initial state o = M v, head by head."""
    # In chunks with v = I, because the closed form has T×T factors and with its gradient took 1.7 times as long.
    dtype, length = common.compute_dtype(q, k, beta, log_decay), q.shape[1]
    identity = torch.eye(length, dtype=dtype, device=q.device)[None, :, None].expand(q.shape[0], -1, 1, -1)
    m, _ = _chunked(q, k, identity, beta, log_decay, None, segments, None, triangular=True)
    return m.transpose(1, 2)


def _check_beta(beta: Tensor, q: Tensor) -> None:
    if beta.shape != q.shape[:3]:
        raise LimbeckError(f"beta has shape {list(beta.shape)}", expected=f"[B, T, H] = {list(q.shape[:3])}")


class _ScanDeltaChunks(torch.autograd.Function):
    """Run the delta rule from chunk to chunk: outputs and final state from what does not depend on the state.

        U_n = (I + L_n)⁻¹ (V_n − E_n S_n),    O_n = Q̂_n S_n + P_n U_n,    S_{n+1} = Diag(D_n) S_n + K̃_nᵀ U_n

    with E = beta·k·exp(g) what is erased, V already times beta and L the strictly lower part of `overlap`.
    """

    @staticmethod
    def forward(ctx, q_decayed, erase_keys, k_decayed, v, scores, overlap, decay, state):
        eye = torch.eye(overlap.shape[-1], dtype=overlap.dtype, device=overlap.device)
        inverse = torch.linalg.solve_triangular(overlap, eye.expand_as(overlap), upper=False, unitriangular=True)
        updates, erased = inverse @ v, inverse @ erase_keys
        states = state.new_empty(q_decayed.shape[0] + 1, *state.shape)
        states[0] = state
        for n in range(q_decayed.shape[0]):
            common.add_matmul_(updates[n], erased[n], states[n], sign=-1)
            common.apply_decay(states[n], decay, n, into=states[n + 1])
            common.add_matmul_(states[n + 1], k_decayed[n].mT, updates[n])
        o = common.add_matmul_(scores @ updates, q_decayed, states[:-1])
        ctx.save_for_backward(q_decayed, k_decayed, scores, decay, inverse, erased, updates, states)
        return o, states[-1].clone()

    @staticmethod
    @common.strict_once_differentiable
    def backward(ctx, do, dlast):
        q_decayed, k_decayed, scores, decay, inverse, erased, updates, states = ctx.saved_tensors
        with common.disable_autocast(do):
            do = do.contiguous()
            dupdates = scores.mT @ do
            dstates = torch.empty_like(states)
            dstates[-1] = dlast
            for n in reversed(range(q_decayed.shape[0])):
                common.add_matmul_(dupdates[n], k_decayed[n], dstates[n + 1])
                common.apply_decay(dstates[n + 1], decay, n, into=dstates[n])
                common.add_matmul_(dstates[n], q_decayed[n].mT, do[n])
                common.add_matmul_(dstates[n], erased[n].mT, dupdates[n], sign=-1)
            dv = inverse.mT @ dupdates
            return (
                do @ states[:-1].mT,
                (dv @ states[:-1].mT).neg_(),
                updates @ dstates[1:].mT,
                dv,
                do @ updates.mT,
                (dv @ updates.mT).tril_(-1).neg_(),
                common.compute_decay_grad(states, dstates, decay),
                dstates[0],
            )
