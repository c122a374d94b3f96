"""One student in one stage: what moves its weights, how far it is, and what it keeps.

    learner = Learner(stage, settings, data, run, index, position, parameters)
    line = learner.take_step()           # ready(), gradients of batches(), update()
    learner.note(line, seconds)
    learner.finish()

The loop trains one (`limbeck.stages.loop`), or several on the same passes of the teacher (`limbeck.stages.together`).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn, no_grad

from limbeck.console import console
from limbeck.data.ahead import Ahead
from limbeck.data.packing import Batch, count_with_targets, with_targets
from limbeck.distributed import add_up, share, take_from_main
from limbeck.errors import LimbeckError
from limbeck.stages.convergence import Convergence
from limbeck.stages.loss_scale import LossScale, needs_scale
from limbeck.stages.optimize import Average, Optimizer, copy_into, gradient_norm, learning_rate, steps_of
from limbeck.stages.shards import Held

MOST_SKIPPED = 5  # non-finite steps in a row


class Stage(Protocol):
    """What the loop asks of a stage."""

    autocast: Callable[[], Any]
    loss_scale: float
    stopped: set[str]  # names of those of its losses that are taken no more
    by_targets: bool  # sequences without a target are passed over

    @property
    def student(self) -> nn.Module: ...

    def parameters(self) -> dict[str, nn.Parameter]: ...

    def learning_rates(self, recipe: Any) -> dict[str, float]: ...

    def count(self, batch: Batch) -> dict[str, float]: ...

    def backward(self, batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]: ...

    def evaluate(self, batch: Batch, counts: dict[str, float] | None = None) -> dict[str, Tensor]: ...


class Learner:
    """One student in one stage: its parameters, optimiser and averages, and how far it is. See `train`."""

    def __init__(self, stage, settings, data, run, index, position, parameters, held_out):
        self.stage, self.settings, self.data, self.run, self.index = stage, settings, data, run, index
        self.start, self.held_out = position, held_out
        self.held = Held(parameters)
        self.parameters = self.held.local  # what is kept and moved here: all, or a part of each that is sharded
        take_from_main(p for name, p in self.parameters.items() if name not in self.held.sharded)
        self.device = next(iter(parameters.values())).device
        self.steps = steps_of(settings, data.length)
        self.first, self.rows = share(settings.batch_size)
        self.micro = min(settings.micro_batch_size or self.rows, self.rows)
        self.ahead = Ahead(self._batches_of, self.device)
        self.optimizer = Optimizer(self.parameters, stage.learning_rates(settings), settings, stage.student)
        self.average = Average(self.parameters, settings.ema_decay) if settings.ema_decay else None
        self.best: dict[str, Tensor] | None = None  # weights of the best held-out loss, where there is patience
        self.facts: dict[str, Any] = {
            "step": 0,
            "seconds": 0.0,
            "skipped": 0,
            "in_a_row": 0,
            "first_loss": None,
            "loss": None,
            "held_out_loss": None,
            "best_loss": None,
            "waited": 0,
            "position": position,
        }
        self.places: dict[int, int] = {}  # where the batches of a step begin, and those of the step after it
        self._resume()
        self.scale = LossScale(self.facts, needs_scale(stage.autocast, self.device.type))
        self.layers = Convergence(getattr(settings, "layer_early_stopping", None), self.facts)

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.facts["step"]

    @property
    def over(self) -> bool:
        """Whether no step is left, or nothing to learn: no better loss for long, or no layer that still learns."""
        out_of_patience = bool(self.settings.patience and self.facts["waited"] >= self.settings.patience)
        return self.step >= self.steps or out_of_patience or self.layers.all_stopped

    @property
    def speed(self) -> float:
        """Tokens a second so far."""
        return self.settings.batch_size * self.data.length * self.step / max(self.facts["seconds"], 1e-9)

    def finish(self) -> dict[str, Any]:
        """Leave the weights that are handed on; returns what `train` returns.

        Raises:
            LimbeckError: all steps were skipped, so that nothing was learnt.
        """
        if self.facts["loss"] is None and self.facts["skipped"]:
            raise self._not_finite(f"all of its {self.facts['skipped']} steps were skipped")
        if self.best is not None:
            copy_into(self.parameters, self.best)
        elif self.average is not None:
            self.average.take_over()
        return {
            **self.facts,
            "steps": self.facts["step"],
            "tokens": self.facts["step"] * self.settings.batch_size * self.data.length,
            "trained_parameters": self.held.numel,
        }

    def take_step(self) -> dict[str, Any]:
        """A whole step of this student alone; returns its line of metrics."""
        self.ready()
        return self.update(accumulate(self.stage, self.batches()))

    def ready(self) -> None:
        """Tell the stage what it has to know of the next step."""
        self.stage.loss_scale = self.scale.value
        self.stage.stopped = self.layers.stopped

    def batches(self) -> list[Batch]:
        """The next step's micro-batches."""
        return self.ahead.take(self.step, last=self.step + 1 >= self.steps)

    def _batches_of(self, step: int) -> list[Batch]:
        sizes = [min(self.micro, self.rows - done) for done in range(0, self.rows, self.micro)]
        if self.stage.by_targets:
            # which sequences have targets nobody knows before they are read, so every process reads the whole batch
            at = self.places.setdefault(step, self.facts["position"])
            batch, self.places[step + 1] = with_targets(self.data, at, self.settings.batch_size)
            begins = [self.first + i * self.micro for i in range(len(sizes))]
            return [batch.rows(slice(begin, begin + size)) for begin, size in zip(begins, sizes)]
        at = self._place(step) + self.first
        return [self.data.batch(at + i * self.micro, size) for i, size in enumerate(sizes)]

    def _place(self, step: int) -> int:
        """Position of a step's first sequence, where every sequence counts."""
        return self.start + step * self.settings.batch_size

    def update(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        """Move the weights by the gradients that are there; returns the step's line of metrics.

        Args:
            sums: each loss, summed over the step's micro-batches.
        """
        step, settings = self.facts["step"], self.settings
        rate = learning_rate(step, self.steps, settings)
        self.optimizer.set_rate(rate)
        self.held.take_gradients()
        self.scale.off(self.parameters.values())
        norm, mine = fetch(
            gradient_norm(self.parameters, settings.max_grad_norm, self.held.sharded, alone_in(self.stage)), sums
        )
        losses = add_up(mine)
        loss = total_loss({**self.layers.last, **losses})
        finite = math.isfinite(norm) and math.isfinite(loss)
        lowered = self.scale.update(finite)
        if finite:
            self.optimizer.step()
            if self.average is not None:
                self.average.update(step + 1)
            self.facts["in_a_row"] = 0
            self.facts["loss"] = loss
            if self.facts["first_loss"] is None:
                self.facts["first_loss"] = loss
            for name in self.layers.update(step + 1, losses):
                console.print(f"{settings.stage}: {name} has converged in step {step + 1}")
        else:
            self._skip(loss, norm, lowered)
        self.optimizer.zero_grad()
        self.held.drop_gradients()
        self.facts["step"] += 1
        self.facts["position"] = self.places.get(step + 1, self._place(step + 1))
        self.places.pop(step, None)
        line = {"step": self.facts["step"], "loss": loss, "losses": parts_of(losses), "grad_norm": norm}
        line |= {"lr": settings.lr * rate, "skipped": self.facts["skipped"]}
        if self.scale.needed:
            line["loss_scale"] = self.stage.loss_scale
        return line

    def note(self, line: dict[str, Any], seconds: float) -> None:
        """Log a step that took so long, with the loss on held-out text where that is due."""
        self.facts["seconds"] += seconds
        line["tokens_per_second"] = round(self.settings.batch_size * self.data.length / seconds, 1)
        self._evaluate(line)
        self.run.log({"stage": self.settings.stage, "stage_index": self.index, **line})

    def _skip(self, loss: float, norm: float, lowered: bool) -> None:
        self.facts["skipped"] += 1
        if lowered:  # fp16 begins with a scale that is too large for most
            return
        self.facts["in_a_row"] += 1
        console.print(f"step {self.facts['step'] + 1} skipped: loss {loss:g}, gradient norm {norm:g}")
        if self.facts["in_a_row"] >= MOST_SKIPPED:
            raise self._not_finite(f"{MOST_SKIPPED} steps in a row were not finite")

    def _not_finite(self, what: str) -> LimbeckError:
        """What is said where steps are skipped; before the first good one, no rate can be what was wrong."""
        lower = f"--set stages.{self.index}.lr={self.settings.lr / 3:.1e} --out another-folder"
        return LimbeckError(
            f"stage {self.settings.stage}: {what}",
            expected="a finite loss and gradient",
            hint=lower
            if self.facts["loss"] is not None
            else "--set precision=fp32; the rate is not the cause, no step has moved a weight yet",
        )

    def _evaluate(self, line: dict[str, Any]) -> None:
        """Loss on held-out text, where it is due."""
        every = self.settings.eval_steps
        if not every or self.held_out is None or self.facts["step"] % every:
            return
        count, counts = self._judged
        with self.average.lent() if self.average else nullcontext(), no_grad():
            # blocks that are sharded run in all processes or in none, so all of them see all of the text
            first, mine = (0, count) if self.held.sharded else share(count)
            batches = (self.held_out.batch(at, 1).to(self.device) for at in range(first, first + mine))
            found = [losses for batch in batches if (losses := self.stage.evaluate(batch, counts))]
        total = sum(total_loss(fetch(0.0, losses)[1]) for losses in found)
        loss = total if self.held.sharded else add_up({"loss": total})["loss"]
        line["held_out_loss"] = self.facts["held_out_loss"] = loss
        if self.facts["best_loss"] is None or loss < self.facts["best_loss"]:
            self.facts["best_loss"], self.facts["waited"] = loss, 0
            if self.settings.patience:
                source = self.average.values if self.average else self.parameters
                self.best = {name: t.detach().clone() for name, t in source.items()}
        else:
            self.facts["waited"] += 1

    @cached_property
    def _judged(self) -> tuple[int, dict[str, float]]:
        """How many held-out sequences are measured, and what their losses are divided by: the counts of all of them."""
        assert self.held_out is not None
        count = min(self.settings.eval_sequences, self.held_out.n_sequences)
        if self.stage.by_targets:
            count = count_with_targets(self.held_out, count)
        counts: dict[str, float] = {}
        for at in range(count):  # every process counts all of them itself
            for name, value in self.stage.count(self.held_out.batch(at, 1)).items():
                counts[name] = counts.get(name, 0.0) + value
        return count, counts

    def _resume(self) -> None:
        found = self.run.last_checkpoint(self.index)
        self.run.forget(self.index, found[2]["step"] if found else 0)
        if found is None:
            return
        tensors, optimizer, facts = found
        self.facts |= {"position": self._place(facts["step"]), **facts}
        kinds: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("|")
            kinds.setdefault(kind, {})[name] = self.held.part(name, tensor).to(self.device)
        copy_into(self.parameters, kinds["last"])
        if self.average is not None:
            self.average.values = kinds["average"]
        self.best = kinds.get("best")
        self.optimizer.load_state_dict(self.optimizer.with_names(optimizer, self.held.part))
        console.print(f"{self.settings.stage}: going on from step {self.facts['step']} of {self.steps}")

    def save(self) -> None:
        """Keep a checkpoint."""
        kinds = {"last": self.parameters, "average": self.average and self.average.values, "best": self.best}
        whole = self.held.whole
        tensors = {f"{kind}|{name}": whole(name, t) for kind, held in kinds.items() for name, t in (held or {}).items()}
        optimizer = self.optimizer.with_names(self.optimizer.state_dict(), whole)
        self.run.checkpoint(self.index, self.facts["step"], tensors, optimizer, self.facts)


def accumulate(stage: Stage, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Gradients of a step, by counts taken over all of its micro-batches and processes first; this process's losses."""
    counts = counts_of(stage, batches)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        add_to(sums, stage.backward(batch, counts))
    return sums


def alone_in(stage: Stage) -> list[list[str]]:
    """Names of the parameters that learn apart from all others, layer by layer; none where all learn together."""
    return getattr(stage, "layer_by_layer", list)()


def fetch(norm: Tensor | float, sums: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """The norm of the gradient and the losses as numbers: the one time in a step that a device is waited for."""
    values = [torch.as_tensor(value, dtype=torch.float64) for value in (norm, *sums.values())]
    where = next((v.device for v in values if v.device.type != "cpu"), values[0].device)
    found = torch.stack([v.to(where, non_blocking=True) for v in values]).tolist()
    return found[0], dict(zip(sums, found[1:]))


def counts_of(stage: Stage, batches: Sequence[Batch]) -> dict[str, float]:
    """What the losses of a step are divided by, over all of its micro-batches and processes."""
    counts: dict[str, float] = {}
    for batch in batches:
        for name, value in stage.count(batch).items():
            counts[name] = counts.get(name, 0.0) + value
    return add_up(counts)


def add_to(sums: dict[str, Tensor], losses: dict[str, Tensor]) -> None:
    """sums += losses, by name."""
    for name, value in losses.items():
        sums[name] = sums[name] + value if name in sums else value


def total_loss(losses: dict[str, float]) -> float:
    """The loss; that of stages of many layers is the mean over them."""
    return losses["loss"] if "loss" in losses else sum(losses.values()) / len(losses)


def parts_of(losses: dict[str, float]) -> dict[str, float]:
    """The losses without their total."""
    return {name: value for name, value in losses.items() if name != "loss"}
