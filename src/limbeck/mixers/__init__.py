"""Token mixers, one file each; importing this package registers them all.

    from limbeck import mixers
    mixers.list_mixers()                      # ['based', 'cosformer', 'deltanet', ...]
    mixers.select_mixers("paper-v3")        # ['linear_attention', 'retnet', 'gla', ...]
    mixers.get("gla").summary

What a mixer is stands in base.py; docs/students.md has the formulas.
"""

from limbeck.mixers import (  # noqa: F401
    deltanet,
    gated_deltanet,
    gla,
    gsa,
    hgrn2,
    hybrid,
    kda,
    linear_attention,
    lolcats,
    mamba2,
    metala,
    mlstm,
    retnet,
    rwkv6,
    rwkv7,
    sliding_window,
    softmax,
)
from limbeck.mixers.base import Mixer
from limbeck.mixers.options import Options
from limbeck.mixers.registry import (
    PRESETS,
    build,
    get,
    list_mixer_sets,
    list_mixers,
    register,
    resolve_options,
    select_mixers,
)
from limbeck.mixers.types import HeadShape, OperatorInputs, State, TokenMask

__all__ = [
    "PRESETS",
    "HeadShape",
    "Mixer",
    "OperatorInputs",
    "Options",
    "State",
    "TokenMask",
    "build",
    "get",
    "list_mixer_sets",
    "list_mixers",
    "register",
    "resolve_options",
    "select_mixers",
]
