"""LoLCATs: softmax over a window and linear attention over all older tokens, under one normalizer.

    y_n = (g Σ_near exp(s_ni − c_n) v_i + Σ_far φ(q_n)·φ(k_j) v_j) / (g Σ_near exp(s_ni − c_n) + Σ_far φ(q_n)·φ(k_j))

Zhang et al. 2024 (arXiv 2410.10254), equation 6: s = scale · q·k, near the last `window` tokens up to the query itself,
far all before them, c_n the largest score of the window, g one learned factor per head. Every query has exactly that
window, as in equation 6, and not the terraced one of the paper's faster kernel, whose length changes from query to
query. φ is a positive feature map of linear_attention. With `sinks`, the softmax sees the first tokens of a document
too.

The linear part is scalar decay over the tokens that leave the window; the state is its memory and the window's keys and
values. `branches` leaves one of the two sums out of numerator and denominator, without changing what was learned; with
the linear one alone, tokens with nothing behind their window have output zero.

Start: g = σ(p) = `factor`, φ as in linear_attention.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import LimbeckError
from limbeck.mixers.base import Mixer
from limbeck.mixers.linear_attention import LinearAttention, LinearAttentionOptions
from limbeck.mixers.options import Options
from limbeck.mixers.registry import register
from limbeck.mixers.types import Inputs, State, Tokens
from limbeck.ops import common, scalar_decay, sliding_window

WINDOW = ("k", "v", "count")  # the part of the state that is the window's


@dataclass(frozen=True)
class LoLCATsOptions(Options):
    feature_map: Literal["relu", "elu1", "softmax", "t2r", "dpfp", "hedgehog", "taylor", "rebased"] = "hedgehog"
    width: int = 0  # map q and k to this number of channels before the features; 0 to leave them
    window: int = 64
    sinks: int = 0
    factor: float = 0.1  # g at the start
    branches: Literal["both", "linear", "window"] = "both"


@register
class LoLCATs(Mixer):
    """See the module's docstring. With option `state`, the window takes at most half of the state's numbers."""

    name = "lolcats"
    summary = "softmax over a window and Hedgehog features for all that is older, in one normaliser (Zhang 2024)"
    source = "arXiv 2410.10254, eq. 6"
    options_class = LoLCATsOptions
    options: LoLCATsOptions

    def build(self) -> None:
        s, o = self.shape, self.options
        if not 0 < o.factor < 1:
            raise LimbeckError(f"option 'factor' of mixer 'lolcats' is {o.factor}", expected="between 0 and 1")
        self.window, share = o.window, 0.0
        if o.state:  # window and memory together take as many numbers as the common state of that size
            numbers = s.heads * o.state * self.teacher_shape.key_width * s.value_width
            token = s.kv_heads * (s.key_width + s.value_width)
            self.window = max(min(o.window, round(numbers / 2 / token) - o.sinks), 1)
            rows = round((numbers - token * (self.window + o.sinks)) / (s.heads * (s.value_width + 1)))
            share = max(rows, 1) / s.key_width
        self.linear = LinearAttention(s, LinearAttentionOptions(feature_map=o.feature_map, width=o.width, state=share))
        self.factor = nn.Parameter(torch.empty(s.heads))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.constant_(self.factor, math.log(self.options.factor / (1 - self.options.factor)))

    def qk_width(self, rows: int) -> int:
        return self._head_width("key")  # the window compares the teacher's q and k

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
        segments, valid = tokens.segments, tokens.valid
        window_state = {name: state[name] for name in WINDOW} if state else None
        near, (old_k, old_v, left), window_state = sliding_window.evicting(
            q, k, v, **self._settings(), state=window_state, segments=segments, valid=valid, normalize=False
        )
        past = self._features(q, old_k, old_v, x, left=left, valid=valid)
        ones = past.v.new_ones(*past.v.shape[:-1], 1)
        value = torch.cat([past.v, ones], -1).to(near.dtype)
        operator = scalar_decay.recurrent if q.shape[1] == 1 else scalar_decay.chunked
        far, memory = operator(past.q, past.k, value, state=state.get("memory"), segments=segments)
        both = self._join(near, far, self._factor().unsqueeze(-1))
        return _divide(both[..., :-1], both[..., -1:]).to(v.dtype), {"memory": memory, **window_state}

    def attend_matrix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens) -> Tensor:
        segments, valid, settings = tokens.segments, tokens.valid, self._settings()
        near = sliding_window.matrix(q, k, **settings, segments=segments, valid=valid, normalize=False)
        real = torch.ones_like(q[..., 0, 0], dtype=torch.bool) if valid is None else valid
        seen = sliding_window.build_window_mask(real, window=self.window, sinks=self.options.sinks, segments=segments)
        past = self._features(q, k, v, x, left=real, valid=valid)
        far = scalar_decay.matrix(past.q, past.k, segments=segments).masked_fill(seen.unsqueeze(1), 0)
        both = self._join(near, far, self._factor()[:, None, None])
        return _divide(both, both.sum(-1, keepdim=True))

    def memory_numel(self) -> int:
        s, sinks = self.shape, self.options.sinks
        window = sliding_window.state_numel(s.kv_heads, s.key_width, s.value_width, self.window + 1, sinks)
        return self.linear.memory_numel() + window

    @property
    def operator_name(self) -> str:
        return "sliding window, scalar decay"

    def _settings(self) -> dict[str, Any]:
        return {"window": self.window, "sinks": self.options.sinks, "scale": self.shape.scale}

    def _features(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, left: Tensor, valid: Tensor | None) -> Inputs:
        """Compute φ(q), φ(k) and v of the linear part; zero where no token has left the window, and for masked q."""
        q, k, v = self.linear._prepare(q, k, v, Tokens(), {}, {})
        past = self.linear.inputs(q, k, v, x, Tokens(), {}).mask_padding(left)
        if valid is not None:
            past.q = past.q.masked_fill(~valid[..., None, None], 0)
        return past

    def _factor(self) -> Tensor:
        """Compute g per head [H]."""
        # The clamp keeps g above zero; below it, 1 + g is 1 to the last bit anyway.
        return self.factor.to(common.compute_dtype(self.factor)).clamp(min=-40).sigmoid()

    def _join(self, near: Tensor, far: Tensor, factor: Tensor) -> Tensor:
        return {"both": factor * near + far, "linear": far, "window": near}[self.options.branches]


def _divide(x: Tensor, total: Tensor) -> Tensor:
    """Divide x by total; 0/0 is 0, for masked tokens and, without the window, for those with an empty memory."""
    return x / total.masked_fill(total == 0, 1)
