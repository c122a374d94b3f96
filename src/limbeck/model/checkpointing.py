"""Activation checkpointing: a block keeps its input alone and is run again in the backward pass.

    with checkpointed(student, ["model.layers.0", ...]):
        hidden = run_body(student, batch)
    hidden.backward(gradient)

transformers' own switch works in training mode only, which would turn on every dropout of the model as well.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel


def blocks_of(model: PreTrainedModel, block: str) -> list[str]:
    """Names of all decoder blocks in the list in which `block` stands."""
    parent = block.rpartition(".")[0]
    return [f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children()]


@contextmanager
def checkpointed(model: PreTrainedModel, blocks: list[str]) -> Iterator[None]:
    """Run the named blocks so that of each only the input outlives the forward pass."""
    before = {}
    for name in blocks:
        block = model.get_submodule(name)
        before[block] = block.__dict__.get("forward")
        block.forward = _again(block)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block, forward in before.items():
            if forward is None:
                del block.forward
            else:
                block.forward = forward


def _again(block: nn.Module):
    forward = block.forward
    return lambda *args, **kwargs: checkpoint(forward, *args, use_reentrant=False, **kwargs)
