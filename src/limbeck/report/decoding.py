"""Curves of what the next token costs over the length of its context: time on the left, memory on the right.

draw({"teacher": points, "student": points}, Path("decoding.png"))          # points: limbeck.evaluate.decoding
"""

from pathlib import Path

from limbeck.evaluate.decoding import Point
from limbeck.report.figure import check_format, new_figure, save


def draw(series: dict[str, list[Point]], path: Path) -> None:
    """Write the picture; LimbeckError without matplotlib or for a format that it does not know."""
    check_format(path)
    figure = new_figure(9, 3.6)
    time, memory = figure.subplots(1, 2)
    for name, points in series.items():
        lengths = [p.length for p in points]
        (line,) = time.plot(lengths, [p.milliseconds for p in points], marker="o", markersize=3, label=name)
        time.fill_between(lengths, [p.least for p in points], [p.most for p in points], alpha=0.15)
        memory.plot(lengths, [p.bytes / 1e6 for p in points], marker="o", markersize=3, color=line.get_color())
    for axes, title in ((time, "milliseconds a token"), (memory, "cache, MB")):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens of context")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.3)
    time.legend(fontsize=7)
    save(figure, path)
