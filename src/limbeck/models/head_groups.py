"""Which groups of heads keep softmax attention: a key/value head with its query heads, written "layer.group".

kept = resolve_softmax_heads("18.2,20.2", groups=[3] * 30)          # {18: [2], 20: [2]}
kept = resolve_softmax_heads("softmax_heads.json", groups)          # those that `limbeck select --heads` chose
describe_softmax_heads(student.config.limbeck)                      # "softmax in 2 of 90 head groups: 18.2, 20.2"
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError
from limbeck.models.layers import SPLIT_MIXER, format_ranges, read_selection

HeadGroups = dict[int, list[int]]  # groups by layer, both counted from 0


def resolve_softmax_heads(softmax_heads: int | str | list[str], groups: Sequence[int]) -> HeadGroups:
    """Return the groups that keep softmax, by layer.

    Args:
        softmax_heads: "none", ["18.2", "20.2"], text such as "18.2,20.2", or a file that
            `limbeck select --heads` wrote.
        groups: of the teacher, the number of groups in each layer.

    Raises:
        LimbeckError: no such layer or group, a group twice, an unreadable file; a number, which only a run can turn
            into groups (`limbeck.training.automatic_heads`).
    """
    if isinstance(softmax_heads, int):
        raise LimbeckError(
            f"softmax_heads is {softmax_heads}, a number of groups",
            expected="which ones: layer.group as in 18.2, or a file; limbeck distill chooses them by itself",
            hint=f"limbeck select --heads --num-softmax-heads {softmax_heads}",
        )
    if softmax_heads in ("none", "", []):
        return {}
    if isinstance(softmax_heads, str):
        if softmax_heads.endswith(".json"):
            softmax_heads = read_selection(
                Path(softmax_heads),
                "softmax_heads",
                '["layer.group", ...]',
                "limbeck select --heads --out softmax_heads.json",
            )
        else:
            softmax_heads = softmax_heads.split(",")
    kept: HeadGroups = {}
    for name in softmax_heads:
        layer, group = _parse_name(name, groups)
        if group in kept.setdefault(layer, []):
            raise LimbeckError(f"softmax_heads names {layer}.{group} twice", expected="each group once")
        kept[layer].append(group)
    return {layer: sorted(kept[layer]) for layer in sorted(kept)}


def describe_softmax_heads(plan: dict[str, Any]) -> str:
    """Say which groups of heads keep softmax: "softmax in 9 of 90 head groups: 18.2, ..."; "" if no layer is split.

    Args:
        plan: `config.limbeck` of the student. Layers that are not in it keep softmax in all of their groups, as many as
            the first converted layer has.
    """
    split = [entry for entry in plan["layers"] if entry["mixer"] == SPLIT_MIXER]
    names = [f"{entry['layer']}.{group}" for entry in split for group in entry["options"]["softmax_groups"]]
    if not names:
        return ""
    shapes = [plan["shapes"][entry["shape"]] for entry in plan["layers"]]
    converted = {entry["layer"] for entry in plan["layers"]}
    whole = [i for i in range(shapes[0].get("layers", len(shapes))) if i not in converted]
    in_whole = len(whole) * shapes[0]["kv_heads"]
    total = in_whole + sum(shape["kv_heads"] for shape in shapes)
    window = split[0]["options"]["softmax_window"]
    return (
        f"softmax in {in_whole + len(names)} of {total} head groups: {', '.join(names)}"
        + (f" (over the last {window} tokens)" if window else "")
        + (f" and all of layer{'s' * (len(whole) > 1)} {format_ranges(whole)}" if whole else "")
    )


def _parse_name(name: str, groups: Sequence[int]) -> tuple[int, int]:
    """Parse "layer.group" of a teacher with so many groups in each layer."""
    # 18.2 and 18.20 are two groups, but one number
    layer, dot, group = name.strip().partition(".") if isinstance(name, str) else ("", "", "")
    if not (dot and layer.isdecimal() and group.isdecimal()):
        raise LimbeckError(
            f"softmax_heads has {name!r}",
            expected="layer.group as in 18.2, counted from 0, or a file.json from limbeck select --heads",
            hint=f"'{name}', in quotes" if isinstance(name, float) else None,
        )
    if int(layer) >= len(groups):
        raise LimbeckError(
            f"softmax_heads names {name}, the teacher has {len(groups)} layers",
            expected=f"layers from 0 to {len(groups) - 1}",
        )
    if int(group) >= groups[int(layer)]:
        raise LimbeckError(
            f"softmax_heads names {name}, layer {layer} has {groups[int(layer)]} groups of heads",
            expected=f"groups from {layer}.0 to {layer}.{groups[int(layer)] - 1}",
        )
    return int(layer), int(group)
