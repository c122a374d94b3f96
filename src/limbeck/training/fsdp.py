"""Blocks of student and teacher shared out over the processes (FSDP2), for models that are too large for one device.

    with shard_blocks(teacher, student, blocks, trained):
        train(...)                       # inside, each process keeps its part of each block's weights

A block's weights are gathered when it runs and dropped when it has run; gradients are summed and kept
in parts, and so is the optimiser's state. Embeddings, final norm and head are whole everywhere: a head's logits are
formed a chunk at a time, outside the model's own forward pass. Blocks are sharded as copies, which stand in the
model while it lasts; the originals wait on the CPU and get what was learnt. So a student that shares tensors with its
teacher is parted from it by this, and is an ordinary student afterwards.
"""

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from limbeck.core.distributed import all_reduce_gradients, get_process_info
from limbeck.core.errors import LimbeckError
from limbeck.models.backbone import supports_packed_positions


@contextmanager
def shard_blocks(
    teacher: PreTrainedModel, student: PreTrainedModel, blocks: Sequence[str], trained: Collection[str]
) -> Iterator[None]:
    """Every named block of both models sharded over all processes; alone, nothing happens.

    Args:
        blocks: names of modules, the same in both models.
        trained: names of the student's parameters that learn; they are gathered in the end.

    Raises:
        LimbeckError: a block shares tensors with something outside it, or holds weights that cannot be sharded.
    """
    if get_process_info().world_size == 1:
        yield
        return
    from torch.distributed.device_mesh import init_device_mesh

    device = student.device
    mesh = init_device_mesh(device.type, (get_process_info().world_size,))
    names = list(dict.fromkeys(blocks))
    models = [teacher, student]
    for model in models:
        supports_packed_positions(model)  # tries the model on its first call, while it is whole
        _check(model, names)
    originals = [{name: model.get_submodule(name) for name in names} for model in models]
    try:
        for model, blocks_of in zip(models, originals):
            for name, block in blocks_of.items():
                model.set_submodule(name, _shard(copy.deepcopy(block).to(device), mesh))
                block.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield
        _give_back(student, originals[1], trained)
    finally:
        for model, blocks_of in zip(models, originals):
            for name, block in blocks_of.items():
                model.set_submodule(name, block)
        for block in (b for blocks_of in originals for b in blocks_of.values()):
            block.to(device)


def _shard(block: nn.Module, mesh: Any) -> nn.Module:
    from torch.distributed.fsdp import fully_shard

    wrapped: Any = fully_shard(block, mesh=mesh, reshard_after_forward=True)
    if hasattr(wrapped, "set_reduce_scatter_unused_params"):
        wrapped.set_reduce_scatter_unused_params(True)  # an expert that no token of this process went to
    return wrapped


def _check(model: PreTrainedModel, names: list[str]) -> None:
    owner: dict[int, str] = {}
    for name in names:
        for inner, parameter in model.get_submodule(name).named_parameters():
            if not parameter.is_floating_point():
                raise LimbeckError(
                    f"{name}.{inner} is {parameter.dtype}, which cannot be sharded",
                    expected="weights in floating point",
                    hint="sharding: none, or no teacher_bits",
                )
            if owner.setdefault(id(parameter), name) != name:
                raise LimbeckError(
                    f"{name}.{inner} is shared with {owner[id(parameter)]}",
                    expected="blocks with weights of their own",
                    hint="sharding: none",
                )
    inside = tuple(f"{name}." for name in names)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in owner and not name.startswith(inside):
            raise LimbeckError(f"{name} is shared with {owner[id(parameter)]}", hint="sharding: none")


@torch.no_grad()
def _give_back(student: PreTrainedModel, originals: dict[str, nn.Module], trained: Collection[str]) -> None:
    """Write what was learnt into the originals; what they share with the teacher becomes theirs before."""
    for name, block in originals.items():
        for inner, _ in list(block.named_parameters()):
            if f"{name}.{inner}" not in trained:
                continue
            part: Any = student.get_parameter(f"{name}.{inner}")
            whole = part.full_tensor() if isinstance(part, DTensor) else part
            module, _, last = inner.rpartition(".")
            own = nn.Parameter(whole.detach().to(block.get_parameter(inner).device, copy=True), requires_grad=False)
            block.get_submodule(module)._parameters[last] = own


class ShardedParameters:
    """What this process holds of a stage's parameters: whole ones, and its part of those that are sharded.

    `local` is what optimiser and averages work on: plain tensors, which share their storage with the model's.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self.given = parameters
        self.sharded = {name for name, p in parameters.items() if isinstance(p, DTensor)}
        self.local = {name: self._local(p) if name in self.sharded else p for name, p in parameters.items()}
        self.numel = sum(math.prod(p.shape) for p in parameters.values())

    def reduce_gradients(self) -> None:
        """Sum over the processes what is not yet, and hand the sharded gradients to `local`."""
        all_reduce_gradients(p for name, p in self.given.items() if name not in self.sharded)
        for name in self.sharded:
            gradient: Any = self.given[name].grad
            # what FSDP leaves is a mean; the losses are divided by counts over all processes already
            self.local[name].grad = (
                None if gradient is None else gradient.to_local().mul_(get_process_info().world_size)
            )

    def clear_gradients(self) -> None:
        """Forget the sharded gradients; the others are the optimiser's."""
        for name in self.sharded:
            self.given[name].grad = None

    def gather(self, name: str, part: Tensor) -> Tensor:
        """A parameter's part, or that of its average or momentum, put together; every process takes part."""
        if name not in self.sharded:
            return part
        like: Any = self.given[name]
        shape, stride = like.shape, torch.empty(like.shape, device="meta").stride()
        spread = DTensor.from_local(
            part.detach(), like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
        )
        return spread.full_tensor()

    def local_shard(self, name: str, whole: Tensor) -> Tensor:
        """The other way round, without communication."""
        if name not in self.sharded:
            return whole
        me = get_process_info()
        pieces = whole.chunk(me.world_size)
        return pieces[me.rank].clone() if me.rank < len(pieces) else whole[:0].clone()

    @staticmethod
    def _local(parameter: Any) -> nn.Parameter:
        return nn.Parameter(parameter.detach().to_local(), requires_grad=False)
