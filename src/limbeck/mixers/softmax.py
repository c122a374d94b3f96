"""Softmax attention itself, as a mixer: the control of experiments, o_t = Σ_{j≤t} softmax_j(scale · q_t·k_j) v_j.

It goes through everything that a student goes through (conversion, stages, cache, export) and must equal the teacher:
every stage's loss is zero at the start, and perplexity is the teacher's. Its cache grows with the length, unlike every
other mixer's. `head_split` gives it some of a layer's heads only.

Start: the teacher's attention (without soft caps, windows and sinks, which a mixer does not get).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.mixers.base import Mixer
from limbeck.mixers.registry import register
from limbeck.mixers.types import State, Tokens
from limbeck.ops.common import repeat_kv


@register
class Softmax(Mixer):
    """See the module's docstring.

    The state is the keys and values of all tokens, `k` [B, N, G, K] and `v` [B, N, G, V], and from the first call with
    padding or documents on, which of them the next token may see: `valid` [B, N].
    """

    name = "softmax"
    source = "arXiv 1706.03762, eq. 1"
    summary = "softmax attention, the control arm: must come out as the teacher, its cache grows"
    grows = True
    controlled = {}  # a head norm would make it another model than the teacher

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
        keys, values = (torch.cat([state[n].to(z.dtype), z], 1) if state else z for n, z in (("k", k), ("v", v)))
        new = {"k": keys, "v": values}
        allowed = None
        if tokens.valid is not None or tokens.segments is not None or "valid" in state:
            valid, segments = _join_tokens(tokens, state, keys.shape[1], k)
            allowed = _build_mask(valid, segments, q.shape[1])
            # The next call's document 0 is that of the last token: it sees no other.
            new["valid"] = valid & (segments == segments[:, -1:])
        elif state and q.shape[1] > 1:
            allowed = _build_causal_mask(q.shape[1], keys.shape[1], q.device)[None]
        return self._attend(q, keys, values, allowed).to(v.dtype), new

    def attend_matrix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens) -> Tensor:
        allowed = _build_mask(*_join_tokens(tokens, {}, k.shape[1], k), q.shape[1])[:, None]
        logits = torch.einsum("bihk,bjhk->bhij", q * self.shape.scale, repeat_kv(k, self.shape.heads))
        # A padded query may see nothing at all; its row is zero, not uniform.
        return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1) * allowed

    def memory_numel(self) -> int:
        """Count the numbers that each token adds."""
        return self.shape.kv_heads * (self.shape.key_width + self.shape.value_width)

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None) -> Tensor:
        """Attend from q [B, T, H, K] to N keys: [B, T, H, V]; causal where `allowed` [B|1, T, N] is None."""
        length, heads = q.shape[1:3]
        dtype = torch.promote_types(torch.promote_types(q.dtype, keys.dtype), values.dtype)
        q, k, v = (z.transpose(1, 2).to(dtype) for z in (q, keys, values))
        if length == 1:
            # The heads of a group stand below each other as its queries, so that keys need not be repeated.
            q = q.squeeze(2).unflatten(1, (k.shape[1], -1))
        else:
            k, v = repeat_kv(k, heads, 1), repeat_kv(v, heads, 1)
        if allowed is None:
            o = F.scaled_dot_product_attention(q, k, v, is_causal=length > 1, scale=self.shape.scale)
        else:
            # A padded query may see nothing at all. Some kernels divide zero by zero there, so it sees everything and
            # its row is cleared afterwards.
            sees = allowed.any(-1, keepdim=True)[:, None]
            mask = allowed[:, None] | ~sees
            o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.shape.scale).masked_fill(~sees, 0)
        return o.flatten(1, 2).unsqueeze(1) if length == 1 else o.transpose(1, 2)


def _join_tokens(tokens: Tokens, state: State, total: int, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of all `total` keys are valid, and their document numbers: [B, total] each.

    Args:
        state: whose keys belong to document 0 of this call.
        k: [B, T, G, K], the call's own keys.
    """
    batch, length = k.shape[:2]
    held = state.get("valid", torch.ones(batch, total - length, dtype=torch.bool, device=k.device))
    valid = torch.ones(batch, length, dtype=torch.bool, device=k.device) if tokens.valid is None else tokens.valid
    none = torch.zeros(batch, length, dtype=torch.long, device=k.device)
    segments = none if tokens.segments is None else tokens.segments
    return torch.cat([held, valid], 1), F.pad(segments, (total - length, 0))


def _build_mask(valid: Tensor, segments: Tensor, length: int) -> Tensor:
    """Mark the keys that each of the last `length` tokens may see, [B, length, N], for valid and segments [B, N]."""
    same = segments[:, -length:, None] == segments[:, None]
    return _build_causal_mask(length, valid.shape[1], valid.device) & same & valid[:, None]


def _build_causal_mask(length: int, total: int, device: torch.device) -> Tensor:
    """Mark the keys that the last `length` of `total` tokens may see if all are one document, [length, total]."""
    return torch.ones(length, total, dtype=torch.bool, device=device).tril(total - length)
