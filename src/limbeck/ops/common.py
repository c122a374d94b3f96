"""What the operators share: precision, grouped heads, chunks, documents and the state that runs from chunk to chunk.

Chunks come first in the inner layout, [N, B, H, C, ·], so that the loop over chunks reads and writes contiguous blocks
while everything else is one batched matrix product over N·B·H. The chunk form of an additive recurrence is

    O_n = Q̂_n S_n + P_n V_n,    S_{n+1} = Diag(D_n) S_n + K̃_nᵀ V_n

with Q̂ = q·exp(g), K̃ = k·exp(g_C − g), D = exp(g_C) for g the cumulative log decay of the chunk, and P the masked and
decayed QKᵀ (the chunkwise form of GLA, arXiv 2312.06635, and of Mamba-2, arXiv 2405.21060).

    x = to_chunks(q, chunk=64)          # [B, T, H, K] -> [N, B, H, C, K]
    o, state = scan_chunks(reads, writes, v, pairs, decay, state)
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import LimbeckError


def disable_autocast(x: Tensor) -> contextlib.AbstractContextManager:
    """A context in which autocast does not touch the operator; costs nothing where autocast is off."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any of the tensors is, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def check_shapes(q: Tensor, k: Tensor, v: Tensor | None = None, *, segments: Tensor | None = None) -> None:
    """Raises a LimbeckError where q [B,T,H,K], k [B,T,G,K], v [B,T,G,V] and segments [B,T] do not fit together."""
    for name, x in (("k", k), ("v", v)):
        if x is not None and (x.dim() != 4 or x.shape[:2] != q.shape[:2] or q.shape[2] % x.shape[2]):
            raise LimbeckError(
                f"{name} has shape {list(x.shape)} beside q {list(q.shape)}",
                expected=f"{name} [B, T, heads, width] with q's B and T, and heads that divide q's",
            )
    if k.shape[-1] != q.shape[-1]:
        raise LimbeckError(f"k has width {k.shape[-1]}", expected=f"the width of q, {q.shape[-1]}")
    if segments is not None and segments.shape != q.shape[:2]:
        raise LimbeckError(f"segments has shape {list(segments.shape)}", expected=f"[B, T] = {list(q.shape[:2])}")


def check_chunk_size(chunk: int) -> None:
    """Raises a LimbeckError unless `chunk` is a power of two: blocks are halved down to single tokens."""
    if chunk < 1 or chunk & (chunk - 1):
        raise LimbeckError(f"chunk is {chunk}", expected="a power of two", hint="chunk=64")


def repeat_kv(x: Tensor, heads: int, dim: int = 2) -> Tensor:
    """Grouped heads repeated to `heads`: head h of the result is head h // (heads/groups) of `x`."""
    return x if x.shape[dim] == heads else x.repeat_interleave(heads // x.shape[dim], dim=dim)


def expand_log_decay(log_decay: Tensor, q: Tensor, *, vector: bool, dtype: torch.dtype) -> Tensor:
    """Log decays as [B, T, H, 1] or [B, T, H, K] in the working precision; a [H] is spread over the tokens."""
    want = q.shape if vector else q.shape[:3]
    if not vector and log_decay.dim() == 1 and log_decay.shape[0] == q.shape[2]:
        log_decay = log_decay.expand(want)
    if log_decay.shape != want:
        raise LimbeckError(f"log_decay has shape {list(log_decay.shape)}", expected=f"{list(want)}")
    return log_decay.to(dtype) if vector else log_decay.to(dtype).unsqueeze(-1)


def has_bounded_decay(log_decay: Tensor) -> bool:
    """Does no chunk of log decays [..., C, D] forget more than exp(−40)? Then it needs no halving: exp(±20) about its
    middle is far from fp32's limits. Never under torch.compile, which cannot branch on values."""
    return not torch.compiler.is_compiling() and bool(log_decay.detach().abs().sum(-2).max() <= 40.0)


def prepare_initial_state(state: Tensor | None, q: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """The incoming state [B, H, K, V] in the working precision, zeros where there is none."""
    shape = (q.shape[0], q.shape[2], q.shape[3], width)
    if state is None:
        return q.new_zeros(shape, dtype=dtype)
    if state.shape != shape:
        raise LimbeckError(f"state has shape {list(state.shape)}", expected=f"[B, H, K, V] = {list(shape)}")
    return state.to(dtype)


def resolve_chunk_size(chunk: int | None, length: int) -> int:
    """The chunk to use: not longer than the sequence, rounded up to a power of two; None stands for 64."""
    chunk = 64 if chunk is None else chunk
    check_chunk_size(chunk)
    return min(chunk, 1 << (length - 1).bit_length())


def to_chunks(x: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """[B, T, H, D] -> contiguous [N, B, H, C, D], filled up with zeros, which every operator takes for no-op tokens."""
    x = x.to(dtype)
    rest = -x.shape[1] % chunk
    if rest:
        x = F.pad(x, (0, 0, 0, 0, 0, rest))
    return x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4).contiguous()


def from_chunks(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """[N, B, H, C, D] -> [B, T, H, D]."""
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length].to(dtype)


def find_document_starts(segments: Tensor) -> Tensor:
    """Where a document begins: [B, T] bool. The incoming state is document 0."""
    return segments != F.pad(segments[:, :-1], (1, 0))


@dataclass(frozen=True)
class DocumentMasks:
    """Masks that keep documents apart; shapes broadcast over heads and widths.

    within_document: [N,B,1,C,C] the two tokens are of one document; reads_state: [N,B,1,C,1] the token belongs to the document of the
    incoming state; writes_state: [N,B,1,C,1] to that of the outgoing one; carries_state: [N,B,1,1,1] both states are of one document.
    """

    within_document: Tensor
    reads_state: Tensor
    writes_state: Tensor
    carries_state: Tensor

    @classmethod
    def from_segments(cls, segments: Tensor, chunk: int) -> "DocumentMasks":
        rest = -segments.shape[1] % chunk
        padded = torch.cat([segments, segments[:, -1:].expand(-1, rest)], 1) if rest else segments
        number = padded.unflatten(1, (-1, chunk)).transpose(0, 1).unsqueeze(2)  # [N, B, 1, C]
        last = number[..., -1:]
        before = torch.cat([torch.zeros_like(last[:1]), last[:-1]])
        return cls(
            within_document=number.unsqueeze(-1) == number.unsqueeze(-2),
            reads_state=(number == before).unsqueeze(-1),
            writes_state=(number == last).unsqueeze(-1),
            carries_state=(last == before).unsqueeze(-1),
        )


def add_matmul_(out: Tensor, a: Tensor, b: Tensor, sign: int = 1) -> Tensor:
    """out += sign · a b, in place and in one pass; leading dimensions agree, `out` is contiguous."""
    size = -1 if out.dim() == 3 else out.shape[:-2].numel()
    flat = (x.reshape(size, *x.shape[-2:]) for x in (a, b))
    out.view(size, *out.shape[-2:]).baddbmm_(*flat, alpha=sign)
    return out


def apply_decay(state: Tensor, decay: Tensor | None, n: int, *, into: Tensor) -> None:
    """Writes the state as chunk n's decay leaves it."""
    if decay is None:
        into.copy_(state)
    else:
        torch.mul(state, decay[n], out=into)


def compute_decay_grad(states: Tensor, dstates: Tensor, decay: Tensor | None) -> Tensor | None:
    """Gradient of D from the states before and the gradients after each chunk."""
    if decay is None:
        return None
    per_channel = (states[:-1] * dstates[1:]).sum(-1, keepdim=True)
    return per_channel.sum(-2, keepdim=True) if decay.shape[-2] == 1 else per_channel


def strict_once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates the backward of an operator that is differentiated once: a second time is an error.

    torch's `once_differentiable` hangs that error on what leads nowhere, so `torch.autograd.grad` with given inputs
    passes it by and leaves terms out. Here it hangs on all that the gradient depends on.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *gradients):
        with torch.no_grad():
            found = backward(ctx, *gradients)
        if not torch.is_grad_enabled():
            return found
        causes = [x for x in (*gradients, *ctx.saved_tensors) if x is not None and x.requires_grad]
        return tuple(None if x is None else _Once.apply(x, *causes) for x in found)

    return wrapped


class _Once(torch.autograd.Function):
    """The first of some tensors, whose slope with respect to any of them is not known."""

    @staticmethod
    def forward(ctx, x, *causes):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise LimbeckError(
            "a second derivative of a mixer's operator was asked for",
            expected="first derivatives, which are written by hand",
            hint="the operator's `recurrent` form is plain autograd",
        )


class _AcrossChunks(torch.autograd.Function):
    """The equations of the module's head; the backward runs the same recurrence from the last chunk to the first."""

    @staticmethod
    def forward(ctx, reads, writes, v, pairs, decay, state):
        states = state.new_empty(reads.shape[0] + 1, *state.shape)
        states[0] = state
        for n in range(reads.shape[0]):
            apply_decay(states[n], decay, n, into=states[n + 1])
            add_matmul_(states[n + 1], writes[n].mT, v[n])
        o = add_matmul_(pairs @ v, reads, states[:-1])
        ctx.save_for_backward(reads, writes, v, pairs, decay, states)
        return o, states[-1].clone()

    @staticmethod
    @strict_once_differentiable
    def backward(ctx, do, dlast):
        reads, writes, v, pairs, decay, states = ctx.saved_tensors
        with disable_autocast(do):
            do = do.contiguous()
            dstates = torch.empty_like(states)
            dstates[-1] = dlast
            for n in reversed(range(reads.shape[0])):
                apply_decay(dstates[n + 1], decay, n, into=dstates[n])
                add_matmul_(dstates[n], reads[n].mT, do[n])
            dv = add_matmul_(pairs.mT @ do, writes, dstates[1:])
            ddecay = compute_decay_grad(states, dstates, decay)
            return do @ states[:-1].mT, v @ dstates[1:].mT, dv, do @ v.mT, ddecay, dstates[0]


def scan_chunks(
    reads: Tensor, writes: Tensor, v: Tensor, pairs: Tensor, decay: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs [N,B,H,C,V] and final state [B,H,K,V] of an additive recurrence.

    Args:
        reads: Q̂ [N,B,H,C,K]. writes: K̃ [N,B,H,C,K]. v: [N,B,H,C,V]. pairs: P [N,B,H,C,C].
        decay: D, [N,B,H,1,1] or [N,B,H,K,1]; None for no decay. state: S_0 [B,H,K,V].
    """
    return _AcrossChunks.apply(reads, writes, v, pairs, decay, state)


def mask_documents(
    segments: Tensor, chunk: int, reads: Tensor, writes: Tensor, pairs: Tensor, decay: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The arguments of `scan_chunks` with documents kept apart."""
    docs = DocumentMasks.from_segments(segments, chunk)
    kept = docs.carries_state.to(reads.dtype)
    return (
        reads * docs.reads_state,
        writes * docs.writes_state,
        pairs * docs.within_document,
        kept if decay is None else decay * kept,
    )


def build_document_mask(segments: Tensor) -> Tensor:
    """[B, 1, T, T] bool: the two tokens are of one document."""
    return (segments.unsqueeze(-1) == segments.unsqueeze(-2)).unsqueeze(1)


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
    """The recurrences as they are defined; with `beta` the delta rule, without it the additive one."""
    check_shapes(q, k, v, segments=segments)
    heads, dtype = q.shape[2], compute_dtype(q, k, v, beta, log_decay, state)
    with disable_autocast(q):
        current = prepare_initial_state(state, q, v.shape[-1], dtype)
        if q.shape[1] == 1:
            return _one_step(q, k, v, log_decay, current, segments, vector=vector, beta=beta)
        queries = q.to(dtype).unsqueeze(-2)  # [B, T, H, 1, K]
        keys = repeat_kv(k.to(dtype), heads).unsqueeze(-1)  # [B, T, H, K, 1]
        values = repeat_kv(v.to(dtype), heads).unsqueeze(-2)  # [B, T, H, 1, V]
        decay = None
        if log_decay is not None:
            decay = expand_log_decay(log_decay, q, vector=vector, dtype=dtype).exp().unsqueeze(-1)
        if segments is not None:
            kept = (~find_document_starts(segments)).to(dtype)[:, :, None, None, None]
            decay = kept if decay is None else decay * kept
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


def stack_outputs(outputs: list[Tensor], q: Tensor, v: Tensor) -> Tensor:
    """Outputs [B, H, 1, V] of each token as [B, T, H, V] in v's dtype; there may be none."""
    if not outputs:
        return v.new_zeros(*q.shape[:3], v.shape[-1])
    return torch.stack(outputs, 1).squeeze(-2).to(v.dtype)


def _one_step(
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
    """One token, in as few passes over the state as there are: that is all a step of decoding costs."""
    heads, dtype, own = q.shape[2], state.dtype, False
    query = q.to(dtype).transpose(1, 2)  # [B, H, 1, K]
    key, write = (repeat_kv(x.to(dtype), heads).transpose(1, 2) for x in (k, v))
    if log_decay is not None:
        decay = expand_log_decay(log_decay, q, vector=vector, dtype=dtype).exp().view(*key.shape[:2], -1, 1)
        state, own = state * decay, True
    if segments is not None:
        state, own = state * (segments == 0).to(dtype)[..., None, None], True
    if beta is not None:
        write = (write - key @ state) * beta.to(dtype).view(*key.shape[:2], 1, 1)
    # the caller's state is never written to, nor one that autograd may have kept
    add = state.addcmul_ if own and not torch.is_grad_enabled() else state.addcmul
    state = add(key.mT, write)
    return (query @ state).transpose(1, 2).to(v.dtype), state
