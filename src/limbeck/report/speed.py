"""A race on the screen and in one figure: prompts, the next token and caches over the length of the context.

output.print(table(found))             # found: measurements of the measure "speed"
figure = draw(found)
"""

from typing import Any

from rich.table import Table

from limbeck.evaluate.measurement import Measurement
from limbeck.evaluate.speed_values import fastest
from limbeck.report.figure import line, logarithmic, new_figure
from limbeck.report.naming import size

DASHES = ("-", "--", ":", "-.")  # by batch size, the smallest first


def table(found: list[Measurement]) -> Table:
    """A row a length, batch size and model: medians, and behind them the least and the most."""
    shown = Table(box=None, pad_edge=False)
    heads = ("tokens", "batch", "model", "prompt, tokens/s", "first token, ms", "a token, ms", "cache kind", "cache")
    for head in (*heads, "peak memory"):
        shown.add_column(head, justify="left" if head in ("model", "cache kind") else "right")
    places = sorted({(p["length"], p["batch"]) for one in found for p in one.details["points"]})
    for index, place in enumerate(places):
        for one in found:
            for point in one.details["points"]:
                if (point["length"], point["batch"]) == place:
                    shown.add_row(*_row(one, point))
        if index + 1 < len(places):
            shown.add_section()
    return shown


def break_even_lines(found: list[Measurement]) -> list[str]:
    """Sentences: from which length on a student is faster and smaller than each softmax model of the race."""
    lines = []
    for one in found:
        lengths = sorted({point["length"] for point in one.details["points"]})
        for rival, batches in one.details["break_even"].items():
            for batch, at in batches.items():
                together = f" in batches of {batch}" if batch != "1" else ""
                lines.append(
                    f"{one.model} against {rival}{together}: a token is cheaper {from_on(at['time'], lengths)}, "
                    f"the cache smaller {from_on(at['memory'], lengths)}"
                )
    return lines


def draw(found: list[Measurement]) -> Any:
    """Milliseconds a token with the faster cache (band: least to most), the cache's size, prompt tokens a second."""
    titles = ["next token, ms", "cache, MB"]
    if any("prefill" in point for one in found for point in one.details["points"]):
        titles.append("prompt, tokens/s")
    figure = new_figure(3.5 * len(titles), 3.3)
    panels = figure.subplots(1, len(titles))
    time, memory = panels[:2]
    batches = sorted({point["batch"] for one in found for point in one.details["points"]})
    for one in found:
        for batch, dash in zip(batches, (DASHES * len(batches))[: len(batches)]):
            points = sorted((p for p in one.details["points"] if p["batch"] == batch), key=lambda p: p["length"])
            if not points:
                continue
            style = {**line(one.model), "linestyle": dash}
            name = one.model if len(batches) == 1 else f"{one.model}, batch {batch}"
            lengths, best = [p["length"] for p in points], [fastest(p) for p in points]
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
        logarithmic(axes.yaxis)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set_xlabel("tokens of context")
        axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=min(len(found) * len(batches), 4))
    return figure


def _row(one: Measurement, point: dict[str, Any]) -> list[str]:
    best, prefill = fastest(point), point.get("prefill")
    kind = next(name for name, token in point["token"].items() if token is best)
    row = [f"{point['length']:,}", str(point["batch"]), one.model]
    if prefill is None:
        row += ["", ""]
    else:
        row += [f"{1000 * point['batch'] * point['length'] / prefill['milliseconds']:,.0f}", _spread(prefill)]
    row += [_spread(best), kind if len(point["token"]) > 1 else "", size(point["token"]["growing"]["cache_bytes"])]
    extra = prefill and prefill["extra_bytes"]
    return [*row, size(one.values["weights_bytes"] + extra) if extra is not None else ""]


def _spread(times: dict[str, float]) -> str:
    return f"{times['milliseconds']:,.1f} ({times['least']:,.1f} to {times['most']:,.1f})"


def from_on(length: float | None, lengths: list[int]) -> str:
    """A break-even length among measured ones in words."""
    if length is None:
        return f"not within {lengths[-1]:,} tokens"
    return f"from {length:,.0f} tokens on" if length > lengths[0] else f"at every length from {lengths[0]:,} on"
