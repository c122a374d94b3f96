"""Diagonal plus rank one: a state that decays per key channel and rewrites one direction of itself per token.

    S_t = Diag(w_t) S_{t-1} + b_t (a_tᵀ S_{t-1}) + k_t v_tᵀ,    o_t = S_tᵀ q_t,    w_t = exp(log_decay_t) ∈ R^K

RWKV-7 (arXiv 2503.14456), with a = −κ̂ and b = κ̂ times its rate. Other than in the delta rule `a` reads the state before
it decays. As a matrix M = P_qk + P_qb (I − P_ab)⁻¹ P_ak, with P the decayed products of q or a with k or b.

    o, state = diagonal_plus_rank_one.chunked(q, k, v, a, b, log_decay)                  # a whole sequence
    o, state = diagonal_plus_rank_one.recurrent(q1, k1, v1, a1, b1, g1, state=state)     # the next token

Shapes: q [B,T,H,K] scaled by the caller; a, b and log_decay [B,T,H,K]; k [B,T,G,K] and v [B,T,G',V] with G and G'
dividing H, head h using group h // (H/G); state [B,H,K,V]; segments [B,T] non-decreasing document numbers, the incoming
state belonging to document 0. Shapes that do not fit raise LimbeckError.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.ops import common
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
    """The definition, one token after the other: for decoding and as the arbiter.

    Returns o [B,T,H,V] in v's dtype and the state [B,H,K,V] in fp32 (fp64 for fp64 inputs).
    """
    dtype = _check(q, k, v, a, b, log_decay, state, segments)
    heads = q.shape[2]
    with common.disable_autocast(q):
        current = common.prepare_initial_state(state, q, v.shape[-1], dtype)
        queries, reads = (x.to(dtype).unsqueeze(-2) for x in (q, a))  # [B, T, H, 1, K]
        keys = common.repeat_kv(k.to(dtype), heads).unsqueeze(-1)  # [B, T, H, K, 1]
        values = common.repeat_kv(v.to(dtype), heads).unsqueeze(-2)  # [B, T, H, 1, V]
        writes, decay = b.to(dtype).unsqueeze(-1), log_decay.to(dtype).exp().unsqueeze(-1)
        kept = None if segments is None else (~common.find_document_starts(segments)).to(dtype)[:, :, None, None, None]
        outputs = []
        for t in range(q.shape[1]):
            if kept is not None:
                current = kept[:, t] * current
            rewritten = writes[:, t] * (reads[:, t] @ current)
            current = decay[:, t] * current + rewritten + keys[:, t] * values[:, t]
            outputs.append(queries[:, t] @ current)
        return common.stack_outputs(outputs, q, v), current


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
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The same in chunks of `chunk` tokens (a power of two): for training and prefill.

    Returns o [B,T,H,V] in v's dtype and the state [B,H,K,V] in fp32 (fp64 for fp64 inputs).
    """
    dtype = _check(q, k, v, a, b, log_decay, state, segments)
    length, heads = q.shape[1], q.shape[2]
    chunk = common.resolve_chunk_size(chunk, length)
    with common.disable_autocast(q):
        first = common.prepare_initial_state(state, q, v.shape[-1], dtype)
        values = common.repeat_kv(common.to_chunks(v, chunk, dtype), heads)
        keys = common.repeat_kv(common.to_chunks(k, chunk, dtype), heads)
        queries, removals, writes, log = (common.to_chunks(x, chunk, dtype) for x in (q, a, b, log_decay))
        products = _mild if common.has_bounded_decay(log) else _any
        reads, erases, writes, mixing, decay = products(queries, removals, keys, writes, log)
        if segments is not None:
            docs = common.DocumentMasks.from_segments(segments, chunk)
            erases, mixing = erases * docs.reads_state, mixing * docs.within_document.repeat(1, 1, 1, 2, 2)
            reads, decay = reads * docs.reads_state, decay * docs.carries_state
            writes = writes * docs.writes_state.repeat(1, 1, 1, 2, 1)
        o, last = _Rewrite.apply(reads, erases, writes, values, mixing, decay, first)
        return common.from_chunks(o, length, v.dtype), last


def matrix(q: Tensor, k: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, *, segments: Tensor | None = None) -> Tensor:
    """The mixing matrix M [B,H,T,T], lower triangular: with a zero initial state o = M v, head by head."""
    # In chunks with v = I, as for the delta rule: the closed form has T×T factors and a T×T inverse.
    dtype, length = common.compute_dtype(q, k, a, b, log_decay), q.shape[1]
    identity = torch.eye(length, dtype=dtype, device=q.device)[None, :, None].expand(q.shape[0], -1, 1, -1)
    with use_backend("torch"):  # exact, and v is as wide as the sequence
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
    """The working precision, where everything fits together."""
    common.check_shapes(q, k, v, segments=segments)
    for name, x in (("a", a), ("b", b), ("log_decay", log_decay)):
        if x.shape != q.shape:
            raise LimbeckError(f"{name} has shape {list(x.shape)}", expected=f"[B, T, H, K] = {list(q.shape)}")
    return common.compute_dtype(q, k, v, a, b, log_decay, state)


def _mild(q: Tensor, a: Tensor, k: Tensor, b: Tensor, log: Tensor) -> tuple[Tensor, ...]:
    """What `_Rewrite` takes, where no chunk forgets much: decays factor about half of the chunk's, so that the four
    products are one, of [q; a] with [k; b]."""
    chunk = q.shape[-2]
    g = log.cumsum(-2)
    total = g[..., -1:, :]
    middle = 0.5 * total.detach()  # it cancels, hence without a gradient
    since = torch.cat([-middle, g - middle], -2).exp()
    rows = torch.cat([q * since[..., 1:, :], a * since[..., :-1, :]], -2)  # `a` reads the state of the token before
    columns = (torch.stack([k, b], -3) * (middle - g).exp().unsqueeze(-3)).flatten(-3, -2)
    seen = torch.ones(2, chunk, 2, chunk, dtype=q.dtype, device=q.device)
    seen[0] = seen[0].transpose(0, 1).tril().transpose(0, 1)
    seen[1] = seen[1].transpose(0, 1).tril(-1).transpose(0, 1)
    mixing = rows @ columns.mT * seen.view(2 * chunk, 2 * chunk)
    reads, erases = (rows * middle.exp()).split(chunk, -2)
    return reads, erases, columns * (total - middle).exp(), mixing, total.exp().mT


def _any(q: Tensor, a: Tensor, k: Tensor, b: Tensor, log: Tensor) -> tuple[Tensor, ...]:
    """The same for any decays. Tokens become two: (a of the next, k) with the decay, then (q, b) without one."""
    following = F.pad(a, (0, 0, -1, 1))
    double = [torch.stack(x, -2).flatten(-3, -2) for x in ((following, q), (k, b), (log, torch.zeros_like(log)))]
    m, _, since, until = compute_decayed_terms(*double)
    m = m.unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2)).movedim((-3, -1), (-4, -2))  # [..., (a, q), C, (k, b), C]
    # The order of the two hides the next token's `a` from this one's b.
    next_to = torch.diag_embed((following * b).sum(-1)[..., :-1], -1)
    below = F.pad(m[..., 0, :, :, :], (0, 0, 0, 0, 1, -1))
    below = torch.stack([below[..., 0, :], below[..., 1, :] + next_to], -2)
    mixing = torch.stack([m[..., 1, :, :, :], below], -4).flatten(-4, -3).flatten(-2, -1)
    since, until = since[..., 1::2, :], until[..., 1::2, :]
    erases = torch.cat([a[..., :1, :], a[..., 1:, :] * since[..., :-1, :]], -2)
    return q * since, erases, torch.cat([k * until, b * until], -2), mixing, since[..., -1:, :].mT


class _Rewrite(torch.autograd.Function):
    """Outputs and final state from what does not depend on the state.

        R_n = (I − Y_n)⁻¹ (Â_n S_n + X_n V_n),    U_n = [V_n; R_n]
        O_n = Q̂_n S_n + P_n U_n,    S_{n+1} = Diag(D_n) S_n + W_nᵀ U_n

    with R what the tokens read through `a`, W = [K̃; B̃] and `mixing` = [P; X Y], X and Y strictly lower triangular.
    """

    @staticmethod
    def forward(ctx, reads, erases, writes, v, mixing, decay, state):
        chunk = v.shape[-2]
        outer, inner = mixing.split(chunk, -2)
        eye = torch.eye(chunk, dtype=v.dtype, device=v.device)
        inverse = torch.linalg.solve_triangular(
            -inner[..., chunk:], eye.expand_as(inner[..., chunk:]), upper=False, unitriangular=True
        )
        read = inverse @ erases
        updates = torch.cat([v, inverse @ (inner[..., :chunk] @ v)], -2)
        states = state.new_empty(reads.shape[0] + 1, *state.shape)
        states[0] = state
        for n in range(reads.shape[0]):
            common.add_matmul_(updates[n, ..., chunk:, :], read[n], states[n])
            common.apply_decay(states[n], decay, n, into=states[n + 1])
            common.add_matmul_(states[n + 1], writes[n].mT, updates[n])
        o = common.add_matmul_(outer @ updates, reads, states[:-1])
        ctx.save_for_backward(reads, writes, mixing, decay, inverse, read, updates, states)
        return o, states[-1].clone()

    @staticmethod
    @common.strict_once_differentiable
    def backward(ctx, do, dlast):
        reads, writes, mixing, decay, inverse, read, updates, states = ctx.saved_tensors
        chunk = do.shape[-2]
        outer, inner = mixing.split(chunk, -2)
        with common.disable_autocast(do):
            do = do.contiguous()
            dupdates = outer.mT @ do
            dv, dread = dupdates.split(chunk, -2)
            dstates = torch.empty_like(states)
            dstates[-1] = dlast
            for n in reversed(range(reads.shape[0])):
                common.add_matmul_(dupdates[n], writes[n], dstates[n + 1])
                common.apply_decay(dstates[n + 1], decay, n, into=dstates[n])
                common.add_matmul_(dstates[n], reads[n].mT, do[n])
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
