"""Which mixers there are, by name; named sets of them; and presets of their common switches.

mixers.names()                                   # every registered mixer
mixers.SETS["paper-v3"]                          # the seven students of arXiv 2504.14366v3
mixers.options("gla", {"conv": 4}, preset="published")
mixers.build("gla", HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64))
"""

from typing import Any

from limbeck.errors import LimbeckError, closest
from limbeck.mixers.base import HeadShape, Mixer
from limbeck.mixers.options import Options

_REGISTRY: dict[str, type[Mixer]] = {}

PRESETS = ("default", "published", "controlled")
# The paper's second version names only xLSTM, GLA, MetaLA and linear attention; its other four are a reconstruction.
_PAPER_V2 = ("linear_attention", "rebased", "hedgehog", "retnet", "gla", "metala", "deltanet", "mlstm")
_PAPER_V3 = ("linear_attention", "retnet", "gla", "mlstm", "deltanet", "gated_deltanet", "kda")


def register(cls: type[Mixer]) -> type[Mixer]:
    """Class decorator: makes the mixer known by its `name` to conversion, recipes and the contract."""
    _REGISTRY[cls.name] = cls
    return cls


def names() -> list[str]:
    """All registered mixers, in alphabetical order."""
    return sorted(_REGISTRY)


def named_set(name: str) -> list[str]:
    """The mixers of a named set: paper-v2, paper-v3 or all."""
    sets = {"paper-v2": list(_PAPER_V2), "paper-v3": list(_PAPER_V3), "all": names()}
    if name not in sets:
        raise LimbeckError(f"unknown set of students '{name}'{closest(name, sets)}", expected=", ".join(sets))
    return sets[name]


def get(name: str) -> type[Mixer]:
    """The mixer class of that name; LimbeckError with the nearest name if there is none."""
    if name not in _REGISTRY:
        raise LimbeckError(
            f"unknown mixer '{name}'{closest(name, _REGISTRY)}",
            expected=", ".join(names()),
            hint="limbeck students   (lists them with what each one is)",
        )
    return _REGISTRY[name]


def options(name: str, given: dict[str, Any] | None = None, preset: str = "default") -> Options:
    """The options of a mixer: its defaults, changed by the preset, changed by what is given.

    Args:
        preset: "default" (what Limbeck measured to start well), "published" (as the authors have the mixer), or
            "controlled" (all mixers alike in everything but the recurrence).
    """
    cls = get(name)
    if preset not in PRESETS:
        raise LimbeckError(f"unknown preset '{preset}'{closest(preset, PRESETS)}", expected=", ".join(PRESETS))
    chosen = {"default": {}, "published": cls.published, "controlled": cls.controlled}[preset]
    return cls.options_class.parse({**cls.defaults, **chosen, **(given or {})}, name)


def build(name: str, shape: HeadShape, given: dict[str, Any] | None = None, preset: str = "default") -> Mixer:
    """A mixer of that name for an attention of that shape; options as plain values."""
    return get(name)(shape, options(name, given, preset))
