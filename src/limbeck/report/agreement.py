"""The figure of the measure `agreement`: divergence by position and by frequency, and how long texts stay together.

    save(draw([measurement_of_one_student, measurement_of_another]), Path("agreement.png"))

Every model is a line; the teacher itself would be the axis, and is left out.
"""

from typing import Any

from limbeck.evaluate.measurement import Measurement
from limbeck.report.figure import new_figure


def draw(found: list[Measurement]) -> Any:
    """One figure for all models that have been measured."""
    students = [one for one in found if one.model != one.teacher] or found
    figure = new_figure(10, 5.6)
    panels = figure.subplots(2, 2)
    for one in students:
        _buckets(panels[0, 0], one, "by_position", "kl")
        _buckets(panels[0, 1], one, "by_frequency", "kl")
        _buckets(panels[1, 0], one, "by_frequency", "top1")
        if "together" in one.details:
            steps = range(1, len(one.details["together"]) + 1)
            (line,) = panels[1, 1].plot(steps, one.details["together"], label=_short(one.model))
            panels[1, 1].plot(steps, one.details["equal_share"], color=line.get_color(), linewidth=0.7, alpha=0.5)
    titles = (
        ("KL(teacher ‖ student), nats", "tokens of the document seen before"),
        ("KL(teacher ‖ student), nats", "occurrences of the target in a million tokens of training text"),
        ("same likeliest token", "occurrences of the target in a million tokens of training text"),
        ("free running: same text so far (thin: same token)", "tokens written"),
    )
    for axes, (title, label) in zip(panels.flat, titles):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(label, fontsize=8)
        axes.tick_params(labelsize=7)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    panels[0, 0].legend(fontsize=7)
    panels[1, 1].set_visible(any("together" in one.details for one in students))
    return figure


def _buckets(axes: Any, one: Measurement, key: str, number: str) -> None:
    """A number over the buckets of one measurement, each named by where it begins."""
    rows = one.details.get(key, [])
    axes.plot(
        [_name(row) for row in rows], [row[number] for row in rows], marker="o", markersize=3, label=_short(one.model)
    )


def _name(row: dict[str, Any]) -> str:
    begin, end = row["from"], row["below"]
    if begin is None:
        return f"< {end:,}"
    return f"{begin:,} +"


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]
