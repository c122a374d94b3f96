"""Softmax attention over the last `window` tokens and the first few, the sinks: a cache that does not grow.

    o, state = sliding_window.chunked(q, k, v, window=128, sinks=4, scale=0.125)                      # a whole sequence
    o, state = sliding_window.chunked(q1, k1, v1, window=128, sinks=4, scale=0.125, state=state)      # the next token

A query sees the token itself, the window − 1 before it and the first `sinks` of its document (StreamingLLM, arXiv
2309.17453). Masked tokens take no place among either. Queries go in blocks, each against the blocks that its window
reaches and the sinks: time and memory O(T · window).

Shapes: q [B,T,H,K]; k [B,T,G,K] and v [B,T,G',V] with G and G' dividing H, head h using group h // (H/G); segments
[B,T] non-decreasing document numbers, the incoming state belonging to document 0; valid [B,T] bool, False where a token
is padding. Legend: S sinks, L keys (those of the state, `held`, and then the new ones), N blocks, C queries and R keys
of a block. Shapes that do not fit raise LimbeckError.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.ops import common
from limbeck.ops.window_state import (
    compute_final_state,
    gather_tokens,
    is_full,
    locate_sinks,
    pack_valid_tokens,
    prepend_state,
    reset_new_documents,
    shift_state,
    unpack_valid_tokens,
)

# Queries in a block: fewer are slow, more see more keys than they need. Wide windows take a quarter of their width.
BLOCK = 64
AttentionFunction = Callable[..., Tensor]  # called as F.scaled_dot_product_attention is


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float = 1.0,
    state: dict[str, Tensor] | None = None,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Attend in the dtype of the inputs, over several tokens or, with a state, the next one.

    Returns:
        o [B,T,H,V] in v's dtype, zero where a token is not valid, and the state, of the same size for every T:
        `k` and `v` [B,S+window−1,G,·], the sinks and then the last tokens up to the newest, zeros where there are none
        yet, and `count` [B], the number of tokens that their document has had.
    """
    _check(q, k, v, window, sinks, segments, valid)
    if valid is not None and not torch.compiler.is_compiling() and bool(valid.all()):
        valid = None
    with common.disable_autocast(q):
        keys, values, count = prepend_state(q, k, v, window, sinks, state)
        if state is not None and q.shape[1] == 1 and valid is None:
            keys, values, count = reset_new_documents(keys, values, count, segments)
            full = is_full(count, window, sinks)
            o = _next(q, keys, values, count, window, sinks, scale, F.scaled_dot_product_attention, full).to(v.dtype)
            return o, shift_state(keys, values, count, sinks, full)
        held = keys.shape[1] - k.shape[1]  # S + window − 1, or none
        packed, keys, values, number = pack_valid_tokens(q, keys, values, held, segments, valid)
        o = _attend(packed, keys, values, _first(number, count), held, window, sinks, scale).to(v.dtype)
        new = compute_final_state(keys, values, count, held, q.shape[1], window, sinks, segments, valid)
        return unpack_valid_tokens(o, valid), new


def evicting(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float = 1.0,
    state: dict[str, Tensor] | None = None,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
    normalize: bool = True,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """Attend as `chunked` does, for mixers that read the tokens behind the window in another way.

    Args:
        normalize: False leaves out the softmax's division.

    Returns:
        o [B,T,H,V], bit for bit that of `chunked`; without `normalize` [B,T,H,V+1] in float32 (float64 for float64
        inputs): the weighted values and, in the last column, the sum of weights, which are exponentials relative to the
        largest one. Then the key [B,T,G,K] and value [B,T,G',V] of the token that each token evicts from the window,
        and where there is one that is no sink, [B,T] bool; and the state of `chunked` for a window of one more, since
        the token to be evicted next must still be in it.
    """
    _check(q, k, v, window, sinks, segments, valid)
    length, attend = q.shape[1], F.scaled_dot_product_attention if normalize else _Exponentials.attend
    if valid is not None and not torch.compiler.is_compiling() and bool(valid.all()):
        valid = None
    with common.disable_autocast(q):
        keys, values, count = prepend_state(q, k, v, window + 1, sinks, state)
        if state is not None and length == 1 and valid is None:
            keys, values, count = reset_new_documents(keys, values, count, segments)
            oldest = slice(sinks, sinks + 1)
            near = [torch.cat([x[:, :sinks], x[:, sinks + 1 :]], 1) if sinks else x[:, 1:] for x in (keys, values)]
            full = is_full(count, window, sinks)
            o = _next(q, near[0], near[1], count, window, sinks, scale, attend, full)
            left = (count >= window + sinks).unsqueeze(1)
            new = shift_state(keys, values, count, sinks, full)
            return o.to(v.dtype) if normalize else o, (keys[:, oldest], values[:, oldest], left), new
        held = keys.shape[1] - length
        packed, keys, values, number = pack_valid_tokens(q, keys, values, held, segments, valid)
        first = _first(number, count)
        o = _attend(packed, keys, values, first, held, window, sinks, scale, attend=attend)
        o = o.to(v.dtype) if normalize else o
        behind = torch.arange(length, device=q.device) - window  # at [S + i] of the keys, or before them
        left = (behind - first >= sinks).expand(len(q), -1)
        padding = (0, 0, 0, 0, min(window, length), 0)
        evicted = [
            x[:, sinks : sinks + length] if held else F.pad(x[:, : max(length - window, 0)], padding)
            for x in (keys, values)
        ]
        o, k, v, left = (unpack_valid_tokens(x, valid) for x in (o, *evicted, left))
        new = compute_final_state(keys, values, count, held, length, window + 1, sinks, segments, valid)
        return o, (k, v, left), new


def matrix(
    q: Tensor,
    k: Tensor,
    *,
    window: int,
    sinks: int = 0,
    scale: float = 1.0,
    segments: Tensor | None = None,
    valid: Tensor | None = None,
    normalize: bool = True,
) -> Tensor:
    """Build the softmax weights M [B,H,T,T]: without a state o = M v, head by head. Rows of masked tokens are zero.

    Args:
        normalize: False for exponentials relative to the largest of a row, as in `evicting`.
    """
    _check(q, k, None, window, sinks, segments, valid)
    length, heads, dtype = q.shape[1], q.shape[2], common.compute_dtype(q, k)
    with common.disable_autocast(q):
        real = torch.ones(1, length, dtype=torch.bool, device=q.device) if valid is None else valid
        seen = build_window_mask(real, window=window, sinks=sinks, segments=segments)
        scores = scale * (q.to(dtype).transpose(1, 2) @ common.repeat_kv(k.to(dtype).transpose(1, 2), heads, 1).mT)
        # A masked token would divide zero by zero, so it sees itself and its row is cleared afterwards.
        own_token = torch.eye(length, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(~(seen | own_token).unsqueeze(1), -torch.inf)
        weights = scores.softmax(-1) if normalize else (scores - scores.amax(-1, keepdim=True)).exp()
        return weights if valid is None else weights * real[:, None, :, None]


def build_window_mask(valid: Tensor, *, window: int, sinks: int, segments: Tensor | None = None) -> Tensor:
    """Mark the tokens that each token attends to, [B,T,T] bool, for valid [B,T]."""
    before, first = _count_tokens_before(valid, segments)
    at = torch.arange(valid.shape[1], device=valid.device)
    seen = (at[:, None] >= at) & valid[:, None]
    if segments is not None:
        seen = seen & common.build_document_mask(segments).squeeze(1)
    near = before[:, :, None] - before[:, None] < window
    return seen & (near | (before - first < sinks)[:, None]) & valid[:, :, None]


def find_evicted(valid: Tensor, *, window: int, sinks: int, segments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Find the token that each token evicts from the window, as `evicting` returns it without a state.

    Returns:
        Its index [B,T], arbitrary where there is none, and where there is one that is no sink, [B,T] bool; for valid
        [B,T] bool.
    """
    before, first = _count_tokens_before(valid, segments)
    behind = before - window  # counted among the valid tokens, as `first` is
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)  # the valid tokens, then the others
    return order.gather(1, behind.clamp(min=0)), valid & (behind - first >= sinks)


def state_numel(groups: int, key: int, value: int, window: int, sinks: int) -> int:
    """Count the numbers in the state of one sequence: keys, values and the count."""
    return (sinks + window - 1) * groups * (key + value) + 1


def _count_tokens_before(valid: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Count the valid tokens before each token and before the document of each, both [B,T]."""
    before = valid.cumsum(1) - valid.long()
    if segments is None:
        return before, torch.zeros_like(before)
    return before, torch.where(common.find_document_starts(segments), before, 0).cummax(1).values


def _check(
    q: Tensor, k: Tensor, v: Tensor | None, window: int, sinks: int, segments: Tensor | None, valid: Tensor | None
) -> None:
    common.check_shapes(q, k, v, segments=segments)
    if window < 1 or sinks < 0:
        raise LimbeckError(f"window is {window} and sinks is {sinks}", expected="window ≥ 1 and sinks ≥ 0")
    if valid is not None and (valid.shape != q.shape[:2] or valid.dtype != torch.bool):
        raise LimbeckError(
            f"valid has shape {list(valid.shape)} and dtype {valid.dtype}",
            expected=f"[B, T] = {list(q.shape[:2])} of bool",
        )


def _next(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    count: Tensor,
    window: int,
    sinks: int,
    scale: float,
    attend: AttentionFunction,
    full: bool,
) -> Tensor:
    """Attend from one token to a state, in few operations: decoding spends its time on calls, not on arithmetic."""
    seen = None
    if not full:
        # The number of tokens that it takes to fill each place; a sink counts once it has left the window.
        needed = torch.arange(sinks + window - 1, -1, -1, device=q.device)
        if sinks:
            needed = torch.cat([needed[:sinks].flip(0), needed[sinks:]])
        seen = (count.unsqueeze(1) >= needed)[:, None, None]
    near = (
        (keys, values)
        if keys.shape[2] == values.shape[2]
        else (common.repeat_kv(x, q.shape[2]) for x in (keys, values))
    )
    k, v = (x.transpose(1, 2) for x in near)
    folded = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])  # the heads of a group as its queries
    if not q.dtype == k.dtype == v.dtype:
        dtype = _common_dtype(q, k, v)
        folded, k, v = folded.to(dtype), k.to(dtype), v.to(dtype)
    o = attend(folded, k, v, attn_mask=seen, scale=scale)
    return o.reshape(q.shape[0], 1, q.shape[2], o.shape[3])


class _Exponentials(torch.autograd.Function):
    """Compute Σ exp(s − c) v with s = scale · q·k, c the largest s of a row, and v with a last column of ones."""

    @staticmethod
    def attend(q: Tensor, k: Tensor, v: Tensor, *, attn_mask: Tensor | None, scale: float) -> Tensor:
        dtype = common.compute_dtype(q, k, v)
        v = F.pad(v.to(dtype), (0, 1), value=1.0)
        hidden = None if attn_mask is None else ~attn_mask
        return _Exponentials.apply(scale * q.to(dtype), k.to(dtype), v, hidden)

    @staticmethod
    def forward(ctx, q, k, v, hidden):
        weights = q @ k.mT
        if hidden is not None:
            weights.masked_fill_(hidden, -torch.inf)
        largest, at = weights.max(-1, keepdim=True)
        weights.sub_(largest).exp_()
        ctx.save_for_backward(q, k, v, weights, at)
        return weights @ v

    @staticmethod
    @common.strict_once_differentiable
    def backward(ctx, do):
        q, k, v, weights, at = ctx.saved_tensors
        with common.disable_autocast(do):
            ds = (do @ v.mT).mul_(weights)
            ds.scatter_add_(-1, at, -ds.sum(-1, keepdim=True))  # the gradient of c goes to the largest
            return ds @ k, ds.mT @ q, weights.mT @ do, None


def _common_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)


def _first(number: Tensor | None, count: Tensor) -> Tensor:
    """Compute where the document of each token begins, [B, T] or [B, 1], counted from the first new token.

    A query sees nothing before that, neither other documents nor empty places of the state.
    """
    incoming = -count.unsqueeze(1)
    if number is None:
        return incoming
    at = torch.arange(number.shape[1], device=number.device)
    return torch.where(number == 0, incoming, torch.where(common.find_document_starts(number), at, 0).cummax(1).values)


def _attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    first: Tensor,
    held: int,
    window: int,
    sinks: int,
    scale: float,
    attend: AttentionFunction = F.scaled_dot_product_attention,
) -> Tensor:
    """Attend in blocks: outputs [B, T, H, V]. The first `held` keys are the state's; `first` is as in `_first`."""
    batch, length, heads = q.shape[:3]
    if not held and first.shape[1] == 1 and length <= window and attend is F.scaled_dot_product_attention:
        return _attend_to_all(q, keys, values, scale)
    past = window - 1 if held else 0  # tokens of the state's window
    block = max(BLOCK, window // 4)
    if length <= block:
        block, reach = length, past
    else:
        reach = -(-min(window - 1, length - 1 + past) // block) * block
    count = -(-length // block)
    end = count * block - length
    i = torch.arange(count * block, device=q.device).view(count, block, 1)
    j = torch.arange(-reach, block, device=q.device) + block * torch.arange(count, device=q.device).view(-1, 1, 1)
    if first.shape[1] > 1:
        first = torch.cat([first, first[:, -1:].expand(-1, end)], 1) if end else first
        first = first.view(batch, count, block, 1)
    else:
        first = first.view(batch, 1, 1, 1)
    seen = (j <= i) & (j >= first.clamp(min=-past)) & ((i - j < window) | (j < first + sinks))
    near = [_regions(x[:, held - past :], past, reach, block, end) for x in (keys, values)]
    if sinks and (held or count > 1):
        # Sinks further back than the block sees are those of its first query's document: others begin inside it.
        document = first[:, :, :1]
        sink = document + torch.arange(sinks, device=q.device)  # [B, N|1, 1, S]
        far = ((first == document) & (sink < j[..., :1].clamp(min=-past))).expand(-1, count, block, -1)
        seen = torch.cat([far, seen.expand(len(far), -1, -1, -1)], -1)
        where = locate_sinks(sink.squeeze(2), held, past).clamp(max=keys.shape[1] - 1).expand(-1, count, -1)
        for n, x in enumerate((keys, values)):
            taken = gather_tokens(x, where.flatten(1)).unflatten(1, (count, sinks))
            near[n] = torch.cat([taken, near[n]], 2)
    if keys.shape[2] != values.shape[2]:
        near = [common.repeat_kv(x, heads, 3) for x in near]
    queries = F.pad(q, (0, 0, 0, 0, 0, end)) if end else q
    groups = near[0].shape[3]
    # The queries of a group stand below each other, so that keys need not be repeated.
    folded = queries.unflatten(2, (groups, -1)).unflatten(1, (count, block)).permute(0, 1, 3, 4, 2, 5)
    dtype = _common_dtype(q, keys, values)
    seen = seen.unsqueeze(2).expand(batch, count, heads // groups, -1, -1).flatten(2, 3).flatten(0, 1)
    k, v = (x.transpose(2, 3).flatten(0, 1).to(dtype) for x in near)
    folded = folded.flatten(3, 4).flatten(0, 1).to(dtype)
    o = attend(folded, k, v, attn_mask=seen.unsqueeze(1), scale=scale)
    o = o.unflatten(2, (-1, block)).unflatten(0, (batch, count)).permute(0, 1, 4, 2, 3, 5)
    return o.flatten(3, 4).flatten(1, 2)[:, :length]


def _attend_to_all(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """Attend to all tokens before, where the window is at least as long as the text: outputs [B, T, H, V]."""
    dtype, heads = _common_dtype(q, keys, values), q.shape[2]
    q, k, v = (x.transpose(1, 2).to(dtype) for x in (q, keys, values))
    k, v = common.repeat_kv(k, heads, 1), common.repeat_kv(v, heads, 1)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)


def _regions(x: Tensor, past: int, reach: int, block: int, end: int) -> Tensor:
    """Gather what each block sees of x [B, past+T, G, D], new tokens after the state's: [B, N, reach+block, G, D]."""
    if past == reach and x.shape[1] == reach + block:  # a single block
        return x.unsqueeze(1)
    blocks = F.pad(x, (0, 0, 0, 0, reach - past, end)).unflatten(1, (-1, block))
    wide = reach // block
    return torch.cat([blocks[:, n : blocks.shape[1] - wide + n] for n in range(wide + 1)], 2)
