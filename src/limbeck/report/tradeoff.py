"""Accuracy against speed: held-out perplexity over milliseconds a token, a mark a model, its area the cache's size.

    if possible(found):
        figure = draw(found, length=4096)

Perplexities are those of the measure "agreement", times and caches those of "speed" at one length, batch size 1 or the
smallest. A softmax model without an agreement measurement of its own has the perplexity that its students' say of it.
"""

from dataclasses import dataclass
from typing import Any

from limbeck.errors import LimbeckError
from limbeck.evaluate.measurement import Measurement
from limbeck.evaluate.speed_values import token_milliseconds
from limbeck.report.figure import colour, logarithmic, marker, new_figure
from limbeck.report.naming import size


@dataclass(frozen=True)
class Mark:
    """One model at one length."""

    model: str
    perplexity: float
    milliseconds: float
    cache_bytes: float


def possible(found: list[Measurement]) -> bool:
    """Whether two models at least have both measurements at a common length."""
    return len(_marks(found, _longest(found))) > 1


def draw(found: list[Measurement], length: int | None = None) -> Any:
    """The figure.

    Args:
        length: tokens of context; None takes the longest that all models have.

    Raises:
        LimbeckError: no model has both measurements at that length.
    """
    at = length or _longest(found)
    marks = _marks(found, at)
    if not marks:
        raise LimbeckError(
            f"no model has perplexity and speed{f' at {at:,} tokens' if at else ''}",
            hint="limbeck eval MODEL --measure agreement,speed",
        )
    figure = new_figure(5.2, 3.8)
    axes = figure.subplots()
    largest = max(mark.cache_bytes for mark in marks)
    for mark in marks:
        area = 40 + 900 * mark.cache_bytes / largest
        axes.scatter(mark.milliseconds, mark.perplexity, s=area, color=colour(mark.model), alpha=0.25, linewidths=0)
        axes.scatter(mark.milliseconds, mark.perplexity, s=22, color=colour(mark.model), marker=marker(mark.model))
        axes.annotate(
            f"{mark.model}\n{size(mark.cache_bytes)}",
            (mark.milliseconds, mark.perplexity),
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=7,
        )
    logarithmic(axes.yaxis)
    axes.margins(0.25)
    axes.set_xlabel(f"next token after {at:,} tokens of context, ms")
    axes.set_ylabel("perplexity of held-out text")
    return figure


def _longest(found: list[Measurement]) -> int | None:
    """The longest length that all models with a speed measurement have."""
    lengths = [{p["length"] for p in one.details.get("points", [])} for one in found if one.measure == "speed"]
    common = set.intersection(*lengths) if lengths else set()
    return max(common, default=None)


def _marks(found: list[Measurement], length: int | None) -> list[Mark]:
    agreements = [one for one in found if one.measure == "agreement"]
    perplexity = {one.teacher: one.values["teacher_perplexity"] for one in agreements if one.teacher is not None}
    perplexity |= {one.model: one.values["perplexity"] for one in agreements}
    marks = []
    for one in found:
        points = [p for p in one.details.get("points", []) if p["length"] == length] if one.measure == "speed" else []
        if points and one.model in perplexity:
            point = min(points, key=lambda p: p["batch"])
            cache = point["token"]["growing"]["cache_bytes"]
            marks.append(Mark(one.model, perplexity[one.model], token_milliseconds(point), cache))
    return marks
