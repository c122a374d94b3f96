"""Train low-rank adapters (LoRA) of the library peft in a student for one stage, and merge them into its weights.

    names = resolve_lora_targets(teacher, sites, "attention")          # full names of linear layers
    adapters = LoraAdapters(student, names, rank=8, alpha=16)
    adapters.parameters()                                              # trained: the adapters and the mixers
    weights = adapters.merge()                                         # an ordinary student again; its changed weights

The adapters are added to the student in place, so its head, hooks and caches keep working.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.core.extras import require
from limbeck.models import Site, unshare_weights
from limbeck.models.backbone import supports_packed_positions
from limbeck.models.modeling import get_mixers

GROUPS = ("attention", "all-linear")


def check_peft() -> None:
    """Raise LimbeckError if peft is not installed."""
    require("peft", "LoRA")


def resolve_lora_targets(
    model: PreTrainedModel, sites: Sequence[Site], target_modules: str | Sequence[str]
) -> list[str]:
    """Return the full names of the linear layers that get adapters; layers of mixers never do.

    Args:
        model: the teacher, or a student of it, whose linear layers have the same names.
        sites: attention layers that are converted.
        target_modules: "attention" (every linear layer of the converted attention modules), "all-linear" (every linear
            layer of the backbone), or endings of names such as ["q_proj", "mlp.down_proj"].

    Raises:
        LimbeckError: no linear layer has such a name; lists those that exist.
    """
    linear = _linear_layers(model)
    if target_modules == "all-linear":
        return linear
    if target_modules == "attention":
        return [name for name in linear if name.startswith(tuple(f"{site.module}." for site in sites))]
    endings = sorted({name.rsplit(".", 1)[-1] for name in linear})
    selected = []
    for target in [target_modules] if isinstance(target_modules, str) else target_modules:
        matches = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not matches:
            raise LimbeckError(
                f"lora.target_modules: unknown linear layer '{target}'{suggest_closest(target, [*endings, *GROUPS])}",
                expected=f"{', '.join(GROUPS)}, or a list of: {', '.join(endings)}",
            )
        selected += matches
    return [name for name in linear if name in set(selected)]


def count_lora_parameters(model: PreTrainedModel, names: Sequence[str], rank: int) -> int:
    """Count the parameters that adapters of this rank add to the named layers."""
    return sum(rank * sum(_linear_widths(model.get_submodule(name))) for name in names)


class LoraAdapters:
    """LoRA adapters inside a student, until `merge`."""

    def __init__(
        self,
        student: PreTrainedModel,
        names: Sequence[str],
        rank: int = 8,
        alpha: float = 16.0,
        dropout: float = 0.0,
        seed: int = 0,
    ):
        """Add adapters to the named layers of `student`. At first they change nothing: A is random, B is zero.

        Raises:
            LimbeckError: peft is not installed.
        """
        check_peft()
        # optional dependency
        from peft import LoraConfig
        from peft.tuners.lora import LoraModel

        supports_packed_positions(student)  # its first call runs the student, which has to be without dropout for that
        self.student, self.names = student, list(names)
        config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=self.names, bias="none")  # type: ignore[arg-type]
        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft warns that it adapts to the transposed weights of GPT-2's Conv1D
            warnings.filterwarnings("ignore", message="fan_in_fan_out")
            torch.manual_seed(seed)
            self.tuner: Any = LoraModel(student, config, "default")
        self._mixer_prefixes = _mixer_prefixes(student)
        self._trained = [
            n for n, _ in student.named_parameters() if ".lora_" in n or n.startswith(self._mixer_prefixes)
        ]
        self.dropout = dropout
        if dropout:  # the student is in eval mode, without the dropout of its family; only the adapters' is active
            for name, module in student.named_modules():
                if name.endswith(".lora_dropout"):
                    module.train()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trained parameters by name: the adapters, and all parameters of the mixers."""
        return {name: self.student.get_parameter(name) for name in self._trained}

    def merge(self) -> dict[str, nn.Parameter]:
        """Merge the adapters into the weights and remove them.

        Returns:
            The changed parameters by their ordinary names: weights of the adapted layers, and the mixers. The same
            adapters give the same weights bit for bit, so the result of a stage needs nothing else.
        """
        for name in self.names:  # peft adds in place, which would change the teacher's weights
            unshare_weights(self.student.get_submodule(name).get_base_layer())
        self.tuner.merge_and_unload()
        if hasattr(self.student, "peft_config"):  # left behind by some versions of peft
            del self.student.peft_config
        merged = {f"{name}.weight" for name in self.names}
        return {
            name: parameter
            for name, parameter in self.student.named_parameters()
            if name in merged or name.startswith(self._mixer_prefixes)
        }


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """List the linear layers of the backbone, without those of mixers."""
    mixers = _mixer_prefixes(model)
    head = model.get_output_embeddings()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and not name.startswith(mixers)
    ]


def _mixer_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    return tuple(f"{name}.mixer." for name in get_mixers(model))


def _linear_widths(module: nn.Module) -> tuple[int, int]:
    """Return the input and output width of a linear layer, also of GPT-2's Conv1D."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    return module.nx, module.nf  # type: ignore[return-value]
