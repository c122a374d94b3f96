"""Decoder blocks for a while through torch.compile, or with activation checkpointing.

    blocks = list_decoder_blocks(student, "model.layers.0")
    with compile_blocks(student, blocks, notes := CompileLog()):
        hidden = run_backbone(student, batch)
    notes.reasons                     # why a block ran uncompiled, if one did
    with activation_checkpointing(student, blocks):
        run_backbone(student, batch).backward(gradient)

All blocks of a model share their code, so the first one is compiled and the others reuse it. The recurrences are
excluded: on a GPU they are kernels already, and as PyTorch code their loops over chunks would be unrolled. A block that
the compiler refuses runs uncompiled from then on, and the reason is printed once.

With activation checkpointing a block stores only its input and runs again in the backward pass. transformers' own
switch works in training mode only, which would turn on every dropout of the model as well.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch._dynamo.exc import TorchDynamoException
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from limbeck.core.console import console
from limbeck.mixers.base import Mixer
from limbeck.models.temporary import instance_attribute

# compiled versions of one function: other kinds of layers, with and without gradients, the last short batch
RECOMPILE_LIMIT = 32


@dataclass
class CompileLog:
    """Reasons for which the compiler refused blocks of a run, for its summary."""

    reasons: list[str] = field(default_factory=list)

    def record_fallback(self, reason: str) -> None:
        """Print once why a block runs uncompiled."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            console.print(f"compile: {reason}; running uncompiled")


def should_compile(choice: bool | str, device: torch.device) -> bool:
    """Return whether a recipe's `compile` (auto, true or false) means to compile on this device."""
    return device.type == "cuda" if choice == "auto" else bool(choice)


@contextmanager
def compile_blocks(
    model: PreTrainedModel, blocks: list[str], notes: CompileLog | None = None, backend: str = "inductor"
) -> Iterator[None]:
    """Run the named blocks through torch.compile for a while.

    Args:
        blocks: names of modules; hooks on them and in them are kept.
        notes: collects what the compiler refuses.
    """
    notes = CompileLog() if notes is None else notes
    with ExitStack() as stack:
        stack.enter_context(torch._dynamo.config.patch(recompile_limit=RECOMPILE_LIMIT))
        for block in (model.get_submodule(name) for name in blocks):
            compiled = _CompiledWithFallback(block.forward, notes, backend)
            stack.enter_context(instance_attribute(block, "forward", compiled))
            for mixer in (m for m in block.modules() if isinstance(m, Mixer)):
                if type(mixer).attend is Mixer.attend and mixer.operator is not None:
                    stack.enter_context(instance_attribute(mixer, "operator", _excluded_operator(mixer.operator)))
                else:
                    stack.enter_context(instance_attribute(mixer, "attend", torch.compiler.disable(mixer.attend)))
        yield


@functools.cache
def _excluded_operator(operator: ModuleType) -> ModuleType:
    """Return a copy of an operator's module whose `chunked` the compiler calls without tracing into it."""
    copy = ModuleType(operator.__name__)
    copy.__dict__.update(vars(operator), chunked=torch.compiler.disable(operator.chunked))
    return copy


class _CompiledWithFallback:
    """A function through torch.compile, or uncompiled once the compiler has refused it."""

    def __init__(self, function: Callable, notes: CompileLog, backend: str):
        self.function, self.notes = function, notes
        self.compiled: Callable | None = torch.compile(function, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.compiled is None:
            return self.function(*args, **kwargs)
        try:
            return self.compiled(*args, **kwargs)
        except TorchDynamoException as error:
            self.compiled = None
            # the first line says that the backend failed, the second why
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            self.notes.record_fallback(" ".join(lines[:2]) or type(error).__name__)
            return self.function(*args, **kwargs)


def list_decoder_blocks(model: PreTrainedModel, block: str) -> list[str]:
    """Return the names of all decoder blocks in the list that contains `block`."""
    parent = block.rpartition(".")[0]
    return [f"{parent}.{name}" for name, _ in model.get_submodule(parent).named_children()]


@contextmanager
def activation_checkpointing(model: PreTrainedModel, blocks: list[str]) -> Iterator[None]:
    """Run the named blocks so that only the input of each outlives the forward pass."""
    with ExitStack() as stack:
        for name in blocks:
            block = model.get_submodule(name)

            def forward(*args, original=block.forward, **kwargs):
                return checkpoint(original, *args, use_reentrant=False, **kwargs)

            stack.enter_context(instance_attribute(block, "forward", forward))
        yield
