"""What mixers of two branches share: a linear mixer of any kind beside a window of softmax attention with sinks.

    class Hybrid(Branches): ...          # see hybrid.py and window_memory.py

A subclass says what each branch reads and how the two are joined. The linear branch is a whole mixer under an option's
name; common options other than `rope` are passed on to it. `branches` leaves one of the two out of the output without
changing what was learned, to measure what each contributes.
"""

from dataclasses import dataclass, field, replace
from typing import Literal

from limbeck.core.errors import LimbeckError
from limbeck.mixers import registry
from limbeck.mixers.base import Mixer
from limbeck.mixers.options import Options, separate_common_options
from limbeck.mixers.sliding_window import SlidingWindow
from limbeck.mixers.types import HeadShape, State


@dataclass(frozen=True)
class BranchesOptions(Options):
    linear: str = "gated_deltanet"  # name of the linear branch's mixer
    linear_options: dict = field(default_factory=dict)  # options of that mixer
    window: int = 64
    sinks: int = 4
    branches: Literal["both", "linear", "window"] = "both"


class Branches(Mixer):
    """Base of mixers with a linear branch and a window."""

    options_class = BranchesOptions
    options: BranchesOptions
    controlled = {"rope": True}

    def __init__(self, teacher_shape: HeadShape, options: BranchesOptions):
        self.switches, own = separate_common_options(options)
        super().__init__(teacher_shape, own)

    @classmethod
    def for_length(cls, options: BranchesOptions, length: int) -> BranchesOptions:
        inner = registry.fit_options_to_length(options.linear, options.linear_options, length)
        return replace(options, linear_options=inner)

    @classmethod
    def list_inner_mixers(cls, options: BranchesOptions) -> list[str]:
        return [options.linear]

    def build(self) -> None:
        o, linear = self.options, registry.get(self.options.linear)
        linear_options = registry.resolve_options(o.linear, o.linear_options)
        if issubclass(linear, Branches | SlidingWindow) or linear.state_grows(linear_options):
            raise LimbeckError(
                f"'{o.linear}' cannot be the linear branch of mixer '{self.name}'",
                expected="a mixer with a fixed-size state",
            )
        self.linear = registry.build(
            o.linear, self.teacher_shape, {**self.switches, **o.linear_options, "rope": o.rope}
        )

    @property
    def operator_name(self) -> str:
        return f"sliding window, {self.linear.operator_name}"


def select_branch_state(state: State, name: str) -> State:
    """Select the state of one branch, whose tensors have its name before their own."""
    return {key.removeprefix(f"{name}."): z for key, z in state.items() if key.startswith(f"{name}.")}


def label_branch_state(state: State, name: str) -> State:
    """Put a branch's name before those of its state's tensors."""
    return {f"{name}.{key}": z for key, z in state.items()}
