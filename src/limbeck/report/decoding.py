"""Curves of what the next token costs over the length of its context: time on the left, memory on the right.

draw({"teacher": points, "student": points}, Path("decoding.png"))          # points: limbeck.evaluate.decoding
"""

from pathlib import Path

from limbeck.evaluate.decoding import Point
from limbeck.report.figure import check_format, line, logarithmic, look, new_figure, save


def draw(series: dict[str, list[Point]], path: Path) -> None:
    """Write the picture; LimbeckError without matplotlib or for a format that it does not know."""
    check_format(path)
    with look(series):
        figure = new_figure(9, 3.6)
        time, memory = figure.subplots(1, 2)
        for name, points in series.items():
            lengths, style = [p.length for p in points], line(name)
            time.plot(lengths, [p.milliseconds for p in points], label=name, **style)
            band = [p.least for p in points], [p.most for p in points]
            time.fill_between(lengths, *band, color=style["color"], alpha=0.12, linewidth=0)
            memory.plot(lengths, [p.bytes / 1e6 for p in points], **style)
        for axes, title in ((time, "milliseconds a token"), (memory, "cache, MB")):
            axes.set_xscale("log", base=2)
            logarithmic(axes.yaxis)
            axes.set_xlabel("tokens of context")
            axes.set_title(title)
        time.legend()
        save(figure, path)
