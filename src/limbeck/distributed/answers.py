"""What process 0 says: its answers and its tensors, in every process.

    result = on_main(write_the_report)            # done by process 0, while the others wait for it
    with main_first():
        make_a_cache()                            # the others find it

Numbers and checkpoints travel by gloo between CPUs. Alone, the work is simply done.
"""

import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from limbeck.distributed.session import POLL_S, Told, linked
from limbeck.distributed.world import world
from limbeck.errors import LimbeckError

T = TypeVar("T")


def on_main(work: Callable[[], T]) -> T:
    """What `work()` returns in process 0, in every process; the others wait, however long it takes.

    Args:
        work: returns something small that can be pickled.
    """
    if world().size == 1 or linked().answering:
        return work()
    session = linked()
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
            raise Told(session.told)
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
    if world().size == 1 or linked().answering:
        return work()
    session = linked()
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
