"""Options that all mixers share, so that two can be compared on equal terms, and the gates that options initialize.

    options = GLAOptions.parse({"conv": 4, "rope": False}, mixer="gla")
    rate = -log_decays_from_half_lives(heads=9, shortest=8, longest=512)          # [H]
    bias = inverse_softplus(rate)

A mixer's own dataclass inherits from `Options`, adds its own fields and sets its own defaults.
"""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError, suggest_closest


@dataclass(frozen=True)
class Options:
    """Options of every mixer; each mixer sets its own defaults and adds its own options."""

    rope: bool = True  # give the mixer q and k with the teacher's rotary position embedding
    qk_norm: bool = True  # give the mixer q and k behind the teacher's q/k norms, where the teacher has such
    conv: int = 0  # width of a causal convolution over q, k and v; 0 for none; starts as the identity
    conv_activation: Literal["none", "silu"] = "none"  # on q, k and v, after the convolution where there is one
    output_norm: Literal["none", "rms", "layer"] = "none"
    # each head; all heads together; all heads together, after the output gate
    norm_over: Literal["head", "heads", "gated"] = "head"
    norm_bias: bool = False  # give the norm a bias besides its weight
    norm_eps: float = 1e-6  # added to the mean square that the norm divides by the root of
    output_gate: Literal["none", "silu", "sigmoid", "inner"] = "none"  # of the hidden states x; inner: W₂ σ(W₁x)
    gate_rank: int = 0  # rank of the output gate's projection; 0 for full rank
    gate_bias: bool = True  # give the output gate a bias, by which it starts open; `inner` gates have none
    heads: int = 0  # merge the teacher's heads into this number; 0 to leave them
    state: float = 0.0  # rows of the state per head, in key widths; 0 for the mixer's own number

    @classmethod
    def parse(cls, given: dict[str, Any], mixer: str) -> "Options":
        """Build options from plain values (YAML, the command line); unknown names and values raise LimbeckError."""
        options = {f.name: f for f in fields(cls)}
        for name, value in given.items():
            if name not in options:
                raise LimbeckError(
                    f"mixer '{mixer}' has no option '{name}'{suggest_closest(name, options)}",
                    expected=", ".join(options),
                )
            kind = options[name].type
            choices = getattr(kind, "__args__", None) if "Literal" in str(kind) else None
            if not (value in choices if choices else _is_instance(value, kind)):
                expected = " | ".join(map(str, choices)) if choices else getattr(kind, "__name__", str(kind))
                raise LimbeckError(f"option '{name}' of mixer '{mixer}' is {value!r}", expected=expected)
            if not choices and not isinstance(value, bool) and name in _AT_LEAST_ZERO and value < 0:
                raise LimbeckError(f"option '{name}' of mixer '{mixer}' is {value!r}", expected="0 or more")
        if given.get("conv") == 1:
            raise LimbeckError(f"option 'conv' of mixer '{mixer}' is 1", expected="0, or 2 and more")
        return cls(**given)


# Options that came after 0.2, with the values at which nothing changes; what identifies a student leaves them out then,
# so that runs of before go on.
LATER_OPTIONS = {"qk_norm": True, "norm_eps": 1e-6, "gate_bias": True, "strength_bias": True}
_AT_LEAST_ZERO = ("conv", "norm_eps", "gate_rank", "heads", "state", "horizon", "code_rank")


def separate_common_options(options: Any) -> tuple[dict[str, Any], Any]:
    """Separate the common options, for mixers that pass them on to a mixer inside.

    Returns:
        The common options that differ from their defaults, and the options with all of them but `rope` at the defaults.
    """
    defaults = vars(Options())
    changed = {name: getattr(options, name) for name in defaults if getattr(options, name) != defaults[name]}
    return changed, replace(options, **{**defaults, "rope": options.rope})


def _is_instance(value: Any, kind: Any) -> bool:
    # A bool is an int in Python, but not where an option is a number.
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


# ------------------------------------------------------------------ gates


def scale_to_unit_length(x: Tensor) -> Tensor:
    """Return x [..., K] divided by its length, as `F.normalize` does in more calls; a zero vector stays zero."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-6)


def upcast(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 where it is that already: gates lose too much in half precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def log_decays_from_half_lives(heads: int, shortest: float, longest: float) -> Tensor:
    """Return log decays per token [H], negative, with half-lives from `shortest` to `longest` tokens.

    The first head has the shortest half-life, the last one the longest, with a geometric series in between.
    """
    steps = torch.linspace(0, 1, heads, dtype=torch.float64) if heads > 1 else torch.zeros(1, dtype=torch.float64)
    return (-math.log(2.0) / (shortest * (longest / shortest) ** steps)).float()


def inverse_softplus(x: Tensor) -> Tensor:
    """Return y with softplus(y) = x, for x > 0."""
    return torch.log(torch.expm1(x))


def logit(x: Tensor) -> Tensor:
    """Return y with sigmoid(y) = x, for x in (0, 1), exact near both ends."""
    return torch.log(x) - torch.log1p(-x)
