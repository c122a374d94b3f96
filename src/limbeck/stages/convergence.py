"""Layers of stages 1 and 2 that have learnt what they will, found by the running mean of each one's loss.

    layers = Convergence(settings.converged, facts)
    layers.update(step, {"model.layers.0.self_attn": 0.31, ...})       # losses of the layers that still learn
    layers.stopped, layers.means

A layer stops when its mean (of about ten steps) has not fallen by `tolerance` of itself for `patience` steps. The
losses are sums over all processes, so all of them find the same. The state lives in `facts`, which checkpoints keep.
"""

from typing import Any

from limbeck.recipe import EarlyStopping

KEEP = 0.9  # of the running mean


class Convergence:
    """See the module's docstring. With `settings` None no layer ever stops."""

    def __init__(self, settings: EarlyStopping | None, facts: dict[str, Any]):
        self.settings = settings
        self.layers: dict[str, dict[str, Any]] = facts.setdefault("layers", {}) if settings else {}

    @property
    def stopped(self) -> set[str]:
        """Names of the layers that learn no more."""
        return {name for name, layer in self.layers.items() if layer["stopped"] is not None}

    @property
    def all_stopped(self) -> bool:
        """Is there nothing left to learn?"""
        return bool(self.layers) and len(self.stopped) == len(self.layers)

    @property
    def last(self) -> dict[str, float]:
        """The mean loss of each stopped layer, when it stopped."""
        return {name: layer["mean"] for name, layer in self.layers.items() if layer["stopped"] is not None}

    def update(self, step: int, losses: dict[str, float]) -> list[str]:
        """Take note of a step's losses, which are finite; names of the layers that stop with this step."""
        if self.settings is None:
            return []
        now = []
        for name, loss in losses.items():
            layer = self.layers.setdefault(name, {"mean": loss, "best": loss, "waited": 0, "stopped": None})
            layer["mean"] = KEEP * layer["mean"] + (1 - KEEP) * loss
            if layer["mean"] < (1 - self.settings.tolerance) * layer["best"]:
                layer["best"], layer["waited"] = layer["mean"], 0
                continue
            layer["waited"] += 1
            if layer["waited"] >= self.settings.patience:
                layer["stopped"] = step
                now.append(name)
        return now
