"""The figure of the measure `hidden`: CKA and cosine with the teacher's states over the layers.

    save(draw([measurement_of_one_student, measurement_of_another]), Path("hidden.png"))

Every model is a line, dotted before it learnt anything.
"""

from typing import Any

from limbeck.evaluate.measurement import Measurement
from limbeck.report.figure import new_figure

ROWS = {"cka": "linear CKA", "cosine": "cosine"}
COLUMNS = {
    "attention": "attention output, teacher-fed",
    "block": "block output, teacher-fed",
    "free": "block output, free-running",
}


def draw(found: list[Measurement]) -> Any:
    """One figure for all models that have been measured."""
    shown = [one for one in found if one.model != one.teacher] or found
    figure = new_figure(10, 5.2)
    panels = figure.subplots(2, 3, sharex=True)
    for line, (kind, name) in zip(panels, ROWS.items()):
        for axes, (place, title) in zip(line, COLUMNS.items()):
            for index, one in enumerate(shown):
                for whose, style, width in (("student", "-", 1.2), ("fresh", ":", 0.7)):
                    if whose in one.details:
                        values = [row[f"{kind}_{place}"] for row in one.details[whose]]
                        label = _short(one.model) if whose == "student" else None
                        axes.plot(values, style, color=f"C{index}", linewidth=width, label=label)
            axes.set_title(f"{name}: {title}", fontsize=8)
            axes.tick_params(labelsize=7)
            axes.grid(alpha=0.3)
    for axes in panels[1]:
        axes.set_xlabel("layer", fontsize=8)
    panels[0, 0].legend(fontsize=7)
    return figure


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]
