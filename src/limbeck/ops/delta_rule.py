"""The delta rule: each token replaces what the state holds for its key, after an optional decay.

    S' = Diag(a_t) S_{t-1},    S_t = S' + beta_t k_t (v_t − S'ᵀ k_t)ᵀ,    o_t = S_tᵀ q_t,    a_t = exp(log_decay_t)

DeltaNet (no decay, arXiv 2406.06484), Gated DeltaNet (scalar, arXiv 2412.06464), Kimi Delta Attention (vector, arXiv
2510.26692). As a matrix M = P (I + Diag(beta) strict_tril(G))⁻¹ Diag(beta), with P and G the decayed products of
queries with keys and of keys with keys.

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
from limbeck.ops import common, cpu
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
    """The definition, one token after the other: for decoding and as the arbiter.

    Returns o [B,T,H,V] in v's dtype and the state [B,H,K,V] in fp32 (fp64 for fp64 inputs).
    """
    _check_beta(beta, q)
    vector = log_decay is not None and log_decay.dim() == 4
    return common.scan_tokens(q, k, v, log_decay, state, segments, vector=vector, beta=beta)


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
    """The same in chunks of `chunk` tokens (a power of two; None chooses): for training and prefill.

    Returns o [B,T,H,V] in v's dtype and the state [B,H,K,V] in fp32 (fp64 for fp64 inputs).
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
    """`triangular`: v is lower triangular and takes no gradient, which may be made use of."""
    _check_beta(beta, q)
    common.check_shapes(q, k, v, segments=segments)
    length, heads, dtype = q.shape[1], q.shape[2], common.compute_dtype(q, k, v, beta, log_decay, state)
    vector, log = log_decay is not None and log_decay.dim() == 4, None
    with common.disable_autocast(q):
        first = common.prepare_initial_state(state, q, v.shape[-1], dtype)
        if log_decay is not None:
            log = common.expand_log_decay(log_decay, q, vector=vector, dtype=dtype)
        route = cpu.plan_chunks(q, log, chunk)
        if route:
            return cpu.run_chunks(q, k, v, beta, log, first, segments, route._replace(triangular=triangular))
        chunk = common.resolve_chunk_size(chunk, length)
        values = common.repeat_kv(common.to_chunks(v, chunk, dtype), heads)
        reads, erases, writes, mixing, overlap, rate, decay = _terms(q, k, beta, log, segments, chunk, dtype)
        o, last = _Correct.apply(reads, rate * erases, writes, rate * values, mixing, rate * overlap, decay, first)
        return common.from_chunks(o, length, v.dtype), last


def _terms(
    q: Tensor, k: Tensor, beta: Tensor, log: Tensor | None, segments: Tensor | None, chunk: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """What does not depend on v, in chunks: decayed queries, keys that erase and that write, products of queries and of
    keys with keys, write strengths, and the decay of each chunk."""
    heads = q.shape[2]
    reads = common.to_chunks(q, chunk, dtype)
    keys = common.to_chunks(k, chunk, dtype)
    writes = common.repeat_kv(keys, heads)
    rate = common.to_chunks(beta.unsqueeze(-1), chunk, dtype)
    decay, erases = None, writes
    if log is not None and log.shape[-1] > 1:
        mixing, overlap, since, until = compute_decayed_terms(
            reads, writes, common.to_chunks(log, chunk, dtype), overlap=True
        )
    else:
        mixing, overlap = reads @ writes.mT, common.repeat_kv(keys @ keys.mT, heads)
        if log is None:
            mixing = mixing.tril()
        else:
            within, since, until = build_decay_matrix(common.to_chunks(log, chunk, dtype))
            mixing, overlap = mixing * within, overlap * within
    if log is not None:
        reads, erases, writes, decay = reads * since, writes * since, writes * until, since[..., -1:, :].mT
    if segments is not None:
        docs = common.DocumentMasks.from_segments(segments, chunk)
        overlap, erases = overlap * docs.within_document, erases * docs.reads_state
        reads, writes, mixing, decay = common.mask_documents(segments, chunk, reads, writes, mixing, decay)
    return reads, erases, writes, mixing, overlap, rate, decay


def compute_rows(
    q: Tensor,
    k: Tensor,
    beta: Tensor,
    log_decay: Tensor | None = None,
    *,
    rows: Tensor,
    segments: Tensor | None = None,
) -> Tensor:
    """Rows [B, R] of the mixing matrix: [B,H,R,T]."""
    _check_beta(beta, q)
    common.check_shapes(q, k, segments=segments)
    dtype, chunk, log = common.compute_dtype(q, k, beta, log_decay), common.resolve_chunk_size(None, q.shape[1]), None
    with common.disable_autocast(q):
        if log_decay is not None:
            log = common.expand_log_decay(log_decay, q, vector=log_decay.dim() == 4, dtype=dtype)
        reads, erases, writes, mixing, overlap, rate, decay = _terms(q, k, beta, log, segments, chunk, dtype)
        corrections = rate, rate * erases, rate * overlap
        return scan_chunk_rows(reads, writes, mixing, decay, rows, q.shape[1], corrections)


def matrix(
    q: Tensor, k: Tensor, beta: Tensor, log_decay: Tensor | None = None, *, segments: Tensor | None = None
) -> Tensor:
    """The mixing matrix M [B,H,T,T], lower triangular: with a zero initial state o = M v, head by head."""
    # In chunks with v = I: the closed form has T×T factors, and with its gradient took 1.7 times as long.
    dtype, length = common.compute_dtype(q, k, beta, log_decay), q.shape[1]
    identity = torch.eye(length, dtype=dtype, device=q.device)[None, :, None].expand(q.shape[0], -1, 1, -1)
    m, _ = _chunked(q, k, identity, beta, log_decay, None, segments, None, triangular=True)
    return m.transpose(1, 2)


def _check_beta(beta: Tensor, q: Tensor) -> None:
    if beta.shape != q.shape[:3]:
        raise LimbeckError(f"beta has shape {list(beta.shape)}", expected=f"[B, T, H] = {list(q.shape[:3])}")


class _Correct(torch.autograd.Function):
    """Outputs and final state from what does not depend on the state.

        U_n = (I + L_n)⁻¹ (V_n − E_n S_n),    O_n = Q̂_n S_n + P_n U_n,    S_{n+1} = Diag(D_n) S_n + K̃_nᵀ U_n

    with E = beta·k·exp(g) what is erased, V already times beta and L the strictly lower part of `system`.
    """

    @staticmethod
    def forward(ctx, reads, erases, writes, v, mixing, system, decay, state):
        eye = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
        inverse = torch.linalg.solve_triangular(system, eye.expand_as(system), upper=False, unitriangular=True)
        updates, erased = inverse @ v, inverse @ erases
        states = state.new_empty(reads.shape[0] + 1, *state.shape)
        states[0] = state
        for n in range(reads.shape[0]):
            common.add_matmul_(updates[n], erased[n], states[n], sign=-1)
            common.apply_decay(states[n], decay, n, into=states[n + 1])
            common.add_matmul_(states[n + 1], writes[n].mT, updates[n])
        o = common.add_matmul_(mixing @ updates, reads, states[:-1])
        ctx.save_for_backward(reads, writes, mixing, decay, inverse, erased, updates, states)
        return o, states[-1].clone()

    @staticmethod
    @common.strict_once_differentiable
    def backward(ctx, do, dlast):
        reads, writes, mixing, decay, inverse, erased, updates, states = ctx.saved_tensors
        with common.disable_autocast(do):
            do = do.contiguous()
            dupdates = mixing.mT @ do
            dstates = torch.empty_like(states)
            dstates[-1] = dlast
            for n in reversed(range(reads.shape[0])):
                common.add_matmul_(dupdates[n], writes[n], dstates[n + 1])
                common.apply_decay(dstates[n + 1], decay, n, into=dstates[n])
                common.add_matmul_(dstates[n], reads[n].mT, do[n])
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
