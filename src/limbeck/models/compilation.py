"""Blocks through torch.compile: what is element-wise is fused, and fewer kernels are launched.

    with compile_blocks(student, list_decoder_blocks(student, "model.layers.0"), notes := CompileLog()):
        hidden = run_backbone(student, batch)
    notes.reasons                     # why a block ran as it is, if one did

All blocks of a model are one piece of code, so the first one is compiled and the others find it there. The recurrences
are left out: on a GPU they are kernels of their own, and as PyTorch code their loops over chunks would be unrolled. A
block that the compiler refuses runs as it is from then on, with the reason said once.

Activation checkpointing: a block keeps its input alone and is run again in the backward pass.

    with activation_checkpointing(student, ["model.layers.0", ...]):
        hidden = run_backbone(student, batch)
    hidden.backward(gradient)

transformers' own switch works in training mode only, which would turn on every dropout of the model as well.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from limbeck.core.console import console
from limbeck.mixers.base import Mixer

MOST_VERSIONS = 32  # of one piece of code: layers of other kinds, with and without gradients, the last short batch


@dataclass
class CompileLog:
    """What the compiler has refused in a run, for its summary."""

    reasons: list[str] = field(default_factory=list)

    def record_fallback(self, reason: str) -> None:
        """Say once why something runs as it is."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            console.print(f"compile: {reason}; it runs as it is")


def should_compile(choice: bool | str, device: torch.device) -> bool:
    """Whether the recipe's `compile` means to compile on this device."""
    return device.type == "cuda" if choice == "auto" else bool(choice)


@contextmanager
def compile_blocks(
    model: PreTrainedModel, blocks: list[str], notes: CompileLog | None = None, backend: str = "inductor"
) -> Iterator[None]:
    """Run the named blocks through torch.compile for a while.

    Args:
        blocks: names of modules; hooks on them and in them are kept.
        notes: where to say what the compiler refuses.
    """
    notes = CompileLog() if notes is None else notes
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=MOST_VERSIONS))
        for block in (model.get_submodule(name) for name in blocks):
            stack.enter_context(_instead(block, "forward", _Attempt(block.forward, notes, backend)))
            for mixer in (m for m in block.modules() if isinstance(m, Mixer)):
                if type(mixer).attend is Mixer.attend and mixer.operator is not None:
                    stack.enter_context(_instead(mixer, "operator", _left_out(mixer.operator)))
                else:
                    stack.enter_context(_instead(mixer, "attend", torch.compiler.disable(mixer.attend)))
        yield


@contextmanager
def _instead(module: nn.Module, name: str, value: Any) -> Iterator[None]:
    """An attribute of a module for a while."""
    known, before = name in module.__dict__, module.__dict__.get(name)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if known:
            module.__dict__[name] = before
        else:
            del module.__dict__[name]


@functools.cache
def _left_out(operator: ModuleType) -> ModuleType:
    """An operator that the compiler calls and does not look into."""
    same = ModuleType(operator.__name__)
    same.__dict__.update(vars(operator), chunked=torch.compiler.disable(operator.chunked))
    return same


class _Attempt:
    """A function through torch.compile, or as it is once the compiler has refused it."""

    def __init__(self, plain: Callable, notes: CompileLog, backend: str):
        self.plain, self.notes = plain, notes
        self.fast: Callable | None = torch.compile(plain, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fast is None:
            return self.plain(*args, **kwargs)
        try:
            return self.fast(*args, **kwargs)
        except TorchDynamoException as error:
            self.fast = None
            self.notes.record_fallback(_reason(error))
            return self.plain(*args, **kwargs)


def _reason(error: Exception) -> str:
    """What the compiler says first; that a backend has failed is one line, and why is the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__


def list_decoder_blocks(model: PreTrainedModel, block: str) -> list[str]:
    """Names of all decoder blocks in the list in which `block` stands."""
    parent = block.rpartition(".")[0]
    return [f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children()]


@contextmanager
def activation_checkpointing(model: PreTrainedModel, blocks: list[str]) -> Iterator[None]:
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
