"""Selection of layers by short texts: which layers get a mixer and which keep softmax.

    parse_layers("0,2,5-9", 30)                         # [0, 2, 5, 6, 7, 8, 9]
    parse_softmax_layers("every 4", 30)                 # [3, 7, 11, 15, 19, 23, 27]: the last of every four
    parse_softmax_layers("uniform 7", 30)               # seven, evenly spread
    parse_softmax_layers("softmax_layers.json", 30)     # those that `limbeck select` chose
    format_ranges([0, 2, 5, 6, 7])                      # "0, 2, 5-7"

Both parsers also take lists of numbers.
"""

import json
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError

SPLIT_MIXER = "head_split"  # softmax in some groups of a layer's heads, another mixer in the others


def parse_layers(layers: str | list[int], count: int) -> list[int]:
    """Parse layer numbers: "all", [0, 3] or "0,2,5-9", of a model with `count` layers."""
    if layers == "all":
        return list(range(count))
    problem = LimbeckError(
        f"layers is {layers!r}, the teacher has {count}", expected=f"'all', or numbers from 0 to {count - 1} as 0,2,5-9"
    )
    chosen = _parse_numbers(layers, problem)
    if not chosen or min(chosen) < 0 or max(chosen) >= count:
        raise problem
    return sorted(chosen)


def parse_softmax_layers(softmax_layers: str | list[int], count: int) -> list[int]:
    """Parse layers that keep softmax: "none", numbers, "every N", "uniform K" or a file written by `limbeck select`."""
    if softmax_layers in ("none", "", []):
        return []
    problem = LimbeckError(
        f"softmax_layers is {softmax_layers!r}, the teacher has {count} layers",
        expected=f"none, numbers from 0 to {count - 1} as 0,2,5-9, 'every 4', 'uniform 7', or a file.json",
    )
    if isinstance(softmax_layers, str):
        word, _, number = softmax_layers.partition(" ")
        if word in ("every", "uniform"):
            if not number.strip().isdigit() or not 0 < int(number) <= count:
                raise problem
            n = int(number)
            return list(range(n - 1, count, n)) if word == "every" else space_evenly(count, n)
        if softmax_layers.endswith(".json"):
            softmax_layers = read_selection(
                Path(softmax_layers),
                "softmax_layers",
                "[numbers]",
                "limbeck select --out softmax_layers.json",
                old_key="keep",
            )
    chosen = _parse_numbers(softmax_layers, problem)
    if chosen and (min(chosen) < 0 or max(chosen) >= count):
        raise problem
    return sorted(chosen)


def select_converted_layers(layers: str | list[int], softmax_layers: str | list[int], count: int) -> list[int]:
    """Return the layers that get a mixer: those in `layers` that are not in `softmax_layers`."""
    softmax = set(parse_softmax_layers(softmax_layers, count))
    converted = [i for i in parse_layers(layers, count) if i not in softmax]
    if not converted:
        raise LimbeckError(
            f"layers={layers!r} and softmax_layers={softmax_layers!r} leave nothing to convert",
            expected="at least one layer",
        )
    return converted


def space_evenly(count: int, chosen: int) -> list[int]:
    """Return `chosen` of `count` layers, evenly spread."""
    return [int((i + 0.5) * count / chosen) for i in range(chosen)]


def name_base_mixer(entry: dict[str, Any]) -> str:
    """Return the mixer of a plan's layer; where groups of heads keep softmax, that of the others."""
    return entry["options"]["mixer"] if entry["mixer"] == SPLIT_MIXER else entry["mixer"]


def group_layers_by_mixer(plan: dict[str, Any], count: int) -> dict[str, list[int]]:
    """Return the layers of a student by `name_base_mixer`, with "softmax" for those that keep it as a whole.

    Args:
        plan: `config.limbeck` of the student.
        count: attention layers of the teacher.
    """
    groups: dict[str, list[int]] = {}
    for entry in plan["layers"]:
        groups.setdefault(name_base_mixer(entry), []).append(entry["layer"])
    converted = {layer for layers in groups.values() for layer in layers}
    if unconverted := [i for i in range(count) if i not in converted]:
        groups["softmax"] = sorted(unconverted + groups.get("softmax", []))  # there is a mixer "softmax" too
    return groups


def format_ranges(layers: list[int]) -> str:
    """Format layer numbers as ranges: "0, 2, 5-7"."""
    parts: list[list[int]] = []
    for layer in sorted(layers):
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in parts)


def _parse_numbers(text: str | list[int], problem: LimbeckError) -> set[int]:
    try:
        if not isinstance(text, str):
            return {int(i) for i in text}
        chosen: set[int] = set()
        for part in text.split(","):
            first, _, last = part.strip().partition("-")
            numbers = range(int(first), int(last or first) + 1)
            if not numbers:
                raise ValueError(f"{part.strip()} runs backward")
            chosen.update(numbers)
        return chosen
    except (TypeError, ValueError) as error:
        raise problem from error


def read_selection(path: Path, key: str, form: str, hint: str, old_key: str | None = None) -> list[Any]:
    """Read the list of a file that `limbeck select` wrote.

    Args:
        key: its name in the file; `old_key`, that of earlier versions.
        form: how the list looks, for the error; `hint`, the command that writes it.

    Raises:
        LimbeckError: no such file, no JSON, or no list of this name.
    """
    try:
        selection = json.loads(path.read_text(encoding="utf-8"))
        chosen = selection[old_key if old_key in selection else key]
        if not isinstance(chosen, list):
            raise TypeError(f"{key} is no list")
        return chosen
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LimbeckError(
            f"cannot read {key} from {path}: {error}", expected=f'a JSON file with "{key}": {form}', hint=hint
        ) from error
