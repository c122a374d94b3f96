"""The recurrence behind scalar decay, vector decay and the delta rule, token by token and in chunks.

    o, state = scan_tokens(q, k, v, log_decay, state, segments, vector=False)
    o, state = scan_chunks(q_decayed, k_decayed, v, scores, decay, state)
    o, state = run_chunked(scan, q, k, v, log_decay, state, segments, chunk, vector=False)    # with a CPU's fast path

In chunks the additive recurrence is

    O_n = Q̂_n S_n + P_n V_n,    S_{n+1} = Diag(D_n) S_n + K̃_nᵀ V_n

with g the cumulative log decay of the chunk, Q̂ = q·exp(g) (`q_decayed`), K̃ = k·exp(g_C − g) (`k_decayed`),
D = exp(g_C) (`decay`), and P the masked and decayed QKᵀ (`scores`): the chunkwise form of GLA (arXiv 2312.06635) and of
Mamba-2 (arXiv 2405.21060). Legend: limbeck.ops.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from limbeck.ops import cpu
from limbeck.ops.common import (
    DocumentMasks,
    add_matmul_,
    apply_decay,
    check_shapes,
    compute_decay_grad,
    compute_dtype,
    disable_autocast,
    expand_log_decay,
    find_document_starts,
    from_chunks,
    prepare_initial_state,
    repeat_kv,
    resolve_chunk_size,
    stack_outputs,
    strict_once_differentiable,
    to_chunks,
)


def scan_tokens(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    *,
    vector: bool,
    beta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run a recurrence as it is defined: the delta rule with `beta`, the additive one without."""
    check_shapes(q, k, v, segments=segments)
    heads, dtype = q.shape[2], compute_dtype(q, k, v, beta, log_decay, state)
    with disable_autocast(q):
        current = prepare_initial_state(state, q, v.shape[-1], dtype)
        if q.shape[1] == 1:
            return _step(q, k, v, log_decay, current, segments, vector=vector, beta=beta)
        queries = q.to(dtype).unsqueeze(-2)  # [B, T, H, 1, K]
        keys = repeat_kv(k.to(dtype), heads).unsqueeze(-1)  # [B, T, H, K, 1]
        values = repeat_kv(v.to(dtype), heads).unsqueeze(-2)  # [B, T, H, 1, V]
        decay = None
        if log_decay is not None:
            decay = expand_log_decay(log_decay, q, vector=vector, dtype=dtype).exp().unsqueeze(-1)
        if segments is not None:
            continues = (~find_document_starts(segments)).to(dtype)[:, :, None, None, None]
            decay = continues if decay is None else decay * continues
        rate = None if beta is None else beta.to(dtype)[..., None, None]
        outputs = []
        for t in range(q.shape[1]):
            if decay is not None:
                current = decay[:, t] * current
            write = values[:, t]
            if rate is not None:
                write = rate[:, t] * (write - keys[:, t].mT @ current)
            current = current + keys[:, t] * write
            outputs.append(queries[:, t] @ current)
        return stack_outputs(outputs, q, v), current


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor,
    segments: Tensor | None,
    *,
    vector: bool,
    beta: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run one token in as few passes over the state and as few calls as possible: they are what decoding costs."""
    (batch, _, heads, _), dtype, is_copy = q.shape, state.dtype, False
    rows = batch * heads
    inputs = (x if x.dtype == dtype else x.to(dtype) for x in (q, k, v))
    query, key, write = (repeat_kv(x, heads).reshape(rows, 1, -1) for x in inputs)
    if segments is not None:
        state, is_copy = state * (segments == 0).to(dtype)[..., None, None], True
    state = state.reshape(rows, *state.shape[2:])
    if log_decay is not None:
        if log_decay.dtype != dtype or log_decay.shape != (q.shape if vector else q.shape[:3]):
            log_decay = expand_log_decay(log_decay, q, vector=vector, dtype=dtype)
        decay = log_decay.exp().reshape(rows, -1, 1)
        state, is_copy = state * decay, True
    if beta is not None:
        rate = (beta if beta.dtype == dtype else beta.to(dtype)).reshape(rows, 1, 1)
        write = torch.baddbmm(write, key, state, alpha=-1) * rate
    # Never write to the caller's state, nor to one that autograd may have saved.
    add = state.addcmul_ if is_copy and not torch.is_grad_enabled() else state.addcmul
    state = add(key.mT, write)
    o = torch.bmm(query, state).view(batch, 1, heads, -1)
    return o if o.dtype == v.dtype else o.to(v.dtype), state.view(batch, heads, *state.shape[1:])


def run_chunked(
    scan: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    state: Tensor | None,
    segments: Tensor | None,
    chunk: int | None,
    *,
    vector: bool,
    beta: Tensor | None = None,
    triangular: bool = False,
) -> tuple[Tensor, Tensor]:
    """Run an operator's chunked form: check and convert its arguments, then take the CPU's fast path or `scan`.

    Args:
        scan: the operator's own part, (log_decay [B,T,H,K|1], values [N,B,H,C,V], C, dtype, first state) -> outputs
            [N,B,H,C,V] and final state. log_decay is None where the operator was given none.
        vector: whether log_decay is [B,T,H,K].
        beta: the delta rule's write strengths [B,T,H]; None for the additive recurrence.
        triangular: promises that v is lower triangular and takes no gradient, which saves half of the work.
    """
    check_shapes(q, k, v, segments=segments)
    length, dtype = q.shape[1], compute_dtype(q, k, v, beta, log_decay, state)
    with disable_autocast(q):
        first = prepare_initial_state(state, q, v.shape[-1], dtype)
        log = None if log_decay is None else expand_log_decay(log_decay, q, vector=vector, dtype=dtype)
        plan = cpu.plan_chunks(q, log, chunk)
        if plan:
            return cpu.run_chunks(q, k, v, beta, log, first, segments, plan._replace(triangular=triangular))
        chunk = resolve_chunk_size(chunk, length)
        values = repeat_kv(to_chunks(v, chunk, dtype), q.shape[2])
        o, last = scan(log, values, chunk, dtype, first)
        return from_chunks(o, length, v.dtype), last


def mask_documents(
    segments: Tensor, chunk: int, q_decayed: Tensor, k_decayed: Tensor, scores: Tensor, decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return those arguments of `scan_chunks` with documents kept apart."""
    masks = DocumentMasks.from_segments(segments, chunk)
    carries = masks.carries_state.to(q_decayed.dtype)
    return (
        q_decayed * masks.reads_state,
        k_decayed * masks.writes_state,
        scores * masks.within_document,
        carries if decay is None else decay * carries,
    )


def scan_chunks(
    q_decayed: Tensor, k_decayed: Tensor, v: Tensor, scores: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Run the additive recurrence from chunk to chunk: outputs [N,B,H,C,V] and final state [B,H,K,V].

    Args:
        q_decayed: Q̂ [N,B,H,C,K].
        k_decayed: K̃ [N,B,H,C,K].
        v: [N,B,H,C,V].
        scores: P [N,B,H,C,C].
        decay: D, [N,B,H,1,1] or [N,B,H,K,1]; None for no decay.
        state: S_0 [B,H,K,V].
    """
    return _ScanChunks.apply(q_decayed, k_decayed, v, scores, decay, state)


class _ScanChunks(torch.autograd.Function):
    """The equations of the module's head; the backward runs the same recurrence from the last chunk to the first."""

    @staticmethod
    def forward(ctx, q_decayed, k_decayed, v, scores, decay, state):
        states = state.new_empty(q_decayed.shape[0] + 1, *state.shape)
        states[0] = state
        for n in range(q_decayed.shape[0]):
            apply_decay(states[n], decay, n, into=states[n + 1])
            add_matmul_(states[n + 1], k_decayed[n].mT, v[n])
        o = add_matmul_(scores @ v, q_decayed, states[:-1])
        ctx.save_for_backward(q_decayed, k_decayed, v, scores, decay, states)
        return o, states[-1].clone()

    @staticmethod
    @strict_once_differentiable
    def backward(ctx, do, dlast):
        q_decayed, k_decayed, v, scores, decay, states = ctx.saved_tensors
        with disable_autocast(do):
            do = do.contiguous()
            dstates = torch.empty_like(states)
            dstates[-1] = dlast
            for n in reversed(range(q_decayed.shape[0])):
                apply_decay(dstates[n + 1], decay, n, into=dstates[n])
                add_matmul_(dstates[n], q_decayed[n].mT, do[n])
            dv = add_matmul_(scores.mT @ do, k_decayed, dstates[1:])
            ddecay = compute_decay_grad(states, dstates, decay)
            return do @ states[:-1].mT, v @ dstates[1:].mT, dv, do @ v.mT, ddecay, dstates[0]
