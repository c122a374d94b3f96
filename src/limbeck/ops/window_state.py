"""The state of a sliding window: the keys and values of the sinks and of the last tokens, and how many there were.

    keys, values, count = prepend_state(q, k, v, window, sinks, state)
    new = shift_state(keys, values, count, sinks)              # after one token; `compute_final_state` after several

A state is `k` and `v` [B,S+window−1,G,·], zeros where there is no token yet, and `count` [B], the number of tokens that
their document has had. Valid tokens are packed before masked ones, so that these take no place.

Shapes and legend are those of limbeck.ops.sliding_window.
"""

import functools

import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.ops.common import is_plain_cpu_call


def pack_valid_tokens(
    q: Tensor, keys: Tensor, values: Tensor, held: int, segments: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Sort valid tokens of q, keys, values and document numbers first, so that masked ones do not add to distances."""
    if valid is None:
        return q, keys, values, segments
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    behind = torch.cat([torch.arange(held, device=q.device).expand(len(q), -1), held + order], 1)
    number = None if segments is None else segments.gather(1, order)
    return gather_tokens(q, order), gather_tokens(keys, behind), gather_tokens(values, behind), number


def unpack_valid_tokens(x: Tensor, valid: Tensor | None) -> Tensor:
    """Put rows [B, T, ...] of packed tokens back in their places; those of masked tokens are zero."""
    if valid is None:
        return x
    return gather_tokens(x, (valid.cumsum(1) - 1).clamp(min=0)) * valid.view(*valid.shape, *[1] * (x.dim() - 2))


def prepend_state(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, state: dict[str, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return keys and values with the state's before them, and the count of the incoming document."""
    if state is None:
        return k, v, torch.zeros(len(q), dtype=torch.long, device=q.device)
    for name, x in (("k", k), ("v", v)):
        shape = [len(q), sinks + window - 1, *x.shape[2:]]
        if list(state[name].shape) != shape:
            raise LimbeckError(
                f"the state's {name} has shape {list(state[name].shape)}",
                expected=f"{shape} with window={window} and sinks={sinks}",
            )
    keys, values = (torch.cat([state[name].to(x.dtype), x], 1) for name, x in (("k", k), ("v", v)))
    return keys, values, state["count"]


def is_full(count: Tensor, window: int, sinks: int) -> bool:
    """Return whether it is known that the state of every sequence has no empty place, so that all of it is seen."""
    # Reading values would break a compiled graph and stall an accelerator in every decoding step.
    return is_plain_cpu_call(count) and min(count.tolist(), default=0) >= sinks + window - 1


def reset_new_documents(
    keys: Tensor, values: Tensor, count: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Empty the state of `prepend_state` where its single new token begins a document."""
    if segments is None:
        return keys, values, count
    continues = segments == 0
    mask = continues[..., None, None]
    keys, values = (torch.cat([x[:, :-1] * mask, x[:, -1:]], 1) for x in (keys, values))
    return keys, values, count * continues[:, 0]


def shift_state(keys: Tensor, values: Tensor, count: Tensor, sinks: int, has_sinks: bool = False) -> dict[str, Tensor]:
    """Return the state after a single token, the last of the keys.

    Args:
        has_sinks: whether it is known, on a CPU, that every sequence has all of its sinks.
    """
    if has_sinks:
        # one call for each tensor, where slices to be joined would be four
        kept = _places_but_oldest(keys.shape[1], sinks)
        return {"k": keys.index_select(1, kept), "v": values.index_select(1, kept), "count": count + 1}
    if not sinks:
        return {"k": keys[:, 1:], "v": values[:, 1:], "count": count + 1}
    is_sink = (count.unsqueeze(1) == torch.arange(sinks, device=count.device))[..., None, None]
    first = {name: torch.where(is_sink, x[:, -1:], x[:, :sinks]) for name, x in (("k", keys), ("v", values))}
    state = {name: torch.cat([first[name], x[:, sinks + 1 :]], 1) for name, x in (("k", keys), ("v", values))}
    return {**state, "count": count + 1}


@functools.cache
def _places_but_oldest(places: int, sinks: int) -> Tensor:
    """Return the places of keys on a CPU without the one behind the sinks, which leaves the window."""
    # an index made in inference mode could not be used again where gradients are taken
    with torch.inference_mode(False):
        return torch.cat([torch.arange(sinks), torch.arange(sinks + 1, places)])


def compute_final_state(
    keys: Tensor,
    values: Tensor,
    count: Tensor,
    held: int,
    length: int,
    window: int,
    sinks: int,
    segments: Tensor | None,
    valid: Tensor | None,
) -> dict[str, Tensor]:
    """Return the state after the last token: that of its document."""
    total = torch.full_like(count, length) if valid is None else valid.sum(1)
    if segments is None:
        count = count + total
    else:
        last = segments == segments[:, -1:]
        count = (last if valid is None else last & valid).sum(1) + count * (segments[:, -1] == 0)
    token = (total - count).unsqueeze(1) + torch.arange(sinks, device=count.device)
    where = locate_sinks(token, held, window - 1 if held else 0)
    filled = torch.arange(sinks, device=count.device) < count.unsqueeze(1)
    recent = torch.arange(1 - window, 0, device=count.device)  # counted from the next token
    if segments is None and valid is None and keys.shape[1] - bool(held) * sinks >= window - 1:
        after = slice(keys.shape[1] - window + 1, None)  # empty places stay empty
    else:
        after = slice(0, 0)
        where = torch.cat([where, held + total.unsqueeze(1) + recent], 1)
        filled = torch.cat([filled, -recent <= count.unsqueeze(1)], 1)
    where = where.clamp(0, keys.shape[1] - 1)
    k, v = (torch.cat([gather_tokens(x, where) * filled[..., None, None], x[:, after]], 1) for x in (keys, values))
    return {"k": k, "v": v, "count": count}


def locate_sinks(token: Tensor, held: int, past: int) -> Tensor:
    """Find sinks [..., S] among the keys: with the other tokens, or in the state's places for sinks."""
    return torch.where(token >= -past, held + token, torch.arange(token.shape[-1], device=token.device))


def gather_tokens(x: Tensor, at: Tensor) -> Tensor:
    """Select x [B, L, ...] at positions [B, M]: [B, M, ...]."""
    rows = torch.arange(len(x), device=x.device)[:, None] * x.shape[1] + at
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, at.shape)
