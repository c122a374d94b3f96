"""The live view: what it says of a run, that it fits its terminal, and that a pipe sees nothing of it."""

import io
import re

import pytest

from limbeck.core import console as consoles
from limbeck.core.live import CURVE_POINTS, Phase, View, current
from limbeck.core.screen import BLOCKS, draw_sparkline, is_drawn, render, watch
from limbeck.report.text_plot import plot_run


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def record_run(clock: Clock) -> View:
    """A run in the middle of its second stage: the first took twice its plan."""
    view = View(
        "gla student of a-teacher-with-quite-a-long-name-1.7B", [Phase("prepare", "prepare")], "runs/x", clock=clock
    )
    view.begin("prepare")
    clock.now += 20
    names = {"calibrate": 30.0, "hidden": 300.0, "logits": 600.0}
    stages = [Phase(i, name, seconds, f"{4096 * 10**i:,} tokens") for i, (name, seconds) in enumerate(names.items())]
    view.plan([*stages, Phase("end", "evaluate", 60.0)])
    view.begin(0)
    clock.now += 60
    view.finish(0, "0.8 % unexplained, ridge 0.01")
    view.begin(1)
    view.show("held-out loss", "3.4100 to 3.1000")
    view.show("exam perplexity: teacher", "19.40")
    view.show("exam perplexity: student", "25.63")
    return view


def texts(view: View, width: int = 80, height: int = 24, **more) -> list[str]:
    lines = render(view, width, height, **more)
    assert max(line.cell_len for line in lines) <= width
    assert len(lines) <= height
    return [line.plain.rstrip() for line in lines]


@pytest.mark.parametrize("width", [40, 80, 120])
def test_all_stages_are_there_and_no_line_is_too_wide(width):
    clock = Clock()
    view = record_run(clock)
    with view.count("hidden", 100, "steps", 0) as advance:
        for step in range(40):
            clock.now += 5
            advance(1)
            view.record(3.0 - step / 20, 118.0, held_out=3.5 if step == 19 else None)
        view.save(35)
        lines = texts(view, width)
    text = "\n".join(lines)
    for name in ("prepare", "calibrate", "hidden", "logits", "evaluate"):
        assert sum(f" {name[:12]}" in line for line in lines) >= 1, name
    assert "held out  3.5" in text
    assert "loss      1.05" in text
    if width >= 80:
        assert "hidden: 40 of 100 steps" in text
        assert "held-out loss 3.4100 to 3.1000, exam perplexity: teacher 19.40, student 25.63"[: width - 20] in text
        assert "checkpoint of step 35, 0 s ago" in text
        assert "Ctrl-C is safe: the same command goes on from runs/x/" in text
    assert all(line.isascii() for line in texts(view, width, plain=True))


def test_a_terminal_of_any_width_is_drawn():
    view = View(
        "gla student of SmolLM2", [Phase(0, "hidden", planned=300.0, amount="20,000 tokens")], folder="runs/gla"
    )
    view.begin(0)
    for step in range(90):
        view.record(5 / (step + 1), 118.0, held_out=3.3)
    for width in range(1, 60):
        assert all(line.cell_len <= width for line in render(view, width, 24)), width


def test_time_left_follows_what_the_run_has_taken_so_far():
    """Of 300 planned seconds 40 % took 200, the first stage 60 for 30: 260 for 150 planned so far."""
    clock = Clock()
    view = record_run(clock)
    with view.count("hidden", 100, "steps", 0) as advance:
        for _ in range(40):
            clock.now += 5
            advance(1)
        assert view.phase_seconds_left(view.phases[2], clock.now) == pytest.approx(300)
        assert view.seconds_left(clock.now) == pytest.approx(300 + (600 + 60) * 260 / 150)
        assert "5 min 00 s left" in "\n".join(texts(view))
        assert "24 min 04 s of the whole" in "\n".join(texts(view))


def test_a_resumed_stage_counts_its_own_steps_alone_and_shows_the_time_before():
    clock = Clock()
    view = View("run", [Phase(0, "calibrate", 30.0), Phase(1, "hidden", 300.0)], clock=clock)
    view.finish(0, "done before", seconds=31.0)
    assert view.seconds_left(clock.now) == pytest.approx(300), "what was done before says nothing of this machine now"
    view.begin(1)
    view.resume(step=60, steps=100, seconds=600.0)
    with view.count("hidden", 100, "steps", 60) as advance:
        for _ in range(10):
            clock.now += 5
            advance(1)
        assert view.seconds_left(clock.now) == pytest.approx(150)
        (row,) = [line for line in texts(view) if "hidden" in line and "steps" not in line]
        assert "10 min 50 s" in row
        assert "70%" in row
        clock.now += 150
    view.plan([Phase("end", "evaluate", 60.0)])
    view.finish(1, seconds=800.0)
    # 40 % of 300 planned seconds took 200 here
    assert view.seconds_left(clock.now) == pytest.approx(60 * 200 / 120)


@pytest.mark.parametrize("height", [12, 24])
def test_a_study_of_many_runs_shows_those_around_the_running_ones(height):
    clock = Clock()
    view = View("study", [Phase(i, f"run-{i}", 60.0) for i in range(144)], clock=clock, workers=2)
    for i in range(50):
        view.begin(i)
    for i in range(48):
        clock.now += 1
        view.finish(i, failed=i == 7)
    inner = View("gla student", [Phase(0, "hidden"), Phase(1, "logits")], clock=clock)
    inner.begin(0)
    inner.record(1.25, 400.0)
    view.inner = inner
    lines = texts(view, height=height)
    shown = [line for line in lines if re.search(r"run-\d+", line)]
    (before,) = [line for line in lines if " failed" in line]
    (after,) = [line for line in lines if "more to come" in line]
    assert sum(map(int, re.findall(r"\d+", before + after))) + len(shown) == 144
    assert [line for line in shown if "▸ run-48" in line]
    if height == 24:
        assert any("▸ hidden" in line and "logits" in line for line in lines)
        assert any("1.25" in line for line in lines)


def test_a_long_curve_takes_bounded_room_and_keeps_its_shape():
    view = View("run")
    for step in range(20_000):
        view.record(float(20_000 - step))
    assert len(view.loss.points) <= CURVE_POINTS
    assert (view.loss.first, view.loss.last) == (20_000.0, 1.0)
    assert [*view.loss.points] == sorted(view.loss.points, reverse=True)
    assert draw_sparkline([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0], 8) == BLOCKS
    assert len(draw_sparkline(view.loss.points, 33)) == 33
    view.record(float("nan"))
    assert view.loss.last == 1.0


def test_a_pipe_has_the_same_lines_with_and_without_a_view(monkeypatch):
    def work() -> str:
        file = io.StringIO()
        monkeypatch.setattr(consoles.console, "_file", file)
        with consoles.progress("hidden", 20, "steps") as advance:
            for step in range(20):
                advance(1, note=f"loss {step}")
        return file.getvalue()

    without = work()
    with watch(View("run", [Phase(0, "hidden")])) as view:
        view.begin(0)
        assert current() is view
        assert not is_drawn()
        assert work() == without
    assert len(without.splitlines()) == 10
    assert "hidden: 20/20 steps [0s] loss 19" in without
    assert "\x1b" not in without


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_picture_of_a_run_fits_and_names_each_model_where_it_ends(width):
    losses = {"teacher": [3.9, 3.0, 2.8], "student": [4.1, 3.4, 3.3], "window": [4.2, 3.5, 3.45]}
    ends = (64, 512, 2047)
    by_position = {
        model: {f"loss, tokens 1 to {end}": loss for end, loss in zip(ends, values)} for model, values in losses.items()
    }
    plot = plot_run({"run": "nowhere", "exam": {"by_position": by_position}}, width)
    assert plot is not None
    lines = plot.plain.splitlines()
    assert max(map(len, lines)) <= width
    names = [line.split()[-1] for line in lines[1:-1] if line.split()[-1] in losses]
    assert names == ["window", "student", "teacher"]
    assert "2,047" in lines[-1]
    assert plot_run({"run": "nowhere", "exam": None}, width) is None
    by_position["student"] = dict.fromkeys(by_position["student"], float("nan"))
    plot = plot_run({"run": "nowhere", "exam": {"by_position": by_position}}, width)
    assert plot is not None, "a student that diverged is left out"
    assert "student" not in plot.plain
    assert plot_run({"run": "nowhere", "exam": {"by_position": {"student": by_position["student"]}}}, width) is None
