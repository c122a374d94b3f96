"""Several processes, on one machine or many, that work on one run: who is who, sums over all, and one end for all.

    with process_group():                                  # joins the processes that torchrun or accelerate started
        first, count = get_local_rows(settings.batch_size)          # this process's rows of a step
        counts = all_reduce_scalars({"tokens": 2048.0})           # sums over all processes
        all_reduce_gradients(parameters)
        result = run_on_main(write_the_report)            # done by process 0, while the others wait for it

Alone, each of these does nothing, and nothing is communicated.

One beginning and one end for several processes: they join, and an error of one ends all of them with that error.

    with process_group():                              # joins the processes that torchrun or accelerate started
        ...

An error is left in the store that all of them watch. Processes that hear nothing of each other for LIMBECK_TIMEOUT
seconds (600) end too.

Who this process is among all of them, and what is its own: rows of a step, a device.

    me = get_process_info()
    first, count = get_local_rows(settings.batch_size)          # this process's rows of a step

The launcher says who is who by the environment (RANK, WORLD_SIZE, LOCAL_RANK); nothing is communicated here.

Sums over all processes: numbers, flags, tensors, gradients.

    counts = all_reduce_scalars({"tokens": 2048.0})
    all_reduce_gradients(parameters)

Numbers are summed between CPUs by gloo, gradients by nccl where they are on GPUs. Alone, each of these does nothing.

What process 0 says: its answers and its tensors, in every process.

    result = run_on_main(write_the_report)            # done by process 0, while the others wait for it
    with main_process_first():
        make_a_cache()                            # the others find it

Numbers and checkpoints travel by gloo between CPUs. Alone, the work is simply done.
"""

import atexit
import json
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.core.console import console, output
from limbeck.core.errors import LimbeckError, summarize_error

# where launchers say which process of how many this is, and which on its machine
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, accelerate
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # mpirun
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)


@dataclass(frozen=True)
class ProcessInfo:
    """This process among all of them."""

    rank: int
    world_size: int
    local_rank: int  # on this machine

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def get_process_info() -> ProcessInfo:
    """Who this process is; alone it is process 0 of 1.

    Raises:
        LimbeckError: the launcher's variables are no numbers, or do not fit together.
    """
    names = next((names for names in LAUNCHERS if names[1] in os.environ), LAUNCHERS[0])
    given = [os.environ.get(name) for name in names]
    try:
        rank, size, local = (int(text or default) for text, default in zip(given, ("0", "1", "0")))
    except ValueError as error:
        raise LimbeckError(f"{', '.join(names)} in the environment: {error}", expected="numbers") from error
    if (size > 1 and given[0] is None) or not 0 <= rank < max(size, 1):
        raise LimbeckError(
            f"process {names[0]}={given[0]} of {names[1]}={size}",
            expected="a launcher that sets both, or none",
            hint="torchrun --nproc-per-node 2 -m limbeck distill ...",
        )
    return ProcessInfo(rank, size, local)


def get_local_rows(rows: int) -> tuple[int, int]:
    """First row and number of rows of this process, of a step's `rows`: contiguous, and as even as can be."""
    me = get_process_info()
    first = rows * me.rank // me.world_size
    return first, rows * (me.rank + 1) // me.world_size - first


def get_local_device(name: str) -> torch.device:
    """The device of this process: "auto", "cpu" or "cuda", one GPU for each process of a machine."""
    if name == "cuda" and not torch.cuda.is_available():
        raise LimbeckError("no CUDA device here", expected="device: auto or cpu", hint="limbeck doctor")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    me = get_process_info()
    if me.world_size == 1:
        return torch.device("cuda")
    if me.local_rank >= torch.cuda.device_count():
        raise LimbeckError(
            f"process {me.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}",
            expected="as many processes as GPUs",
            hint=f"torchrun --nproc-per-node {torch.cuda.device_count()} -m limbeck distill ...",
        )
    torch.cuda.set_device(me.local_rank)
    return torch.device("cuda", me.local_rank)


def mute_other_processes() -> None:
    """Messages and progress bars come from process 0 alone."""
    console.quiet = output.quiet = not get_process_info().is_main


POLL_SECONDS = 0.25
GRACE_SECONDS = 20.0  # for a process that is stuck in a collective after another one has failed


class Session:
    """The link between the processes: one store, one gloo group for numbers, one thread that listens for errors."""

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
                    f"process {self.me.rank} of {self.me.world_size} is not told where process 0 is",
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
        self.n_begun = 0

    def begin(self) -> None:
        self.n_begun += 1
        self.store = dist.PrefixStore(f"limbeck_{self.n_begun}", self.root_store)
        self.n_requests = 0  # of main's answers
        self.is_answering = False  # process 0, inside one: nobody else takes part
        self.remote_error: tuple[int, str, int] | None = None  # process, message and exit code of the first error
        self.stopped = threading.Event()
        self.listener = threading.Thread(target=self._listen, daemon=True)
        self.listener.start()

    def end(self) -> None:
        self.stopped.set()
        self.listener.join()

    def _listen(self) -> None:
        """Hear of errors; end a process that cannot, because it waits for one that is gone."""
        try:
            while not self.stopped.wait(POLL_SECONDS):
                if self.me.is_main:
                    self.store.add("beat", 1)
                if self.store.check(["error"]):
                    self.remote_error = tuple(json.loads(self.store.get("error")))
                    self.store.add("heard", 1)
                    break
        except Exception:  # the store went with its process; the next collective says so
            return
        if self.remote_error and self.remote_error[0] != self.me.rank and not self.stopped.wait(GRACE_SECONDS):
            os._exit(self.remote_error[2])

    def fail(self, error: BaseException) -> BaseException:
        """Tell the others, unless they told us first; the error that this process ends with."""
        lost = isinstance(error, RuntimeError) and not isinstance(error, torch.OutOfMemoryError)
        patience = time.monotonic() + (5.0 if lost else 0.0)  # a broken link has a cause, which is told by now or soon
        while self.remote_error is None and time.monotonic() < patience:
            time.sleep(POLL_SECONDS / 5)
        try:
            if self.remote_error is None:
                if lost and _is_of_the_link(error):
                    error = LimbeckError(
                        f"process {self.me.rank} of {self.me.world_size} lost the others: {summarize_error(error)}",
                        hint="one of them ended or stood still; the same command goes on from the last checkpoint",
                    )
                mine = self.me.rank, _message(error, self.me), getattr(error, "exit_code", 1)
                # all may fail at once; the first is heard
                self.remote_error = tuple(json.loads(self.store.compare_set("error", "", json.dumps(mine))))
                wait = time.monotonic() + 10.0
                while self.store.add("heard", 0) < self.me.world_size and time.monotonic() < wait:
                    time.sleep(POLL_SECONDS / 5)
        except Exception:
            console.quiet = False  # the store is gone: whoever reads this must hear it from us
            return error if self.remote_error is None else RemoteError(self.remote_error)
        console.quiet = self.remote_error[0] != self.me.rank  # it is told once, by the one that it happened to
        return RemoteError(self.remote_error) if console.quiet else error


class RemoteError(LimbeckError):
    """The error of another process."""

    def __init__(self, told: tuple[int, str, int]):
        super().__init__(told[1])
        self.exit_code = told[2]


def _is_of_the_link(error: BaseException) -> bool:
    """Does this come from a collective or the store, rather than from what is computed?"""
    known = isinstance(error, dist.DistError)
    return known or any(word in str(error).lower() for word in ("gloo", "nccl", "connection", "tcpstore"))


def _message(error: BaseException, me: ProcessInfo) -> str:
    if isinstance(error, LimbeckError):
        return str(error)
    return f"process {me.rank} of {me.world_size}: {type(error).__name__}: {str(error).strip() or 'no message'}"


_session: Session | None = None


@contextmanager
def process_group() -> Iterator[ProcessInfo]:
    """Join the other processes for what is inside. All end together: well, or with the error of the first that failed.

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
            f"process {me.rank} of {me.world_size} found no others at {address}: {summarize_error(error)}",
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
    if _session is not None and get_process_info().world_size > 1:
        dist.barrier(group=_session.control)


def get_session() -> Session:
    """The link; LimbeckError outside of `process_group`."""
    if _session is None:
        raise LimbeckError(
            f"process {get_process_info().rank} of {get_process_info().world_size} has not joined the others",
            hint="with together(): ...",
        )
    return _session


BUCKET_BYTES = 25 * 2**20  # gradients that travel together


def all_reduce_scalars(numbers: dict[str, float]) -> dict[str, float]:
    """Sums over all processes, of the same names everywhere."""
    if get_process_info().world_size == 1:
        return numbers
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(values, group=get_session().control)
    return dict(zip(numbers, values.tolist()))


def sync_stop_and_save(stop: bool, save: bool) -> tuple[bool, bool]:
    """Stop if any process was asked to; save if process 0 finds it time."""
    me = get_process_info()
    if me.world_size == 1:
        return stop, save
    flags = torch.tensor([int(stop), int(save and me.is_main)])
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=get_session().control)
    return bool(flags[0]), bool(flags[1])


@torch.no_grad()
def all_reduce_tensors(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its sum over all processes; the same shapes everywhere."""
    if get_process_info().world_size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


@torch.no_grad()
def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Each gradient becomes its sum over all processes, in buckets; where none has one, it stays None."""
    if get_process_info().world_size == 1:
        return
    members = list(parameters)
    there = torch.tensor([p.grad is not None for p in members], dtype=torch.uint8)
    dist.all_reduce(there, dist.ReduceOp.MAX, group=get_session().control)
    bucket: list[Tensor] = []
    for parameter, some in zip(members, there.tolist()):
        if not some:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad
        if bucket and (
            bucket[0].dtype != gradient.dtype or sum(t.nbytes for t in bucket) + gradient.nbytes > BUCKET_BYTES
        ):
            _add_bucket(bucket)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _add_bucket(bucket)


def _add_bucket(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(summed.view_as(gradient))


T = TypeVar("T")


def run_on_main(work: Callable[[], T]) -> T:
    """What `work()` returns in process 0, in every process; the others wait, however long it takes.

    Args:
        work: returns something small that can be pickled.
    """
    if get_process_info().world_size == 1 or get_session().is_answering:
        return work()
    session = get_session()
    session.n_requests += 1
    key = f"answer_{session.n_requests}"
    if session.me.is_main:
        session.is_answering = True
        try:
            answer = work()
        finally:
            session.is_answering = False
        session.store.set(key, pickle.dumps(answer))  # type: ignore[arg-type]
        return answer
    seen, since = -1, time.monotonic()
    while not session.store.check([key]):
        if session.remote_error is not None:
            raise RemoteError(session.remote_error)
        if (beat := session.store.add("beat", 0)) != seen:
            seen, since = beat, time.monotonic()
        if time.monotonic() - since > session.timeout.total_seconds():
            raise LimbeckError(
                f"process 0 has not been heard of for {session.timeout.total_seconds():.0f} s",
                hint="look at its messages; the same command goes on from the last checkpoint",
            )
        time.sleep(POLL_SECONDS / 5)
    return pickle.loads(session.store.get(key))


@contextmanager
def main_process_first() -> Iterator[None]:
    """What is inside is done by process 0 first, so that the others find its caches."""
    if get_process_info().is_main:
        yield
    run_on_main(lambda: None)
    if not get_process_info().is_main:
        yield


def run_on_main_with_tensors(work: Callable[[], T]) -> T:
    """Like `run_on_main`, for dicts, lists and tuples with large tensors in them; these come out on the CPU."""
    if get_process_info().world_size == 1 or get_session().is_answering:
        return work()
    session = get_session()
    tensors: list[Tensor] = []
    value = None
    if session.me.is_main:
        value = _without_tensors(work(), tensors)
    value, kinds = run_on_main(lambda: (value, [(t.shape, t.dtype) for t in tensors]))
    if not session.me.is_main:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in kinds]
    for tensor in tensors:
        if tensor.numel():
            dist.broadcast(tensor.view(-1).view(torch.uint8), 0, group=session.control)
    return _with_tensors(value, tensors)


@torch.no_grad()
def broadcast_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite these tensors by those of process 0."""
    if get_process_info().world_size > 1:
        for tensor in tensors:
            if tensor.is_contiguous():
                dist.broadcast(tensor.detach(), 0)
            else:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, 0)
                tensor.copy_(whole)


@dataclass(frozen=True)
class _Place:
    index: int


def _without_tensors(value: Any, found: list[Tensor]) -> Any:
    if isinstance(value, Tensor):
        found.append(value.detach().cpu().contiguous())
        return _Place(len(found) - 1)
    if isinstance(value, dict):
        return {key: _without_tensors(inner, found) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_without_tensors(inner, found) for inner in value)
    return value


def _with_tensors(value: Any, tensors: list[Tensor]) -> Any:
    if isinstance(value, _Place):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _with_tensors(inner, tensors) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(inner, tensors) for inner in value)
    return value
