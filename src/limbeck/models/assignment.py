"""Which mixer each layer of a student gets: the student's own, a rule's, or softmax in some of its groups of heads.

    groups = [site.shape.kv_heads for site in find_attention_sites(teacher)]
    assigned = assign_mixers(groups, "gated_deltanet", softmax_layers="every 4", softmax_heads=["18.2"], length=2048)
    assigned[18].mixer, assigned[18].options["softmax_groups"]           # 'head_split', [2]

Layers that are not in the result keep the teacher's own attention.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from limbeck import mixers
from limbeck.core.errors import LimbeckError
from limbeck.mixers.head_split import HeadSplit, HeadSplitOptions
from limbeck.mixers.sliding_window import SlidingWindow
from limbeck.models.head_groups import HeadGroups, resolve_softmax_heads
from limbeck.models.layers import format_ranges, parse_layers, select_converted_layers


@dataclass(frozen=True)
class MixerAssignment:
    """The mixer of a layer, with all its options."""

    mixer: str
    options: dict[str, Any]
    given: tuple[str, ...] = ()  # names of the options that were asked for

    @classmethod
    def create(cls, mixer: str, options: dict[str, Any] | None, preset: str, length: int) -> "MixerAssignment":
        resolved = mixers.get(mixer).for_length(mixers.resolve_options(mixer, options, preset), length)
        return cls(mixers.get(mixer).name, asdict(resolved), tuple(options or ()))

    def keep_softmax(self, kept: list[int], groups: int, window: int, layer: int) -> "MixerAssignment":
        """Return this mixer for all but the `kept` groups of a layer that has so many; arguments as in `convert`."""
        if self.mixer == HeadSplit.name:
            raise LimbeckError(
                f"layer {layer} has the mixer 'head_split' and is named in softmax_heads too",
                expected="one of the two",
                hint="give the mixer of the other groups, and name those with softmax in softmax_heads",
            )
        if len(kept) == groups:
            options = {"window": window, "sinks": HeadSplitOptions().softmax_sinks}
            return MixerAssignment.create(SlidingWindow.name, options, "default", 0)
        if "rope" in self.given and not self.options["rope"]:
            raise LimbeckError(
                f"mixer '{self.mixer}' in layer {layer} is to have q and k without the rotary embedding, which the "
                "groups that keep softmax need",
                expected="rope=true, or no option rope",
            )
        # q and k come to a layer in one form; a preset without RoPE gives way
        options = {**self.options, "rope": True}
        split = HeadSplitOptions(mixer=self.mixer, mixer_options=options, softmax_groups=kept, softmax_window=window)
        return MixerAssignment(HeadSplit.name, asdict(split))

    def list_mixers(self) -> list[str]:
        """List the mixer and those that it consists of."""
        cls = mixers.get(self.mixer)
        return [self.mixer, *cls.list_inner_mixers(cls.options_class.parse(self.options, cls.name))]


def assign_mixers(
    groups: Sequence[int],
    mixer: str,
    options: dict[str, Any] | None = None,
    preset: str = "default",
    *,
    layers: str | list[int] = "all",
    softmax_layers: str | list[int] = "none",
    softmax_heads: int | str | list[str] = "none",
    softmax_window: int = 0,
    rules: Sequence[dict[str, Any]] = (),
    length: int = 0,
) -> dict[int, MixerAssignment]:
    """Return the mixers of the converted layers, by layer.

    Args:
        groups: groups of heads in each of the teacher's attention layers.
        length: of the longest training sequences, in tokens.
        others: as in `limbeck.convert`.

    Raises:
        LimbeckError: unknown mixer, option, layer or group; a rule or a group for a layer that keeps softmax; no layer
            is left.
    """
    kept = resolve_softmax_heads(softmax_heads, groups)
    converted = _choose_layers(layers, softmax_layers, kept, groups, softmax_window)
    assigned = dict.fromkeys(converted, MixerAssignment.create(mixer, options, preset, length))
    for rule in rules:
        assigned.update(_apply_rule(rule, mixer, preset, assigned, len(groups), length))
    for layer in kept.keys() & assigned.keys():
        assigned[layer] = assigned[layer].keep_softmax(kept[layer], groups[layer], softmax_window, layer)
    return assigned


def _choose_layers(
    layers: str | list[int], softmax_layers: str | list[int], kept: HeadGroups, groups: Sequence[int], window: int
) -> list[int]:
    """Return the layers that get a mixer: not those that keep all of their groups, unless with a window."""
    if window < 0:
        raise LimbeckError(f"softmax_window is {window}", expected="a number of tokens, or 0 for all")
    if window and not kept:
        raise LimbeckError(
            f"softmax_window is {window}, but softmax_heads names no group",
            expected="both, or neither",
            hint="mixer sliding_window has a window in all heads",
        )
    converted = select_converted_layers(layers, softmax_layers, len(groups))
    for layer, names in kept.items():
        if layer not in converted:
            raise LimbeckError(
                f"softmax_heads names {layer}.{names[0]}, but layer {layer} keeps softmax as a whole",
                expected=f"groups of the layers {format_ranges(converted)}",
            )
    split = [i for i in converted if window or len(kept.get(i, [])) < groups[i]]
    if not split:
        raise LimbeckError("softmax_heads names every group, which leaves nothing to convert", expected="some of them")
    return split


def _apply_rule(
    rule: dict[str, Any], mixer: str, preset: str, assigned: dict[int, MixerAssignment], count: int, length: int
) -> dict[int, MixerAssignment]:
    """Return the mixers that a rule assigns, by layer."""
    unknown = [key for key in rule if key not in ("layers", "mixer", "preset", "options")]
    if unknown or "layers" not in rule:
        raise LimbeckError(
            f"a rule has {', '.join(map(repr, rule)) or 'nothing'}",
            expected="layers, and any of mixer, preset, options",
        )
    layers = parse_layers(rule["layers"], count)
    absent = [i for i in layers if i not in assigned]
    if absent:
        raise LimbeckError(f"a rule names layer {absent[0]}, which keeps softmax", expected="layers that are converted")
    new = MixerAssignment.create(rule.get("mixer", mixer), rule.get("options"), rule.get("preset", preset), length)
    return dict.fromkeys(layers, new)
