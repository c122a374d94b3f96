"""Low-rank adapters (LoRA) in a student, by the library peft: put in for a stage, trained, merged into the weights.

    names = resolve_lora_targets(teacher, sites, "attention")          # full names of linear layers
    with_adapters = LoraAdapters(student, names, rank=8, alpha=16)
    with_adapters.parameters()                               # what learns: the adapters and the mixers
    weights = with_adapters.merge()                          # an ordinary student again, and what changed in it

The adapters live inside the very student that was given, so its heads, hooks and caches need no care.
"""

import importlib.util
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.models import Site, unshare_weights
from limbeck.models.backbone import supports_packed_positions
from limbeck.models.modeling import get_mixers

GROUPS = ("attention", "all-linear")


def check_peft() -> None:
    """Raises LimbeckError where the library peft is not installed."""
    if importlib.util.find_spec("peft") is None:
        raise LimbeckError("LoRA needs the library peft", hint="pip install 'limbeck[peft]'")


def resolve_lora_targets(
    model: PreTrainedModel, sites: Sequence[Site], target_modules: str | Sequence[str]
) -> list[str]:
    """Full names of the linear layers that get adapters; a mixer's own layers are never among them.

    Args:
        model: the teacher or a student of it, whose linear layers have the same names.
        sites: of the layers that are converted.
        target_modules: "attention" (every linear layer of the converted attention modules), "all-linear" (every linear layer
            of the body), or ends of names such as ["q_proj", "mlp.down_proj"].

    Raises:
        LimbeckError: a name that no linear layer has, with those that there are.
    """
    linear = _linear_layers(model)
    if target_modules == "all-linear":
        return linear
    if target_modules == "attention":
        return [name for name in linear if name.startswith(tuple(f"{site.module}." for site in sites))]
    known = sorted({name.rsplit(".", 1)[-1] for name in linear})
    chosen = []
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        found = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not found:
            raise LimbeckError(
                f"lora.target_modules: there is no linear layer '{target}'{suggest_closest(target, [*known, *GROUPS])}",
                expected=f"{', '.join(GROUPS)}, or a list of: {', '.join(known)}",
            )
        chosen += found
    return [name for name in linear if name in set(chosen)]


def count_lora_parameters(model: PreTrainedModel, names: Sequence[str], rank: int) -> int:
    """Parameters that adapters of that rank add to the named layers."""
    return sum(rank * sum(_widths(model.get_submodule(name))) for name in names)


class LoraAdapters:
    """LoRA inside a student until `merge`."""

    def __init__(
        self,
        student: PreTrainedModel,
        names: Sequence[str],
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        seed: int = 0,
    ):
        """Put adapters into the named layers of `student`. They start as nothing: A is drawn from `seed`, B is zero.

        Raises:
            LimbeckError: peft is not installed.
        """
        check_peft()
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        supports_packed_positions(student)  # tries the student on its first call, which should not meet dropout
        self.student, self.names = student, list(names)
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=self.names, bias="none")  # type: ignore[arg-type]
        with torch.random.fork_rng(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="fan_in_fan_out")  # GPT-2's Conv1D; peft sets it by itself
            torch.manual_seed(seed)
            self.tuner: Any = LoraModel(student, config, "default")
        inside = tuple(f"{name}.mixer." for name in get_mixers(student))
        self._learning = [n for n, _ in student.named_parameters() if ".lora_" in n or n.startswith(inside)]
        self._inside = inside
        self.dropout = dropout
        if dropout:  # a student under training is in eval mode otherwise: no family's dropout is wanted
            for name, module in student.named_modules():
                if name.endswith(".lora_dropout"):
                    module.train()

    def parameters(self) -> dict[str, nn.Parameter]:
        """What learns, by name: the adapters, and the mixers in full."""
        return {name: self.student.get_parameter(name) for name in self._learning}

    def merge(self) -> dict[str, nn.Parameter]:
        """Add the adapters to the weights and take them out again.

        Returns:
            What the student has learnt, by its ordinary names: the weights of the adapted layers, and the mixers. The
            same adapters give the same weights bit for bit, so a stage that is finished needs nothing else.
        """
        for name in self.names:  # peft adds in place, and what is shared with the teacher is not ours to change
            unshare_weights(self.student.get_submodule(name).get_base_layer())
        self.tuner.merge_and_unload()
        if hasattr(self.student, "peft_config"):  # left behind by some versions of peft
            del self.student.peft_config
        changed = {f"{name}.weight" for name in self.names}
        return {
            name: p for name, p in self.student.named_parameters() if name in changed or name.startswith(self._inside)
        }


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Names of the linear layers of the body, without the mixers' and without the head."""
    inside = tuple(f"{name}.mixer." for name in get_mixers(model))
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not name.startswith(inside)
    ]


def _widths(module: nn.Module) -> tuple[int, int]:
    """Inputs and outputs of a linear layer, however its weights are stored."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.nx, module.nf  # type: ignore[return-value]
