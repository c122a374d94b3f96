"""Which mixers there are, by name, and presets of their common switches.

    mixers.names()                                   # every registered mixer
    mixers.options("gla", {"conv": 4}, preset="published")
    mixers.build("gla", HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64))

A mixer is registered by the decorator `register`.
"""

from typing import Any

from limbeck.errors import LimbeckError, closest
from limbeck.mixers.base import HeadShape, Mixer
from limbeck.mixers.options import Options

_REGISTRY: dict[str, type[Mixer]] = {}

PRESETS = ("default", "published", "controlled")


def register(cls: type[Mixer]) -> type[Mixer]:
    """Class decorator: makes the mixer known by its `name` to conversion, recipes and the contract."""
    _REGISTRY[cls.name] = cls
    return cls


def names() -> list[str]:
    """All registered mixers, in alphabetical order."""
    return sorted(_REGISTRY)


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
