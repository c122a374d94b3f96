"""Token mixers, one file each; importing this package registers them all.

    from limbeck import mixers
    mixers.names()                      # ['gated_deltanet', 'gla', 'linear_attention', 'mlstm', 'retnet', 'softmax']
    mixers.get("gla").summary

What a mixer is stands in base.py; docs/students.md has the formulas.
"""

from limbeck.mixers import gated_deltanet, gla, linear_attention, mlstm, retnet, softmax  # noqa: F401
from limbeck.mixers.base import HeadShape, Mixer, Options, State, Tokens, build, get, names, register

__all__ = ["HeadShape", "Mixer", "Options", "State", "Tokens", "build", "get", "names", "register"]
