"""Scores of several models on several tasks as bars, with standard errors and the line of guessing.

save(bars(found), Path("tasks.svg"))            # found: measurements of the measure `tasks`
"""

from typing import Any

from limbeck.evaluate.measurement import Measurement
from limbeck.report.figure import new_figure


def bars(found: list[Measurement]) -> Any:
    """A group of bars a task, a bar a model; guessing is a dashed line across the group."""
    names = list(dict.fromkeys(name for one in found for name, task in one.details["tasks"].items() if task["metric"]))
    figure = new_figure(max(5.0, 1.2 + 0.4 * len(names) * (1 + len(found))), 3.4)
    axes = figure.subplots()
    width = 0.8 / len(found)
    for at, one in enumerate(found):
        tasks = one.details["tasks"]
        keys = {name: f"{name} {tasks[name]['metric']}" for name in names if name in tasks}
        axes.bar(
            [names.index(name) + (at - (len(found) - 1) / 2) * width for name in keys],
            [one.values[key] for key in keys.values()],
            width,
            yerr=[one.errors.get(key, 0.0) for key in keys.values()],
            error_kw={"linewidth": 0.8},
            label=one.model,
        )
    metrics = {name: task for one in found for name, task in one.details["tasks"].items()}
    for at, name in enumerate(names):
        axes.hlines(metrics[name]["chance"], at - 0.45, at + 0.45, color="black", linestyle="dashed", linewidth=0.8)
    axes.set_xticks(range(len(names)), [f"{name}\n{metrics[name]['metric']}" for name in names], fontsize=8)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("score")
    axes.legend(fontsize=7)
    return figure
