"""Ctrl-C, a terminal that closes and SIGTERM, at any moment: one line, the signal's exit code, nothing lost."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from limbeck import Recipe, distill
from limbeck.core import signals
from limbeck.core.errors import LimbeckError
from limbeck.core.signals import (
    TerminatedBySignal,
    TrainingInterrupted,
    graceful_shutdown,
    raise_on_signals,
    restore_handlers,
)

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
RESUMES = "stopped; the same command resumes"


@pytest.fixture(autouse=True)
def _handlers_stay():
    """No test leaves a handler behind."""
    before = {number: signal.getsignal(number) for number in signals.HANDLED_SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in signals.HANDLED_SIGNALS} == before


def raised(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0)  # handlers run between two steps of the interpreter


# ---------------------------------------------------------------------------- in training


def stopped_by(number: int, error: Exception | None = None, times: int = 1) -> None:
    """A training that a signal reaches."""
    with graceful_shutdown() as asked:
        assert not asked()
        for _ in range(times):
            raised(number)
        assert asked()
        raise error or TrainingInterrupted("kept")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_training_is_asked_to_stop_by_every_signal(number, capfd):
    with pytest.raises(TrainingInterrupted) as ended:
        stopped_by(number)
    expected = {signal.SIGINT: 130, signal.SIGHUP: 129}.get(number, 143)
    assert ended.value.exit_code == expected
    assert ("Ctrl-C again" in capfd.readouterr().err) == (number != signal.SIGUSR1)


def test_a_signal_that_comes_too_late_for_one_training_is_heard_by_the_next_who_listens():
    """While a stage is finished the flag is looked at no more; the signal is not forgotten."""
    with pytest.raises(KeyboardInterrupt), graceful_shutdown():
        raised(signal.SIGINT)
    before = raise_on_signals()
    try:
        with pytest.raises(TerminatedBySignal) as ended, graceful_shutdown():
            raised(signal.SIGTERM)
        assert ended.value.exit_code == 143
    finally:
        restore_handlers(before)


def test_an_error_in_training_is_not_hidden_by_a_signal():
    with pytest.raises(LimbeckError, match="other"):
        stopped_by(signal.SIGTERM, LimbeckError("other"))


def test_what_is_ignored_stays_ignored():
    """`nohup` ignores SIGHUP, a shell's background job SIGINT."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with graceful_shutdown() as asked:
            raised(signal.SIGHUP)
            assert not asked()
        handlers = raise_on_signals()
        raised(signal.SIGHUP)
        restore_handlers(handlers)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_one_ctrl_c_that_arrives_twice_is_one():
    """From the terminal, and passed on by a parent such as a launcher."""
    with pytest.raises(TrainingInterrupted):
        stopped_by(signal.SIGINT, times=2)


# ---------------------------------------------------------------------------- anywhere else

IMPORTS = """
import sys
from limbeck.core.signals import raise_on_signals
raise_on_signals()
sys.path.insert(0, sys.argv[1])
print("ready", flush=True)
try:
    import slow
except BaseException:       # as libraries do around what they can do without
    print("swallowed", flush=True)
print("went on", flush=True)
"""
TWICE = """
import time
from limbeck.core.signals import graceful_shutdown
with graceful_shutdown() as asked:
    print("ready", flush=True)
    while True:
        time.sleep(0.01)
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_during_imports_ends_the_process(tmp_path, number, code):
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(60)\n", encoding="utf-8")
    process = started([sys.executable, "-c", IMPORTS, str(tmp_path)])
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == ""
    assert err.strip() == "stopped"


def test_a_second_ctrl_c_ends_training_at_once():
    process = started([sys.executable, "-c", TWICE])
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "Traceback" not in err


def test_outside_of_training_a_signal_raises_what_no_handler_of_errors_catches():
    before = raise_on_signals()
    try:
        with (
            pytest.raises(TerminatedBySignal) as ended,
            suppress(Exception),
        ):  # else an arm had failed, and the study gone on
            raised(signal.SIGTERM)
        assert ended.value.exit_code == 143
    finally:
        restore_handlers(before)


# ---------------------------------------------------------------------------- the command line


@pytest.fixture(autouse=True)
def signals_are_heard():
    """What starts the tests (nohup, a shell's `&`) may have signals ignored, and children would inherit that."""
    ignored = [s for s in signals.HANDLED_SIGNALS if signal.getsignal(s) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def started(command: list[str], **more) -> subprocess.Popen:
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8", errors="replace", **more
    )


def lines_of(run: Path) -> int:
    log = run / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def written(teacher: Path, corpus: Path, out: Path) -> Recipe:
    """Three hundred steps: a run that is not over before the signal comes."""
    recipe = Recipe.parse(
        {
            "name": "tiny",
            "teacher": str(teacher),
            "student": {"mixer": "linear_attention"},
            "data": {"source": str(corpus), "seq_len": 16, "held_out": 0.2},
            "stages": [
                {"stage": "hidden", "tokens": 4800, "batch_size": 1},
                {"stage": "logits", "tokens": 64, "batch_size": 1},
            ],
            "evaluation": {"tokens": 64, "prompt": None},
            "checkpoint_seconds": 600,
            "trackers": [],
            "out": str(out),
        }
    )
    out.with_suffix(".yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    return recipe


def struck(run: Path, number: int, when: Callable[[], bool], **more) -> tuple[int, str]:
    """Start the run, send it a signal at some moment; exit code and what it said."""
    process = started([sys.executable, "-m", "limbeck", "distill", str(run.with_suffix(".yaml"))], **more)
    while process.poll() is None and not when():
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    return process.returncode, err


@pytest.mark.slow
def test_a_run_that_is_interrupted_again_and_again_loses_no_step(teacher_folder, corpus, own_cache, tmp_path):
    """Ctrl-C and a hangup in training, a checkpoint each; SIGTERM where it exports or evaluates."""
    run = tmp_path / "run"
    recipe = written(teacher_folder, corpus, run)
    reached = 0
    for number in (signal.SIGINT, signal.SIGHUP):
        code, said = struck(run, number, lambda least=reached + 20: lines_of(run) > least)
        assert code == 128 + number
        assert "Traceback" not in said
        assert "checkpoint saved" in said
        assert RESUMES in said
        kept = max(int(path.name.removeprefix("step-")) for path in run.glob("stages/0-hidden/step-*"))
        assert kept == lines_of(run) > reached, "the last step is in the checkpoint"
        reached = kept
    code, said = struck(run, signal.SIGTERM, lambda: (run / "student").exists())
    assert code in (143, 0)  # or it was over
    assert "Traceback" not in said
    assert not list(run.rglob("*.tmp"))
    distill(recipe, plot_curves=False)
    whole = tmp_path / "whole"
    distill(recipe.model_copy(update={"out": str(whole)}), plot_curves=False)
    first, second = (path / "student" / "model.safetensors" for path in (run, whole))
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.slow
def test_a_terminal_that_closes_leaves_a_checkpoint(teacher_folder, corpus, own_cache, tmp_path):
    """What is printed then fails; the run keeps its state all the same."""
    run = tmp_path / "run"
    written(teacher_folder, corpus, run)
    master, slave = os.openpty()

    def own_terminal() -> None:
        import fcntl
        import termios

        os.setsid()
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    command = [sys.executable, "-m", "limbeck", "distill", str(run.with_suffix(".yaml"))]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, preexec_fn=own_terminal)
    os.close(slave)
    os.set_blocking(master, False)
    while process.poll() is None and lines_of(run) < 20:
        try:
            os.read(master, 65536)  # a terminal that nobody reads would hold it up
        except BlockingIOError:
            time.sleep(0.01)
    os.close(master)
    assert process.wait(120) == 129
    kept = [int(path.name.removeprefix("step-")) for path in run.glob("stages/0-hidden/step-*")]
    assert max(kept, default=0) == lines_of(run) >= 20


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("verb", ["generate", "eval", "study"])
def test_other_verbs_end_with_one_line(verb, teacher_folder, corpus, own_cache, tmp_path):
    """The signal comes while they are at their real work, in this process: what they raise ends in the same place."""
    words = {
        "generate": ["generate", str(teacher_folder), "The license", "--tokens", "100000"],
        "eval": ["eval", str(teacher_folder), "--data", str(corpus), "--measure", "speed", "--set", "speed.rounds=100"],
        "study": ["study", "controlled", "--size", "smoke", "--out", str(tmp_path / "study")],
    }[verb]
    script = (
        "import os, signal, sys, threading\n"
        "from limbeck.__main__ import main\n"
        "import limbeck.evaluation.subject, limbeck.models.generation, limbeck.study\n"
        "sys.argv = ['limbeck', *sys.argv[1:]]\n"
        "later = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))\n"
        "later.daemon = True\n"
        "later.start()\n"
        "main()\n"
    )
    process = started([sys.executable, "-c", script, *words], cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert err.strip().splitlines()[-1].startswith("stopped")
