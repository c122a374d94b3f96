"""Two branches inside a layer: a linear mixer beside sliding-window attention with sinks, and a gate between them.

    y = g ⊙ linear(q, k, v) + (1 − g) ⊙ window(q, k, v),   g = σ(w·x) per head and token

as in the xLSTM hybrids (arXiv 2603.15590). `combine="fixed"` takes g = `share` everywhere, as Liger does with a half
(arXiv 2503.01496). `branches` switches one of the two off without changing what was learned, to measure what each one
contributes.

Start: w = 0 and the bias such that g = `share`.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from limbeck.core.errors import LimbeckError
from limbeck.mixers.branches import Branches, BranchesOptions, label_branch_state, select_branch_state
from limbeck.mixers.registry import register
from limbeck.mixers.sliding_window import SlidingWindow, SlidingWindowOptions
from limbeck.mixers.types import State, Tokens

BRANCHES = ("linear", "window")


@dataclass(frozen=True)
class HybridOptions(BranchesOptions):
    combine: Literal["gate", "fixed"] = "gate"
    share: float = 0.5  # weight of the linear branch: at the start, or always where combine is fixed


@register
class Hybrid(Branches):
    """See the module's docstring. Common options other than `rope` are those of the linear branch."""

    name = "hybrid"
    summary = "a linear mixer beside a sliding window with sinks, joined by a gate per head and token"
    source = "arXiv 2603.15590"
    options_class = HybridOptions
    options: HybridOptions

    def build(self) -> None:
        o = self.options
        if not 0 < o.share < 1:
            raise LimbeckError(f"option 'share' of mixer 'hybrid' is {o.share}", expected="more than 0 and less than 1")
        super().build()
        self.window = SlidingWindow(
            self.teacher_shape, SlidingWindowOptions(rope=o.rope, window=o.window, sinks=o.sinks)
        )
        if o.combine == "gate":
            self.choice = nn.Linear(self.teacher_shape.hidden, self.teacher_shape.heads)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.options.combine == "gate":
            nn.init.zeros_(self.choice.weight)
            nn.init.constant_(self.choice.bias, math.log(self.options.share / (1 - self.options.share)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens, state: State) -> tuple[Tensor, State]:
        outputs, new = {}, {}
        for name in BRANCHES:
            branch_state = select_branch_state(state, name)
            outputs[name], after = getattr(self, name)(q, k, v, x, tokens=tokens, state=branch_state)
            new.update(label_branch_state(after, name))
        return self._join(outputs, self._share(x).unsqueeze(-1)), new

    def attend_matrix(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, tokens: Tokens) -> Tensor:
        matrices = {name: getattr(self, name).forward_matrix(q, k, v, x, tokens=tokens)[1] for name in BRANCHES}
        return self._join(matrices, self._share(x).transpose(1, 2).unsqueeze(-1))

    def forward_matrix(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, tokens: Tokens | None = None
    ) -> tuple[Tensor, Tensor]:
        # A branch's norm and gate lie between its matrix and the sum, so outputs and matrices are summed separately.
        both = {name: getattr(self, name).forward_matrix(q, k, v, x, tokens=tokens) for name in BRANCHES}
        share = self._share(x)
        y = self._join({name: pair[0] for name, pair in both.items()}, share.unsqueeze(-1))
        return y, self._join({n: pair[1] for n, pair in both.items()}, share.transpose(1, 2).unsqueeze(-1))

    def memory_numel(self) -> int:
        return self.linear.state_numel() + self.window.state_numel()

    def _share(self, x: Tensor) -> Tensor:
        """Compute the weight g of the linear branch, [B, T, H]."""
        if self.options.combine == "gate":
            return torch.sigmoid(self.choice(x))
        return x.new_full((*x.shape[:2], self.teacher_shape.heads), self.options.share)

    def _join(self, branches: dict[str, Any], share: Tensor) -> Tensor:
        linear, window = share * branches["linear"], (1 - share) * branches["window"]
        joined = {"both": linear + window, "linear": linear, "window": window}[self.options.branches]
        return joined.to(branches["linear"].dtype)
