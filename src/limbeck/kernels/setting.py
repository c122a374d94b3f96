"""Which backend is asked for: the process's setting, from a run's recipe or LIMBECK_BACKEND.

with using("torch"):        # or "fla": a call that would not go to a kernel is an error; or "auto"
    asked_for()
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from limbeck.errors import LimbeckError

BACKENDS = ("auto", "torch", "fla")
# Of the process, not the thread: backward passes have their own. The last that asked and is still inside is heard.
_inside: list[list[str]] = [[os.environ.get("LIMBECK_BACKEND", "auto")]]


def asked_for() -> str:
    """The setting as it is, "auto" unless something else was asked for."""
    return _inside[-1][0]


def check_setting() -> None:
    """Raises LimbeckError where LIMBECK_BACKEND names no backend."""
    if (asked := asked_for()) not in BACKENDS:
        raise LimbeckError(f"the backend is '{asked}'", expected=" | ".join(BACKENDS), hint="LIMBECK_BACKEND=auto")


@contextmanager
def using(backend: str) -> Iterator[None]:
    """That backend inside, for the whole process; "auto" leaves LIMBECK_BACKEND its say.

    Raises:
        LimbeckError: no such backend.
    """
    mine = [backend if backend != "auto" else os.environ.get("LIMBECK_BACKEND", "auto")]
    _inside.append(mine)
    try:
        check_setting()
        yield
    finally:  # not the last one, where another thread came in since
        del _inside[next(i for i, one in enumerate(_inside) if one is mine)]
