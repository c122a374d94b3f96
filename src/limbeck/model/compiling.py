"""Blocks through torch.compile: what is element-wise is fused, and fewer kernels are launched.

    with compiled(student, blocks_of(student, "model.layers.0"), notes := Notes()):
        hidden = run_body(student, batch)
    notes.reasons                     # why a block ran as it is, if one did

All blocks of a model are one piece of code, so the first one is compiled and the others find it there. The recurrences
are left out: on a GPU they are kernels of their own, and as PyTorch code their loops over chunks would be unrolled. A
block that the compiler refuses runs as it is from then on, with the reason said once.
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
from transformers import PreTrainedModel

from limbeck.console import console
from limbeck.mixers.base import Mixer

MOST_VERSIONS = 32  # of one piece of code: layers of other kinds, with and without gradients, the last short batch


@dataclass
class Notes:
    """What the compiler has refused in a run, for its summary."""

    reasons: list[str] = field(default_factory=list)

    def refused(self, reason: str) -> None:
        """Say once why something runs as it is."""
        if reason not in self.reasons:
            self.reasons.append(reason)
            console.print(f"compile: {reason}; it runs as it is")


def wanted(choice: bool | str, device: torch.device) -> bool:
    """Whether the recipe's `compile` means to compile on this device."""
    return device.type == "cuda" if choice == "auto" else bool(choice)


@contextmanager
def compiled(
    model: PreTrainedModel, blocks: list[str], notes: Notes | None = None, backend: str = "inductor"
) -> Iterator[None]:
    """Run the named blocks through torch.compile for a while.

    Args:
        blocks: names of modules; hooks on them and in them are kept.
        notes: where to say what the compiler refuses.
    """
    notes = Notes() if notes is None else notes
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

    def __init__(self, plain: Callable, notes: Notes, backend: str):
        self.plain, self.notes = plain, notes
        self.fast: Callable | None = torch.compile(plain, backend=backend)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.fast is None:
            return self.plain(*args, **kwargs)
        try:
            return self.fast(*args, **kwargs)
        except TorchDynamoException as error:
            self.fast = None
            self.notes.refused(_reason(error))
            return self.plain(*args, **kwargs)


def _reason(error: Exception) -> str:
    """What the compiler says first; that a backend has failed is one line, and why is the next."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) or type(error).__name__
