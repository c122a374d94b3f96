"""One beginning and one end for several processes: they join, and an error of one ends all of them with that error.

    with together():                              # joins the processes that torchrun or accelerate started
        ...

An error is left in the store that all of them watch. Processes that hear nothing of each other for LIMBECK_TIMEOUT
seconds (600) end too.
"""

import atexit
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from limbeck.console import console
from limbeck.distributed.world import World, one_voice, world
from limbeck.errors import LimbeckError, sentences

POLL_S = 0.25
GRACE_S = 20.0  # for a process that is stuck in a collective after another one has failed


class Session:
    """The link between the processes: one store, one gloo group for numbers, one thread that listens for errors."""

    def __init__(self) -> None:
        self.me = world()
        self.timeout = timedelta(seconds=float(os.environ.get("LIMBECK_TIMEOUT", "600")))
        if dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
            self.control = dist.new_group(backend="gloo", timeout=self.timeout)
        else:
            missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
            if missing:
                raise LimbeckError(
                    f"process {self.me.rank} of {self.me.size} is not told where process 0 is",
                    expected=f"{' and '.join(missing)} in the environment",
                    hint="torchrun --nproc-per-node 2 -m limbeck distill ...",
                )
            store, rank, size = next(dist.rendezvous("env://", self.me.rank, self.me.size, timeout=self.timeout))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            own = dist.PrefixStore("limbeck_groups", store)
            dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=self.timeout)
            self.control = dist.group.WORLD
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        self.link = store
        self.begun = 0

    def begin(self) -> None:
        self.begun += 1
        self.store = dist.PrefixStore(f"limbeck_{self.begun}", self.link)
        self.asked = 0  # of main's answers
        self.answering = False  # process 0, inside one: nobody else takes part
        self.told: tuple[int, str, int] | None = None  # process, message and exit code of the first error
        self.over = threading.Event()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def end(self) -> None:
        self.over.set()
        self.listener.join()

    def _listen(self) -> None:
        """Hear of errors; end a process that cannot, because it waits for one that is gone."""
        try:
            while not self.over.wait(POLL_S):
                if self.me.main:
                    self.store.add("beat", 1)
                if self.store.check(["error"]):
                    self.told = tuple(json.loads(self.store.get("error")))
                    self.store.add("heard", 1)
                    break
        except Exception:  # the store went with its process; the next collective says so
            return
        if self.told and self.told[0] != self.me.rank and not self.over.wait(GRACE_S):
            os._exit(self.told[2])

    def fail(self, error: BaseException) -> BaseException:
        """Tell the others, unless they told us first; the error that this process ends with."""
        lost = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        patience = time.monotonic() + (5.0 if lost else 0.0)  # a broken link has a cause, which is told by now or soon
        while self.told is None and time.monotonic() < patience:
            time.sleep(POLL_S / 5)
        try:
            if self.told is None:
                if lost and _is_of_the_link(error):
                    error = LimbeckError(
                        f"process {self.me.rank} of {self.me.size} lost the others: {sentences(error)}",
                        hint="one of them ended or stood still; the same command goes on from the last checkpoint",
                    )
                mine = self.me.rank, _message(error, self.me), getattr(error, "exit_code", 1)
                # all may fail at once; the first is heard
                self.told = tuple(json.loads(self.store.compare_set("error", "", json.dumps(mine))))
                wait = time.monotonic() + 10.0
                while self.store.add("heard", 0) < self.me.size and time.monotonic() < wait:
                    time.sleep(POLL_S / 5)
        except Exception:
            console.quiet = False  # the store is gone: whoever reads this must hear it from us
            return error if self.told is None else Told(self.told)
        console.quiet = self.told[0] != self.me.rank  # it is told once, by the one that it happened to
        return Told(self.told) if console.quiet else error


class Told(LimbeckError):
    """The error of another process."""

    def __init__(self, told: tuple[int, str, int]):
        super().__init__(told[1])
        self.exit_code = told[2]


def _is_of_the_link(error: BaseException) -> bool:
    """Does this come from a collective or the store, rather than from what is computed?"""
    known = isinstance(error, dist.DistError)
    return known or any(word in str(error).lower() for word in ("gloo", "nccl", "connection", "tcpstore"))


def _message(error: BaseException, me: World) -> str:
    if isinstance(error, LimbeckError):
        return str(error)
    return f"process {me.rank} of {me.size}: {type(error).__name__}: {str(error).strip() or 'no message'}"


_session: Session | None = None


@contextmanager
def together() -> Iterator[World]:
    """Join the other processes for what is inside. All end together: well, or with the error of the first that failed.

    Raises:
        LimbeckError: the error of another process.
    """
    global _session
    me = world()
    if me.size == 1:
        yield me
        return
    one_voice()
    try:
        _session = _session or Session()
    except RuntimeError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LimbeckError(
            f"process {me.rank} of {me.size} found no others at {address}: {sentences(error)}",
            expected="all of them started within LIMBECK_TIMEOUT seconds (600)",
        ) from error
    _session.begin()
    try:
        yield me
        barrier()
    except BaseException as error:
        final = _session.fail(error)
        if final is error:
            raise
        raise final from error
    finally:
        _session.end()


def barrier() -> None:
    """Wait for all, at most LIMBECK_TIMEOUT seconds."""
    if _session is not None and world().size > 1:
        dist.barrier(group=_session.control)


def linked() -> Session:
    """The link; LimbeckError outside of `together`."""
    if _session is None:
        raise LimbeckError(
            f"process {world().rank} of {world().size} has not joined the others", hint="with together(): ..."
        )
    return _session
