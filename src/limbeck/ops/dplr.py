"""Diagonal plus rank one: a state that decays per key channel and rewrites one direction of itself per token.

    S_t = Diag(w_t) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ,    o_t = S_tᵀ q_t,    w_t = exp(log_decay_t) ∈ R^K

RWKV-7 (arXiv 2503.14456), with a = −κ̂ and b = κ̂ times its rate. Unlike in the delta rule, `a` reads the state before
it decays. The mixing matrix is M = P_qk + P_qb (I − P_ab)⁻¹ P_ak, with P the decayed products of q or a with k or b.

    o, state = dplr.chunked(q, k, v, a, b, log_decay)                  # a whole sequence
    o, state = dplr.recurrent(q1, k1, v1, a1, b1, g1, state=state)     # the next token

Shapes: q [B,T,H,K] scaled by the caller; a, b and log_decay [B,T,H,K]; k [B,T,G,K] and v [B,T,G',V] with G and G'
dividing H, head h using group h // (H/G); state [B,H,K,V]; segments [B,T] non-decreasing document numbers, the incoming
state belonging to document 0. Shapes that do not fit raise LimbeckError.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.ops import common, cpu
from limbeck.ops.cpu_rank_one import RankOneChunk
from limbeck.ops.fla import accelerated, use_backend
from limbeck.ops.intra_chunk import compute_decayed_terms


@accelerated("diagonal_plus_rank_one")
def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the definition, one token after the other: for decoding, and as the reference of the other forms.

    Returns:
        o [B,T,H,V] in v's dtype and the state [B,H,K,V] in float32 (float64 for float64 inputs).
    """
    dtype = _check(q, k, v, a, b, log_decay, state, segments)
    heads = q.shape[2]
    with common.disable_autocast(q):
        current = common.prepare_initial_state(state, q, v.shape[-1], dtype)
        if q.shape[1] == 1:
            return _step(q, k, v, a, b, log_decay, current, segments)
        queries, read_keys = (x.to(dtype).unsqueeze(-2) for x in (q, a))  # [B, T, H, 1, K]
        keys = common.repeat_kv(k.to(dtype), heads).unsqueeze(-1)  # [B, T, H, K, 1]
        values = common.repeat_kv(v.to(dtype), heads).unsqueeze(-2)  # [B, T, H, 1, V]
        write_keys, decay = b.to(dtype).unsqueeze(-1), log_decay.to(dtype).exp().unsqueeze(-1)
        continues = None
        if segments is not None:
            continues = (~common.find_document_starts(segments)).to(dtype)[:, :, None, None, None]
        outputs = []
        for t in range(q.shape[1]):
            if continues is not None:
                current = continues[:, t] * current
            rewritten = write_keys[:, t] * (read_keys[:, t] @ current)
            current = decay[:, t] * current + rewritten + keys[:, t] * values[:, t]
            outputs.append(queries[:, t] @ current)
        return common.stack_outputs(outputs, q, v), current


def _step(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Run one token in few calls, which are what decoding costs."""
    (batch, _, heads, width), dtype = q.shape, state.dtype
    if segments is not None:
        state = state * (segments == 0).to(dtype)[..., None, None]
    state = state.reshape(-1, *state.shape[2:])
    query, read_key, write_key = (x.to(dtype).reshape(-1, 1, width) for x in (q, a, b))
    key, value = (common.repeat_kv(x.to(dtype), heads).reshape(batch * heads, 1, -1) for x in (k, v))
    read = torch.bmm(read_key, state)
    state = state * log_decay.to(dtype).exp().reshape(-1, width, 1)
    # In place only where autograd has saved nothing.
    if torch.is_grad_enabled():
        state = state.addcmul(write_key.mT, read).addcmul(key.mT, value)
    else:
        state.addcmul_(write_key.mT, read).addcmul_(key.mT, value)
    return torch.bmm(query, state).view(batch, 1, heads, -1).to(v.dtype), state.view(batch, heads, *state.shape[1:])


@accelerated("diagonal_plus_rank_one")
def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    *,
    state: Tensor | None = None,
    segments: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the same recurrence in chunks of `chunk` tokens, a power of two; None chooses: for training and prefill.

    Returns:
        o [B,T,H,V] in v's dtype and the state [B,H,K,V] in float32 (float64 for float64 inputs).
    """
    dtype = _check(q, k, v, a, b, log_decay, state, segments)
    length, heads = q.shape[1], q.shape[2]
    with common.disable_autocast(q):
        first = common.prepare_initial_state(state, q, v.shape[-1], dtype)
        log_decay = log_decay.to(dtype)
        plan = cpu.plan_chunks(q, log_decay, chunk)
        if plan:
            plan = plan._replace(kind=RankOneChunk)
            return cpu.run_chunks(q, k, v, None, log_decay, first, segments, plan, (a, b))
        chunk = common.resolve_chunk_size(chunk, length)
        values = common.repeat_kv(common.to_chunks(v, chunk, dtype), heads)
        keys = common.repeat_kv(common.to_chunks(k, chunk, dtype), heads)
        queries, a_chunks, b_chunks, log = (common.to_chunks(x, chunk, dtype) for x in (q, a, b, log_decay))
        compute_terms = _bounded_chunk_terms if common.has_bounded_decay(log) else _chunk_terms
        q_decayed, a_decayed, kb_decayed, scores, decay = compute_terms(queries, a_chunks, keys, b_chunks, log)
        if segments is not None:
            masks = common.DocumentMasks.from_segments(segments, chunk)
            a_decayed, scores = a_decayed * masks.reads_state, scores * masks.within_document.repeat(1, 1, 1, 2, 2)
            q_decayed, decay = q_decayed * masks.reads_state, decay * masks.carries_state
            kb_decayed = kb_decayed * masks.writes_state.repeat(1, 1, 1, 2, 1)
        o, last = _ScanRewriteChunks.apply(q_decayed, a_decayed, kb_decayed, values, scores, decay, first)
        return common.from_chunks(o, length, v.dtype), last


def matrix(q: Tensor, k: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, *, segments: Tensor | None = None) -> Tensor:
    """Build the mixing matrix M [B,H,T,T], lower triangular: with a zero initial state o = M v, head by head."""
    # In chunks with v = I, as for the delta rule: the closed form has T×T factors and a T×T inverse.
    dtype, length = common.compute_dtype(q, k, a, b, log_decay), q.shape[1]
    identity = torch.eye(length, dtype=dtype, device=q.device)[None, :, None].expand(q.shape[0], -1, 1, -1)
    with use_backend("torch"):  # because kernels are inexact, and limited in the width of v, which here is T
        m, _ = chunked(q, k, identity, a, b, log_decay, segments=segments)
    return m.transpose(1, 2)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    log_decay: Tensor,
    state: Tensor | None,
    segments: Tensor | None,
) -> torch.dtype:
    """Return the working precision; raise LimbeckError unless all shapes fit together."""
    common.check_shapes(q, k, v, segments=segments)
    for name, x in (("a", a), ("b", b), ("log_decay", log_decay)):
        if x.shape != q.shape:
            raise LimbeckError(f"{name} has shape {list(x.shape)}", expected=f"[B, T, H, K] = {list(q.shape)}")
    return common.compute_dtype(q, k, v, a, b, log_decay, state)


def _bounded_chunk_terms(q: Tensor, a: Tensor, k: Tensor, b: Tensor, log: Tensor) -> tuple[Tensor, ...]:
    """Compute Q̂, Â, W, [P; X Y] and D of `_ScanRewriteChunks` where `has_bounded_decay`.

    Decays are factored about half of the chunk's, so that the four products are one, of [q; a] with [k; b].
    """
    chunk = q.shape[-2]
    g = log.cumsum(-2)
    total = g[..., -1:, :]
    middle = 0.5 * total.detach()  # cancels from all products, hence without a gradient
    since = torch.cat([-middle, g - middle], -2).exp()
    rows = torch.cat([q * since[..., 1:, :], a * since[..., :-1, :]], -2)  # `a` reads the state of the token before
    columns = (torch.stack([k, b], -3) * (middle - g).exp().unsqueeze(-3)).flatten(-3, -2)
    seen = torch.ones(2, chunk, 2, chunk, dtype=q.dtype, device=q.device)
    seen[0] = seen[0].transpose(0, 1).tril().transpose(0, 1)
    seen[1] = seen[1].transpose(0, 1).tril(-1).transpose(0, 1)
    scores = rows @ columns.mT * seen.view(2 * chunk, 2 * chunk)
    q_decayed, a_decayed = (rows * middle.exp()).split(chunk, -2)
    return q_decayed, a_decayed, columns * (total - middle).exp(), scores, total.exp().mT


def _chunk_terms(q: Tensor, a: Tensor, k: Tensor, b: Tensor, log: Tensor) -> tuple[Tensor, ...]:
    """Compute the same for any decays.

    Each token becomes two: (a of the next token, k) with the decay, then (q, b) without one.
    """
    following = F.pad(a, (0, 0, -1, 1))
    double = [torch.stack(x, -2).flatten(-3, -2) for x in ((following, q), (k, b), (log, torch.zeros_like(log)))]
    m, _, since, until = compute_decayed_terms(*double)
    m = m.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).movedim((-3, -1), (-4, -2))  # [..., (a, q), C, (k, b), C]
    # In that order the next token's `a` does not see this one's b: those products are added here.
    next_to = torch.diag_embed((following * b).sum(-1)[..., :-1], -1)
    below = F.pad(m[..., 0, :, :, :], (0, 0, 0, 0, 1, -1))
    below = torch.stack([below[..., 0, :], below[..., 1, :] + next_to], -2)
    scores = torch.stack([m[..., 1, :, :, :], below], -4).flatten(-4, -3).flatten(-2, -1)
    since, until = since[..., 1::2, :], until[..., 1::2, :]
    a_decayed = torch.cat([a[..., :1, :], a[..., 1:, :] * since[..., :-1, :]], -2)
    return q * since, a_decayed, torch.cat([k * until, b * until], -2), scores, since[..., -1:, :].mT


class _ScanRewriteChunks(torch.autograd.Function):
    """Run the recurrence from chunk to chunk: outputs and final state from what does not depend on the state.

        R_n = (I − Y_n)⁻¹ (Â_n S_n + X_n V_n),    U_n = [V_n; R_n]
        O_n = Q̂_n S_n + P_n U_n,    S_{n+1} = Diag(D_n) S_n + W_nᵀ U_n

    with R what the tokens read through `a`, W = [K̃; B̃] (`kb_decayed`), Â the decayed `a` and `scores` = [P; X Y], X and
    Y strictly lower triangular.
    """

    @staticmethod
    def forward(ctx, q_decayed, a_decayed, kb_decayed, v, scores, decay, state):
        chunk = v.shape[-2]
        outer, inner = scores.split(chunk, -2)
        eye = torch.eye(chunk, dtype=v.dtype, device=v.device)
        inverse = torch.linalg.solve_triangular(
            -inner[..., chunk:], eye.expand_as(inner[..., chunk:]), upper=False, unitriangular=True
        )
        read = inverse @ a_decayed
        updates = torch.cat([v, inverse @ (inner[..., :chunk] @ v)], -2)
        states = state.new_empty(q_decayed.shape[0] + 1, *state.shape)
        states[0] = state
        for n in range(q_decayed.shape[0]):
            common.add_matmul_(updates[n, ..., chunk:, :], read[n], states[n])
            common.apply_decay(states[n], decay, n, into=states[n + 1])
            common.add_matmul_(states[n + 1], kb_decayed[n].mT, updates[n])
        o = common.add_matmul_(outer @ updates, q_decayed, states[:-1])
        ctx.save_for_backward(q_decayed, kb_decayed, scores, decay, inverse, read, updates, states)
        return o, states[-1].clone()

    @staticmethod
    @common.strict_once_differentiable
    def backward(ctx, do, dlast):
        q_decayed, kb_decayed, scores, decay, inverse, read, updates, states = ctx.saved_tensors
        chunk = do.shape[-2]
        outer, inner = scores.split(chunk, -2)
        with common.disable_autocast(do):
            do = do.contiguous()
            dupdates = outer.mT @ do
            dv, dread = dupdates.split(chunk, -2)
            dstates = torch.empty_like(states)
            dstates[-1] = dlast
            for n in reversed(range(q_decayed.shape[0])):
                common.add_matmul_(dupdates[n], kb_decayed[n], dstates[n + 1])
                common.apply_decay(dstates[n + 1], decay, n, into=dstates[n])
                common.add_matmul_(dstates[n], q_decayed[n].mT, do[n])
                common.add_matmul_(dstates[n], read[n].mT, dread[n])
            dsolved = inverse.mT @ dread
            return (
                do @ states[:-1].mT,
                dsolved @ states[:-1].mT,
                updates @ dstates[1:].mT,
                common.add_matmul_(dv, inner[..., :chunk].mT, dsolved),
                torch.cat([do, dsolved], -2) @ updates.mT,
                common.compute_decay_grad(states, dstates, decay),
                dstates[0],
            )
