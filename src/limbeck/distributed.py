"""Several processes, on one machine or many, that work on one run: who is who, sums over all, and one end for all.

    with together():                                  # joins the processes that torchrun or accelerate started
        first, count = share(settings.batch)          # this process's rows of a step
        counts = add_up({"tokens": 2048.0})           # sums over all processes
        add_gradients(parameters)
        result = on_main(write_the_report)            # done by process 0, while the others wait for it

Alone, each of these does nothing, and nothing is communicated. The launcher says who is who by the environment (RANK,
WORLD_SIZE, LOCAL_RANK). Numbers and checkpoints travel by gloo between CPUs, gradients by nccl where they are on GPUs.
An error of one process ends all of them with that error: it is left in the store that all of them watch. Processes that
hear nothing of each other for LIMBECK_TIMEOUT seconds (600) end too.
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

from limbeck.console import console, output
from limbeck.errors import LimbeckError

BUCKET_BYTES = 25 * 2**20  # gradients that travel together
POLL_S = 0.25
GRACE_S = 20.0  # for a process that is stuck in a collective after another one has failed

# where launchers say which process of how many this is, and which on its machine
LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),  # torchrun, accelerate
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),  # mpirun
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
)

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """This process among all of them."""

    rank: int
    size: int
    local_rank: int  # on this machine

    @property
    def main(self) -> bool:
        return self.rank == 0


def world() -> World:
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
    return World(rank, size, local)


def share(rows: int) -> tuple[int, int]:
    """First row and number of rows of this process, of a step's `rows`: contiguous, and as even as can be."""
    me = world()
    first = rows * me.rank // me.size
    return first, rows * (me.rank + 1) // me.size - first


def local_device(name: str) -> torch.device:
    """The device of this process: "auto", "cpu" or "cuda", one GPU for each process of a machine."""
    if name == "cuda" and not torch.cuda.is_available():
        raise LimbeckError("no CUDA device here", expected="device: auto or cpu", hint="limbeck doctor")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    me = world()
    if me.size == 1:
        return torch.device("cuda")
    if me.local_rank >= torch.cuda.device_count():
        raise LimbeckError(
            f"process {me.local_rank} of this machine has no GPU: there are {torch.cuda.device_count()}",
            expected="as many processes as GPUs",
            hint=f"torchrun --nproc-per-node {torch.cuda.device_count()} -m limbeck distill ...",
        )
    torch.cuda.set_device(me.local_rank)
    return torch.device("cuda", me.local_rank)


def one_voice() -> None:
    """Messages and progress bars come from process 0 alone."""
    console.quiet = output.quiet = not world().main


# ---------------------------------------------------------------------- one beginning and one end


class _Session:
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
                        f"process {self.me.rank} of {self.me.size} lost the others: {_first_line(error)}",
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
            return error if self.told is None else _Told(self.told)
        console.quiet = self.told[0] != self.me.rank  # it is told once, by the one that it happened to
        return _Told(self.told) if console.quiet else error


class _Told(LimbeckError):
    """The error of another process."""

    def __init__(self, told: tuple[int, str, int]):
        super().__init__(told[1])
        self.exit_code = told[2]


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _is_of_the_link(error: BaseException) -> bool:
    """Does this come from a collective or the store, rather than from what is computed?"""
    known = isinstance(error, dist.DistError)
    return known or any(word in str(error).lower() for word in ("gloo", "nccl", "connection", "tcpstore"))


def _message(error: BaseException, me: World) -> str:
    if isinstance(error, LimbeckError):
        return str(error)
    return f"process {me.rank} of {me.size}: {type(error).__name__}: {str(error).strip() or 'no message'}"


_session: _Session | None = None


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
        _session = _session or _Session()
    except RuntimeError as error:
        address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LimbeckError(
            f"process {me.rank} of {me.size} found no others at {address}: {_first_line(error)}",
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


# ---------------------------------------------------------------------- what process 0 says


def on_main(work: Callable[[], T]) -> T:
    """What `work()` returns in process 0, in every process; the others wait, however long it takes.

    Args:
        work: returns something small that can be pickled.
    """
    if world().size == 1 or _linked().answering:
        return work()
    session = _linked()
    session.asked += 1
    key = f"answer_{session.asked}"
    if session.me.main:
        session.answering = True
        try:
            answer = work()
        finally:
            session.answering = False
        session.store.set(key, pickle.dumps(answer))  # type: ignore[arg-type]
        return answer
    seen, since = -1, time.monotonic()
    while not session.store.check([key]):
        if session.told is not None:
            raise _Told(session.told)
        if (beat := session.store.add("beat", 0)) != seen:
            seen, since = beat, time.monotonic()
        if time.monotonic() - since > session.timeout.total_seconds():
            raise LimbeckError(
                f"process 0 has not been heard of for {session.timeout.total_seconds():.0f} s",
                hint="look at its messages; the same command goes on from the last checkpoint",
            )
        time.sleep(POLL_S / 5)
    return pickle.loads(session.store.get(key))


@contextmanager
def main_first() -> Iterator[None]:
    """What is inside is done by process 0 first, so that the others find its caches."""
    if world().main:
        yield
    on_main(lambda: None)
    if not world().main:
        yield


def tensors_from_main(work: Callable[[], T]) -> T:
    """Like `on_main`, for dicts, lists and tuples with large tensors in them; these come out on the CPU."""
    if world().size == 1 or _linked().answering:
        return work()
    session = _linked()
    tensors: list[Tensor] = []
    value = None
    if session.me.main:
        value = _without_tensors(work(), tensors)
    value, kinds = on_main(lambda: (value, [(t.shape, t.dtype) for t in tensors]))
    if not session.me.main:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in kinds]
    for tensor in tensors:
        if tensor.numel():
            dist.broadcast(tensor.view(-1).view(torch.uint8), 0, group=session.control)
    return _with_tensors(value, tensors)


@torch.no_grad()
def take_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite these tensors by those of process 0."""
    if world().size > 1:
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


# ---------------------------------------------------------------------- sums


def add_up(numbers: dict[str, float]) -> dict[str, float]:
    """Sums over all processes, of the same names everywhere."""
    if world().size == 1:
        return numbers
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(values, group=_linked().control)
    return dict(zip(numbers, values.tolist()))


def agree(stop: bool, save: bool) -> tuple[bool, bool]:
    """Stop if any process was asked to; save if process 0 finds it time."""
    me = world()
    if me.size == 1:
        return stop, save
    flags = torch.tensor([int(stop), int(save and me.main)])
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=_linked().control)
    return bool(flags[0]), bool(flags[1])


@torch.no_grad()
def add_tensors(tensors: Iterable[Tensor]) -> None:
    """Each tensor becomes its sum over all processes; the same shapes everywhere."""
    if world().size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


@torch.no_grad()
def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Each gradient becomes its sum over all processes, in buckets; where none has one, it stays None."""
    if world().size == 1:
        return
    members = list(parameters)
    there = torch.tensor([p.grad is not None for p in members], dtype=torch.uint8)
    dist.all_reduce(there, dist.ReduceOp.MAX, group=_linked().control)
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


def _linked() -> _Session:
    if _session is None:
        raise LimbeckError(
            f"process {world().rank} of {world().size} has not joined the others", hint="with together(): ..."
        )
    return _session
