"""Checks under other options: every preset, and the switches that all mixers have.

presets(Variant("mamba2"))
"""

from typing import Any

from limbeck.contract.on_modules import padded_module, split, state_size, three_forms
from limbeck.contract.registry import check
from limbeck.contract.variant import SHAPE, Variant
from limbeck.mixers import PRESETS

FULL = {"conv": 4, "conv_activation": "silu", "output_norm": "layer", "output_gate": "sigmoid", "gate_rank": 2}
SWITCHES: tuple[dict[str, Any], ...] = (
    {"heads": SHAPE.heads // 2},
    {"state": 0.5},
    {"state": 2.0},
    {"heads": 1, "state": 0.25, "output_norm": "rms", "output_gate": "silu"},
    {"output_norm": "layer", "norm_over": "gated", "norm_bias": True, "output_gate": "inner", "gate_rank": 3},
    FULL,
)


@check("every preset builds, and under it splits, forms and state size hold")
def presets(variant: Variant) -> None:
    for preset in PRESETS:
        chosen = Variant(variant.mixer, variant.options, preset)
        for clause in (three_forms, split, state_size):
            _under(f"preset {preset}", clause, chosen)


@check("merged heads, smaller and larger states, convolution, norm and gate: splits, forms, padding, state size hold")
def switches(variant: Variant) -> None:
    for options in SWITCHES:
        chosen = variant.but(**options)
        for clause in (three_forms, split, padded_module, state_size):
            _under(" ".join(f"{name}={value}" for name, value in options.items()), clause, chosen)


def _under(what: str, clause: Any, variant: Variant) -> None:
    try:
        clause(variant)
    except AssertionError as error:
        raise AssertionError(f"{what}: {clause.__name__}: {error}") from None
