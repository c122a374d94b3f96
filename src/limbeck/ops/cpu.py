"""The chunked recurrences on a CPU: one chunk after the other, so that all intermediate results stay in cache.

    plan = plan_chunks(q, log_decay, chunk)                     # None: take the general path
    o, state = run_chunks(q, k, v, beta, log_decay, state, segments, plan)

Decays are factored inside each chunk (`limbeck.ops.cpu_chunk`), which makes a vector decay as cheap as none but for one
exponential. The factors grow with the decays: `plan_chunks` takes this route only where they stay far from overflow,
with shorter chunks where those help. It leaves the rest to the general path with the exact halvings of intra_chunk.py:
near resets, decays that grow, other devices, torch.compile.

The backward pass needs q, k, v, the gates, U and one state per chunk; all else is computed again while in cache.
Shapes: R rows of the batch that are run together, c tokens of a chunk; the rest as in limbeck.ops.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from limbeck.ops import common
from limbeck.ops.cpu_chunk import Chunk, Pass

# Largest sum of -log_decay over half a chunk: above the diagonal, before it is cut off, Q Kᵀ reaches exp of twice that.
LIMITS = {torch.float32: 32.0, torch.float64: 300.0}


class ChunkPlan(NamedTuple):
    """How `run_chunks` cuts a sequence.

    Attributes:
        chunk: tokens of a chunk.
        halves: log decays summed over the first and the second half of each chunk, [N, 2, B, H, K|1] in float64.
        triangular: the caller's promise that v [B,T,·,T] is lower triangular and takes no gradient: columns that are
            still zero are left out, which saves half of the work.
        kind: how a chunk is computed.
    """

    chunk: int
    halves: Tensor | None
    triangular: bool = False
    kind: type[Chunk] = Chunk


def plan_chunks(q: Tensor, log_decay: Tensor | None, chunk: int | None) -> ChunkPlan | None:
    """Choose chunks for q [B,T,H,K] and log_decay [B,T,H,K|1]; None where the general path has to be taken."""
    if chunk is not None:
        common.check_chunk_size(chunk)
    if q.device.type != "cpu" or q.shape[1] == 0 or torch.compiler.is_compiling():
        return None
    # A chunk of 64 takes the least time on one thread; threads wait for each other less often with 128.
    sizes = (chunk,) if chunk else (64, 32, 16) if torch.get_num_threads() == 1 else (128, 64, 32, 16)
    if log_decay is None:
        return ChunkPlan(min(sizes[0], q.shape[1]), None)
    log_decay = log_decay.detach()
    if log_decay.amax() > 0:
        return None
    for size in sizes:
        halves = _halves(log_decay, size)
        if halves.amin() >= -LIMITS[log_decay.dtype]:
            return ChunkPlan(size, halves)
    return None


def _halves(log_decay: Tensor, chunk: int) -> Tensor:
    """Sum the log decays of both halves of each chunk, [N, 2, B, H, K|1]; the last chunk may be shorter."""
    whole = log_decay.shape[1] // chunk * chunk
    sums = []
    if whole:
        blocks = log_decay[:, :whole].unflatten(1, (-1, chunk))
        halves = (blocks[:, :, : chunk // 2], blocks[:, :, chunk // 2 :])
        sums.append(torch.stack([x.sum(2, dtype=torch.float64) for x in halves]).permute(2, 0, 1, 3, 4))
    if whole < log_decay.shape[1]:
        middle = whole + (log_decay.shape[1] - whole) // 2
        halves = (log_decay[:, whole:middle], log_decay[:, middle:])
        sums.append(torch.stack([x.sum(1, dtype=torch.float64) for x in halves]).unsqueeze(0))
    return torch.cat(sums)


def run_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None,
    log_decay: Tensor | None,
    state: Tensor,
    segments: Tensor | None,
    plan: ChunkPlan,
    pair: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over chunks: outputs [B,T,H,V] in v's dtype and the final state [B,H,K,V].

    Args:
        q, k, v, beta, segments: as in delta_rule.py; beta is None for the additive recurrence.
        log_decay: [B,T,H,K], [B,T,H,1] or None, in the dtype of `state`.
        state: [B,H,K,V]; everything is computed in its dtype.
        pair: a and b [B,T,H,K] of a `RankOneChunk`.
    """
    return _RunChunks.apply(q, k, v, beta, log_decay, state, segments, plan, *(pair or (None, None)))


class _RunChunks(torch.autograd.Function):
    """Run the chunks of each block of rows in order; the backward goes from the last chunk to the first."""

    @staticmethod
    def forward(ctx, q, k, v, beta, log_decay, state, segments, plan, a, b):
        whole = Pass(q, k, v, beta, log_decay, segments, plan, state.dtype, (a, b))
        o, new = v.new_empty(*q.shape[:3], v.shape[3]), state.new_empty
        if plan.triangular:
            o, new = o.zero_(), state.new_zeros
        # Without a backward pass two states take turns, and U is that of one chunk: both stay in cache.
        keeps = any(ctx.needs_input_grad) or plan.triangular
        slots, kept = (whole.count + 1, whole.length) if keeps else (2, whole.size)
        updates = None if beta is None and a is None else state.new_empty(len(o), kept, *o.shape[2:])
        states = [new(*state.shape[:3], whole.columns(n)) for n in range(slots)]
        first = state[..., : whole.columns(0)]
        torch.mul(first, 1 if whole.decays is None else whole.decays[0], out=states[0])
        for block in whole.blocks():
            outputs: Any = block.cut_values(o)
            us: Any = [None] * whole.count
            if updates is not None:
                one = block.cut(updates)[0]
                us = block.cut_values(updates) if keeps else [one[:, :, : x.shape[2]] for x in block.q]
            for n in range(whole.count):
                x = block.chunk(n)
                before, into = (block.state(states[i % slots]) for i in (n, n + 1))
                after = into if into.shape == before.shape else torch.empty_like(before)
                outputs[n].copy_(x.heads(x.forward(before, after, us[n])))
                if log_decay is not None:
                    after.mul_(block.decays[n + 1])
                if after is not into:
                    into[..., : after.shape[2]] = after
        last = states[whole.count % slots]
        if not keeps:
            return o, last
        ctx.plan = plan
        ctx.save_for_backward(q, k, v, beta, log_decay, a, b, segments, updates, *states)
        return o, last.clone()

    @staticmethod
    @common.strict_once_differentiable
    def backward(ctx, do, dlast):
        q, k, v, beta, log_decay, a, b, segments, updates, *states = ctx.saved_tensors
        with common.disable_autocast(do):
            dtype = states[0].dtype
            whole = Pass(q, k, v, beta, log_decay, segments, ctx.plan, dtype, (a, b))
            inputs = (q, k, None if ctx.plan.triangular else v, beta, log_decay, a, b)
            grads: list[Any] = [None if x is None else states[0].new_empty(x.shape) for x in inputs]
            dfirst = torch.zeros_like(dlast, dtype=dtype)
            absent: Any = [None] * whole.count
            for block in whole.blocks():
                dos, us = block.cut_values(do), absent if updates is None else block.cut_values(updates)
                dqs, dks, dvs = (absent if x is None else block.cut(x) for x in grads[:3])
                dgates: Any = absent if beta is None else block.cut(grads[3].unsqueeze(-1))
                if a is not None:
                    dgates = list(zip(block.cut(grads[5]), block.cut(grads[6])))
                dlogs = absent if log_decay is None else grads[4][block.batch_slice].flatten(2).split(whole.size, 1)
                dstate = block.state(dlast).to(dtype, copy=True)
                for n in reversed(range(whole.count)):
                    x, before = block.chunk(n), block.state(states[n])
                    dstate = dstate[..., : x.value].contiguous()
                    if log_decay is not None:
                        after = block.state(states[n + 1])[..., : x.value]
                        leaving = torch.mul(after, dstate, out=x.buffer("leaving", *dstate.shape[1:])).sum(-1)
                        dstate.mul_(block.decays[n + 1])
                    dq, de, dk, du = x.backward(dos[n], before, dstate, us[n])
                    if log_decay is not None:
                        dlogs[n].copy_(x.compute_log_decay_grad(dq, de, dk, leaving))
                    x.write_grads(dq, de, dk, du, dqs[n], dks[n], dvs[n], dgates[n])
                if log_decay is not None:
                    dstate.mul_(block.decays[0])
                block.state(dfirst)[..., : dstate.shape[2]] = dstate
            out = (None if g is None else g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))
            *own, da, db = out
            return *own, dfirst, None, None, da, db
