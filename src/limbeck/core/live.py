"""What is known of a long piece of work while it goes on: its plan, losses, speed, and the time that is left.

    view = View("gla student of SmolLM2", [Phase("prepare", "prepare")], folder="runs/gla")
    view.begin("prepare")
    view.plan([Phase(0, "hidden", planned=300.0, amount="20,000 tokens"), Phase("end", "evaluate", planned=60.0)])
    current().record(loss=3.2, tokens_per_second=118.0)             # by whoever does the work, deep inside
    view.finish(0, result="loss 5.1 to 3.2")
    view.seconds_left(view.clock())

Work reports to `current()` whether or not anybody watches: a report sets a few attributes, and `limbeck.core.screen`
draws them from a thread of its own. So lists and dicts are replaced here, never changed in place.
"""

import math
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

CURVE_POINTS = 256  # that a curve keeps; more are averaged in pairs
MIN_SHARE = 0.02  # of a phase, before its own speed says when it ends

State = Literal["to come", "running", "stopped", "done", "failed"]


@dataclass
class Phase:
    """A part of the work.

    key: what `View.begin` and `View.finish` name it by.
    planned: seconds that it will take, or any weight where the view's plan is not in seconds; None if unknown.
    amount: how much work it is, for people: "20,000 tokens".
    share: of it that is done, 0 to 1.
    seconds: that it took, in earlier processes too; of a running phase those of earlier processes.
    share_before, seconds_before: what earlier processes did of it.
    counted_by: title of the bar that counts it, where that is not its name.
    """

    key: Hashable
    name: str
    planned: float | None = None
    amount: str = ""
    state: State = "to come"
    share: float = 0.0
    seconds: float = 0.0
    share_before: float = 0.0
    seconds_before: float = 0.0
    result: str = ""
    counted_by: str = ""
    began: float | None = None  # in this process


@dataclass
class Bar:
    """A count within a phase: of steps, sequences, documents. initial: counted before `began`."""

    title: str
    total: float | None
    unit: str
    done: float
    initial: float
    began: float
    note: str = ""

    def seconds_left(self, now: float) -> float | None:
        """Return the seconds that the rest takes at the speed so far; None if that is not known yet."""
        if not self.total or self.done <= self.initial:
            return None
        return (now - self.began) * max(self.total - self.done, 0) / (self.done - self.initial)


@dataclass
class Curve:
    """A series of any length in bounded memory: the older points are, the more of them are averaged."""

    points: list[float] = field(default_factory=list)
    first: float | None = None
    last: float | None = None
    stride: int = 1
    pending: list[float] = field(default_factory=list)

    def add(self, value: float) -> None:
        """Add a value; those that are not finite are left out."""
        if not math.isfinite(value):
            return
        self.first, self.last = value if self.first is None else self.first, value
        self.pending.append(value)
        if len(self.pending) >= self.stride:
            self.points.append(sum(self.pending) / len(self.pending))
            self.pending = []
        if len(self.points) > CURVE_POINTS:
            self.points = [(a + b) / 2 for a, b in zip(self.points[::2], self.points[1::2])]
            self.stride *= 2


class View:
    """What is known of a piece of work. All methods are cheap, and none fails on a phase that is not in the plan.

    Args:
        title: what is being done.
        phases: its parts, as far as they are known.
        folder: where its results and checkpoints go.
        in_seconds: whether `Phase.planned` are seconds; otherwise times are known after the first phase.
        collects: whether measurements add phases of their own.
        workers: how many phases run side by side.
    """

    def __init__(
        self,
        title: str,
        phases: Sequence[Phase] = (),
        folder: str = "",
        *,
        in_seconds: bool = True,
        collects: bool = False,
        workers: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.title, self.folder, self.in_seconds, self.collects = title, folder, in_seconds, collects
        self.workers, self.clock = max(workers, 1), clock
        self.phases = list(phases)
        self.started = clock()
        self.bars: list[Bar] = []
        self.loss, self.held_out = Curve(), Curve()
        self.tokens_per_second: float | None = None
        self.figures: dict[str, str] = {}  # last results by name
        self.saved: tuple[int, float] | None = None  # step and time of the last checkpoint
        self.notice = ""
        self.inner: View | None = None

    # ------------------------------------------------------------------ what the work reports

    def plan(self, phases: Sequence[Phase]) -> None:
        """Set the phases to come."""
        self.phases = [*(phase for phase in self.phases if phase.state != "to come"), *phases]

    def begin(self, key: Hashable) -> None:
        """Say that a phase begins, or goes on; unless several run side by side, the one before has ended."""
        if (phase := self._find(key)) is None:
            return
        for other in self.phases:
            if other.state == "running" and self.workers == 1:
                self.finish(other.key)
        if phase.state in ("done", "failed"):  # it is done once more
            phase.share = phase.seconds = 0.0
        phase.state, phase.began, phase.share_before = "running", self.clock(), phase.share
        self.clear()

    def clear(self) -> None:
        """Begin new curves: what is recorded from here on is another loss."""
        self.loss, self.held_out, self.tokens_per_second, self.saved = Curve(), Curve(), None, None

    def add(self, name: str) -> None:
        """Begin a phase by its name, one more where the plan has none of that name and the view collects."""
        if self.collects and self._find(name) is None:
            self.plan([*(phase for phase in self.phases if phase.state == "to come"), Phase(name, name, 1.0)])
        if self.collects:
            self.begin(name)

    def finish(self, key: Hashable, result: str = "", seconds: float | None = None, failed: bool = False) -> None:
        """Say that a phase has ended.

        Args:
            result: what it came to, in a few words.
            seconds: that it took; by default those since it began.
        """
        if (phase := self._find(key)) is None or phase.state in ("done", "failed"):
            return
        if seconds is None:
            seconds = phase.seconds + (self.clock() - phase.began if phase.began is not None else 0.0)
        if phase.began is None:  # it was done before this process
            phase.share_before = 1.0
        phase.state, phase.share, phase.seconds, phase.result = "failed" if failed else "done", 1.0, seconds, result

    def stop(self) -> None:
        """Say that the work has ended before its end: by an error, or because somebody stopped it."""
        for phase in self.phases:
            if phase.state == "running":
                phase.state, phase.seconds = "stopped", phase.seconds + self.clock() - (phase.began or self.clock())

    def record(
        self, loss: float | None = None, tokens_per_second: float | None = None, held_out: float | None = None
    ) -> None:
        """Add a step's losses and speed."""
        for curve, value in ((self.loss, loss), (self.held_out, held_out)):
            if value is not None:
                curve.add(value)
        self.tokens_per_second = tokens_per_second or self.tokens_per_second

    def show(self, name: str, text: str) -> None:
        """Show a last result, as text; a later one of the same name takes its place."""
        self.figures = {**self.figures, name: text}  # another thread may be reading the one before

    def save(self, step: int) -> None:
        """Say that a checkpoint of this step has been written."""
        self.saved = step, self.clock()

    def resume(self, step: int, steps: int, seconds: float) -> None:
        """Say how much of the running phase was done before: steps, and the seconds they took."""
        self.save(step)
        for phase in self.phases:
            if phase.state == "running":
                phase.share = phase.share_before = step / max(steps, 1)
                phase.seconds = phase.seconds_before = seconds

    @contextmanager
    def count(self, title: str, total: float | None, unit: str, initial: float) -> Iterator[Callable[..., None]]:
        """Count work within the running phase; what `limbeck.core.console.progress` does while somebody watches."""
        bar = Bar(title, total, unit, initial, initial, self.clock())
        self.bars = [*self.bars, bar]

        def advance(amount: float = 1, note: str = "") -> None:
            bar.done += amount
            bar.note = note
            for phase in self.phases:
                if phase.state == "running" and title in (phase.counted_by, phase.name) and total:
                    phase.share = min(bar.done / total, 1.0)

        try:
            yield advance
        finally:
            self.bars = [other for other in self.bars if other is not bar]

    def _find(self, key: Hashable) -> Phase | None:
        return next((phase for phase in self.phases if phase.key == key), None)

    # ------------------------------------------------------------------ what follows from it

    def seconds_left(self, now: float) -> float | None:
        """Estimate the seconds until all phases are done; None if nothing tells.

        The plan's seconds, times how much longer than planned the phases took so far; phases to come of which no time
        is known count nothing.
        """
        pace = self._pace(now)
        running = [self.phase_seconds_left(phase, now) for phase in self.phases if phase.state == "running"]
        rest = sum(phase.planned or 0.0 for phase in self.phases if phase.state == "to come")
        if pace is None or None in running or not (running or rest):
            return None
        return (rest * pace + sum(seconds or 0.0 for seconds in running)) / self.workers

    def phase_seconds_left(self, phase: Phase, now: float) -> float | None:
        """Estimate the seconds until a running phase is done; None if nothing tells."""
        for bar in self.bars:
            if bar.title in (phase.counted_by, phase.name) and phase.share - phase.share_before >= MIN_SHARE:
                return bar.seconds_left(now)
        pace = self._pace(now)
        if phase.planned is None or pace is None:
            return None
        if phase.share:
            return phase.planned * pace * (1 - phase.share)
        return max(phase.planned * pace - (now - (phase.began or now)), 0.0)

    def _pace(self, now: float) -> float | None:
        """Return the seconds that a planned second takes here; 1 before anything is done, None for other weights."""
        planned = taken = 0.0
        for phase in self.phases:
            here = phase.share - phase.share_before
            if not phase.planned or phase.began is None or here < MIN_SHARE:
                continue
            planned += phase.planned * here
            taken += now - phase.began if phase.state == "running" else phase.seconds - phase.seconds_before
        if planned:
            return taken / planned
        return 1.0 if self.in_seconds else None


open_views: list[View] = []  # the outermost first


def current() -> View:
    """Return the view of the work that is going on; one that nobody sees if there is none."""
    return open_views[-1] if open_views else View("")
