"""The frozen teacher at work: its loss is checked, and its layers' outputs are read while it runs.

    with hook_modules(teacher, {"model.layers.0.self_attn": hook}):
        run_backbone(teacher, batch)                   # calls hook(args, kwargs, output)

Only the backbone runs (`limbeck.models.backbone`), so the last hook sees the last block's output before the final norm.
"""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from limbeck.core.errors import LimbeckError
from limbeck.data.packing import IGNORE_INDEX, Batch
from limbeck.models.backbone import LMHead, run_backbone, supports_packed_positions
from limbeck.models.probe import Site
from limbeck.models.temporary import use_attn_implementation

ModuleHook = Callable[[tuple, dict, Tensor | tuple], None]


class DistillationPair(NamedTuple):
    """What every stage works on: teacher, student, converted layers, and the autocast context of their passes."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    sites: list[Site]
    autocast: Callable[[], AbstractContextManager]


@torch.no_grad()
def check_finite_loss(teacher: PreTrainedModel, batch: Batch, autocast: Callable[[], AbstractContextManager]) -> None:
    """Refuse a teacher whose loss on a batch is not finite; checked once per model and precision.

    Raises:
        LimbeckError: names the first module whose output is NaN or infinite.
    """
    with autocast():
        device = batch.input_ids.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        if dtype in getattr(teacher, "_limbeck_finite", ()):
            return
        hidden = run_backbone(teacher, batch)
        head, targets = LMHead(teacher), batch.targets.flatten()
        # 128 tokens at a time: logits of a whole batch may not fit into memory
        chunks = zip(hidden.flatten(0, 1).split(128), targets.split(128))
        finite = bool(hidden.isfinite().all()) and all(
            bool(F.cross_entropy(head(chunk).float(), target, ignore_index=IGNORE_INDEX, reduction="sum").isfinite())
            for chunk, target in chunks
        )
        if finite:
            teacher._limbeck_finite = {*getattr(teacher, "_limbeck_finite", ()), dtype}  # type: ignore[assignment]
            return
        module = _first_non_finite_module(teacher, batch)
    raise LimbeckError(
        f"the teacher's loss on the text is not finite; the first module whose output is NaN or infinite is {module}",
        expected="finite logits in the precision of the run",
        hint="--set precision=fp32"
        if dtype != torch.float32
        else "use another teacher, or weights whose training did not diverge",
    )


def _first_non_finite_module(teacher: PreTrainedModel, batch: Batch) -> str:
    names: list[str] = []

    def hook(name: str) -> Callable:
        def check(module, args, output) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            if not names and isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                names.append(name)

        return check

    handles = [module.register_forward_hook(hook(name)) for name, module in teacher.named_modules() if name]
    try:
        hidden = run_backbone(teacher, batch)
        for chunk in hidden.flatten(0, 1).split(128):
            LMHead(teacher)(chunk)
    finally:
        for handle in handles:
            handle.remove()
    return names[0] if names else "the loss itself"


@contextmanager
def hook_modules(teacher: PreTrainedModel, hooks: dict[str, ModuleHook], eager: bool = False) -> Iterator[None]:
    """Call `hook(args, kwargs, output)` after each named module of the teacher.

    Args:
        hooks: by module name.
        eager: let attention modules return their attention matrix as the second output.
    """
    supports_packed_positions(teacher)  # its first call runs a trial pass, which no hook should see
    thread = threading.get_ident()
    with ExitStack() as stack:
        for name, hook in hooks.items():

            def call_hook(module, args, kwargs, output, hook=hook):
                if threading.get_ident() == thread:  # a pass of another thread is over another batch
                    hook(args, kwargs, output)

            stack.callback(teacher.get_submodule(name).register_forward_hook(call_hook, with_kwargs=True).remove)
        if eager:
            stack.enter_context(use_attn_implementation(teacher, "eager"))
        yield


def first_output(output: Tensor | tuple) -> Tensor:
    """Return what a module returns, of several tensors the first."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def record_outputs(model: PreTrainedModel, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dictionary that a pass of the model fills with the outputs of the named modules."""
    outputs: dict[str, Tensor] = {}

    def make_hook(name: str) -> ModuleHook:
        def record(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
            outputs[name] = first_output(output)

        return record

    with hook_modules(model, {name: make_hook(name) for name in names}):
        yield outputs


@contextmanager
def change_outputs(model: PreTrainedModel, changes: Mapping[str, Callable[[Tensor, Tensor], Tensor]]) -> Iterator[None]:
    """Replace the outputs of named decoder blocks in this thread: `change(input, output)` returns the new output.

    Hooks that are added inside see the changed outputs.
    """
    supports_packed_positions(model)  # its first call runs a trial pass, which is not to be changed
    thread = threading.get_ident()
    with ExitStack() as stack:
        for name, change in changes.items():

            def call(module, args, kwargs, output, change=change):
                if threading.get_ident() != thread:
                    return output
                given = args[0] if args else kwargs["hidden_states"]
                changed = change(given, first_output(output))
                return (changed, *output[1:]) if isinstance(output, tuple) else changed

            stack.callback(model.get_submodule(name).register_forward_hook(call, with_kwargs=True).remove)
        yield
