"""The teacher while it teaches: frozen, its body run once per batch, its layers tapped on the way.

    with hook_modules(teacher, {"model.layers.0.self_attn": visit}):
        run_backbone(teacher, batch)                   # visit(args, kwargs, output) is called inside

Only the body runs (`limbeck.models.backbone`), so the last tap sees the last block's output before the final norm.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck.core.errors import LimbeckError
from limbeck.data.packing import IGNORE_INDEX, Batch
from limbeck.models import Site
from limbeck.models.backbone import LMHead, run_backbone, supports_packed_positions
from limbeck.models.loading import load_config, load_model, load_tokenizer
from limbeck.models.packed import use_attn_implementation
from limbeck.models.quantization import build_teacher_kwargs, check_not_quantized

ModuleHook = Callable[[tuple, dict, Tensor | tuple], None]


class DistillationPair(NamedTuple):
    """What every stage works on: a teacher and its student, the converted layers, and what their products run in."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    sites: list[Site]
    autocast: Callable[[], AbstractContextManager]


def load_teacher(
    name: str, device: torch.device, bits: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A frozen teacher in float32 and its tokenizer, from a local folder or a hub name.

    Args:
        bits: 8 or 4 loads the linear layers of the body in so many bits (bitsandbytes); None leaves all in float32.

    Raises:
        LimbeckError: see `limbeck.models.loading`; or a student already, weights that are stored in few bits, or `bits`
            without bitsandbytes.
    """
    settings = build_teacher_kwargs(bits, device)
    config = load_config(name)
    check_not_quantized(config, f"'{name}'")
    if hasattr(config, "limbeck"):
        raise LimbeckError(f"'{name}' is a student already", expected="a softmax teacher")
    tokenizer = load_tokenizer(name)
    model = load_model(name, config, **settings)
    if bits is None:
        model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False), tokenizer


@torch.no_grad()
def check_finite_loss(teacher: PreTrainedModel, batch: Batch, autocast: Callable[[], AbstractContextManager]) -> None:
    """Refuse a teacher whose answers on a batch of the text are not finite; what they are of is not asked again.

    Raises:
        LimbeckError: names the first module whose output is NaN or infinite.
    """
    with autocast():
        device = batch.input_ids.device.type
        kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
        if kind in getattr(teacher, "_limbeck_finite", ()):
            return
        hidden = run_backbone(teacher, batch)
        head, targets = LMHead(teacher), batch.targets.flatten()
        parts = zip(hidden.flatten(0, 1).split(128), targets.split(128))
        finite = bool(hidden.isfinite().all()) and all(
            bool(F.cross_entropy(head(part).float(), wanted, ignore_index=IGNORE_INDEX, reduction="sum").isfinite())
            for part, wanted in parts
        )
        if finite:
            teacher._limbeck_finite = {*getattr(teacher, "_limbeck_finite", ()), kind}  # type: ignore[assignment]
            return
        first = _first_not_finite(teacher, batch)
    reduced = kind != torch.float32
    raise LimbeckError(
        f"what the teacher says of the text is not finite: the first module whose output is NaN or infinite is {first}",
        expected="finite logits, in the precision of the run",
        hint="--set precision=fp32" if reduced else "another teacher, or weights whose training did not diverge",
    )


def _first_not_finite(teacher: PreTrainedModel, batch: Batch) -> str:
    found: list[str] = []

    def hook(name: str) -> Callable:
        def look(module, args, output) -> None:
            tensor = output[0] if isinstance(output, tuple) and output else output
            if not found and isinstance(tensor, Tensor) and tensor.is_floating_point() and not tensor.isfinite().all():
                found.append(name)

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in teacher.named_modules() if name]
    try:
        hidden = run_backbone(teacher, batch)
        for part in hidden.flatten(0, 1).split(128):
            LMHead(teacher)(part)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself"


@contextmanager
def hook_modules(teacher: PreTrainedModel, hooks: dict[str, ModuleHook], eager: bool = False) -> Iterator[None]:
    """Call `visit(args, kwargs, output)` after each named module of the teacher.

    Args:
        hooks: by module name.
        eager: let attention modules return their attention matrix as the second output.
    """
    supports_packed_positions(teacher)  # tries the teacher on its first call, which no visitor should see
    own = threading.get_ident()
    with ExitStack() as stack:
        for name, visit in hooks.items():

            def hook(module, args, kwargs, output, visit=visit):
                if threading.get_ident() == own:  # what passes in another thread is not this batch
                    visit(args, kwargs, output)

            stack.callback(teacher.get_submodule(name).register_forward_hook(hook, with_kwargs=True).remove)
        if eager:
            stack.enter_context(use_attn_implementation(teacher, "eager"))
        yield
