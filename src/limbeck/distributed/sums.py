"""Sums over all processes: numbers, flags, tensors, gradients.

    counts = add_up({"tokens": 2048.0})
    add_gradients(parameters)

Numbers are summed between CPUs by gloo, gradients by nccl where they are on GPUs. Alone, each of these does nothing.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from limbeck.distributed.session import linked
from limbeck.distributed.world import world

BUCKET_BYTES = 25 * 2**20  # gradients that travel together


def add_up(numbers: dict[str, float]) -> dict[str, float]:
    """Sums over all processes, of the same names everywhere."""
    if world().size == 1:
        return numbers
    values = torch.tensor(list(numbers.values()), dtype=torch.float64)
    dist.all_reduce(values, group=linked().control)
    return dict(zip(numbers, values.tolist()))


def agree(stop: bool, save: bool) -> tuple[bool, bool]:
    """Stop if any process was asked to; save if process 0 finds it time."""
    me = world()
    if me.size == 1:
        return stop, save
    flags = torch.tensor([int(stop), int(save and me.main)])
    dist.all_reduce(flags, dist.ReduceOp.MAX, group=linked().control)
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
    dist.all_reduce(there, dist.ReduceOp.MAX, group=linked().control)
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
