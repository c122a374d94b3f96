"""What a student computes with while it is exported to ONNX: nodes of the standard, and plain torch where it has none.

    substitute_operators(mixer)          # this mixer, and those inside it, of a copy of the student
    mixer(q, k, v, x, tokens=tokens, state=state)

Three recurrences become the operator LinearAttention of opset 27, short convolutions CausalConvWithState of the same.
The window and softmax as a mixer are written again without branches on the number of tokens, which a graph for any
number cannot have; their states are those of `limbeck.mixers`. Every function takes padding into account: a masked
token is a no-op, wherever it stands.

Outside an export the operators compute what they always do, so a student with them can be tried before it is written.

Shapes: B batch, T time, H query heads, G key/value heads, K key width, V value width, W window, S sinks, N keys.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.mixers import Mixer, State, Tokens
from limbeck.mixers.sliding_window import SlidingWindow
from limbeck.mixers.softmax import Softmax
from limbeck.ops import delta_rule, scalar_decay, vector_decay
from limbeck.ops.common import repeat_kv

# Nodes newer than the opset that torch's exporter can write are carried in this domain until the graph is complete.
NEW_DOMAIN = "opset27"
LINEAR_OPERATORS = (scalar_decay, vector_decay, delta_rule)


def substitute_operators(mixer: Mixer) -> None:
    """Make a mixer and those inside it compute with the functions of this module."""
    for inner in mixer.modules():
        if not isinstance(inner, Mixer):
            continue
        if inner.operator in LINEAR_OPERATORS:
            inner.operator = LinearAttentionNode(inner.operator)  # type: ignore[assignment]
        if inner.options.conv:
            inner._convolve = partial(convolve, inner)  # type: ignore[method-assign]
        if isinstance(inner, SlidingWindow):
            inner.attend = partial(attend_window, inner)  # type: ignore[method-assign]
        elif isinstance(inner, Softmax):
            inner.attend = partial(attend_softmax, inner)  # type: ignore[method-assign]


class LinearAttentionNode:
    """Takes the place of a module of `limbeck.ops`; in an export its call becomes one node, for any number of tokens.

    S_t = exp(g_t) S_{t-1} + k_t (w_t)ᵀ and o_t = S_tᵀ q_t, with w_t = v_t, or β_t (v_t − exp(g_t) S_{t-1}ᵀ k_t) for the
    delta rule (ONNX, LinearAttention-27).
    """

    def __init__(self, operator: Any) -> None:
        self.operator = operator
        self.__name__ = operator.__name__  # for `Mixer.operator_name`

    def chunked(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *gates: Tensor | None,
        state: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Compute o [B, T, H, V] and the state [B, H, K, V]; arguments as in `limbeck.ops`."""
        if not torch.compiler.is_exporting():
            return self.operator.chunked(q, k, v, *gates, state=state, segments=segments)
        assert state is not None
        assert segments is None
        beta, log_decay = gates if self.operator is delta_rule else (None, *gates)
        batch, length, heads, _ = q.shape
        if log_decay is not None and log_decay.dim() == 1:
            log_decay = log_decay.expand(batch, length, heads)
        rule = (
            ("" if log_decay is None else "gated")
            if beta is None
            else ("delta" if log_decay is None else "gated_delta")
        )
        tensors = [q, repeat_kv(k, heads), repeat_kv(v, heads), state, log_decay, beta]
        packed = [z if z is None or z is state else z.to(state.dtype).reshape(batch, length, -1) for z in tensors]
        o, state = torch.onnx.ops.symbolic_multi_out(
            f"{NEW_DOMAIN}::LinearAttention",
            packed,
            {"q_num_heads": heads, "kv_num_heads": heads, "scale": 1.0, "update_rule": rule or "linear"},
            dtypes=(state.dtype, state.dtype),
            shapes=((batch, length, heads * v.shape[-1]), state.shape),
        )
        return o.reshape(batch, length, heads, -1).to(v.dtype), state

    recurrent = chunked


def convolve(mixer: Mixer, name: str, z: Tensor, tokens: Tokens, state: State, carried: State) -> Tensor:
    """Convolve q, k or v [B, T, heads, width] as `Mixer` does; in an export by CausalConvWithState."""
    if not torch.compiler.is_exporting():
        return Mixer._convolve(mixer, name, z, tokens, state, carried)
    key, weight = f"conv_{name}", mixer.conv(name)  # [W, heads, width]; weight[0] meets the token itself
    valid, past = tokens.valid, state[f"conv_{name}"]
    assert valid is not None
    batch, length, *channels = z.shape
    held = weight.shape[0] - 1
    z = z.masked_fill(~valid[..., None, None], 0)
    # Padding is sorted to before the state, where no token's window reaches.
    history = take_tokens(torch.cat([past, z], 1).flatten(2), order_valid_last(valid, held))
    history = history.transpose(1, 2)  # channels before time
    y, new = torch.onnx.ops.symbolic_multi_out(
        f"{NEW_DOMAIN}::CausalConvWithState",
        [history[..., held:], weight.flip(0).flatten(1).t().unsqueeze(1), None, history[..., :held]],
        {"activation": "none"},
        dtypes=(z.dtype, z.dtype),
        shapes=((batch, history.shape[1], length), (batch, history.shape[1], held)),
    )
    carried[key] = new.transpose(1, 2).unflatten(2, channels)
    position = length - valid.sum(1, keepdim=True) + valid.cumsum(1) - 1
    y = take_tokens(y.transpose(1, 2), position.clamp(min=0)).unflatten(2, channels)
    return y.masked_fill(~valid[..., None, None], 0)


def attend_window(
    mixer: SlidingWindow, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State
) -> tuple[Tensor, State]:
    """Attend to the last W tokens and the first S, with the state of `limbeck.ops.sliding_window`.

    Keys are counted: those of the state, S sinks and W − 1 recent ones, and the new tokens. Time and memory grow with
    T (T + W), so long prompts are better read in pieces.
    """
    sinks, window, (batch, length) = mixer.options.sinks, mixer.window, q.shape[:2]
    valid = _valid(tokens, k)
    if not state:
        state = {n: z.new_zeros(batch, sinks + window - 1, *z.shape[2:]) for n, z in (("k", k), ("v", v))}
        state["count"] = torch.zeros(batch, dtype=torch.long, device=k.device)
    count = state["count"][:, None]
    sink, recent = (torch.arange(n, device=k.device) for n in (sinks, window - 1))
    new = count + valid.cumsum(1) - 1
    recent = recent + count - (window - 1)
    query = new.unsqueeze(-1)  # [B, T, 1]
    # a sink counts as one once it has left the window
    seen = [(sink < count)[:, None] & (query - sink >= window)]
    seen += [(recent >= 0)[:, None] & (query - recent[:, None] < window)]
    seen += [mark_visible(valid, length) & ((query - new[:, None] < window) | (new < sinks)[:, None])]
    keys, values = (torch.cat([state[n], z], 1) for n, z in (("k", k), ("v", v)))
    o = _attend(q, keys, values, torch.cat(seen, -1), mixer.shape.scale)
    is_new_sink = (valid[:, None] & (new[:, None] == sink[:, None])).to(k.dtype)  # [B, S, T]
    order = order_valid_last(valid, window - 1)[:, length:]
    after = {"count": state["count"] + valid.sum(1)}
    for name, z in (("k", k), ("v", v)):
        first = state[name][:, :sinks] + torch.einsum("bst,btgk->bsgk", is_new_sink, z)
        last = take_tokens(torch.cat([state[name][:, sinks:], z], 1).flatten(2), order).unflatten(2, z.shape[2:])
        after[name] = torch.cat([first, last], 1)
    return o.masked_fill(~valid[..., None, None], 0).to(v.dtype), after


def attend_softmax(
    mixer: Softmax, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State
) -> tuple[Tensor, State]:
    """Attend to all tokens; the state is their keys and values [B, N, G, ·] and which of them are valid [B, N]."""
    own = {"k": k, "v": v, "valid": _valid(tokens, k)}
    new = {name: torch.cat([state[name], z], 1) if state else z for name, z in own.items()}
    o = _attend(q, new["k"], new["v"], mark_visible(new["valid"], q.shape[1]), mixer.shape.scale)
    return o.masked_fill(~own["valid"][..., None, None], 0).to(v.dtype), new


def order_valid_last(valid: Tensor, held: int) -> Tensor:
    """Return the order [B, held + T] that moves padding before all else, for `held` earlier tokens and then valid's.

    Args:
        valid: [B, T] bool.
    """
    real = F.pad(valid, (held, 0), value=True)
    total = real.shape[1]
    at = torch.arange(total, device=valid.device)
    return torch.where(real, at, at - total).argsort(1)


def take_tokens(x: Tensor, at: Tensor) -> Tensor:
    """Select x [B, N, D] at positions [B, M]: [B, M, D]."""
    return x.gather(1, at.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def mark_visible(valid: Tensor, length: int) -> Tensor:
    """Mark what each of the last `length` tokens may see of valid [B, N], [B, length, N].

    A masked token sees itself, since a softmax over nothing is not a number and would reach other tokens as 0 · NaN.
    """
    total = valid.shape[1]
    key = torch.arange(total, device=valid.device)
    query = key[total - length :, None]
    return ((key <= query) & valid[:, None]) | (key == query)


def _attend(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Attend from q [B, T, H, K] to k [B, N, G, K] and v [B, N, G, V] where seen [B, T, N]: [B, T, H, V]."""
    q, k, v = (repeat_kv(z, q.shape[2]).transpose(1, 2) for z in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale).transpose(1, 2)


def _valid(tokens: Tokens, k: Tensor) -> Tensor:
    return torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if tokens.valid is None else tokens.valid
