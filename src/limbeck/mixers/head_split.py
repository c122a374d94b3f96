"""Softmax for some groups of heads of a layer, another mixer for the others.

    mixer = build("head_split", shape, {"softmax_groups": [2], "mixer": "gated_deltanet"})
    y, state = mixer(q, k, v, x)                # heads 2·H/G to 3·H/G − 1 are softmax's, all others Gated DeltaNet's

A group is a key/value head with the query heads that use it: heads g·H/G to (g + 1)·H/G − 1 of group g. What looks far
back sits in few of them: DuoAttention (arXiv 2410.10819, section 2) keeps the whole cache for the retrieval heads alone
and gives the streaming heads a window with sinks. Here these get any mixer, over a shape of so many heads fewer.

The cache of the softmax groups grows. With `softmax_window` it does not: they see that many last tokens and the first
`softmax_sinks`.

Start: that of the two mixers.
"""

from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.mixers import registry
from limbeck.mixers.base import Mixer
from limbeck.mixers.branches import label_branch_state, select_branch_state
from limbeck.mixers.options import Options, separate_common_options
from limbeck.mixers.registry import register
from limbeck.mixers.sliding_window import SlidingWindow
from limbeck.mixers.softmax import Softmax
from limbeck.mixers.types import HeadShape, State, Tokens

PARTS = ("softmax", "others")


@dataclass(frozen=True)
class HeadSplitOptions(Options):
    mixer: str = "sliding_window"  # of the other groups, by name
    mixer_options: dict = field(default_factory=dict)  # options of that mixer
    softmax_groups: list = field(default_factory=lambda: [0])  # of this layer, counted from 0
    softmax_window: int = 0  # tokens that those groups see, 0 for all
    softmax_sinks: int = 4  # first tokens that they see besides a window


@register
class HeadSplit(Mixer):
    """See the module's docstring. Common options other than `rope` are those of the other mixer."""

    name = "head_split"
    summary = "softmax for some groups of heads, another mixer for the others"
    source = "arXiv 2410.10819, sec. 2"
    options_class = HeadSplitOptions
    options: HeadSplitOptions
    grows = True
    controlled = {"rope": True}

    def __init__(self, teacher_shape: HeadShape, options: HeadSplitOptions):
        self.switches, own = separate_common_options(options)
        super().__init__(teacher_shape, own)

    @classmethod
    def for_length(cls, options: HeadSplitOptions, length: int) -> HeadSplitOptions:
        inner = registry.fit_options_to_length(options.mixer, options.mixer_options, length)
        return replace(options, mixer_options=inner)

    @classmethod
    def state_grows(cls, options: HeadSplitOptions) -> bool:
        others = registry.resolve_options(options.mixer, options.mixer_options)
        growing_softmax = bool(options.softmax_groups) and not options.softmax_window
        return growing_softmax or registry.get(options.mixer).state_grows(others)

    @classmethod
    def list_inner_mixers(cls, options: HeadSplitOptions) -> list[str]:
        return [options.mixer]

    def build(self) -> None:
        o, groups = self.options, self.teacher_shape.kv_heads
        chosen = check_softmax_groups(o.softmax_groups, groups)
        if o.softmax_window < 0 or o.softmax_sinks < 0:
            raise LimbeckError(
                f"options 'softmax_window' and 'softmax_sinks' of mixer 'head_split' are {o.softmax_window} and "
                f"{o.softmax_sinks}",
                expected="0 or more",
            )
        if registry.get(o.mixer) is HeadSplit:
            raise LimbeckError("'head_split' cannot be the mixer of the other groups", expected="another mixer")
        # Which part each group belongs to, in runs of neighbors: groups are taken and put back by splitting.
        parts = [PARTS[group not in chosen] for group in range(groups)]
        self.runs = [(part, [group for group, _ in run]) for part, run in groupby(enumerate(parts), lambda g: g[1])]
        self.sizes = {part: parts.count(part) for part in PARTS if part in parts}
        if "softmax" in self.sizes:
            window = {"window": o.softmax_window, "sinks": o.softmax_sinks}
            name, options = (SlidingWindow.name, window) if o.softmax_window else (Softmax.name, {})
            self.softmax = registry.build(name, self._shape("softmax"), {**options, "rope": o.rope})
        if "others" in self.sizes:
            self.others = registry.build(o.mixer, self._shape("others"), self._others_options())
        self.grows = any(getattr(self, part).grows for part in self.sizes)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, tokens: Tokens | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        outputs: dict[str, Tensor] = {}
        new: State = {}
        for part, own in self._divide(q, k, v).items():
            before = select_branch_state(state or {}, part) or None
            outputs[part], after = getattr(self, part)(*own, x, tokens=tokens, state=before)
            new.update(label_branch_state(after, part))
        return self._join(outputs, 2), new

    def forward_matrix(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, *, tokens: Tokens | None = None
    ) -> tuple[Tensor, Tensor]:
        both = {
            part: getattr(self, part).forward_matrix(*own, x, tokens=tokens)
            for part, own in self._divide(q, k, v).items()
        }
        outputs, matrices = ({part: pair[n] for part, pair in both.items()} for n in (0, 1))
        return self._join(outputs, 2), self._join(matrices, 1)

    def forward_rows(
        self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, rows: Tensor | None, *, tokens: Tokens | None = None
    ) -> Tensor:
        parts = {
            part: getattr(self, part).forward_rows(*own, x, rows, tokens=tokens)
            for part, own in self._divide(q, k, v).items()
        }
        return self._join(parts, 1)

    def memory_numel(self) -> int:
        """Count the numbers of the state; where it grows, those that each token adds."""
        return sum(m.state_numel() for m in (getattr(self, part) for part in self.sizes) if m.grows == self.grows)

    @property
    def operator_name(self) -> str:
        return ", ".join(dict.fromkeys(getattr(self, part).operator_name for part in self.sizes))

    def _shape(self, part: str) -> HeadShape:
        """Return the shape of a part: so many groups with their query heads."""
        shape, groups = self.teacher_shape, self.sizes[part]
        return replace(shape, heads=groups * shape.heads // shape.kv_heads, kv_heads=groups)

    def _others_options(self) -> dict[str, Any]:
        """Return the options of the other mixer; merged heads are counted over the whole layer, so it gets a share."""
        options = {**self.switches, **self.options.mixer_options}
        if options.get("heads"):
            options["heads"] = max(options["heads"] * self.sizes["others"] // self.teacher_shape.kv_heads, 1)
        rope = registry.resolve_options(self.options.mixer, options).rope
        if rope != self.options.rope:
            raise LimbeckError(
                f"option 'rope' of '{self.options.mixer}' is {str(rope).lower()}: q and k come to a layer in one form",
                expected=f"that of the groups with softmax: mixer_options.rope={str(self.options.rope).lower()}",
            )
        return options

    def _divide(self, *tensors: Tensor) -> dict[str, list[Tensor]]:
        """Divide the heads of tensors [B, T, heads or groups, width] among the parts."""
        divided: dict[str, list[Tensor]] = {part: [] for part in self.sizes}
        for z in tensors:
            # One split instead of slices: the gradients of slices are as large as the whole and are added up.
            n = z.shape[2] // self.teacher_shape.kv_heads
            pieces = z.split([n * len(run) for _, run in self.runs], 2)
            for part, own in divided.items():
                taken = [piece for piece, (name, _) in zip(pieces, self.runs) if name == part]
                own.append(taken[0] if len(taken) == 1 else torch.cat(taken, 2))
        return divided

    def _join(self, parts: dict[str, Tensor], dim: int) -> Tensor:
        """Put the heads of both parts back in their order, along dimension `dim`."""
        n = self.teacher_shape.heads // self.teacher_shape.kv_heads
        left = {
            part: z.split([n * len(run) for name, run in self.runs if name == part], dim) for part, z in parts.items()
        }
        pieces = {part: iter(z) for part, z in left.items()}
        return torch.cat([next(pieces[part]) for part, _ in self.runs], dim)


def check_softmax_groups(groups: list[Any], count: int) -> list[int]:
    """Return the groups; raise LimbeckError unless they are different numbers of a layer's `count` groups."""
    wrong = [g for g in groups if not isinstance(g, int) or isinstance(g, bool) or not 0 <= g < count]
    if wrong or len(set(groups)) < len(groups):
        raise LimbeckError(
            f"option 'softmax_groups' of mixer 'head_split' is {groups}, and the layer has {count} groups of heads",
            expected=f"different numbers from 0 to {count - 1}",
        )
    return groups
