"""The one training loop of all stages that learn by gradient; it knows no stage.

    train(stage, settings, data, run, index, position)

AdamW, warm-up and decay sized in optimiser steps, gradient clipping, gradient accumulation with counts taken over the
whole step first (so a split changes nothing), non-finite steps skipped and counted, a line of metrics a step,
checkpoints by the clock. A resumed run continues bit for bit on a CPU: weights, optimiser and data position are all its
state.
"""

import math
import time
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from limbeck.console import console, progress
from limbeck.data.packing import Batch, Packed
from limbeck.errors import LimbeckError
from limbeck.recipe import Hidden, Logits, Matrix
from limbeck.stages.run import RunDirectory

MOST_SKIPPED = 5  # non-finite steps in a row


class Stage(Protocol):
    """What the loop asks of a stage."""

    def parameters(self) -> dict[str, nn.Parameter]: ...

    def learning_rates(self, recipe: Any) -> dict[str, float]: ...

    def count(self, batch: Batch) -> dict[str, float]: ...

    def backward(self, batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]: ...


def learning_rate(step: int, steps: int, settings: Matrix | Hidden | Logits) -> float:
    """Share of the peak learning rate in a step: up over the warm-up, then down to the floor in the last step."""
    warm = round(settings.warmup * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    if settings.decay == "constant":
        return 1.0
    along = (step - warm) / max(steps - 1 - warm, 1)
    shape = 1 - along if settings.decay == "linear" else 0.5 * (1 + math.cos(math.pi * along))
    return settings.floor + (1 - settings.floor) * shape


def steps_of(settings: Matrix | Hidden | Logits, length: int) -> int:
    """Optimiser steps that the stage's token budget pays for, at least one."""
    return max(1, round(settings.tokens / (settings.batch * length)))


def train(
    stage: Stage, settings: Matrix | Hidden | Logits, data: Packed, run: RunDirectory, index: int, position: int
) -> dict[str, Any]:
    """Train to the end of the stage's budget, from its last checkpoint if there is one.

    Args:
        stage: what to minimise, and by which parameters.
        position: of the stage's first sequence in `data`.

    Returns:
        facts: steps, tokens, seconds, skipped steps, the data position after the stage, first and last loss.

    Raises:
        LimbeckError: the loss was not finite several steps in a row.
    """
    parameters = stage.parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        return _Run(stage, settings, data, run, index, position, parameters).go()
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


class _Run:
    def __init__(self, stage, settings, data, run, index, position, parameters):
        self.stage, self.settings, self.data, self.run, self.index = stage, settings, data, run, index
        self.start, self.parameters = position, parameters
        self.device = next(iter(parameters.values())).device
        self.steps = steps_of(settings, data.length)
        self.micro = min(settings.micro_batch or settings.batch, settings.batch)
        self.optimizer = torch.optim.AdamW(self._groups(), betas=settings.betas, fused=True)
        self.facts: dict[str, Any] = {
            "step": 0,
            "seconds": 0.0,
            "skipped": 0,
            "in_a_row": 0,
            "first_loss": None,
            "loss": None,
        }
        self._resume()

    def go(self) -> dict[str, Any]:
        tokens = self.settings.batch * self.data.length
        saved = time.monotonic()
        name = self.settings.stage
        with progress(f"{name}", self.steps, "steps", done=self.facts["step"]) as advance:
            while self.facts["step"] < self.steps:
                began = time.monotonic()
                line = self._step()
                self.facts["seconds"] += time.monotonic() - began
                line["tokens_per_second"] = round(tokens / (time.monotonic() - began), 1)
                self.run.log({"stage": name, "stage_index": self.index, **line})
                speed = tokens * self.facts["step"] / self.facts["seconds"]
                advance(1, note=f"loss {line['loss']:.4g}, {speed:.0f} tokens/s")
                if time.monotonic() - saved > self.run.recipe.checkpoint_seconds and self.facts["step"] < self.steps:
                    self._save()
                    saved = time.monotonic()
        sequences = self.steps * self.settings.batch
        return {
            **self.facts,
            "tokens": sequences * self.data.length,
            "position": self.start + sequences,
            "trained_parameters": sum(p.numel() for p in self.parameters.values()),
        }

    def _step(self) -> dict[str, Any]:
        step, settings = self.facts["step"], self.settings
        at = self.start + step * settings.batch
        sizes = [min(self.micro, settings.batch - done) for done in range(0, settings.batch, self.micro)]
        batches = [self.data.batch(at + i * self.micro, size).to(self.device) for i, size in enumerate(sizes)]
        counts: dict[str, float] = {}
        for batch in batches:
            for name, value in self.stage.count(batch).items():
                counts[name] = counts.get(name, 0.0) + value
        rate = learning_rate(step, self.steps, settings)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        sums: dict[str, Tensor] = {}
        for batch in batches:
            for name, value in self.stage.backward(batch, counts).items():
                sums[name] = sums[name] + value if name in sums else value
        norm = float(nn.utils.clip_grad_norm_(list(self.parameters.values()), settings.clip))
        losses = {name: float(value) for name, value in sums.items()}
        loss = losses.pop("loss") if "loss" in losses else sum(losses.values()) / len(losses)
        if math.isfinite(norm) and math.isfinite(loss):
            self.optimizer.step()
            self.facts["in_a_row"] = 0
            self.facts["loss"] = loss
            if self.facts["first_loss"] is None:
                self.facts["first_loss"] = loss
        else:
            self._skip(loss, norm)
        self.optimizer.zero_grad()
        self.facts["step"] += 1
        return {"step": self.facts["step"], "loss": loss, "losses": losses, "grad_norm": norm, "lr": settings.lr * rate}

    def _skip(self, loss: float, norm: float) -> None:
        self.facts["skipped"] += 1
        self.facts["in_a_row"] += 1
        console.print(f"step {self.facts['step'] + 1} skipped: loss {loss:g}, gradient norm {norm:g}")
        if self.facts["in_a_row"] >= MOST_SKIPPED:
            raise LimbeckError(
                f"stage {self.settings.stage}: {MOST_SKIPPED} steps in a row were not finite",
                expected="a finite loss",
                hint=f"--set stages.{self.index}.lr={self.settings.lr / 3:.1e} --out another-folder",
            )

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters by peak learning rate and weight decay; gates, norms and biases do not decay."""
        rates = self.stage.learning_rates(self.settings)
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            decay = self.settings.weight_decay if parameter.dim() > 1 and ".mixer." not in name else 0.0
            groups.setdefault((rates[name], decay), []).append(parameter)
        return [
            {"params": members, "peak": peak, "lr": peak, "weight_decay": decay}
            for (peak, decay), members in groups.items()
            if peak > 0
        ]

    def _resume(self) -> None:
        found = self.run.last_checkpoint(self.index)
        self.run.forget(self.index, found[2]["step"] if found else 0)
        if found is None:
            return
        tensors, optimizer, self.facts = found
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[name])
        self.optimizer.load_state_dict(optimizer)
        console.print(f"{self.settings.stage}: going on from step {self.facts['step']} of {self.steps}")

    def _save(self) -> None:
        tensors = dict(self.parameters.items())
        self.run.checkpoint(self.index, self.facts["step"], tensors, self.optimizer.state_dict(), self.facts)
