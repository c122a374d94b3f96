"""Let several processes, on one machine or many, work on one run: ranks, answers of process 0, and one common end.

    with process_group():                                        # joins the processes of torchrun, accelerate or mpirun
        first, count = get_local_rows(settings.batch_size)       # this process's rows of a step
        result = run_on_main(write_the_report)                   # by process 0, while the others wait for the answer

In a single process each of these does nothing and nothing is communicated. Sums and copies of tensors over the
processes are in `limbeck.core.collectives`.

An error of one process is left in the store that all of them watch, so all end with that error. Processes that hear
nothing of each other for LIMBECK_TIMEOUT seconds (600) end too.
"""

import atexit
import json
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from limbeck.core.console import console, output
from limbeck.core.errors import LimbeckError, summarize_error

T = TypeVar("T")

POLL_SECONDS = 0.25
GRACE_SECONDS = 20.0  # for a process that is stuck in a collective after another one has failed

# ------------------------------------------------------------------ who is who

# Variables in which launchers pass the rank, the number of processes and the rank on this machine.
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, accelerate
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # mpirun
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


@dataclass(frozen=True)
class ProcessInfo:
    """Which process of how many this is."""

    rank: int
    world_size: int
    local_rank: int  # on this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def get_process_info() -> ProcessInfo:
    """Return rank and number of processes as the launcher set them; without one, rank 0 of 1.

    Raises:
        LimbeckError: the launcher's variables are not numbers, or contradict each other.
    """
    names = next((names for names in LAUNCHERS if names[1] in os.environ), LAUNCHERS[0])
    values = [os.environ.get(name) for name in names]
    try:
        rank, size, local = (int(text or default) for text, default in zip(values, ("0", "1", "0")))
    except ValueError as error:
        raise LimbeckError(f"{', '.join(names)} in the environment: {error}", expected="numbers") from error
    if (size > 1 and values[0] is None) or not 0 <= rank < max(size, 1):
        raise LimbeckError(
            f"the environment has {names[0]}={values[0]} and {names[1]}={size}",
            expected="a launcher that sets both, or none",
            hint="torchrun --nproc-per-node 2 -m limbeck distill ...",
        )
    return ProcessInfo(rank, size, local)


def get_local_rows(rows: int) -> tuple[int, int]:
    """Return the first row and the number of rows of this process, of a step's `rows`: contiguous and balanced."""
    me = get_process_info()
    first = rows * me.rank // me.world_size
    return first, rows * (me.rank + 1) // me.world_size - first


def get_local_device(name: str) -> torch.device:
    """Return the device of this process: one GPU for each process of a machine, or the CPU.

    Args:
        name: "auto", "cpu" or "cuda".

    Raises:
        LimbeckError: no GPU, or fewer than processes.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise LimbeckError("no CUDA device is available", expected="device: auto or cpu", hint="limbeck doctor")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    me = get_process_info()
    if me.world_size == 1:
        return torch.device("cuda")
    if me.local_rank >= torch.cuda.device_count():
        raise LimbeckError(
            f"no GPU for process {me.local_rank} of this machine, which has {torch.cuda.device_count()}",
            expected="at most one process per GPU",
            hint=f"torchrun --nproc-per-node {torch.cuda.device_count()} -m limbeck distill ...",
        )
    torch.cuda.set_device(me.local_rank)
    return torch.device("cuda", me.local_rank)


def mute_other_processes() -> None:
    """Print messages and progress bars in process 0 alone."""
    console.quiet = output.quiet = not get_process_info().is_main


# ------------------------------------------------------------------ one beginning and one end


class Session:
    """Connect the processes: one store, one gloo group for numbers, one thread that listens for errors."""

    def __init__(self) -> None:
        self.me = get_process_info()
        self.timeout = timedelta(seconds=float(os.environ.get("LIMBECK_TIMEOUT", "600")))
        if dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
            self.control = dist.new_group(backend="gloo", timeout=self.timeout)
        else:
            missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
            if missing:
                raise LimbeckError(
                    f"process {self.me.rank} of {self.me.world_size} does not know the address of process 0",
                    expected=f"{' and '.join(missing)} in the environment",
                    hint="torchrun --nproc-per-node 2 -m limbeck distill ...",
                )
            store, rank, size = next(dist.rendezvous("env://", self.me.rank, self.me.world_size, timeout=self.timeout))
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            own = dist.PrefixStore("limbeck_groups", store)
            dist.init_process_group(backend, store=own, rank=rank, world_size=size, timeout=self.timeout)
            self.control = dist.group.WORLD
            atexit.register(lambda: dist.is_initialized() and dist.destroy_process_group())
        self.root_store = store
        self.n_blocks = 0

    def begin(self) -> None:
        """Start a `process_group` block: keys of its own in the store, and the listener."""
        self.n_blocks += 1
        self.store = dist.PrefixStore(f"limbeck_{self.n_blocks}", self.root_store)
        self.n_answers = 0  # that process 0 has given the others
        self.is_answering = False  # process 0 is computing one, so no other process takes part
        self.remote_error: tuple[int, str, int] | None = None  # process, message and exit code of the first error
        self.stopped = threading.Event()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def end(self) -> None:
        """Stop the listener."""
        self.stopped.set()
        self.listener.join()

    def _listen(self) -> None:
        """Wait for the first error of any process; end this one if it is stuck in a collective with a dead one."""
        try:
            while not self.stopped.wait(POLL_SECONDS):
                if self.me.is_main:
                    self.store.add("beat", 1)
                if self.store.check(["error"]):
                    self.remote_error = tuple(json.loads(self.store.get("error")))
                    self.store.add("heard", 1)
                    break
        except Exception:  # the store died with its process; the next collective reports that
            return
        if self.remote_error and self.remote_error[0] != self.me.rank and not self.stopped.wait(GRACE_SECONDS):
            os._exit(self.remote_error[2])

    def fail(self, error: BaseException) -> BaseException:
        """Report an error to the others, unless one was first; returns the error that this process ends with."""
        maybe_connection = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        # A broken connection has a cause in another process, which has reported it by now or will soon.
        deadline = time.monotonic() + (5.0 if maybe_connection else 0.0)
        while self.remote_error is None and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 5)
        try:
            if self.remote_error is None:
                if maybe_connection and _is_connection_error(error):
                    error = LimbeckError(
                        f"process {self.me.rank} of {self.me.world_size} lost contact with the others: "
                        f"{summarize_error(error)}",
                        hint="one of them ended or hung; the same command resumes from the last checkpoint",
                    )
                own = self.me.rank, _format_error(error, self.me), getattr(error, "exit_code", 1)
                # all may fail at once; the first one counts
                self.remote_error = tuple(json.loads(self.store.compare_set("error", "", json.dumps(own))))
                deadline = time.monotonic() + 10.0
                while self.store.add("heard", 0) < self.me.world_size and time.monotonic() < deadline:
                    time.sleep(POLL_SECONDS / 5)
        except Exception:
            console.quiet = False  # the store is gone, so the error may be printed nowhere else
            return error if self.remote_error is None else RemoteError(self.remote_error)
        # it is printed once, by the process in which it happened
        console.quiet = self.remote_error[0] != self.me.rank
        return RemoteError(self.remote_error) if console.quiet else error


class RemoteError(LimbeckError):
    """An error that happened in another process.

    Args:
        report: rank, message and exit code of that process.
    """

    def __init__(self, report: tuple[int, str, int]):
        super().__init__(report[1])
        self.exit_code = report[2]


def _is_connection_error(error: BaseException) -> bool:
    """Whether a collective or the store raised this, rather than a computation."""
    if isinstance(error, dist.DistError):
        return True
    return any(word in str(error).lower() for word in ("gloo", "nccl", "connection", "tcpstore"))


def _format_error(error: BaseException, me: ProcessInfo) -> str:
    if isinstance(error, LimbeckError):
        return str(error)
    return f"process {me.rank} of {me.world_size}: {type(error).__name__}: {str(error).strip() or 'no message'}"


_session: Session | None = None


@contextmanager
def process_group() -> Iterator[ProcessInfo]:
    """Join the other processes inside this block; all of them end well, or all with the error of the first that failed.

    Raises:
        LimbeckError: the error of another process.
    """
    global _session
    me = get_process_info()
    if me.world_size == 1:
        yield me
        return
    mute_other_processes()
    try:
        _session = _session or Session()
    except RuntimeError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LimbeckError(
            f"process {me.rank} of {me.world_size} could not reach the others at {address}: {summarize_error(error)}",
            expected="all processes to start within LIMBECK_TIMEOUT seconds (600)",
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
    """Wait until all processes have come here, at most LIMBECK_TIMEOUT seconds."""
    if _session is not None and get_process_info().world_size > 1:
        dist.barrier(group=_session.control)


def get_session() -> Session:
    """Return the connection to the other processes; LimbeckError outside of `process_group`."""
    if _session is None:
        raise LimbeckError(
            f"process {get_process_info().rank} of {get_process_info().world_size} has not joined the others",
            expected="a call inside process_group()",
        )
    return _session


# ------------------------------------------------------------------ answers of process 0


def run_on_main(work: Callable[[], T]) -> T:
    """Run `work` in process 0 and return its result in every process; the others wait, however long it takes.

    Args:
        work: returns something small that can be pickled.

    Raises:
        LimbeckError: another process failed, or process 0 shows no sign of life.
    """
    if get_process_info().world_size == 1 or get_session().is_answering:
        return work()
    session = get_session()
    session.n_answers += 1
    key = f"answer_{session.n_answers}"
    if session.me.is_main:
        session.is_answering = True
        try:
            answer = work()
        finally:
            session.is_answering = False
        session.store.set(key, pickle.dumps(answer))  # type: ignore[arg-type]
        return answer
    last_beat, since = -1, time.monotonic()
    while not session.store.check([key]):
        if session.remote_error is not None:
            raise RemoteError(session.remote_error)
        if (beat := session.store.add("beat", 0)) != last_beat:
            last_beat, since = beat, time.monotonic()
        if time.monotonic() - since > session.timeout.total_seconds():
            raise LimbeckError(
                f"process 0 has not responded for {session.timeout.total_seconds():.0f} s",
                hint="look at its messages; the same command resumes from the last checkpoint",
            )
        time.sleep(POLL_SECONDS / 5)
    return pickle.loads(session.store.get(key))


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block in process 0 first, so that the others find its caches."""
    if get_process_info().is_main:
        yield
    run_on_main(lambda: None)
    if not get_process_info().is_main:
        yield
