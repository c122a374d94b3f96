"""How a stage's parameters are updated: optimizer, learning rate, clipping, averaging, loss scale, early stopping.

    optimizer = StageOptimizer(parameters, learning_rates, settings, student)
    optimizer.set_lr_multiplier(get_lr_multiplier(step, steps, settings))
    clip_gradients(parameters, settings.max_grad_norm)
    optimizer.step()

Schedules count optimizer steps, so gradient accumulation and several processes change nothing.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from limbeck.core.collectives import all_reduce_scalars
from limbeck.core.stage_settings import EarlyStopping, Trained

INITIAL_SCALE = 2.0**16  # of the fp16 loss
GROWTH_INTERVAL = 2000  # finite steps in a row after which the loss scale is doubled
EMA_DECAY = 0.9  # of the running mean of a layer's loss


def count_training_steps(settings: Trained, length: int) -> int:
    """Return the number of optimizer steps in the stage's token budget, at least one."""
    return max(1, round(settings.tokens / (settings.batch_size * length)))


def get_lr_multiplier(step: int, steps: int, settings: Trained) -> float:
    """Return the share of the peak learning rate in a step: linear warm-up, then decay to `min_lr_ratio` in the last.

    "cosine" and "linear" decay from the end of the warm-up on; "wsd" stays at the peak and decays over the last
    `decay_ratio` of all steps as one minus the square root (arXiv 2405.18392); "constant" stays.

    Args:
        step: counted from zero.
        steps: of the whole stage.
    """
    warmup_steps = round(settings.warmup_ratio * steps)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if settings.lr_scheduler == "constant":
        return 1.0
    decay_start = warmup_steps
    if settings.lr_scheduler == "wsd":
        decay_steps = max(round(settings.decay_ratio * steps), 1)  # a share of very few steps may round to none
        decay_start = max(warmup_steps, steps - 1 - decay_steps)
    progress = max(step - decay_start, 0) / max(steps - 1 - decay_start, 1)
    decay = {
        "linear": 1 - progress,
        "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        "wsd": 1 - math.sqrt(progress),
    }[settings.lr_scheduler]
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * decay


class StageOptimizer:
    """AdamW for all parameters, or Muon for the weights of linear maps and AdamW for the rest.

    Norms, biases and all that belongs to a mixer have no weight decay, nor have 2-D parameters that are not called
    "weight", such as the decay rates of a state-space layer.

    Muon (see `linear_map_weights`) is for maps from one hidden vector to another, whose directions it equalizes. Left
    to AdamW are embeddings and heads, whose rows are looked up or scored one by one, routers, which score experts, and
    the two factors of a LoRA adapter, which are one map together.

    Args:
        parameters: by name.
        learning_rates: peak learning rate by name; parameters with rate 0 are left out.
        settings: the stage's part of the recipe.
        model: to which the parameters belong.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], learning_rates: dict[str, float], settings: Trained, model: nn.Module
    ):
        groups: dict[tuple[bool, float, float], list[nn.Parameter]] = {}
        muon_names = linear_map_weights(model) if settings.optimizer == "muon" else set()
        for name, parameter in parameters.items():
            is_weight = parameter.dim() > 1 and (parameter.dim() != 2 or name.endswith("weight"))
            decay = settings.weight_decay if is_weight and ".mixer." not in name else 0.0
            if learning_rates[name] > 0:
                groups.setdefault((name in muon_names, learning_rates[name], decay), []).append(parameter)
        self.names = {id(parameter): name for name, parameter in parameters.items()}
        self.optimizers: list[torch.optim.Optimizer] = []
        for use_muon in (False, True):
            param_groups = [
                {"params": members, "peak": peak, "lr": peak, "weight_decay": decay}  # "peak" is stored in checkpoints
                for (is_muon, peak, decay), members in groups.items()
                if is_muon == use_muon
            ]
            if param_groups and use_muon:
                self.optimizers.append(torch.optim.Muon(param_groups, adjust_lr_fn="match_rms_adamw"))
            elif param_groups:
                self.optimizers.append(torch.optim.AdamW(param_groups, betas=settings.betas, fused=True))

    def set_lr_multiplier(self, multiplier: float) -> None:
        """Set the learning rate of every group to this share of its peak."""
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * multiplier

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for optimizer, part in zip(self.optimizers, state["parts"]):
            optimizer.load_state_dict(part)

    def map_state_tensors(self, state: dict[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """Return the state with each tensor of a parameter's size replaced by `change(parameter's name, tensor)`."""
        parts = []
        for optimizer, part in zip(self.optimizers, state["parts"]):
            names = [self.names[id(p)] for group in optimizer.param_groups for p in group["params"]]
            mapped = {
                i: {k: change(names[i], t) if torch.is_tensor(t) and t.dim() else t for k, t in tensors.items()}
                for i, tensors in part["state"].items()
            }
            parts.append({**part, "state": mapped})
        return {"parts": parts}


class ExponentialMovingAverage:
    """Exponential moving average of parameters over steps, which may replace them at the end of a stage.

    ema = ExponentialMovingAverage(parameters, 0.99); ema.update(1); ema.copy_to_parameters()
    """

    def __init__(self, parameters: dict[str, nn.Parameter], decay: float):
        self.parameters, self.decay = parameters, decay
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Average in the parameters after optimizer step `step`, counted from one."""
        # smaller at first, so that the untrained weights are forgotten
        decay = min(self.decay, step / (step + 9))
        for name, parameter in self.parameters.items():
            self.values[name].lerp_(parameter, 1 - decay)

    @contextmanager
    def average_parameters(self) -> Iterator[None]:
        """Put the averages into the parameters for the body of a `with` statement."""
        original = {name: p.detach().clone() for name, p in self.parameters.items()}
        self.copy_to_parameters()
        try:
            yield
        finally:
            assign_parameters(self.parameters, original)

    @torch.no_grad()
    def copy_to_parameters(self) -> None:
        """Overwrite the parameters by the averages."""
        assign_parameters(self.parameters, self.values)


@torch.no_grad()
def assign_parameters(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    """Copy values into parameters of the same names."""
    for name, parameter in parameters.items():
        parameter.copy_(values[name])


def clip_gradients(
    parameters: dict[str, nn.Parameter],
    max_norm: float,
    sharded: Collection[str] = (),
    clip_groups: Collection[Collection[str]] = (),
) -> Tensor | float:
    """Scale all gradients down to a common norm of `max_norm` if it is larger; returns the norm before.

    Without sharded parameters the norm stays on the device, so that nothing waits for it.

    Args:
        sharded: names of parameters of which this process holds a shard; then all processes have to call this.
        clip_groups: groups of names that are scaled each by the norm of its own; returned is the norm of all.
    """
    if clip_groups:
        groups = ([parameters[name] for name in group if parameters[name].grad is not None] for group in clip_groups)
        norms = [nn.utils.clip_grad_norm_(group, max_norm) for group in groups if group]
        return torch.stack(norms).norm() if norms else 0.0
    if not sharded:
        return nn.utils.clip_grad_norm_(list(parameters.values()), max_norm)
    shards, whole = (
        [p.grad for name, p in parameters.items() if p.grad is not None and (name in sharded) == is_sharded]
        for is_sharded in (True, False)
    )
    square = all_reduce_scalars({"square": float(nn.utils.get_total_norm(shards)) ** 2})["square"]
    norm = math.sqrt(square + float(nn.utils.get_total_norm(whole)) ** 2)
    nn.utils.clip_grads_with_norm_(list(parameters.values()), max_norm, torch.tensor(norm))
    return norm


def linear_map_weights(model: nn.Module) -> set[str]:
    """Return the names of the weights that map one hidden vector to another, for Muon; see `StageOptimizer`."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    # a router is recognized by its outputs: one per expert
    expert_counts = {getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")}
    tables = [getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    table_ids = {id(p) for table in tables if table is not None for p in table.parameters()}
    names = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(module, nn.Linear | Conv1D) or id(weight) in table_ids or weight.shape[0] in expert_counts:
            continue
        if ".mixer." not in f"{name}." and ".lora_" not in f"{name}.":
            names.add(f"{name}.weight")
    return names


def needs_loss_scaling(autocast: Callable[[], Any], device: str) -> bool:
    """Tell whether products are taken in fp16 under this autocast, in which small gradients would underflow."""
    with autocast():
        return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16


class LossScaler:
    """The factor on the loss that keeps small fp16 gradients from underflowing (arXiv 1710.03740).

    scaler = LossScaler(state, enabled=needs_loss_scaling(autocast, "cuda"))
    stage.loss_scale = scaler.value
    scaler.unscale_gradients(parameters)               # after they were summed over processes
    scaler.update(finite=True)

    The rule is that of torch.amp.GradScaler: halved if a gradient is not finite, doubled after 2,000 finite steps.
    GradScaler itself decides for each optimizer of each process, while here one decision has to hold for two optimizers
    and all processes. Powers of two are exact in the JSON of a checkpoint.

    Args:
        state: where scale and count live, a dictionary that checkpoints save.
        enabled: if not, the factor is always one.
    """

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
        """Adapt the scale after a step; returns whether it was lowered, so that the next step may succeed."""
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


class LayerEarlyStopping:
    """Early stopping of each layer in stages 1 and 2, by the running mean of its loss.

    early_stopping = LayerEarlyStopping(settings.layer_early_stopping, state)
    early_stopping.update(step, {"model.layers.0.self_attn": 0.31, ...})     # losses of the layers that still learn
    early_stopping.stopped                                                   # names of those that do not

    A layer stops when its mean, over about ten steps, has not fallen by the share `tolerance` for `patience` steps.
    Losses are sums over all processes, so all of them stop the same layers.

    Args:
        settings: None never stops a layer.
        state: where means and counts live, a dictionary that checkpoints save.
    """

    def __init__(self, settings: EarlyStopping | None, state: dict[str, Any]):
        self.settings = settings
        self.layers: dict[str, dict[str, Any]] = state.setdefault("layers", {}) if settings else {}

    @property
    def stopped(self) -> set[str]:
        """Names of the layers that have stopped."""
        return {name for name, layer in self.layers.items() if layer["stopped"] is not None}

    @property
    def all_stopped(self) -> bool:
        """Whether no layer is left that learns."""
        return bool(self.layers) and len(self.stopped) == len(self.layers)

    @property
    def final_losses(self) -> dict[str, float]:
        """Running mean of the loss of each stopped layer when it stopped."""
        return {name: layer["mean"] for name, layer in self.layers.items() if layer["stopped"] is not None}

    def update(self, step: int, losses: dict[str, float]) -> list[str]:
        """Update the means by a step's finite losses; returns the names of the layers that stop with this step."""
        if self.settings is None:
            return []
        newly_stopped = []
        for name, loss in losses.items():
            layer = self.layers.setdefault(name, {"mean": loss, "best": loss, "waited": 0, "stopped": None})
            layer["mean"] = EMA_DECAY * layer["mean"] + (1 - EMA_DECAY) * loss
            if layer["mean"] < (1 - self.settings.tolerance) * layer["best"]:
                layer["best"], layer["waited"] = layer["mean"], 0
                continue
            layer["waited"] += 1
            if layer["waited"] >= self.settings.patience:
                layer["stopped"] = step
                newly_stopped.append(name)
        return newly_stopped
