"""How a stage's parameters move: schedule, groups, AdamW or Muon, and the running average of the weights.

    optimizer = StageOptimizer(parameters, rates, settings, student)
    optimizer.set_lr_multiplier(get_lr_multiplier(step, steps, settings))
    optimizer.step()

Everything is sized in optimiser steps, so accumulation and several processes change nothing.

Loss scaling for fp16 (arXiv 1710.03740): gradients that would be too small for it are kept by a larger loss.

    scale = LossScaler(state, enabled=needs_loss_scaling(autocast, "cuda"))
    stage.loss_scale = scale.value
    scale.unscale_gradients(parameters)                # divides the gradients, after they were summed
    scale.update(finite=True)

The rule is that of torch.amp.GradScaler: halved where a gradient is not finite, doubled after 2,000 steps that were.
GradScaler itself decides for each optimiser of each process. Here a step may have two optimisers and several processes,
and the one decision is the loop's; and a power of two is held by a checkpoint's JSON exactly.

Layers of stages 1 and 2 that have learnt what they will, found by the running mean of each one's loss.

    layers = LayerEarlyStopping(settings.converged, state)
    layers.update(step, {"model.layers.0.self_attn": 0.31, ...})       # losses of the layers that still learn
    layers.stopped, layers.means

A layer stops when its mean (of about ten steps) has not fallen by `tolerance` of itself for `patience` steps. The
losses are sums over all processes, so all of them find the same. The state lives in `state`, which checkpoints keep.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from limbeck.core.distributed import all_reduce_scalars
from limbeck.core.recipe import EarlyStopping, Trained


def count_training_steps(settings: Trained, length: int) -> int:
    """Optimiser steps that the stage's token budget pays for, at least one."""
    return max(1, round(settings.tokens / (settings.batch_size * length)))


def get_lr_multiplier(step: int, steps: int, settings: Trained) -> float:
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


class StageOptimizer:
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
        self.optimizers: list[torch.optim.Optimizer] = []
        for by_muon in (False, True):
            mine = [
                {"params": members, "peak": peak, "lr": peak, "weight_decay": decay}
                for (muon, peak, decay), members in groups.items()
                if muon == by_muon
            ]
            if mine and by_muon:
                self.optimizers.append(torch.optim.Muon(mine, adjust_lr_fn="match_rms_adamw"))
            elif mine:
                self.optimizers.append(torch.optim.AdamW(mine, betas=settings.betas, fused=True))

    def set_lr_multiplier(self, share: float) -> None:
        """Every group to this share of its peak."""
        for part in self.optimizers:
            for group in part.param_groups:
                group["lr"] = group["peak"] * share

    def step(self) -> None:
        for part in self.optimizers:
            part.step()

    def zero_grad(self) -> None:
        for part in self.optimizers:
            part.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, own in zip(self.optimizers, state["parts"]):
            part.load_state_dict(own)

    def map_state_tensors(self, state: dict[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """The same state, each tensor of a parameter's size replaced by `change(name of the parameter, tensor)`."""
        changed = []
        for part, own in zip(self.optimizers, state["parts"]):
            members = [self.names[id(p)] for group in part.param_groups for p in group["params"]]
            of = {
                i: {k: change(members[i], t) if torch.is_tensor(t) and t.dim() else t for k, t in held.items()}
                for i, held in own["state"].items()
            }
            changed.append({**own, "state": of})
        return {"parts": changed}


class ExponentialMovingAverage:
    """The running average of parameters (exponential, over steps), which a stage may hand on instead of the last ones.

    average = ExponentialMovingAverage(parameters, 0.99); average.update(1); average.copy_to_parameters()
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After optimiser step `step`, counted from one: early steps weigh more, so that the start is forgotten."""
        decay = min(self.decay, step / (step + 9))
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """The averages in the parameters' place for a while."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.copy_to_parameters()
        try:
            yield
        finally:
            assign_parameters(self.parameters, kept)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Put the averages in the parameters' place."""
        assign_parameters(self.parameters, self.values)


@torch.no_grad()
def assign_parameters(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Write values into parameters of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def clip_gradients(
    parameters: dict[str, nn.Parameter],
    max_norm: float,
    sharded: Collection[str] = (),
    clip_groups: Collection[Collection[str]] = (),
) -> Tensor | float:
    """Norm of all gradients together, which are scaled down to `max_norm` where it is more; nothing is waited for.

    Args:
        sharded: names of those of which this process holds a part only; every process takes part then.
        clip_groups: groups of names that learn alone, each scaled by its own norm; what is returned is that of all, before.
    """
    if clip_groups:
        groups = ([parameters[name] for name in group if parameters[name].grad is not None] for group in clip_groups)
        norms = [nn.utils.clip_grad_norm_(group, max_norm) for group in groups if group]
        return torch.stack(norms).norm() if norms else 0.0
    if not sharded:
        return nn.utils.clip_grad_norm_(list(parameters.values()), max_norm)
    parts, others = (
        [p.grad for name, p in parameters.items() if p.grad is not None and (name in sharded) == inside]
        for inside in (True, False)
    )
    square = all_reduce_scalars({"square": float(nn.utils.get_total_norm(parts)) ** 2})["square"]
    norm = math.sqrt(square + float(nn.utils.get_total_norm(others)) ** 2)
    nn.utils.clip_grads_with_norm_(list(parameters.values()), max_norm, torch.tensor(norm))
    return norm


def linear_maps(model: nn.Module) -> set[str]:
    """Names of the weights that map one hidden vector to another; see `StageOptimizer`."""
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


INITIAL_SCALE = 2.0**16
GROWTH_INTERVAL = 2000  # finite steps in a row


def needs_loss_scaling(autocast: Callable[[], Any], device: str) -> bool:
    """Are products taken in fp16 inside?"""
    with autocast():
        return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


class LossScaler:
    """The factor on the loss; one, always, where none is needed. Its state lives in `state`."""

    def __init__(self, state: dict[str, Any], enabled: bool):
        self.state, self.enabled = state, enabled
        state.setdefault("loss_scale", INITIAL_SCALE if enabled else 1.0)
        state.setdefault("finite_in_a_row", 0)

    @property
    def value(self) -> float:
        return self.state["loss_scale"]

    @torch.no_grad()
    def unscale_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients by the scale."""
        if self.enabled:
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter.grad.mul_(1 / self.value)

    def update(self, finite: bool) -> bool:
        """After a step; True where the scale came down, so that the next step has a chance that this one had not."""
        if not self.enabled:
            return False
        if finite:
            self.state["finite_in_a_row"] += 1
            if self.state["finite_in_a_row"] == GROWTH_INTERVAL:
                self.state["loss_scale"], self.state["finite_in_a_row"] = 2 * self.value, 0
            return False
        self.state["finite_in_a_row"] = 0
        if self.value <= 1:
            return False
        self.state["loss_scale"] = self.value / 2
        return True


EMA_DECAY = 0.9  # of the running mean


class LayerEarlyStopping:
    """See the module's docstring. With `settings` None no layer ever stops."""

    def __init__(self, settings: EarlyStopping | None, state: dict[str, Any]):
        self.settings = settings
        self.layers: dict[str, dict[str, Any]] = state.setdefault("layers", {}) if settings else {}

    @property
    def stopped(self) -> set[str]:
        """Names of the layers that learn no more."""
        return {name for name, layer in self.layers.items() if layer["stopped"] is not None}

    @property
    def all_stopped(self) -> bool:
        """Is there nothing left to learn?"""
        return bool(self.layers) and len(self.stopped) == len(self.layers)

    @property
    def final_losses(self) -> dict[str, float]:
        """The mean loss of each stopped layer, when it stopped."""
        return {name: layer["mean"] for name, layer in self.layers.items() if layer["stopped"] is not None}

    def update(self, step: int, losses: dict[str, float]) -> list[str]:
        """Take note of a step's losses, which are finite; names of the layers that stop with this step."""
        if self.settings is None:
            return []
        now = []
        for name, loss in losses.items():
            layer = self.layers.setdefault(name, {"mean": loss, "best": loss, "waited": 0, "stopped": None})
            layer["mean"] = EMA_DECAY * layer["mean"] + (1 - EMA_DECAY) * loss
            if layer["mean"] < (1 - self.settings.tolerance) * layer["best"]:
                layer["best"], layer["waited"] = layer["mean"], 0
                continue
            layer["waited"] += 1
            if layer["waited"] >= self.settings.patience:
                layer["stopped"] = step
                now.append(name)
        return now
