"""Sliding-window softmax attention with sink tokens: the last `window` tokens and the first `sinks` of the document.

Xiao et al. 2023 (arXiv 2309.17453), section 3.2. Its state is a window of the cache, which does not grow; hybrids are
built on it. Tokens keep the rotary positions that the teacher gave them.

Start: no parameters of its own: the teacher's attention with everything between sinks and window cut out.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from limbeck.mixers.base import Mixer
from limbeck.mixers.options import Options
from limbeck.mixers.registry import register
from limbeck.mixers.types import State, Tokens
from limbeck.ops import sliding_window


@dataclass(frozen=True)
class SlidingWindowOptions(Options):
    window: int = 128
    sinks: int = 4


@register
class SlidingWindow(Mixer):
    """See the module's docstring."""

    name = "sliding_window"
    summary = "softmax attention over the last tokens and the first few, the sinks (Xiao 2023)"
    source = "arXiv 2309.17453, sec. 3.2"
    options_class = SlidingWindowOptions
    options: SlidingWindowOptions
    published = {"window": 1020}

    def build(self) -> None:
        s, o = self.shape, self.options
        self.window = o.window
        if o.state:  # the window takes as many numbers as the common state of that size
            numbers = s.heads * o.state * s.key_width * s.value_width
            self.window = max(round(numbers / (s.kv_heads * (s.key_width + s.value_width))) - o.sinks, 1)

    def qk_width(self, rows: int) -> int:
        return self._head_width("key")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
        segments, valid = tokens.segments, tokens.valid
        return sliding_window.chunked(q, k, v, **self._settings(), state=state or None, segments=segments, valid=valid)

    def attend_matrix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens) -> Tensor:
        return sliding_window.matrix(q, k, **self._settings(), segments=tokens.segments, valid=tokens.valid)

    def memory_numel(self) -> int:
        s = self.shape
        return sliding_window.state_numel(s.kv_heads, s.key_width, s.value_width, self.window, self.options.sinks)

    def _settings(self) -> dict[str, Any]:
        return {"window": self.window, "sinks": self.options.sinks, "scale": self.shape.scale}
