"""Sums and copies of numbers and tensors over the processes of one run.

    counts = all_reduce_scalars({"tokens": 2048.0})              # sums over all processes
    all_reduce_gradients(parameters)
    broadcast_from_main(student.state_dict().values())           # as process 0 has them
    loaded = run_on_main_with_tensors(load_checkpoint)

Inside `limbeck.core.distributed.process_group`; in a single process nothing is communicated. Numbers, answers and
checkpoints travel between CPUs (gloo), gradients between GPUs (nccl) where there are any.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.core.distributed import get_process_info, get_session, run_on_main

T = TypeVar("T")

BUCKET_BYTES = 25 * 2**20  # gradients that travel together


def all_reduce_scalars(numbers: dict[str, float]) -> dict[str, float]:
    """Sum numbers over all processes, which have to pass the same names."""
    if get_process_info().world_size == 1:
        return numbers
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(values, group=get_session().control)
    return dict(zip(numbers, values.tolist()))


def sync_stop_and_save(stop: bool, save: bool) -> tuple[bool, bool]:
    """Agree on stopping (if any process received a signal) and on saving (if process 0 finds it time)."""
    me = get_process_info()
    if me.world_size == 1:
        return stop, save
    flags = torch.tensor([int(stop), int(save and me.is_main)])
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=get_session().control)
    return bool(flags[0]), bool(flags[1])


@torch.no_grad()
def all_reduce_tensors(tensors: Iterable[Tensor]) -> None:
    """Replace each tensor by its sum over all processes, which have to pass the same shapes."""
    if get_process_info().world_size > 1:
        for tensor in tensors:
            dist.all_reduce(tensor)


@torch.no_grad()
def all_reduce_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by its sum over all processes, in buckets; it stays None where no process has one."""
    if get_process_info().world_size == 1:
        return
    members = list(parameters)
    # A process whose micro-batch did not use a parameter (an expert) has no gradient of it, but has to take part.
    has_gradient = torch.tensor([p.grad is not None for p in members], dtype=torch.uint8)
    dist.all_reduce(has_gradient, dist.ReduceOp.MAX, group=get_session().control)
    bucket: list[Tensor] = []
    for parameter, anywhere in zip(members, has_gradient.tolist()):
        if not anywhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad
        if bucket and (
            bucket[0].dtype != gradient.dtype or sum(t.nbytes for t in bucket) + gradient.nbytes > BUCKET_BYTES
        ):
            _all_reduce_bucket(bucket)
            bucket = []
        bucket.append(gradient)
    if bucket:
        _all_reduce_bucket(bucket)


def _all_reduce_bucket(gradients: list[Tensor]) -> None:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients])):
        gradient.copy_(summed.view_as(gradient))


def run_on_main_with_tensors(work: Callable[[], T]) -> T:
    """Do the same as `run_on_main` for results with large tensors in dicts, lists and tuples; these come to the CPU."""
    if get_process_info().world_size == 1 or get_session().is_answering:
        return work()
    session = get_session()
    tensors: list[Tensor] = []
    skeleton = None
    if session.me.is_main:
        skeleton = _extract_tensors(work(), tensors)
    skeleton, shapes = run_on_main(lambda: (skeleton, [(t.shape, t.dtype) for t in tensors]))
    if not session.me.is_main:
        tensors = [torch.empty(shape, dtype=dtype) for shape, dtype in shapes]
    for tensor in tensors:
        if tensor.numel():
            dist.broadcast(tensor.view(-1).view(torch.uint8), 0, group=session.control)
    return _insert_tensors(skeleton, tensors)


@dataclass(frozen=True)
class _TensorIndex:
    """Stands for a tensor in a result whose tensors travel apart."""

    index: int


def _extract_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """Replace the tensors in nested dicts, lists and tuples by their index in `tensors`, to which they are appended."""
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu().contiguous())
        return _TensorIndex(len(tensors) - 1)
    if isinstance(value, dict):
        return {key: _extract_tensors(inner, tensors) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_extract_tensors(inner, tensors) for inner in value)
    return value


def _insert_tensors(value: Any, tensors: list[Tensor]) -> Any:
    """Undo `_extract_tensors`."""
    if isinstance(value, _TensorIndex):
        return tensors[value.index]
    if isinstance(value, dict):
        return {key: _insert_tensors(inner, tensors) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_insert_tensors(inner, tensors) for inner in value)
    return value


@torch.no_grad()
def broadcast_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors in every process by those of process 0."""
    if get_process_info().world_size > 1:
        for tensor in tensors:
            if tensor.is_contiguous():
                dist.broadcast(tensor.detach(), 0)
            else:
                whole = tensor.detach().contiguous()
                dist.broadcast(whole, 0)
                tensor.copy_(whole)
