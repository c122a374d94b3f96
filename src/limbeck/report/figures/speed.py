"""Tables and figures of speed: the measure `speed`, decoding curves, and perplexity against speed.

output.print(build_speed_table(measurements))                # of the measure "speed"
figure = draw_speed(measurements)
if can_draw_tradeoff(measurements):                          # of the measures "speed" and "agreement"
    figure = draw_tradeoff(measurements, length=4096)
draw_decoding({"teacher": timings, "student": timings}, Path("decoding.png"))         # `limbeck.evaluation.timing`
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

LINESTYLES = ("-", "--", ":", "-.")  # by batch size, the smallest first


def build_speed_table(measurements: list[Measurement]) -> Table:
    """Build a table with a row per length, batch size and model: medians, with minimum and maximum in brackets."""
    table = Table(box=None, pad_edge=False)
    columns = (
        "tokens",
        "batch",
        "model",
        "prompt, tokens/s",
        "first token, ms",
        "next token, ms",
        "cache kind",
        "cache",
    )
    for column in (*columns, "peak memory"):
        table.add_column(column, justify="left" if column in ("model", "cache kind") else "right")
    workloads = sorted({(p["length"], p["batch"]) for one in measurements for p in one.details["points"]})
    for index, workload in enumerate(workloads):
        for one in measurements:
            for point in one.details["points"]:
                if (point["length"], point["batch"]) == workload:
                    table.add_row(*_format_row(one, point))
        if index + 1 < len(workloads):
            table.add_section()
    return table


def _format_row(measurement: Measurement, point: dict[str, Any]) -> list[str]:
    fastest, prefill = fastest_cache(point), point.get("prefill")
    kind = next(name for name, token in point["token"].items() if token is fastest)
    row = [f"{point['length']:,}", str(point["batch"]), measurement.model]
    if prefill is None:
        row += ["", ""]
    else:
        tokens_per_second = 1000 * point["batch"] * point["length"] / prefill["milliseconds"]
        row += [f"{tokens_per_second:,.0f}", _format_times(prefill)]
    row += [
        _format_times(fastest),
        kind if len(point["token"]) > 1 else "",
        format_bytes(point["token"]["growing"]["cache_bytes"]),
    ]
    extra = prefill and prefill["extra_bytes"]
    return [*row, format_bytes(measurement.values["weights_bytes"] + extra) if extra is not None else ""]


def _format_times(times: dict[str, float]) -> str:
    return f"{times['milliseconds']:,.1f} ({times['least']:,.1f} to {times['most']:,.1f})"


def format_break_even(measurements: list[Measurement]) -> list[str]:
    """Describe from which length on each student is faster and smaller than each softmax model, one sentence each."""
    sentences = []
    for one in measurements:
        lengths = sorted({point["length"] for point in one.details["points"]})
        for baseline, batches in one.details["break_even"].items():
            for batch, break_even in batches.items():
                at_batch = f" at batch size {batch}" if batch != "1" else ""
                sentences.append(
                    f"{one.model} vs. {baseline}{at_batch}: decoding is "
                    f"{format_break_even_length('faster', break_even['time'], lengths)}, the cache is "
                    f"{format_break_even_length('smaller', break_even['memory'], lengths)}"
                )
    return sentences


def format_break_even_length(better: str, length: float | None, lengths: list[int]) -> str:
    """Describe a break-even length among the measured lengths; `better` says what begins there."""
    if length is None:
        return f"not {better} within {lengths[-1]:,} tokens"
    if length > lengths[0]:
        return f"{better} from {length:,.0f} tokens on"
    return f"{better} at every length from {lengths[0]:,} on"


def draw_speed(measurements: list[Measurement]) -> Any:
    """Draw the time per token with the faster cache (band: minimum to maximum), cache size and prefill speed."""
    titles = ["next token, ms", "cache, MB"]
    if any("prefill" in point for one in measurements for point in one.details["points"]):
        titles.append("prompt, tokens/s")
    figure = create_figure(3.5 * len(titles), 3.3)
    panels = figure.subplots(1, len(titles))
    time, memory = panels[:2]
    batches = sorted({point["batch"] for one in measurements for point in one.details["points"]})
    for one in measurements:
        for index, batch in enumerate(batches):
            points = sorted((p for p in one.details["points"] if p["batch"] == batch), key=lambda p: p["length"])
            if not points:
                continue
            style = {**get_marker_style(one.model), "linestyle": LINESTYLES[index % len(LINESTYLES)]}
            label = one.model if len(batches) == 1 else f"{one.model}, batch {batch}"
            lengths, fastest = [p["length"] for p in points], [fastest_cache(p) for p in points]
            time.plot(lengths, [token["milliseconds"] for token in fastest], label=label, **style)
            band = [token["least"] for token in fastest], [token["most"] for token in fastest]
            time.fill_between(lengths, *band, color=style["color"], alpha=0.12, linewidth=0)
            memory.plot(lengths, [p["token"]["growing"]["cache_bytes"] / 1e6 for p in points], **style)
            prefilled = [p for p in points if "prefill" in p]
            if prefilled:
                speeds = [1000 * batch * p["length"] / p["prefill"]["milliseconds"] for p in prefilled]
                panels[2].plot([p["length"] for p in prefilled], speeds, **style)
    for axes, title in zip(panels, titles):
        _label_context_axis(axes, title)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    figure.legend(loc="outside lower center", ncols=min(len(measurements) * len(batches), 4))
    return figure


def draw_decoding(series: dict[str, list[TokenTiming]], path: Path) -> None:
    """Write a figure of the time per token and the cache size over the length of the context.

    Raises:
        LimbeckError: matplotlib is not installed, or an unsupported format.
    """
    check_figure_format(path)
    with use_style(series):
        figure = create_figure(9, 3.6)
        time, memory = figure.subplots(1, 2)
        for name, timings in series.items():
            lengths, style = [t.length for t in timings], get_marker_style(name)
            time.plot(lengths, [t.milliseconds for t in timings], label=name, **style)
            band = [t.min_milliseconds for t in timings], [t.max_milliseconds for t in timings]
            time.fill_between(lengths, *band, color=style["color"], alpha=0.12, linewidth=0)
            memory.plot(lengths, [t.bytes / 1e6 for t in timings], **style)
        _label_context_axis(time, "milliseconds per token")
        _label_context_axis(memory, "cache, MB")
        time.legend()
        save_figure(figure, path)


def _label_context_axis(axes: Any, title: str) -> None:
    axes.set_xscale("log", base=2)
    use_log_scale(axes.yaxis)
    axes.set_xlabel("tokens of context")
    axes.set_title(title)


@dataclass(frozen=True)
class TradeoffPoint:
    """Perplexity, speed and memory of a model at one length."""

    model: str
    perplexity: float
    milliseconds: float
    cache_bytes: float


def can_draw_tradeoff(measurements: list[Measurement]) -> bool:
    """Whether at least two models have both measurements at a common length."""
    return len(_list_tradeoff_points(measurements, _find_longest_common_length(measurements))) > 1


def draw_tradeoff(measurements: list[Measurement], length: int | None = None) -> Any:
    """Draw perplexity on held-out text over milliseconds per token; the area of a mark is the size of the cache.

    Args:
        measurements: of the measures "agreement" and "speed".
        length: tokens of context; None for the longest that all models have.

    Raises:
        LimbeckError: no model has both measurements at that length.
    """
    length = length or _find_longest_common_length(measurements)
    points = _list_tradeoff_points(measurements, length)
    if not points:
        raise LimbeckError(
            f"no model has both perplexity and speed{f' at {length:,} tokens' if length else ''}",
            hint="limbeck eval MODEL --measure agreement,speed",
        )
    figure = create_figure(5.2, 3.8)
    axes = figure.subplots()
    max_cache_bytes = max(point.cache_bytes for point in points)
    for point in points:
        x, y, color = point.milliseconds, point.perplexity, get_color(point.model)
        axes.scatter(x, y, s=40 + 900 * point.cache_bytes / max_cache_bytes, color=color, alpha=0.25, linewidths=0)
        axes.scatter(x, y, s=22, color=color, marker=get_marker(point.model))
        label = f"{point.model}\n{format_bytes(point.cache_bytes)}"
        axes.annotate(label, (x, y), xytext=(6, 6), textcoords="offset points", fontsize=7)
    use_log_scale(axes.yaxis)
    axes.margins(0.25)
    axes.set_xlabel(f"next token after {length:,} tokens of context, ms")
    axes.set_ylabel("perplexity of held-out text")
    return figure


def _find_longest_common_length(measurements: list[Measurement]) -> int | None:
    """Find the longest length that all models with a speed measurement have."""
    lengths = [{p["length"] for p in one.details.get("points", [])} for one in measurements if one.measure == "speed"]
    common = set.intersection(*lengths) if lengths else set()
    return max(common, default=None)


def _list_tradeoff_points(measurements: list[Measurement], length: int | None) -> list[TradeoffPoint]:
    """List the models with both measurements, at batch size 1 or the smallest one measured."""
    agreements = [one for one in measurements if one.measure == "agreement"]
    # A softmax model without a measurement of its own has the perplexity that its students' measurements say of it.
    perplexity = {one.teacher: one.values["teacher_perplexity"] for one in agreements if one.teacher is not None}
    perplexity |= {one.model: one.values["perplexity"] for one in agreements}
    points = []
    for one in measurements:
        if one.measure != "speed" or one.model not in perplexity:
            continue
        at_length = [p for p in one.details.get("points", []) if p["length"] == length]
        if at_length:
            point = min(at_length, key=lambda p: p["batch"])
            cache_bytes = point["token"]["growing"]["cache_bytes"]
            milliseconds = min_token_milliseconds(point)
            points.append(TradeoffPoint(one.model, perplexity[one.model], milliseconds, cache_bytes))
    return points
