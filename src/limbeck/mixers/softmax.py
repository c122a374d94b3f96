"""Softmax attention itself, as a mixer: the control of experiments, o_t = Σ_{j≤t} softmax_j(scale · q_t·k_j) v_j.

It goes through everything that a student goes through (conversion, stages, cache, export) and must equal the teacher:
every stage's loss is zero at the start, and perplexity is the teacher's. Its cache grows with the length, unlike every
other mixer's.

Start: the teacher's attention (without soft caps, windows and sinks, which a mixer does not get).
"""

import torch
from torch import Tensor

from limbeck.mixers.base import Mixer
from limbeck.mixers.registry import register
from limbeck.mixers.types import State, Tokens
from limbeck.ops.common import repeat_kv


@register
class Softmax(Mixer):
    """See the module's docstring."""

    name = "softmax"
    source = "arXiv 1706.03762, eq. 1"
    summary = "softmax attention, the control arm: must come out as the teacher, its cache grows"
    grows = True
    controlled = {}  # a head norm would make it another model than the teacher

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
        length = q.shape[1]
        new = {"k": k, "v": v, "valid": _valid(tokens, k), "segments": _segments(tokens, k)}
        if "k" in state:
            # The incoming state belongs to document 0 of this call.
            old = {**state, "segments": state["segments"] - state["segments"][:, -1:]}
            new = {name: torch.cat([old[name], tensor], 1) for name, tensor in new.items()}
        weights = self._weights(q, new["k"], new["valid"], new["segments"], length)
        return torch.einsum("bhij,bjhv->bihv", weights, repeat_kv(new["v"], self.shape.heads)).to(v.dtype), new

    def attend_matrix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens) -> Tensor:
        return self._weights(q, k, _valid(tokens, k), _segments(tokens, k), q.shape[1])

    def memory_numel(self) -> int:
        """Count the numbers that each token adds."""
        return self.shape.kv_heads * (self.shape.key_width + self.shape.value_width)

    def _weights(self, q: Tensor, k: Tensor, valid: Tensor, segments: Tensor, length: int) -> Tensor:
        """Compute the softmax weights [B, H, T, keys]; the queries are the last `length` tokens of the keys."""
        total = k.shape[1]
        logits = torch.einsum("bihk,bjhk->bhij", q * self.shape.scale, repeat_kv(k, self.shape.heads))
        causal = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length)
        same = segments[:, -length:, None] == segments[:, None, :]
        allowed = (causal & same & valid[:, None, :])[:, None]
        # A padded query may see nothing at all; its row is zero, not uniform.
        return logits.masked_fill(~allowed, torch.finfo(logits.dtype).min).softmax(-1) * allowed


def _valid(tokens: Tokens, k: Tensor) -> Tensor:
    return torch.ones(k.shape[:2], dtype=torch.bool, device=k.device) if tokens.valid is None else tokens.valid


def _segments(tokens: Tokens, k: Tensor) -> Tensor:
    return torch.zeros(k.shape[:2], dtype=torch.long, device=k.device) if tokens.segments is None else tokens.segments
