"""Checks of a student's mixers against what a format computes: every option that differs, with the switch for it.

    options = {"conv": Only((0,), "it has a token shift of another kind"), ...}
    reasons = check_mixers(student, "rwkv7", options, free={"rank"}, softmax=False)

Layers with the same finding are named together. An option that is neither in the table nor free has to be what it is by
default, so that one which comes later to the mixers is not overlooked.
"""

from collections.abc import Set
from dataclasses import dataclass, fields
from typing import Any

from limbeck.models.export import Reason
from limbeck.models.export.body import format_layers, list_mixers_by_layer


@dataclass(frozen=True)
class Only:
    """The values of an option that a format can hold; the first is the one to recommend."""

    values: tuple[Any, ...]
    why: str  # as a clause: "the format's convolution is four wide"


def check_mixers(student: Any, mixer: str, options: dict[str, Only], *, free: Set[str], softmax: bool) -> list[Reason]:
    """Return the reasons why the mixers of a student do not fit.

    Args:
        mixer: the one that the format computes.
        options: what its options have to be.
        free: options that may have any value.
        softmax: whether layers may keep softmax.
    """
    mixers = list_mixers_by_layer(student)
    count = len(mixers)
    found: dict[Reason, list[int]] = {}
    for layer, own in enumerate(mixers):
        for reason in _check_mixer(own, mixer, options, free, softmax):
            found.setdefault(reason, []).append(layer)
    reasons = [Reason(f"{reason.problem} ({format_layers(at, count)})", reason.switch) for reason, at in found.items()]
    return reasons + _check_uniform(mixers)


def _check_mixer(own: Any, mixer: str, options: dict[str, Only], free: Set[str], softmax: bool) -> list[Reason]:
    if own is None or own.name == "softmax":
        if softmax and own is None:
            return []
        return [Reason("softmax attention, beside which the format has no such layers", "student.softmax_layers=none")]
    if own.name != mixer:
        return [Reason(f"the mixer is {own.name}, and the format computes {mixer}", f"student.mixer={mixer}")]
    reasons = []
    defaults = {f.name: Only((f.default,), "the format does not know it") for f in fields(own.options)}
    for name, only in {**{k: v for k, v in defaults.items() if k not in free}, **options}.items():
        value = getattr(own.options, name)
        if not any(_equal(value, allowed) for allowed in only.values):
            wanted = _format(only.values[0])
            reasons.append(Reason(f"{name} is {_format(value)}: {only.why}", f"student.options.{name}={wanted}"))
    if own.teacher_shape.key_width != own.teacher_shape.value_width:
        reasons.append(Reason("the teacher's keys and values have different widths"))
    return reasons


def _check_uniform(mixers: list[Any]) -> list[Reason]:
    """Return a reason if layers have different tensors: a format's sizes are those of all layers."""
    present = [mixer for mixer in mixers if mixer is not None]
    shapes = [{name: tensor.shape for name, tensor in mixer.state_dict().items()} for mixer in present]
    if all(shape == shapes[0] for shape in shapes) or len({mixer.name for mixer in present}) > 1:
        return []
    return [Reason("the mixers of different layers differ in size", "student.rules=[]")]


def _equal(value: Any, allowed: Any) -> bool:
    if isinstance(value, float) and isinstance(allowed, float):
        return abs(value - allowed) <= 1e-6 * abs(allowed)
    return bool(value == allowed)


def _format(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
