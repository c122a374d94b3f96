"""Token mixers, one file each; importing this package registers them all.

    from limbeck import mixers
    mixers.list_mixers()                      # ['based', 'cosformer', 'deltanet', ...]
    mixers.select_mixers("paper-v3")          # ['linear_attention', 'retnet', 'gla', ...]
    mixers.get("gla").summary
    mixers.build("gla", HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64))

base.py says what a mixer is; each file opens with its mixer's equations, which docs/concepts/mixers.md has side by
side. Legend: B batch, T time, H heads, K key width, V value width, D model width; S_t the state [K, V] of one head,
k_t, v_t and q_t the teacher's key, value and query, x_t [D] the layer's input.
"""

from limbeck.mixers import (  # noqa: F401
    deltanet,
    gated_deltanet,
    gla,
    gsa,
    head_split,
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
    window_memory,
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
from limbeck.mixers.types import HeadShape, Inputs, State, Tokens

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
    "list_mixer_sets",
    "list_mixers",
    "register",
    "resolve_options",
    "select_mixers",
]
