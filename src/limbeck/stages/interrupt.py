"""A polite request to stop: on SIGTERM (and SIGUSR1, with which schedulers warn) training ends with a checkpoint.

    with watch() as asked:
        while ...:
            if asked():
                save(); raise Stopped

The process then ends with the code of the signal, 128 + 15, which schedulers read as "stopped, may be started again".
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from limbeck.errors import LimbeckError

EXIT_CODE = 128 + signal.SIGTERM
SIGNALS = [s for s in (getattr(signal, "SIGTERM", None), getattr(signal, "SIGUSR1", None)) if s is not None]


class Stopped(LimbeckError):
    """The run was asked to stop and has kept its state."""

    exit_code = EXIT_CODE


@contextmanager
def watch() -> Iterator[Callable[[], bool]]:
    """Yields a function that says whether a signal to stop has come. Outside the main thread none is watched for."""
    came: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {s: signal.signal(s, lambda number, frame: came.append(number)) for s in SIGNALS}
    try:
        yield lambda: bool(came)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)
