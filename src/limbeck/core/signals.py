"""Graceful shutdown on Ctrl-C, SIGTERM, SIGHUP and SIGUSR1.

    with graceful_shutdown() as stop_requested:          # training: save a checkpoint, then end
        while ...:
            if stop_requested():
                save(); raise TrainingInterrupted

    raise_on_signals()                                   # the command line, from its first line on: clean up, then end

Schedulers send SIGUSR1 as a warning. The process exits with 128 + the number of the signal, which shells and schedulers
read as "stopped, may be restarted"; after SIGUSR1 with the code of SIGTERM. A second Ctrl-C ends the process at once.
Signals that are ignored, as under `nohup`, stay ignored.
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
# One Ctrl-C may arrive twice within so short a time: from the terminal, and passed on by a parent process.
REPEAT_WINDOW_S = 0.3
listeners: list[Callable[[str], None]] = []  # show what `say` has to say, in its place
Handler = Callable[[int, FrameType | None], None]
Handlers = dict[signal.Signals, Any]


class TrainingInterrupted(LimbeckError):
    """Training was stopped by a signal after saving a checkpoint."""

    exit_code = SIGTERM_EXIT_CODE


class TerminatedBySignal(BaseException):
    """A signal ends the process outside of training.

    Not an Exception, so that code which goes on after errors does not go on after this.

    Args:
        number: number of the signal.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.exit_code = exit_code_of(number)


def exit_code_of(number: int) -> int:
    """Return the exit code of a process that ends because of this signal."""
    return 128 + number if number in TERMINATION_SIGNALS else SIGTERM_EXIT_CODE


@contextmanager
def graceful_shutdown() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether a signal has requested a stop; always False outside the main thread."""
    received: list[tuple[int, float]] = []  # signal and time

    def record(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT and time.monotonic() - received[0][1] > REPEAT_WINDOW_S:
            _exit_now(number)
        if not received and number != signal.SIGUSR1:
            say("Stopping after this step; a checkpoint will be saved. Press Ctrl-C again to exit at once.")
        received.append((number, time.monotonic()))

    before = _install(record)
    try:
        yield lambda: bool(received)
    except TrainingInterrupted as interrupted:
        if received:
            interrupted.exit_code = exit_code_of(received[0][0])
        raise
    finally:
        restore_handlers(before)
    if received:  # training was over before it saw the signal, so the handler of the surrounding code gets it
        signal.raise_signal(received[0][0])


def raise_on_signals() -> Handlers:
    """Raise TerminatedBySignal on signals from here on; during an import, end the process instead.

    Returns:
        The previous handlers, for `restore_handlers`; empty outside the main thread, where handlers cannot be set.
    """
    since: list[float] = []

    def terminate(number: int, frame: FrameType | None) -> None:
        if since:
            if time.monotonic() - since[0] > REPEAT_WINDOW_S:
                _exit_now(number)
            return  # it is ending already
        since.append(time.monotonic())
        # An exception in the middle of an import is lost, or leaves half-initialized modules behind.
        if _is_importing(frame):
            _exit_now(number)
        raise TerminatedBySignal(number)

    return _install(terminate)


def exit_on_signals() -> None:
    """Exit at once on signals from here on: no code is left that could handle an exception."""
    _install(lambda number, frame: _exit_now(number))


def restore_handlers(handlers: Handlers) -> None:
    """Set the handlers that `raise_on_signals` returned."""
    for s, handler in handlers.items():
        signal.signal(s, handler)


def say(text: str) -> None:
    """Write a line to stderr from a signal handler; if the terminal is gone, discard all later output."""
    # a line in the midst of what is drawn on a terminal would be drawn over; one that has closed is none any more
    if listeners and os.isatty(2):
        listeners[-1](text)
        return
    try:
        os.write(2, f"{text}\n".encode())
    except OSError:
        with suppress(OSError):
            null = os.open(os.devnull, os.O_WRONLY)
            for descriptor in (1, 2):
                os.dup2(null, descriptor)


def _install(handler: Handler) -> Handlers:
    """Set a handler for all signals that are not ignored; returns the previous handlers."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {s: signal.getsignal(s) for s in HANDLED_SIGNALS}
    before = {s: old for s, old in before.items() if old is not None and old != signal.SIG_IGN}
    for s in before:
        signal.signal(s, handler)
    return before


def _exit_now(number: int) -> NoReturn:
    """End this process without cleaning up; the next one removes its temporary files."""
    with suppress(OSError):
        # what draws progress hides the cursor and leaves it at the end of its last line
        end_drawing = "\x1b[?25h\n" if os.isatty(2) else ""
        os.write(2, f"{end_drawing}stopped\n".encode())
    os._exit(exit_code_of(number))


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False
