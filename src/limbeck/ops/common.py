"""What all operators share: precision, shape checks, grouped heads, chunks and packed documents.

    x = to_chunks(q, chunk=64, dtype=torch.float32)                    # [B, T, H, K] -> [N, B, H, C, K]
    masks = DocumentMasks.from_segments(segments, chunk=64)

Chunks come first, [N, B, H, C, ·], so that a loop over chunks reads and writes contiguous blocks while everything else
is one batched matrix product over N·B·H. The recurrences over them are in recurrence.py. Legend: limbeck.ops.
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
    """Return a context that switches autocast off on x's device; it costs nothing where autocast is off already."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else contextlib.nullcontext()


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return the working precision: float64 if any of the tensors is float64, else float32."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def check_shapes(q: Tensor, k: Tensor, v: Tensor | None = None, *, segments: Tensor | None = None) -> None:
    """Raise a LimbeckError unless q [B,T,H,K], k [B,T,G,K], v [B,T,G',V] and segments [B,T] fit together."""
    for name, x in (("k", k), ("v", v)):
        if x is not None and (x.dim() != 4 or x.shape[:2] != q.shape[:2] or q.shape[2] % x.shape[2]):
            raise LimbeckError(
                f"{name} has shape {list(x.shape)}, which does not match q {list(q.shape)}",
                expected=f"{name} [B, T, heads, width] with the B and T of q, and a number of heads that divides q's",
            )
    if k.shape[-1] != q.shape[-1]:
        raise LimbeckError(f"k has width {k.shape[-1]}", expected=f"the width of q, {q.shape[-1]}")
    if segments is not None and segments.shape != q.shape[:2]:
        raise LimbeckError(f"segments has shape {list(segments.shape)}", expected=f"[B, T] = {list(q.shape[:2])}")


def repeat_kv(x: Tensor, heads: int, dim: int = 2) -> Tensor:
    """Repeat grouped heads to `heads`: head h of the result is head h // (heads/groups) of x."""
    groups = x.shape[dim]
    if groups == heads:
        return x
    if x.shape[1] == 1 and dim == 2 and is_plain_cpu_call(x) and not torch.is_grad_enabled():
        return x.index_select(2, _group_of_each_head(groups, heads))  # half the time of one token's repetition
    return x.repeat_interleave(heads // groups, dim=dim)


@functools.cache
def _group_of_each_head(groups: int, heads: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(heads) // (heads // groups)


def is_plain_cpu_call(x: Tensor) -> bool:
    """Return whether x is on a CPU and nothing records the call: values may be read, index tensors be kept."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def expand_log_decay(log_decay: Tensor, q: Tensor, *, vector: bool, dtype: torch.dtype) -> Tensor:
    """Bring log decays to [B, T, H, 1], or [B, T, H, K] where `vector`, in `dtype`; a [H] is spread over the tokens."""
    shape = q.shape if vector else q.shape[:3]
    if not vector and log_decay.dim() == 1 and log_decay.shape[0] == q.shape[2]:
        log_decay = log_decay.expand(shape)
    if log_decay.shape != shape:
        raise LimbeckError(f"log_decay has shape {list(log_decay.shape)}", expected=f"{list(shape)}")
    return log_decay.to(dtype) if vector else log_decay.to(dtype).unsqueeze(-1)


def prepare_initial_state(state: Tensor | None, q: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Return the incoming state [B, H, K, V] in `dtype`, zeros if there is none; `width` is V."""
    shape = (q.shape[0], q.shape[2], q.shape[3], width)
    if state is None:
        return q.new_zeros(shape, dtype=dtype)
    if state.shape != shape:
        raise LimbeckError(f"state has shape {list(state.shape)}", expected=f"[B, H, K, V] = {list(shape)}")
    return state.to(dtype)


def stack_outputs(outputs: list[Tensor], q: Tensor, v: Tensor) -> Tensor:
    """Stack the outputs [B, H, 1, V] of the tokens, of which there may be none, to [B, T, H, V] in v's dtype."""
    if not outputs:
        return v.new_zeros(*q.shape[:3], v.shape[-1])
    return torch.stack(outputs, 1).squeeze(-2).to(v.dtype)


# ------------------------------------------------------------------ chunks


def check_chunk_size(chunk: int) -> None:
    """Raise a LimbeckError unless `chunk` is a power of two: blocks are halved down to single tokens."""
    if chunk < 1 or chunk & (chunk - 1):
        raise LimbeckError(f"chunk is {chunk}", expected="a power of two", hint="chunk=64")


def resolve_chunk_size(chunk: int | None, length: int) -> int:
    """Return the chunk size to use: 64 for None, and no longer than the sequence rounded up to a power of two."""
    chunk = 64 if chunk is None else chunk
    check_chunk_size(chunk)
    return min(chunk, 1 << (length - 1).bit_length())


def to_chunks(x: Tensor, chunk: int, dtype: torch.dtype) -> Tensor:
    """Cut [B, T, H, D] into contiguous [N, B, H, C, D], padded with zeros, which are no-op tokens for all operators."""
    x = x.to(dtype)
    rest = -x.shape[1] % chunk
    if rest:
        x = F.pad(x, (0, 0, 0, 0, 0, rest))
    return x.unflatten(1, (-1, chunk)).permute(1, 0, 3, 2, 4).contiguous()


def from_chunks(x: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Join chunks [N, B, H, C, D] to [B, T, H, D]."""
    return x.permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :length].to(dtype)


def has_bounded_decay(log_decay: Tensor) -> bool:
    """Tell whether no chunk of log decays [..., C, D] decays below exp(−40).

    Such a chunk needs no halving: exp(±20) about its middle is far from the limits of float32. False under
    torch.compile, which cannot branch on values.
    """
    return not torch.compiler.is_compiling() and bool(log_decay.detach().abs().sum(-2).max() <= 40.0)


# ------------------------------------------------------------------ packed documents


def find_document_starts(segments: Tensor) -> Tensor:
    """Mark the first token of each document, [B, T] bool. The incoming state belongs to document 0."""
    return segments != F.pad(segments[:, :-1], (1, 0))


def build_document_mask(segments: Tensor) -> Tensor:
    """Mark the pairs of tokens that are of one document, [B, 1, T, T] bool."""
    return (segments.unsqueeze(-1) == segments.unsqueeze(-2)).unsqueeze(1)


@dataclass(frozen=True)
class DocumentMasks:
    """Masks that keep the documents of chunks apart; their shapes broadcast over heads and widths.

    Attributes:
        within_document: [N,B,1,C,C] both tokens are of one document.
        reads_state: [N,B,1,C,1] the token is of the document of the chunk's incoming state.
        writes_state: [N,B,1,C,1] the token is of the document of the chunk's outgoing state.
        carries_state: [N,B,1,1,1] incoming and outgoing state are of one document.
    """

    within_document: Tensor
    reads_state: Tensor
    writes_state: Tensor
    carries_state: Tensor

    @classmethod
    def from_segments(cls, segments: Tensor, chunk: int) -> "DocumentMasks":
        """Build the masks from document numbers [B, T]; padding belongs to the last document."""
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


# ------------------------------------------------------------------ helpers of hand-written backward passes


def add_matmul_(out: Tensor, a: Tensor, b: Tensor, sign: int = 1) -> Tensor:
    """Add sign · a b to `out`, in place and in one pass; leading dimensions agree, `out` is contiguous."""
    size = -1 if out.dim() == 3 else out.shape[:-2].numel()
    flat = (x.reshape(size, *x.shape[-2:]) for x in (a, b))
    out.view(size, *out.shape[-2:]).baddbmm_(*flat, alpha=sign)
    return out


def apply_decay(state: Tensor, decay: Tensor | None, n: int, *, into: Tensor) -> None:
    """Write the state, decayed by chunk n's decay, into `into`."""
    if decay is None:
        into.copy_(state)
    else:
        torch.mul(state, decay[n], out=into)


def compute_decay_grad(states: Tensor, dstates: Tensor, decay: Tensor | None) -> Tensor | None:
    """Return the gradient of D from the states before each chunk and the gradients after it."""
    if decay is None:
        return None
    per_channel = (states[:-1] * dstates[1:]).sum(-1, keepdim=True)
    return per_channel.sum(-2, keepdim=True) if decay.shape[-2] == 1 else per_channel


def strict_once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate the backward of an operator that can be differentiated once: a second time raises LimbeckError.

    torch's `once_differentiable` attaches that error to a dead end of the graph, so `torch.autograd.grad` with given
    inputs misses it and silently leaves terms out. Here it is attached to everything that the gradient depends on.
    """

    @functools.wraps(backward)
    def wrapped(ctx, *output_grads):
        with torch.no_grad():
            input_grads = backward(ctx, *output_grads)
        if not torch.is_grad_enabled():
            return input_grads
        sources = [x for x in (*output_grads, *ctx.saved_tensors) if x is not None and x.requires_grad]
        return tuple(None if x is None else _RaiseOnBackward.apply(x, *sources) for x in input_grads)

    return wrapped


class _RaiseOnBackward(torch.autograd.Function):
    """Return the first of some tensors; its derivative with respect to any of them is an error."""

    @staticmethod
    def forward(ctx, x, *sources):
        return x.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise LimbeckError(
            "a mixer's operator has no second derivative",
            expected="first derivatives, which are written by hand",
            hint="the operator's `recurrent` form is plain autograd",
        )
