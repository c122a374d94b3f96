"""Which backend is asked for: the process's setting, from a run's recipe or LIMBECK_BACKEND.

with using("torch"):        # or "fla": a call that would not go to a kernel is an error; or "auto"
    asked_for()
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from limbeck.errors import LimbeckError

BACKENDS = ("auto", "torch", "fla")
_asked = os.environ.get("LIMBECK_BACKEND", "auto")  # of the process, not the thread: backward passes have their own


def asked_for() -> str:
    """The setting as it is, "auto" unless something else was asked for."""
    return _asked


def check_setting() -> None:
    """Raises LimbeckError where LIMBECK_BACKEND names no backend."""
    if _asked not in BACKENDS:
        raise LimbeckError(f"the backend is '{_asked}'", expected=" | ".join(BACKENDS), hint="LIMBECK_BACKEND=auto")


@contextmanager
def using(backend: str) -> Iterator[None]:
    """That backend inside, for the whole process; "auto" leaves LIMBECK_BACKEND its say.

    Raises:
        LimbeckError: no such backend.
    """
    global _asked
    before = _asked
    _asked = backend if backend != "auto" else os.environ.get("LIMBECK_BACKEND", "auto")
    try:
        check_setting()
        yield
    finally:
        _asked = before
