"""The figures of measures that look inside: agreement, mixing matrices, hidden states, scores on tasks.

    panels = analysis(lines)               # inside `look`

A measure draws its own figure, one line a model. Of a grid one place is shown, the one with the lowest perplexity over
its students, and of each student the first seed; the captions say so.
"""

from statistics import fmean

from limbeck.evaluate.measurement import Measurement
from limbeck.evaluate.measures import find
from limbeck.report.arms import TEACHER, Arm
from limbeck.report.figure import colour, look_of
from limbeck.report.grid import METRICS, Line, metric_name, named, places_of
from limbeck.report.panels import Panel
from limbeck.report.tasks import bars

CAPTIONS = {
    "agreement": "How a student's next token differs from its teacher's: divergence by position and by frequency "
    "of the target, agreement on the likeliest token, and how long texts that both write stay the same",
    "mixing": "Mixing matrices of students beside the teacher's attention: above one head on one document, below "
    "statistics over the layers; dotted before training",
    "hidden": "How alike hidden states are, layer by layer, as linear CKA and cosine; dotted before training",
    "tasks": "Scores on benchmarks with standard errors; guessing is dashed",
}
TITLES = {
    "agreement": "Agreement with the teacher",
    "mixing": "Mixing matrices",
    "hidden": "Hidden states",
    "tasks": "Benchmarks",
}


def analysis(lines: list[Line]) -> list[Panel]:
    """A figure for each of these measures that some arm has."""
    place = _best_place(lines)
    shown = [line for line in lines if line.place in (place, {})]
    panels = []
    for name, caption in CAPTIONS.items():
        arms = {line.student: arm for line in shown if (arm := _first(line, name)) is not None}
        if not any(student != TEACHER for student in arms):
            continue
        found = [_renamed(arm.measurements[name], student) for student, arm in arms.items()]
        with look_of([colour(student) for student in arms]):
            draw = bars if name == "tasks" else find(name).draw
            assert draw is not None
            figure = draw(found)
        told = f" ({named(place)})" if place else ""
        told += "; one seed of each" if any(len(line.members) > 1 for line in shown) else ""
        panels.append(Panel("analysis", name, TITLES[name], f"{caption}{told}.", figure, lines=list(arms)))
    return panels


def _best_place(lines: list[Line]) -> dict[str, str]:
    name = metric_name(METRICS[0], lines)
    means: list[tuple[float, dict[str, str]]] = []
    for place in places_of(lines):
        found = [mean for line in lines if line.place == place and name and (mean := line.mean(name)) is not None]
        if found:
            means.append((fmean(found), place))
    return min(means, key=lambda pair: pair[0])[1] if means else places_of(lines)[0]


def _first(line: Line, measure: str) -> Arm | None:
    """The first seed that has a measurement with something to draw."""
    having = [arm for arm in line.members if measure in arm.measurements]
    return next((arm for arm in having if arm.measurements[measure].details), None)


def _renamed(one: Measurement, student: str) -> Measurement:
    """Under the name of its line; a measurement of the teacher stays one."""
    return one.model_copy(update={"model": student, "teacher": student if one.model == one.teacher else TEACHER})
