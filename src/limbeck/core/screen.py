"""Draw a long piece of work on one screen of the terminal, again and again while it goes on.

    with watch(View("gla student of SmolLM2", [Phase("prepare", "prepare")], folder="runs/gla")) as view:
        ...                                              # whoever works reports to `limbeck.core.live.current()`
    render(view, width=80, height=24)                    # the same screen as lines of text, without a terminal

In a pipe, a file or a notebook nothing is drawn, and `limbeck.core.console` prints lines. A view that is opened inside
another one (a run of a study) is a part of the outer screen.
"""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from textwrap import wrap

from rich.cells import cell_len, set_cell_size
from rich.console import Group
from rich.live import Live
from rich.text import Text

from limbeck.core import console as consoles
from limbeck.core import signals
from limbeck.core.console import console, format_bytes, format_duration
from limbeck.core.live import Bar, Phase, View, current, open_views
from limbeck.core.system import get_device_memory, get_resident_memory

REFRESHES = 2  # a second
LOG_RATIO = 10.0  # a curve over a wider range than this is drawn on a logarithmic scale
BLOCKS = "▁▂▃▄▅▆▇█"
MARKS = {
    "to come": ("·", "dim"),
    "running": ("▸", "bold cyan"),
    "stopped": ("‖", "yellow"),
    "done": ("✓", "green"),
    "failed": ("✗", "red"),
}
# for terminals whose encoding has no such characters
PLAIN = str.maketrans("✓▸‖·✗━─…▁▂▃▄▅▆▇█", "+>|.x=-~_..--^^#")


def is_drawn() -> bool:
    """Tell whether there is a view on the terminal."""
    return bool(consoles.progress_counters)


@contextmanager
def watch(view: View) -> Iterator[View]:
    """Open a view, drawn on the terminal if there is one; it is left on the screen if the work does not end well."""
    outer = open_views[-1] if open_views else None
    open_views.append(view)
    try:
        if outer is not None:
            outer.inner = view
            yield view
        elif console.is_interactive and not console.quiet and getattr(console.file, "isatty", bool)():
            with _draw(view):
                yield view
        else:
            yield view
    finally:
        open_views.remove(view)
        if outer is not None:
            outer.inner = None


@contextmanager
def _draw(view: View) -> Iterator[None]:
    """Draw a view again and again until the end of the block."""

    drawn: list[Text] = []

    def draw() -> Group:
        if not console.quiet:  # what is not written now must be as high as what is on the screen
            drawn[:] = render(view, console.width, console.height - 1, plain=console.options.ascii_only)
        return Group(*drawn)

    def take_notice(text: str) -> None:
        view.notice = text

    live = Live(
        get_renderable=draw,
        console=console,
        refresh_per_second=REFRESHES,
        transient=True,
        redirect_stdout=False,
        vertical_overflow="crop",
    )
    consoles.progress_counters.append(lambda *args: current().count(*args))
    signals.listeners.append(take_notice)
    try:
        with live:
            try:
                yield
            except BaseException:
                view.stop()
                live.transient = False
                raise
    finally:
        signals.listeners.remove(take_notice)
        consoles.progress_counters.pop()


def render(view: View, width: int, height: int, now: float | None = None, plain: bool = False) -> list[Text]:
    """Render a view as lines of text, none wider than `width` and at most `height` of them.

    Args:
        now: the time of the view's clock.
        plain: with ASCII alone.
    """
    now = view.clock() if now is None else now
    deepest = view
    while deepest.inner is not None:
        deepest = deepest.inner
    head = _spread(Text(view.title, "bold"), Text(format_duration(now - view.started), "dim"), width)
    details = [
        *([_render_stages(deepest)] if deepest is not view and deepest.phases else []),
        *_render_curves(deepest, width),
        *_render_figures(deepest),
        *(_render_bar(deepest, bar, now) for bar in deepest.bars[-1:]),
        _render_machine(deepest, now),
    ]
    foot = [
        *_render_left(view, now),
        Text(f"  {'' if is_stopped(view) else 'Ctrl-C is safe: '}the same command goes on", "dim").append(
            f" from {view.folder}/" if view.folder else ""
        ),
        *(Text(f"  {line}", "bold yellow") for line in wrap(view.notice, max(width - 2, 1))),
    ]
    rows = _render_phases(view, width, max(height - len(details) - len(foot) - 4, 3), now)
    lines = [head, Text(), *rows, Text(), *details, Text(), *foot]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
        line.no_wrap, line.overflow = True, "ellipsis"
    if plain:
        lines = [Text(line.plain.translate(PLAIN)) for line in lines]
    return lines[:height]


def _render_phases(view: View, width: int, rows: int, now: float) -> list[Text]:
    """Render a line for each phase; where there are too many, those around the running ones."""
    phases = view.phases
    first = next((i for i, phase in enumerate(phases) if phase.state in ("running", "stopped", "to come")), len(phases))
    begin, end = 0, len(phases)
    if len(phases) > rows:
        begin = min(max(first - min(2, rows - 3), 0), len(phases) - (rows - 2))
        end = begin + rows - 2
    shown = phases[begin:end]
    longest = max((cell_len(phase.name) for phase in shown), default=0)
    name_width = min(longest, max(16, width // 2 - 12))
    amount_width = max((len(phase.amount) for phase in shown), default=0)
    lines = [_render_phase(view, phase, name_width, amount_width, width, now) for phase in shown]
    if begin:
        failed = sum(phase.state == "failed" for phase in phases[:begin])
        lines.insert(0, Text(f"  ✓ {begin - failed} done" + (f", {failed} failed" if failed else ""), "dim"))
    if end < len(phases):
        lines.append(Text(f"  · {len(phases) - end} more to come", "dim"))
    return lines


def _render_phase(view: View, phase: Phase, name_width: int, amount_width: int, width: int, now: float) -> Text:
    mark, style = MARKS[phase.state]
    name = phase.name if cell_len(phase.name) <= name_width else f"{set_cell_size(phase.name, name_width - 1)}…"
    line = Text.assemble((f"  {mark} ", style), (set_cell_size(name, name_width), style), "  ")
    line.append(f"{phase.amount:>{amount_width}}  " if amount_width else "")
    if phase.state in ("running", "stopped"):
        is_running = phase.state == "running"
        elapsed = phase.seconds + (now - phase.began if is_running and phase.began is not None else 0.0)
        left = view.phase_seconds_left(phase, now) if is_running else None
        tail = "" if left is None else f"  {format_duration(left)} left"
        line.append(f"{format_duration(elapsed):>14}  ")
        share = phase.share
        if not share and left is not None:  # nothing counts it, so time does
            share = elapsed / max(elapsed + left, 1e-9)
        if share or left is not None:
            room = min(max(width - line.cell_len - len(tail) - 6, 4), 40)
            filled = round(room * share)
            line.append("━" * filled, "cyan").append("─" * (room - filled), "dim").append(f" {share:>4.0%}")
        return line.append(tail)
    about = phase.planned is not None and view.in_seconds and phase.state == "to come"
    time_text = f"~ {format_duration(phase.planned or 0)}" if about else ""
    if phase.state != "to come" and phase.seconds:
        time_text = format_duration(phase.seconds)
    return line.append(f"{time_text:>14}  ", "dim" if about else "").append(phase.result, "dim")


def _render_stages(view: View) -> Text:
    """Render the phases of an inner view on one line."""
    line = Text.assemble(("  in it     ", "dim"))
    for phase in view.phases:
        mark, style = MARKS[phase.state]
        line.append(f"{mark} {phase.name}", style).append(f" {phase.share:.0%}  " if phase.state == "running" else "  ")
    return line


def _render_curves(view: View, width: int) -> list[Text]:
    """Render the losses: the last value, a small curve, the first value."""
    lines = []
    for label, curve in (("loss", view.loss), ("held out", view.held_out)):
        if curve.last is None or curve.first is None:
            continue
        begin = f"  from {curve.first:.4g}"
        line = Text.assemble((f"  {label:<10}", "dim"), (f"{curve.last:<9.4g}", "bold"))
        room = min(width - line.cell_len - len(begin), 60)
        lines.append(line.append(draw_sparkline(curve.points, room), "cyan").append(begin, "dim"))
    return lines


def average_neighbors(values: Sequence[float], count: int) -> list[float]:
    """Average neighbors so that at most `count` values are left, none where there is no room."""
    if count < 1 or len(values) <= count:
        return list(values[: max(count, 0)])
    edges = [round(i * len(values) / count) for i in range(count + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def draw_sparkline(values: Sequence[float], width: int) -> str:
    """Draw values as a line of at most `width` blocks: means of neighbors, between their own least and greatest."""
    values = average_neighbors(values, width)
    if values and min(values) > 0 and max(values) > LOG_RATIO * min(values):
        values = [math.log(value) for value in values]
    low, high = min(values, default=0.0), max(values, default=0.0)
    scale = (len(BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(BLOCKS[round((value - low) * scale)] for value in values)


def _render_figures(view: View) -> list[Text]:
    """Render last results on a line; what several names begin with is said once."""
    texts: list[str] = []
    said = ""
    for name, value in view.figures.items():
        group, _, rest = name.rpartition(": ")
        texts.append(f"{rest if group and group == said else name} {value}")
        said = group
    return [Text.assemble(("  so far    ", "dim"), ", ".join(texts))] if texts else []


def _render_bar(view: View, bar: Bar, now: float) -> Text:
    of = f" of {bar.total:,.0f}" if bar.total else ""
    line = Text.assemble(("  now       ", "dim"), f"{bar.title}: {bar.done:,.0f}{of} {bar.unit}".rstrip())
    if any(phase.state == "running" and phase.name == bar.title for phase in view.phases):
        return line  # time and losses stand elsewhere
    left = bar.seconds_left(now)
    line.append(f", {format_duration(left)} left" if left is not None else "", "dim")
    return line.append(f"  {bar.note}" if bar.note else "", "dim")


def _render_machine(view: View, now: float) -> Text:
    """Render speed, memory and the last checkpoint."""
    parts = []
    if view.tokens_per_second:
        parts.append(f"{view.tokens_per_second:,.0f} tokens/s")
    for label, size in (("memory", get_resident_memory()), ("GPU memory", get_device_memory())):
        if size:
            parts.append(f"{label} {format_bytes(size)}")
    if view.saved is not None:
        step, at = view.saved
        parts.append(f"checkpoint of step {step:,}, {format_duration(now - at)} ago")
    return Text.assemble(("  machine   ", "dim"), ", ".join(parts))


def is_stopped(view: View) -> bool:
    """Tell whether the work has ended before its end."""
    return any(phase.state == "stopped" for phase in view.phases)


def _render_left(view: View, now: float) -> list[Text]:
    """Render the time that is left of all phases, and when that is."""
    if is_stopped(view):
        return []
    line = Text.assemble(("  left      ", "dim"))
    left = view.seconds_left(now)
    if left is None:
        waits = any(phase.planned is None and phase.state == "running" for phase in view.phases)
        return [line.append("known when the plan has been measured" if waits and view.in_seconds else "not known yet")]
    end = time.localtime(time.time() + left)
    stamp = time.strftime("%H:%M" if left < 43_200 else "%a %H:%M", end)
    return [line.append(f"{format_duration(left)} of the whole", "bold").append(f", until {stamp}", "dim")]


def _spread(left: Text, right: Text, width: int) -> Text:
    """Put two texts at both ends of a line."""
    left.truncate(max(width - right.cell_len - 2, 1), overflow="ellipsis")
    return Text.assemble(left, " " * max(width - left.cell_len - right.cell_len, 1), right)
