"""What a signal to end does: in training a checkpoint is kept first, anywhere else what is half made is removed.

    with graceful_shutdown() as asked:                    # training, in any program
        while ...:
            if asked():
                save(); raise TrainingInterrupted

    raise_on_signals()                          # the command line, from its first line on

Signals are Ctrl-C (SIGINT), a terminal that closes (SIGHUP), SIGTERM, and SIGUSR1, with which schedulers warn. The
process ends with the code of the signal, 128 + its number, which shells and schedulers read as "stopped, may be started
again"; after SIGUSR1 with that of SIGTERM. A second Ctrl-C ends it at once. Signals that are ignored, as `nohup` has
it, stay so.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from limbeck.core.errors import LimbeckError

SIGTERM_EXIT_CODE = 128 + signal.SIGTERM
TERMINATION_SIGNALS = [s for s in (getattr(signal, n, None) for n in ("SIGINT", "SIGTERM", "SIGHUP")) if s is not None]
HANDLED_SIGNALS = [*TERMINATION_SIGNALS, *(s for s in (getattr(signal, "SIGUSR1", None),) if s is not None)]
REPEAT_WINDOW_S = (
    0.3  # what comes again within so short a time is one Ctrl-C, from the terminal and passed on by a parent
)
Handler = Callable[[int, FrameType | None], None]
Handlers = dict[signal.Signals, Any]


class TrainingInterrupted(LimbeckError):
    """The run was asked to stop and has kept its state."""

    exit_code = SIGTERM_EXIT_CODE


class TerminatedBySignal(BaseException):
    """A signal has come, outside of training. No Exception: nothing that goes on after an error goes on after this.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = exit_code_of(number)


def exit_code_of(number: int) -> int:
    """The exit code of a process that ends because of that signal."""
    return 128 + number if number in TERMINATION_SIGNALS else SIGTERM_EXIT_CODE


@contextmanager
def graceful_shutdown() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether a signal to stop has come. Outside the main thread none is watched for."""
    came: list[tuple[int, float]] = []

    def note(number: int, frame: FrameType | None) -> None:
        if came and number == signal.SIGINT and time.monotonic() - came[0][1] > REPEAT_WINDOW_S:
            _leave(number)
        if not came and number != signal.SIGUSR1:
            say("stopping, the state is kept; Ctrl-C again ends at once")
        came.append((number, time.monotonic()))

    before = _install(note)
    try:
        yield lambda: bool(came)
    except TrainingInterrupted as stopped:
        if came:
            stopped.exit_code = exit_code_of(came[0][0])
        raise
    finally:
        restore_handlers(before)
    if came:  # too late for this training: whoever hears of signals next is told
        signal.raise_signal(came[0][0])


def raise_on_signals() -> Handlers:
    """From here on a signal to end raises TerminatedBySignal; while modules are being imported the process ends in its place.

    An exception in the midst of an import is lost, or leaves modules half made.

    Returns:
        The handlers that were there, for `restore_handlers`. Outside the main thread none is changed.
    """
    since: list[float] = []

    def end(number: int, frame: FrameType | None) -> None:
        if since:
            if time.monotonic() - since[0] > REPEAT_WINDOW_S:
                _leave(number)
            return  # it is ending already
        since.append(time.monotonic())
        if _importing(frame):
            _leave(number)
        raise TerminatedBySignal(number)

    return _install(end)


def say(text: str) -> None:
    """A line on stderr from a signal's handler; a terminal that is gone is not written to again."""
    try:
        os.write(2, f"{text}\n".encode())
    except OSError:
        with suppress(OSError):
            nowhere = os.open(os.devnull, os.O_WRONLY)
            for gone in (1, 2):
                os.dup2(nowhere, gone)


def exit_on_signals() -> None:
    """From here on a signal to end does so at once: there is nobody left who would hear of an exception."""
    _install(lambda number, frame: _leave(number))


def restore_handlers(handlers: Handlers) -> None:
    """Set the handlers that were there before."""
    for s, handler in handlers.items():
        signal.signal(s, handler)


def _install(handler: Handler) -> Handlers:
    """Set a handler for those signals that are not ignored; returns the handlers that were there."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {s: signal.getsignal(s) for s in HANDLED_SIGNALS}
    before = {s: old for s, old in before.items() if old is not None and old != signal.SIG_IGN}
    for s in before:
        signal.signal(s, handler)
    return before


def _leave(number: int) -> NoReturn:
    """End this process at once; what it had half made the next one removes."""
    with suppress(OSError):
        shown = "\x1b[?25h" if os.isatty(2) else ""  # a progress bar hides the cursor
        os.write(2, f"{shown}stopped\n".encode())
    os._exit(exit_code_of(number))


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
