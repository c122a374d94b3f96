"""Which mixers there are, by name, and presets of their common switches.

    mixers.names()                                   # every mixer: Limbeck's own and those of installed packages
    mixers.get("gla")                                # by name, or from a file: get("path/to/mine.py:ClassName")
    mixers.options("gla", {"conv": 4}, preset="published")
    mixers.build("gla", HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64))

A mixer is registered by the decorator `register`. A package announces its own as an entry point of the group
`limbeck.mixers`; those are imported when a name is first asked for that Limbeck does not have itself. docs/own_mixer.md
walks through both ways.
"""

import hashlib
import inspect
import re
import sys
import warnings
from dataclasses import asdict, dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from limbeck.errors import LimbeckError, closest
from limbeck.mixers.base import HeadShape, Mixer
from limbeck.mixers.options import Options

GROUP = "limbeck.mixers"
PRESETS = ("default", "published", "controlled")

_REGISTRY: dict[str, type[Mixer]] = {}
_FILES: dict[str, "Source"] = {}  # by module name
_BROKEN: dict[str, str] = {}  # entry points that could not be loaded, with the reason
_discovered = False


@dataclass(frozen=True)
class Source:
    """A file that registered mixers: where it was, what stood in it and which classes it registered."""

    path: Path
    text: str
    classes: list[type[Mixer]] = field(default_factory=list)


@dataclass(frozen=True)
class Origin:
    """Where a mixer that is not Limbeck's own comes from; kept in the config of every student that has it."""

    module: str
    package: str | None = None  # the installed distribution
    file: str | None = None  # the name of a single file, which is saved beside the student's weights

    def plain(self) -> dict[str, str]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def register(cls: type[Mixer]) -> type[Mixer]:
    """Class decorator: makes the mixer known by its `name` to conversion, recipes and the contract."""
    if not (inspect.isclass(cls) and issubclass(cls, Mixer)):
        raise LimbeckError(f"{cls!r} is no mixer", expected="a subclass of limbeck.mixers.Mixer")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not getattr(cls, "summary", None):
        raise LimbeckError(
            f"{cls.__qualname__} has name {name!r}",
            expected="class attributes `name` (letters, digits, _ and -) and `summary` (one line)",
        )
    known = _REGISTRY.get(name)
    if known is not None and _home(known) != _home(cls):
        owner = "Limbeck's own" if known.__module__.startswith("limbeck.") else f"in {_home(known)} already"
        raise LimbeckError(f"the mixer name '{name}' of {_home(cls)} is {owner}", expected="a name of its own")
    _REGISTRY[name] = cls
    if cls.__module__ in _FILES and cls not in _FILES[cls.__module__].classes:
        _FILES[cls.__module__].classes.append(cls)
    return cls


def names() -> list[str]:
    """All mixers, in alphabetical order: Limbeck's own, those of installed packages and of files loaded so far."""
    _discover()
    return sorted(_REGISTRY)


def known(name: str) -> bool:
    """Is there a mixer of that name?"""
    if name not in _REGISTRY:
        _discover()
    return name in _REGISTRY


def get(name: str) -> type[Mixer]:
    """The mixer class of that name, or of a file.

    Args:
        name: a registered name, `path/to/file.py`, or `path/to/file.py:ClassName` where the file has several.

    Raises:
        LimbeckError: with the nearest name where there is no such mixer, or with what is wrong with the file.
    """
    if is_file(name):
        return load_file(name)
    if known(name):
        return _REGISTRY[name]
    if name in _BROKEN:
        raise LimbeckError(f"mixer '{name}' could not be loaded: {_BROKEN[name]}", hint="limbeck students")
    raise LimbeckError(
        f"unknown mixer '{name}'{closest(name, _REGISTRY)}",
        expected=", ".join(names()) + ", or a file as path/to/mine.py",
        hint="limbeck students   (lists them with what each one is)",
    )


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
    return cls.options_class.parse({**cls.defaults, **chosen, **(given or {})}, cls.name)


def build(name: str, shape: HeadShape, given: dict[str, Any] | None = None, preset: str = "default") -> Mixer:
    """A mixer of that name for an attention of that shape; options as plain values."""
    return get(name)(shape, options(name, given, preset))


# ---------------------------------------------------------------------- mixers of others


def is_file(name: str) -> bool:
    """Does this mixer name stand for a file?"""
    return _split(name)[0].endswith(".py")


def load_file(name: str | Path) -> type[Mixer]:
    """The mixer of `path/to/file.py` or `path/to/file.py:ClassName`; runs the file the first time only."""
    head, wanted = _split(str(name))
    path = Path(head).expanduser().resolve()
    if not path.is_file():
        raise LimbeckError(f"there is no file {head}", expected="a Python file that registers a mixer")
    found = {cls.__name__: cls for cls in run_file(path)}
    if wanted and wanted not in found:
        raise LimbeckError(
            f"{head} registers no class '{wanted}'{closest(wanted, found)}", expected=", ".join(found) or "@register"
        )
    if len(found) != 1 and not wanted:
        raise LimbeckError(
            f"{head} registers {len(found)} mixers" + (f": {', '.join(found)}" if found else ""),
            expected="one, or the class by name" if found else "limbeck.mixers.register as decorator of the class",
            hint=f"{head}:{next(iter(found))}" if found else None,
        )
    return found[wanted or next(iter(found))]


def files() -> list[Path]:
    """The files whose mixers are loaded, for processes that shall have the same."""
    return [source.path for source in _FILES.values()]


def origin(name: str) -> Origin | None:
    """Where the mixer of that name comes from; None for Limbeck's own."""
    module = get(name).__module__
    if module.startswith("limbeck."):
        return None
    if module in _FILES:
        return Origin(module, file=_FILES[module].path.name)
    return Origin(module, package=_package(module))


def source(name: str) -> str | None:
    """The text of the file that registered the mixer; None where it came from a module."""
    file = _FILES.get(get(name).__module__)
    return file.text if file else None


def _discover() -> None:
    """Import the mixers of installed packages, once. A broken one is told and left out."""
    global _discovered
    if _discovered:
        return
    _discovered = True
    for point in entry_points(group=GROUP):
        try:
            loaded: Any = point.load()
            if inspect.isclass(loaded) and loaded not in _REGISTRY.values():
                register(loaded)  # type: ignore[arg-type]
        except (Exception, SystemExit) as error:
            _BROKEN[point.name] = f"{type(error).__name__}: {error}".replace("\n", "; ")
            warnings.warn(f"mixer '{point.name}'{_from(point)} is left out: {_BROKEN[point.name]}", stacklevel=3)


def _from(point: EntryPoint) -> str:
    return f" of package {point.dist.name}" if point.dist else f" of {point.value}"


def _package(module: str) -> str | None:
    """The installed distribution that announced this module; None for one that was simply imported."""
    top = module.split(".")[0]
    points = (p for p in entry_points(group=GROUP) if re.split(r"[.:\s]", p.value)[0] == top)
    return next((p.dist.name for p in points if p.dist), None)


def _home(cls: type[Mixer]) -> str:
    """What tells two classes of one name apart: the same one may be registered again, as an edited file's is."""
    where = _FILES[cls.__module__].path if cls.__module__ in _FILES else cls.__module__
    return f"{where}:{cls.__qualname__}"


def _split(name: str) -> tuple[str, str | None]:
    head, colon, tail = name.rpartition(":")
    return (head, tail) if colon and head.endswith(".py") and tail.isidentifier() else (name, None)


def run_file(path: Path) -> list[type[Mixer]]:
    """Execute a file as a module of its own, unless the same text was before; the classes that it registers."""
    text = path.read_text(encoding="utf-8")
    name = f"limbeck_mixer_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if name in _FILES:
        return [register(cls) for cls in _FILES[name].classes]
    module, before = ModuleType(name), dict(_REGISTRY)
    module.__file__ = str(path)
    sys.modules[name], _FILES[name] = module, Source(path, text)  # dataclasses look their module up
    try:
        exec(compile(text, path, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[name], _FILES[name]
        _REGISTRY.clear()
        _REGISTRY.update(before)
        if isinstance(error, LimbeckError):
            raise
        raise LimbeckError(f"{path} could not be loaded: {type(error).__name__}: {error}") from error
    return _FILES[name].classes
