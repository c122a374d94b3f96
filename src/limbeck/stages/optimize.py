"""How a stage's parameters move: schedule, groups, AdamW or Muon, and the running average of the weights.

    optimizer = Optimizer(parameters, rates, settings, student)
    optimizer.set_rate(learning_rate(step, steps, settings))
    optimizer.step()

Everything is sized in optimiser steps, so accumulation and several processes change nothing.
"""

import math
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from limbeck.distributed import add_up
from limbeck.recipe import Trained


def steps_of(settings: Trained, length: int) -> int:
    """Optimiser steps that the stage's token budget pays for, at least one."""
    return max(1, round(settings.tokens / (settings.batch_size * length)))


def learning_rate(step: int, steps: int, settings: Trained) -> float:
    """Share of the peak learning rate in a step: up over the warm-up, then down to the floor in the last step.

    "wsd" stays at the peak and comes down over the last `decay_ratio` of all steps as one minus the square root
    (arXiv 2405.18392); "cosine" and "linear" come down all the way; "constant" stays.
    """
    warm = round(settings.warmup_ratio * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if settings.lr_scheduler == "constant":
        return 1.0
    cooling = max(round(settings.decay_ratio * steps), 1)  # of a few steps the last one at least
    begin = warm if settings.lr_scheduler != "wsd" else max(warm, steps - 1 - cooling)
    along = max(step - begin, 0) / max(steps - 1 - begin, 1)
    shape = {
        "linear": 1 - along,
        "cosine": 0.5 * (1 + math.cos(math.pi * along)),
        "wsd": 1 - math.sqrt(along),
    }[settings.lr_scheduler]
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * shape


class Optimizer:
    """AdamW for all parameters, or Muon for matrices of the teacher's own and AdamW for the rest.

    Args:
        parameters: by name.
        rates: peak learning rate by name; what has none does not move.
        settings: the stage's recipe.
        model: what they belong to.

    Gates, norms, biases and whatever else belongs to a mixer do not decay, and Muon leaves them to AdamW: it equalises
    the directions of a linear map, and they are none. Nor are embeddings and heads, whose rows are looked up or scored
    one by one, routers, which score experts, the two factors of an adapter, which are one map together, and matrices of
    numbers that no linear map has for its weight (decay rates of a state-space layer, which do not decay either).
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], rates: dict[str, float], settings: Trained, model: nn.Module
    ):
        groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
        maps = linear_maps(model) if settings.optimizer == "muon" else set()
        for name, parameter in parameters.items():
            own = ".mixer." in name
            numbers = parameter.dim() == 2 and not name.endswith("weight")
            decay = settings.weight_decay if parameter.dim() > 1 and not own and not numbers else 0.0
            by_muon = name in maps
            if rates[name] > 0:
                groups.setdefault((by_muon, rates[name], decay), []).append(parameter)
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.parts: list[torch.optim.Optimizer] = []
        for by_muon in (False, True):
            mine = [
                {"params": members, "peak": peak, "lr": peak, "weight_decay": decay}
                for (muon, peak, decay), members in groups.items()
                if muon == by_muon
            ]
            if mine and by_muon:
                self.parts.append(torch.optim.Muon(mine, adjust_lr_fn="match_rms_adamw"))
            elif mine:
                self.parts.append(torch.optim.AdamW(mine, betas=settings.betas, fused=True))

    def set_rate(self, share: float) -> None:
        """Every group to this share of its peak."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["peak"] * share

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, own in zip(self.parts, state["parts"]):
            part.load_state_dict(own)

    def with_names(self, state: dict[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """The same state, each tensor of a parameter's size replaced by `change(name of the parameter, tensor)`."""
        changed = []
        for part, own in zip(self.parts, state["parts"]):
            members = [self.names[id(p)] for group in part.param_groups for p in group["params"]]
            of = {
                i: {k: change(members[i], t) if torch.is_tensor(t) and t.dim() else t for k, t in held.items()}
                for i, held in own["state"].items()
            }
            changed.append({**own, "state": of})
        return {"parts": changed}


class Average:
    """The running average of parameters (exponential, over steps), which a stage may hand on instead of the last ones.

    average = Average(parameters, 0.99); average.update(1); average.take_over()
    """

    def __init__(self, parameters: dict[str, nn.Parameter], keep: float):
        self.parameters, self.keep = parameters, keep
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step `step`, counted from one: early steps weigh more, so that the start is forgotten."""
        keep = min(self.keep, step / (step + 9))
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter, 1 - keep)

    @contextmanager
    def lent(self) -> Iterator[None]:
        """The averages in the parameters' place for a while."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.take_over()
        try:
            yield
        finally:
            copy_into(self.parameters, kept)

    @torch.no_grad()
    def take_over(self) -> None:
        """Put the averages in the parameters' place."""
        copy_into(self.parameters, self.values)


@torch.no_grad()
def copy_into(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Write values into parameters of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def gradient_norm(
    parameters: dict[str, nn.Parameter],
    largest: float,
    sharded: Collection[str] = (),
    alone: Collection[Collection[str]] = (),
) -> Tensor | float:
    """Norm of all gradients together, which are scaled down to `largest` where it is more; nothing is waited for.

    Args:
        sharded: names of those of which this process holds a part only; every process takes part then.
        alone: groups of names that learn alone, each scaled by its own norm; what is returned is that of all, before.
    """
    if alone:
        groups = ([parameters[name] for name in group if parameters[name].grad is not None] for group in alone)
        norms = [nn.utils.clip_grad_norm_(group, largest) for group in groups if group]
        return torch.stack(norms).norm() if norms else 0.0
    if not sharded:
        return nn.utils.clip_grad_norm_(list(parameters.values()), largest)
    parts, others = (
        [p.grad for name, p in parameters.items() if p.grad is not None and (name in sharded) == inside]
        for inside in (True, False)
    )
    square = add_up({"square": float(nn.utils.get_total_norm(parts)) ** 2})["square"]
    norm = math.sqrt(square + float(nn.utils.get_total_norm(others)) ** 2)
    nn.utils.clip_grads_with_norm_(list(parameters.values()), largest, torch.tensor(norm))
    return norm


def linear_maps(model: nn.Module) -> set[str]:
    """Names of the weights that map one hidden vector to another; see `Optimizer`."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    experts = {getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")}
    tables = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    ends = {id(p) for table in tables if table is not None for p in table.parameters()}
    found = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear | Conv1D) or id(weight) in ends or weight.shape[0] in experts:
            continue
        if ".mixer." not in f"{name}." and ".lora_" not in f"{name}.":
            found.add(f"{name}.weight")
    return found
