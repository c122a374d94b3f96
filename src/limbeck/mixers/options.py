"""Where gates start: decay rates from half-lives, and the inverses of the functions that gates go through.

rate = -log_decays_from_half_lives(heads=9, shortest=8, longest=512)          # [H]
bias = inverse_softplus(rate)

The switches that all mixers share, so that two of them can be compared on equal terms.

    options = GLAOptions.parse({"conv": 4, "rope": False}, mixer="gla")

A mixer's own dataclass inherits from `Options`, adds its own fields and sets its own defaults.
"""

import math
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError, suggest_closest


def log_decays_from_half_lives(heads: int, shortest: float, longest: float) -> Tensor:
    """Log decay per token [H] (negative) under which a write fades to one half in `shortest` tokens in the first head,
    `longest` in the last and geometrically in between."""
    steps = torch.linspace(0, 1, heads, dtype=torch.float64) if heads > 1 else torch.zeros(1, dtype=torch.float64)
    return (-math.log(2.0) / (shortest * (longest / shortest) ** steps)).float()


def inverse_softplus(x: Tensor) -> Tensor:
    """y with softplus(y) = x, for x > 0."""
    return torch.log(torch.expm1(x))


def logit(x: Tensor) -> Tensor:
    """y with sigmoid(y) = x, for x in (0, 1), exact near both ends."""
    return torch.log(x) - torch.log1p(-x)


@dataclass(frozen=True)
class Options:
    """Switches common to all mixers; each mixer sets its own defaults and adds its own."""

    rope: bool = True  # hand over q and k with the teacher's rotary position embedding
    conv: int = 0  # width of a causal convolution over q, k and v; 0 for none; starts as the identity
    conv_activation: Literal["none", "silu"] = "none"  # on q, k and v, after the convolution where there is one
    output_norm: Literal["none", "rms", "layer"] = "none"  # over what norm_over says
    norm_over: Literal["head", "heads", "gated"] = (
        "head"  # each head; all together; all together behind the output gate
    )
    norm_bias: bool = False  # a bias beside the norm's weight
    output_gate: Literal["none", "silu", "sigmoid", "inner"] = "none"  # from the hidden states; inner: W₂ σ(W₁x)
    gate_rank: int = 0  # rank of the output gate's projection; 0 for full
    heads: int = 0  # merge the teacher's heads into so many; 0 for the teacher's own number
    state: float = 0.0  # rows of the state per head, in key widths; 0 for the mixer's own number

    @classmethod
    def parse(cls, given: dict[str, Any], mixer: str) -> "Options":
        """Options from plain values (YAML, the command line); unknown names and values raise LimbeckError."""
        known = {f.name: f for f in fields(cls)}
        for name, value in given.items():
            if name not in known:
                raise LimbeckError(
                    f"mixer '{mixer}' has no option '{name}'{suggest_closest(name, known)}", expected=", ".join(known)
                )
            kind = known[name].type
            choices = getattr(kind, "__args__", None) if "Literal" in str(kind) else None
            ok = value in choices if choices else _is_a(value, kind)
            if not ok:
                expected = " | ".join(map(str, choices)) if choices else getattr(kind, "__name__", str(kind))
                raise LimbeckError(f"option '{name}' of mixer '{mixer}' is {value!r}", expected=expected)
            if not choices and not isinstance(value, bool) and name in _AT_LEAST_ZERO and value < 0:
                raise LimbeckError(f"option '{name}' of mixer '{mixer}' is {value!r}", expected="0 or more")
        if given.get("conv") == 1:
            raise LimbeckError(f"option 'conv' of mixer '{mixer}' is 1", expected="0, or 2 and more")
        return cls(**given)


_AT_LEAST_ZERO = ("conv", "gate_rank", "heads", "state", "horizon")


def _is_a(value: Any, kind: Any) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
