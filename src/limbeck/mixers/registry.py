"""The registry of mixers by name, with presets of their options and named sets for studies.

    mixers.list_mixers()                             # every mixer: Limbeck's own and those of installed packages
    mixers.get("gla")                                # by name, or from a file: get("path/to/mine.py:ClassName")
    mixers.resolve_options("gla", {"conv": 4}, preset="published")
    mixers.build("gla", HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64))
    mixers.select_mixers("paper-v3")                 # ["linear_attention", "retnet", "gla", ...]

A mixer is registered by the decorator `register`. A package announces its own as an entry point of the group
`limbeck.mixers`; those are imported when a name is first looked up that is not one of Limbeck's.
docs/guides/own_mixer.md walks through both ways.
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

from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.mixers.base import Mixer
from limbeck.mixers.options import Options
from limbeck.mixers.types import HeadShape

ENTRY_POINT_GROUP = "limbeck.mixers"
PRESETS = ("default", "published", "controlled")
# arXiv 2504.14366. Its second version names only xLSTM, GLA, MetaLA and linear attention; the other four of its eight
# are a reconstruction. The third version names all seven.
PAPER_V2 = ("linear_attention", "rebased", "hedgehog", "retnet", "gla", "metala", "deltanet", "mlstm")
PAPER_V3 = ("linear_attention", "retnet", "gla", "mlstm", "deltanet", "gated_deltanet", "kda")

_REGISTRY: dict[str, type[Mixer]] = {}
_FILES: dict[str, "MixerFile"] = {}  # by module name
_BROKEN: dict[str, str] = {}  # entry points that could not be loaded, and why
_discovered = False


@dataclass(frozen=True)
class MixerFile:
    """A file that registered mixers: its path, its text and the classes that it registered."""

    path: Path
    text: str
    classes: list[type[Mixer]] = field(default_factory=list)


@dataclass(frozen=True)
class MixerOrigin:
    """Where a mixer that is not Limbeck's own comes from; saved in the config of every student that has it."""

    module: str
    package: str | None = None  # the installed distribution
    file: str | None = None  # the name of a single file, which is saved beside the student's weights

    def to_dict(self) -> dict[str, str]:
        return {key: value for key, value in asdict(self).items() if value is not None}


def register(cls: type[Mixer]) -> type[Mixer]:
    """Register a mixer class under its `name`, for conversion, recipes and the contract; use it as a decorator."""
    if not (inspect.isclass(cls) and issubclass(cls, Mixer)):
        raise LimbeckError(f"{cls!r} is not a mixer", expected="a subclass of limbeck.mixers.Mixer")
    name = getattr(cls, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not getattr(cls, "summary", None):
        raise LimbeckError(
            f"{cls.__qualname__} has name {name!r}",
            expected="class attributes `name` (letters, digits, _ and -) and `summary` (one line)",
        )
    registered = _REGISTRY.get(name)
    if registered is not None and _location(registered) != _location(cls):
        owner = "Limbeck" if registered.__module__.startswith("limbeck.") else _location(registered)
        raise LimbeckError(
            f"the mixer name '{name}' of {_location(cls)} is already used by {owner}", expected="another name"
        )
    _REGISTRY[name] = cls
    if cls.__module__ in _FILES and cls not in _FILES[cls.__module__].classes:
        _FILES[cls.__module__].classes.append(cls)
    return cls


def list_mixers() -> list[str]:
    """List all mixers in alphabetical order: Limbeck's own, those of installed packages and of files loaded so far."""
    _discover()
    return sorted(_REGISTRY)


def is_registered(name: str) -> bool:
    """Tell whether there is a mixer of that name."""
    if name not in _REGISTRY:
        _discover()
    return name in _REGISTRY


def get(name: str) -> type[Mixer]:
    """Return the mixer class of that name, or of a file.

    Args:
        name: a registered name, `path/to/file.py`, or `path/to/file.py:ClassName` where the file has several.

    Raises:
        LimbeckError: there is no such mixer, with the closest name; or the file cannot be loaded, and why.
    """
    if is_file(name):
        return load_file(name)
    if is_registered(name):
        return _REGISTRY[name]
    if name in _BROKEN:
        raise LimbeckError(f"mixer '{name}' could not be loaded: {_BROKEN[name]}", hint="limbeck students")
    raise LimbeckError(
        f"unknown mixer '{name}'{suggest_closest(name, _REGISTRY)}",
        expected=", ".join(list_mixers()) + ", or a file, path/to/mine.py",
        hint="limbeck students   (lists and describes them)",
    )


def resolve_options(name: str, given: dict[str, Any] | None = None, preset: str = "default") -> Options:
    """Resolve the options of a mixer: its defaults, overridden by the preset, overridden by `given`.

    Args:
        given: options as plain values (YAML, the command line).
        preset: "default" (start well in Limbeck's measurements), "published" (as in the authors' model), or
            "controlled" (all mixers alike in everything but the recurrence).
    """
    cls = get(name)
    if preset not in PRESETS:
        raise LimbeckError(f"unknown preset '{preset}'{suggest_closest(preset, PRESETS)}", expected=", ".join(PRESETS))
    preset_values = {"default": {}, "published": cls.published, "controlled": cls.controlled}[preset]
    return cls.options_class.parse({**cls.defaults, **preset_values, **(given or {})}, cls.name)


def fit_options_to_length(name: str, given: dict[str, Any], length: int) -> dict[str, Any]:
    """Return a mixer's given options, with those that depend on the length of training sequences set for `length`."""
    resolved = resolve_options(name, given)
    before, after = vars(resolved), vars(get(name).for_length(resolved, length))
    return {**given, **{option: value for option, value in after.items() if value != before[option]}}


def build(name: str, shape: HeadShape, given: dict[str, Any] | None = None, preset: str = "default") -> Mixer:
    """Build a mixer for an attention of that shape; arguments as in `resolve_options`."""
    return get(name)(shape, resolve_options(name, given, preset))


def list_mixer_sets() -> dict[str, list[str]]:
    """Return the named sets: paper-v2 and paper-v3 (arXiv 2504.14366), and all that are registered."""
    return {"paper-v2": list(PAPER_V2), "paper-v3": list(PAPER_V3), "all": list_mixers()}


def select_mixers(text: str) -> list[str]:
    """Return mixers named one by one ("gla,kda") or by a set; LimbeckError where there is no such set or mixer."""
    sets = list_mixer_sets()
    if text in sets:
        return sets[text]
    names = [part.strip() for part in text.split(",") if part.strip()]
    if not names:
        raise LimbeckError("no mixer given", expected=f"names as a,b,c, or a set: {', '.join(sets)}")
    for name in names:
        get(name)
    return list(dict.fromkeys(names))


# ---------------------------------------------------------------------- mixers from files and packages


def is_file(name: str) -> bool:
    """Tell whether this mixer name is the path of a file."""
    return _split(name)[0].endswith(".py")


def load_file(name: str | Path) -> type[Mixer]:
    """Load the mixer of `path/to/file.py` or `path/to/file.py:ClassName`; runs the file the first time only."""
    head, class_name = _split(str(name))
    path = Path(head).expanduser().resolve()
    if not path.is_file():
        raise LimbeckError(f"no such file: {head}", expected="a Python file that registers a mixer")
    classes = {cls.__name__: cls for cls in execute_file(path)}
    if class_name and class_name not in classes:
        raise LimbeckError(
            f"{head} registers no class '{class_name}'{suggest_closest(class_name, classes)}",
            expected=", ".join(classes) or "@register",
        )
    if len(classes) != 1 and not class_name:
        raise LimbeckError(
            f"{head} registers {len(classes)} mixers" + (f": {', '.join(classes)}" if classes else ""),
            expected="one, or the class by name" if classes else "limbeck.mixers.register as decorator of the class",
            hint=f"{head}:{next(iter(classes))}" if classes else None,
        )
    return classes[class_name or next(iter(classes))]


def list_loaded_files() -> list[Path]:
    """List the files whose mixers are loaded, for other processes to load them too."""
    return [source.path for source in _FILES.values()]


def get_origin(name: str) -> MixerOrigin | None:
    """Return where the mixer of that name comes from; None for Limbeck's own."""
    module = get(name).__module__
    if module.startswith("limbeck."):
        return None
    if module in _FILES:
        return MixerOrigin(module, file=_FILES[module].path.name)
    return MixerOrigin(module, package=_package(module))


def get_source_code(name: str) -> str | None:
    """Return the text of the file that registered the mixer; None where it came from a module."""
    file = _FILES.get(get(name).__module__)
    return file.text if file else None


def _discover() -> None:
    """Import the mixers of installed packages, once. A broken one is skipped with a warning."""
    global _discovered
    if _discovered:
        return
    _discovered = True
    for point in entry_points(group=ENTRY_POINT_GROUP):
        try:
            loaded: Any = point.load()
            if inspect.isclass(loaded) and loaded not in _REGISTRY.values():
                register(loaded)  # type: ignore[arg-type]
        except (Exception, SystemExit) as error:
            _BROKEN[point.name] = f"{type(error).__name__}: {error}".replace("\n", "; ")
            warnings.warn(f"mixer '{point.name}'{_from(point)} is skipped: {_BROKEN[point.name]}", stacklevel=3)


def _from(point: EntryPoint) -> str:
    return f" of package {point.dist.name}" if point.dist else f" of {point.value}"


def _package(module: str) -> str | None:
    """Return the installed distribution that announced this module; None for one that was simply imported."""
    top = module.split(".")[0]
    points = (p for p in entry_points(group=ENTRY_POINT_GROUP) if re.split(r"[.:\s]", p.value)[0] == top)
    return next((p.dist.name for p in points if p.dist), None)


def _location(cls: type[Mixer]) -> str:
    """Return what tells two classes of one name apart; an edited file may register its class again."""
    where = _FILES[cls.__module__].path if cls.__module__ in _FILES else cls.__module__
    return f"{where}:{cls.__qualname__}"


def _split(name: str) -> tuple[str, str | None]:
    head, colon, tail = name.rpartition(":")
    return (head, tail) if colon and head.endswith(".py") and tail.isidentifier() else (name, None)


def execute_file(path: Path) -> list[type[Mixer]]:
    """Execute a file as a module, unless that text was executed before, and return the classes that it registers."""
    text = path.read_text(encoding="utf-8")
    name = f"limbeck_mixer_{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    if name in _FILES:
        return [register(cls) for cls in _FILES[name].classes]
    module, before = ModuleType(name), dict(_REGISTRY)
    module.__file__ = str(path)
    sys.modules[name], _FILES[name] = module, MixerFile(path, text)  # in sys.modules, because dataclasses look there
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
