"""What a sliding window keeps: the keys and values of sinks and last tokens, and where they stand among new ones.

    keys, values, count = history(q, k, v, window, sinks, state)
    packed, keys, values, number = pack(q, keys, values, held, segments, valid)
    state = outgoing(keys, values, count, held, length, window, sinks, segments, valid)

Shapes and the state's contents as in `sliding_window`; L tokens with the state's `held` ones ahead, S sinks.
"""

import torch
from torch import Tensor

from limbeck.errors import LimbeckError


def pack(
    q: Tensor, keys: Tensor, values: Tensor, held: int, segments: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """q, keys, values and document numbers with valid tokens first, so that their distances are what counts."""
    if valid is None:
        return q, keys, values, segments
    order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
    behind = torch.cat([torch.arange(held, device=q.device).expand(len(q), -1), held + order], 1)
    number = None if segments is None else segments.gather(1, order)
    return take(q, order), take(keys, behind), take(values, behind), number


def unpack(x: Tensor, valid: Tensor | None) -> Tensor:
    """Rows [B, T, ...] of packed tokens back in their places, those of masked tokens zero."""
    if valid is None:
        return x
    return take(x, (valid.cumsum(1) - 1).clamp(min=0)) * valid.view(*valid.shape, *[1] * (x.dim() - 2))


def history(
    q: Tensor, k: Tensor, v: Tensor, window: int, sinks: int, state: dict[str, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values with the state's ahead of them, and the count of the incoming document."""
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


def forget(keys: Tensor, values: Tensor, count: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same before a single token: a new document finds an empty state."""
    if segments is None:
        return keys, values, count
    goes_on = segments == 0
    kept = goes_on[..., None, None]
    keys, values = (torch.cat([x[:, :-1] * kept, x[:, -1:]], 1) for x in (keys, values))
    return keys, values, count * goes_on[:, 0]


def shifted(keys: Tensor, values: Tensor, count: Tensor, sinks: int) -> dict[str, Tensor]:
    """The state after a single token, the last of the keys."""
    state = {"k": keys[:, 1:], "v": values[:, 1:], "count": count + 1}
    if sinks:
        here = (count.unsqueeze(1) == torch.arange(sinks, device=count.device))[..., None, None]
        for name, x in (("k", keys), ("v", values)):
            state[name] = torch.cat([torch.where(here, x[:, -1:], x[:, :sinks]), x[:, sinks + 1 :]], 1)
    return state


def outgoing(
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
    """The state after the last token: that of its document."""
    total = torch.full_like(count, length) if valid is None else valid.sum(1)
    if segments is None:
        count = count + total
    else:
        last = segments == segments[:, -1:]
        count = (last if valid is None else last & valid).sum(1) + count * (segments[:, -1] == 0)
    token = (total - count).unsqueeze(1) + torch.arange(sinks, device=count.device)
    where = positions(token, held, window - 1 if held else 0)
    filled = torch.arange(sinks, device=count.device) < count.unsqueeze(1)
    recent = torch.arange(1 - window, 0, device=count.device)  # before the next token
    if segments is None and valid is None and keys.shape[1] - bool(held) * sinks >= window - 1:
        after = slice(keys.shape[1] - window + 1, None)  # empty places stay empty
    else:
        after = slice(0, 0)
        where = torch.cat([where, held + total.unsqueeze(1) + recent], 1)
        filled = torch.cat([filled, -recent <= count.unsqueeze(1)], 1)
    where = where.clamp(0, keys.shape[1] - 1)
    kept = (torch.cat([take(x, where) * filled[..., None, None], x[:, after]], 1) for x in (keys, values))
    return {**dict(zip(("k", "v"), kept)), "count": count}


def positions(token: Tensor, held: int, past: int) -> Tensor:
    """Where sinks [..., S] stand among the keys: with the other tokens, or where the state keeps sinks."""
    return torch.where(token >= -past, held + token, torch.arange(token.shape[-1], device=token.device))


def take(x: Tensor, at: Tensor) -> Tensor:
    """x [B, L, ...] at positions [B, M] -> [B, M, ...]."""
    rows = torch.arange(len(x), device=x.device)[:, None] * x.shape[1] + at
    return x.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, at.shape)
