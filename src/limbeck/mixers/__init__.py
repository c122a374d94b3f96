"""Token mixers, one file each; importing this package registers them all.

    from limbeck import mixers
    mixers.names()                      # ['based', 'cosformer', 'deltanet', ...]
    mixers.selection("paper-v3")        # ['linear_attention', 'retnet', 'gla', ...]
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
from limbeck.mixers.inputs import HeadShape, Inputs, State, Tokens
from limbeck.mixers.options import Options
from limbeck.mixers.registry import PRESETS, build, get, names, options, register
from limbeck.mixers.sets import selection, sets

__all__ = [
    "PRESETS",
    "HeadShape",
    "Inputs",
    "Mixer",
    "Options",
    "State",
    "Tokens",
    "build",
    "get",
    "names",
    "options",
    "register",
    "selection",
    "sets",
]
