"""Shard the blocks of student and teacher over the processes (FSDP2), for models that are too large for one device.

    with shard_blocks(teacher, student, blocks, trained):
        train(...)                       # each process has a shard of every block's weights

A block's weights are gathered when it runs and dropped afterwards; gradients and optimizer state stay sharded.
Embeddings, final norm and head are not sharded, because logits are computed in chunks outside of the model's forward
pass. The sharded blocks are copies that replace the originals inside the block of code; the originals wait on the CPU
and receive the trained weights at the end. A student that shared tensors with its teacher does not share them any more.
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

from limbeck.core.collectives import all_reduce_gradients
from limbeck.core.distributed import get_process_info
from limbeck.core.errors import LimbeckError
from limbeck.models.backbone import supports_packed_positions


@contextmanager
def shard_blocks(
    teacher: PreTrainedModel, student: PreTrainedModel, blocks: Sequence[str], trained: Collection[str]
) -> Iterator[None]:
    """Shard the named blocks of both models over all processes inside this block; does nothing in a single process.

    Args:
        blocks: names of modules, the same in both models.
        trained: names of the student's trained parameters, which are gathered at the end.

    Raises:
        LimbeckError: a block shares tensors with other modules, or has weights that cannot be sharded.
    """
    if get_process_info().world_size == 1:
        yield
        return
    # only runs in several processes need it, and it takes long to import
    from torch.distributed.device_mesh import init_device_mesh

    device = student.device
    mesh = init_device_mesh(device.type, (get_process_info().world_size,))
    names = list(dict.fromkeys(blocks))
    models = [teacher, student]
    for model in models:
        supports_packed_positions(model)  # its first call runs the model, which has to be unsharded for that
        _check_shardable(model, names)
    originals = [{name: model.get_submodule(name) for name in names} for model in models]
    try:
        for model, blocks_of in zip(models, originals):
            for name, block in blocks_of.items():
                model.set_submodule(name, _shard(copy.deepcopy(block).to(device), mesh))
                block.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()
        yield
        _copy_to_originals(student, originals[1], trained)
    finally:
        for model, blocks_of in zip(models, originals):
            for name, block in blocks_of.items():
                model.set_submodule(name, block)
        for block in (b for blocks_of in originals for b in blocks_of.values()):
            block.to(device)


def _shard(block: nn.Module, mesh: Any) -> nn.Module:
    # torch.distributed.fsdp takes long to import and few runs need it
    from torch.distributed.fsdp import fully_shard

    wrapped: Any = fully_shard(block, mesh=mesh, reshard_after_forward=True)
    if hasattr(wrapped, "set_reduce_scatter_unused_params"):
        # an expert that received no token in this process has no gradient, but the other processes wait for it
        wrapped.set_reduce_scatter_unused_params(True)
    return wrapped


def _check_shardable(model: PreTrainedModel, names: list[str]) -> None:
    """Raise LimbeckError if blocks have quantized weights or share weights."""
    owner: dict[int, str] = {}
    for name in names:
        for inner, parameter in model.get_submodule(name).named_parameters():
            if not parameter.is_floating_point():
                raise LimbeckError(
                    f"{name}.{inner} is {parameter.dtype}, which cannot be sharded",
                    expected="floating-point weights",
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
def _copy_to_originals(student: PreTrainedModel, originals: dict[str, nn.Module], trained: Collection[str]) -> None:
    """Copy the trained weights into the original blocks, as new tensors that the teacher does not share."""
    for name, block in originals.items():
        for inner, _ in list(block.named_parameters()):
            if f"{name}.{inner}" not in trained:
                continue
            shard: Any = student.get_parameter(f"{name}.{inner}")
            full = shard.full_tensor() if isinstance(shard, DTensor) else shard
            module, _, leaf = inner.rpartition(".")
            copied = full.detach().to(block.get_parameter(inner).device, copy=True)
            block.get_submodule(module)._parameters[leaf] = nn.Parameter(copied, requires_grad=False)


class ShardedParameters:
    """The parameters of a stage in this process: full ones, and shards of those that are sharded.

    `local` is for optimizer and averages: plain tensors that share their storage with the model's parameters.
    """

    def __init__(self, parameters: dict[str, nn.Parameter]):
        self.parameters = parameters
        self.sharded = {name for name, p in parameters.items() if isinstance(p, DTensor)}
        self.local = {name: self._local(p) if name in self.sharded else p for name, p in parameters.items()}
        self.numel = sum(math.prod(p.shape) for p in parameters.values())

    def reduce_gradients(self) -> None:
        """Sum the gradients that FSDP has not summed, and hand the sharded gradients to `local`."""
        all_reduce_gradients(p for name, p in self.parameters.items() if name not in self.sharded)
        for name in self.sharded:
            gradient: Any = self.parameters[name].grad
            # FSDP averages over the processes, but the losses are already divided by counts over all processes
            self.local[name].grad = (
                None if gradient is None else gradient.to_local().mul_(get_process_info().world_size)
            )

    def clear_gradients(self) -> None:
        """Drop the sharded gradients; the optimizer drops the others."""
        for name in self.sharded:
            self.parameters[name].grad = None

    def gather(self, name: str, shard: Tensor) -> Tensor:
        """Gather the full tensor from shards of a parameter, its average or its momentum; a collective call."""
        if name not in self.sharded:
            return shard
        like: Any = self.parameters[name]
        shape, stride = like.shape, torch.empty(like.shape, device="meta").stride()
        distributed = DTensor.from_local(
            shard.detach(), like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
        )
        return distributed.full_tensor()

    def local_shard(self, name: str, full: Tensor) -> Tensor:
        """Take this process's shard of a full tensor, without communication."""
        if name not in self.sharded:
            return full
        me = get_process_info()
        shards = full.chunk(me.world_size)
        # with fewer rows than processes the last processes have an empty shard
        return shards[me.rank].clone() if me.rank < len(shards) else full[:0].clone()

    @staticmethod
    def _local(parameter: Any) -> nn.Parameter:
        return nn.Parameter(parameter.detach().to_local(), requires_grad=False)
