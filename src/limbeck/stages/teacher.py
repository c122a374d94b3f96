"""The teacher while it teaches: frozen, its body run once per batch, its layers tapped on the way.

    with tap(teacher, {"model.layers.0.self_attn": visit}):
        run_body(teacher, batch)                   # visit(args, kwargs, output) is called inside

Only the body runs (`limbeck.model.body`), so the last tap sees the last block's output before the final norm.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from limbeck.errors import LimbeckError
from limbeck.hub import look_up
from limbeck.model import Site
from limbeck.model.body import packs_by_position
from limbeck.model.switching import implemented_by
from limbeck.quantise import refuse_quantised, teacher_settings

Visit = Callable[[tuple, dict, Tensor | tuple], None]


class Pair(NamedTuple):
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
        LimbeckError: nothing there, not a causal language model, a student already, weights that are stored in few
            bits, or `bits` without bitsandbytes.
    """
    settings = teacher_settings(bits, device)
    if device.type == "cpu":
        # a student that is still far off has many probabilities too small to matter, which slow products down tenfold
        torch.set_flush_denormal(True)
    if not Path(name).exists():
        look_up(name)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        refuse_quantised(AutoConfig.from_pretrained(name), f"'{name}'")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **settings)
    except LimbeckError:
        raise
    except Exception as error:
        local = Path(name).exists()
        raise LimbeckError(
            f"cannot load a causal language model from '{name}': {str(error).strip().splitlines()[0]}",
            expected="a folder that save_pretrained wrote, or the name of a model on the hub",
            hint="--teacher embedded   (comes with `limbeck assets`)" if not local else None,
        ) from error
    if hasattr(model.config, "limbeck"):
        raise LimbeckError(f"'{name}' is a student already", expected="a softmax teacher")
    if bits is None:
        model.to(device)  # type: ignore[arg-type]
    return model.eval().requires_grad_(False), tokenizer


@contextmanager
def tap(teacher: PreTrainedModel, visits: dict[str, Visit], eager: bool = False) -> Iterator[None]:
    """Call `visit(args, kwargs, output)` after each named module of the teacher.

    Args:
        visits: by module name.
        eager: let attention modules return their attention matrix as the second output.
    """
    packs_by_position(teacher)  # tries the teacher on its first call, which no visitor should see
    own = threading.get_ident()
    with ExitStack() as stack:
        for name, visit in visits.items():

            def hook(module, args, kwargs, output, visit=visit):
                if threading.get_ident() == own:  # what passes in another thread is not this batch
                    visit(args, kwargs, output)

            stack.callback(teacher.get_submodule(name).register_forward_hook(hook, with_kwargs=True).remove)
        if eager:
            stack.enter_context(implemented_by(teacher, "eager"))
        yield
