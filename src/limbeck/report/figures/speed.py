"""A race on the screen and in one figure: prompts, the next token and caches over the length of the context.

output.print(build_speed_table(measurements))             # of the measure "speed"
figure = draw_speed(measurements)

Curves of what the next token costs over the length of its context: time on the left, memory on the right.

draw_decoding({"teacher": points, "student": points}, Path("decoding.png"))          # points: limbeck.evaluation.timing

Accuracy against speed: held-out perplexity over milliseconds a token, a mark a model, its area the cache's size.

    if can_draw_tradeoff(measurements):
        figure = draw_tradeoff(measurements, length=4096)

Perplexities are those of the measure "agreement", times and caches those of "speed" at one length, batch size 1 or the
smallest. A softmax model without an agreement measurement of its own has the perplexity that its students' say of it.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from limbeck.core.console import format_bytes
from limbeck.core.errors import LimbeckError
from limbeck.evaluation.measure import Measurement
from limbeck.evaluation.speed import fastest_cache, min_token_milliseconds
from limbeck.evaluation.timing import TokenTiming
from limbeck.report.figures.style import (
    check_figure_format,
    create_figure,
    get_color,
    get_marker,
    get_marker_style,
    save_figure,
    use_log_scale,
    use_style,
)

DASHES = ("-", "--", ":", "-.")  # by batch size, the smallest first


def build_speed_table(measurements: list[Measurement]) -> Table:
    """A row a length, batch size and model: medians, and behind them the least and the most."""
    shown = Table(box=None, pad_edge=False)
    heads = ("tokens", "batch", "model", "prompt, tokens/s", "first token, ms", "a token, ms", "cache kind", "cache")
    for head in (*heads, "peak memory"):
        shown.add_column(head, justify="left" if head in ("model", "cache kind") else "right")
    places = sorted({(p["length"], p["batch"]) for one in measurements for p in one.details["points"]})
    for index, place in enumerate(places):
        for one in measurements:
            for point in one.details["points"]:
                if (point["length"], point["batch"]) == place:
                    shown.add_row(*_row(one, point))
        if index + 1 < len(places):
            shown.add_section()
    return shown


def format_break_even(measurements: list[Measurement]) -> list[str]:
    """Sentences: from which length on a student is faster and smaller than each softmax model of the race."""
    lines = []
    for one in measurements:
        lengths = sorted({point["length"] for point in one.details["points"]})
        for rival, batches in one.details["break_even"].items():
            for batch, at in batches.items():
                together = f" in batches of {batch}" if batch != "1" else ""
                lines.append(
                    f"{one.model} against {rival}{together}: a token is cheaper {format_break_even_length(at['time'], lengths)}, "
                    f"the cache smaller {format_break_even_length(at['memory'], lengths)}"
                )
    return lines


def draw_speed(measurements: list[Measurement]) -> Any:
    """Milliseconds a token with the faster cache (band: least to most), the cache's size, prompt tokens a second."""
    titles = ["next token, ms", "cache, MB"]
    if any("prefill" in point for one in measurements for point in one.details["points"]):
        titles.append("prompt, tokens/s")
    figure = create_figure(3.5 * len(titles), 3.3)
    panels = figure.subplots(1, len(titles))
    time, memory = panels[:2]
    batches = sorted({point["batch"] for one in measurements for point in one.details["points"]})
    for one in measurements:
        for batch, dash in zip(batches, (DASHES * len(batches))[: len(batches)]):
            points = sorted((p for p in one.details["points"] if p["batch"] == batch), key=lambda p: p["length"])
            if not points:
                continue
            style = {**get_marker_style(one.model), "linestyle": dash}
            name = one.model if len(batches) == 1 else f"{one.model}, batch {batch}"
            lengths, best = [p["length"] for p in points], [fastest_cache(p) for p in points]
            time.plot(lengths, [b["milliseconds"] for b in best], label=name, **style)
            band = [b["least"] for b in best], [b["most"] for b in best]
            time.fill_between(lengths, *band, color=style["color"], alpha=0.12, linewidth=0)
            memory.plot(lengths, [p["token"]["growing"]["cache_bytes"] / 1e6 for p in points], **style)
            read = [p for p in points if "prefill" in p]
            if read:
                speeds = [1000 * batch * p["length"] / p["prefill"]["milliseconds"] for p in read]
                panels[2].plot([p["length"] for p in read], speeds, **style)
    for axes, title in zip(panels, titles):
        axes.set_xscale("log", base=2)
        use_log_scale(axes.yaxis)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set_xlabel("tokens of context")
        axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=min(len(measurements) * len(batches), 4))
    return figure


def _row(one: Measurement, point: dict[str, Any]) -> list[str]:
    best, prefill = fastest_cache(point), point.get("prefill")
    kind = next(name for name, token in point["token"].items() if token is best)
    row = [f"{point['length']:,}", str(point["batch"]), one.model]
    if prefill is None:
        row += ["", ""]
    else:
        row += [f"{1000 * point['batch'] * point['length'] / prefill['milliseconds']:,.0f}", _spread(prefill)]
    row += [
        _spread(best),
        kind if len(point["token"]) > 1 else "",
        format_bytes(point["token"]["growing"]["cache_bytes"]),
    ]
    extra = prefill and prefill["extra_bytes"]
    return [*row, format_bytes(one.values["weights_bytes"] + extra) if extra is not None else ""]


def _spread(times: dict[str, float]) -> str:
    return f"{times['milliseconds']:,.1f} ({times['least']:,.1f} to {times['most']:,.1f})"


def format_break_even_length(length: float | None, lengths: list[int]) -> str:
    """A break-even length among measured ones in words."""
    if length is None:
        return f"not within {lengths[-1]:,} tokens"
    return f"from {length:,.0f} tokens on" if length > lengths[0] else f"at every length from {lengths[0]:,} on"


def draw_decoding(series: dict[str, list[TokenTiming]], path: Path) -> None:
    """Write the picture; LimbeckError without matplotlib or for a format that it does not know."""
    check_figure_format(path)
    with use_style(series):
        figure = create_figure(9, 3.6)
        time, memory = figure.subplots(1, 2)
        for name, points in series.items():
            lengths, style = [p.length for p in points], get_marker_style(name)
            time.plot(lengths, [p.milliseconds for p in points], label=name, **style)
            band = [p.min_milliseconds for p in points], [p.max_milliseconds for p in points]
            time.fill_between(lengths, *band, color=style["color"], alpha=0.12, linewidth=0)
            memory.plot(lengths, [p.bytes / 1e6 for p in points], **style)
        for axes, title in ((time, "milliseconds a token"), (memory, "cache, MB")):
            axes.set_xscale("log", base=2)
            use_log_scale(axes.yaxis)
            axes.set_xlabel("tokens of context")
            axes.set_title(title)
        time.legend()
        save_figure(figure, path)


@dataclass(frozen=True)
class TradeoffPoint:
    """One model at one length."""

    model: str
    perplexity: float
    milliseconds: float
    cache_bytes: float


def can_draw_tradeoff(measurements: list[Measurement]) -> bool:
    """Whether two models at least have both measurements at a common length."""
    return len(_marks(measurements, _longest(measurements))) > 1


def draw_tradeoff(measurements: list[Measurement], length: int | None = None) -> Any:
    """The figure.

    Args:
        length: tokens of context; None takes the longest that all models have.

    Raises:
        LimbeckError: no model has both measurements at that length.
    """
    at = length or _longest(measurements)
    marks = _marks(measurements, at)
    if not marks:
        raise LimbeckError(
            f"no model has perplexity and speed{f' at {at:,} tokens' if at else ''}",
            hint="limbeck eval MODEL --measure agreement,speed",
        )
    figure = create_figure(5.2, 3.8)
    axes = figure.subplots()
    largest = max(mark.cache_bytes for mark in marks)
    for mark in marks:
        area = 40 + 900 * mark.cache_bytes / largest
        axes.scatter(mark.milliseconds, mark.perplexity, s=area, color=get_color(mark.model), alpha=0.25, linewidths=0)
        axes.scatter(
            mark.milliseconds, mark.perplexity, s=22, color=get_color(mark.model), marker=get_marker(mark.model)
        )
        axes.annotate(
            f"{mark.model}\n{format_bytes(mark.cache_bytes)}",
            (mark.milliseconds, mark.perplexity),
            xytext=(6, 6),
            textcoords="offset points",
            fontsize=7,
        )
    use_log_scale(axes.yaxis)
    axes.margins(0.25)
    axes.set_xlabel(f"next token after {at:,} tokens of context, ms")
    axes.set_ylabel("perplexity of held-out text")
    return figure


def _longest(measurements: list[Measurement]) -> int | None:
    """The longest length that all models with a speed measurement have."""
    lengths = [{p["length"] for p in one.details.get("points", [])} for one in measurements if one.measure == "speed"]
    common = set.intersection(*lengths) if lengths else set()
    return max(common, default=None)


def _marks(measurements: list[Measurement], length: int | None) -> list[TradeoffPoint]:
    agreements = [one for one in measurements if one.measure == "agreement"]
    perplexity = {one.teacher: one.values["teacher_perplexity"] for one in agreements if one.teacher is not None}
    perplexity |= {one.model: one.values["perplexity"] for one in agreements}
    marks = []
    for one in measurements:
        points = [p for p in one.details.get("points", []) if p["length"] == length] if one.measure == "speed" else []
        if points and one.model in perplexity:
            point = min(points, key=lambda p: p["batch"])
            cache = point["token"]["growing"]["cache_bytes"]
            marks.append(TradeoffPoint(one.model, perplexity[one.model], min_token_milliseconds(point), cache))
    return marks
