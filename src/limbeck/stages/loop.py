"""The one training loop of all stages that learn by gradient; it knows no stage.

    train(stage, settings, data, run, index, position, held_out)

Gradient accumulation with counts taken over the whole step first (so a split changes nothing), clipping, non-finite
steps skipped and counted, a line of metrics a step, checkpoints by the clock and on SIGTERM. A resumed run continues
bit for bit on a CPU: weights, optimiser, averages and data position are all its state.

Of several processes each takes its rows of a step. Counts are summed over them before the first gradient, gradients
after the last one, so a step is that of one process with all rows (docs/scaling.md).

`Learner` is a step in its parts, for whoever trains several students at once (`limbeck.stages.together`).
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn, no_grad

from limbeck.console import console, progress
from limbeck.data.packing import Batch, Sequences
from limbeck.distributed import add_up, agree, share, take_from_main
from limbeck.errors import LimbeckError
from limbeck.recipe import Trained
from limbeck.stages.interrupt import Stopped, watch
from limbeck.stages.optimize import Average, Optimizer, copy_into, gradient_norm, learning_rate, steps_of
from limbeck.stages.run import RunDirectory
from limbeck.stages.shards import Held

MOST_SKIPPED = 5  # non-finite steps in a row


class Stage(Protocol):
    """What the loop asks of a stage."""

    def parameters(self) -> dict[str, nn.Parameter]: ...

    def learning_rates(self, recipe: Any) -> dict[str, float]: ...

    def count(self, batch: Batch) -> dict[str, float]: ...

    def backward(self, batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]: ...

    def evaluate(self, batch: Batch) -> dict[str, Tensor]: ...


def train(
    stage: Stage,
    settings: Trained,
    data: Sequences,
    run: RunDirectory,
    index: int,
    position: int,
    held_out: Sequences | None = None,
) -> dict[str, Any]:
    """Train to the end of the stage's budget, from its last checkpoint if there is one.

    Args:
        stage: what to minimise, and by which parameters.
        position: of the stage's first sequence in `data`.
        held_out: text for `settings.evaluate_every`.

    Returns:
        facts: steps, tokens, seconds, skipped steps, the data position after the stage, first and last loss.

    Raises:
        LimbeckError: the loss was not finite several steps in a row.
        Stopped: SIGTERM came; the state is kept.
    """
    with learning(stage) as parameters, watch() as asked_to_stop:
        return _go(Learner(stage, settings, data, run, index, position, parameters, held_out), asked_to_stop)


@contextmanager
def learning(stage: Stage) -> Iterator[dict[str, nn.Parameter]]:
    """The parameters of a stage, which take gradients meanwhile."""
    parameters = stage.parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        yield parameters
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None


def _go(learner: "Learner", asked_to_stop: Callable[[], bool]) -> dict[str, Any]:
    settings, saved = learner.settings, time.monotonic()
    with progress(f"{settings.stage}", learner.steps, "steps", done=learner.step) as advance:
        while not learner.over:
            began = time.monotonic()
            batches, counts = learner.batches()
            sums: dict[str, Tensor] = {}
            for batch in batches:
                add_to(sums, learner.stage.backward(batch, counts))
            line = learner.update(sums)
            learner.note(line, time.monotonic() - began)
            advance(1, note=f"loss {line['loss']:.4g}, {learner.speed:.0f} tokens/s")
            stop, save = agree(asked_to_stop(), time.monotonic() - saved > learner.run.recipe.checkpoint_seconds)
            if learner.step < learner.steps and (stop or save):
                learner.save()
                saved = time.monotonic()
            if stop:
                raise Stopped(f"asked to stop in step {learner.step} of {learner.steps}, state kept")
    return learner.finish()


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
        self.first, self.rows = share(settings.batch)
        self.micro = min(settings.micro_batch or self.rows, self.rows)
        self.optimizer = Optimizer(self.parameters, stage.learning_rates(settings), settings)
        self.average = Average(self.parameters, settings.ema) if settings.ema else None
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
        }
        self._resume()

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.facts["step"]

    @property
    def over(self) -> bool:
        """Whether no step is left, or patience is at its end."""
        return self.step >= self.steps or self._out_of_patience()

    @property
    def speed(self) -> float:
        """Tokens a second so far."""
        return self.settings.batch * self.data.length * self.step / max(self.facts["seconds"], 1e-9)

    def finish(self) -> dict[str, Any]:
        """Leave the weights that are handed on; returns what `train` returns."""
        if self.best is not None:
            copy_into(self.parameters, self.best)
        elif self.average is not None:
            self.average.take_over()
        sequences = self.facts["step"] * self.settings.batch
        return {
            **self.facts,
            "steps": self.facts["step"],
            "tokens": sequences * self.data.length,
            "position": self.start + sequences,
            "trained_parameters": self.held.numel,
        }

    def batches(self) -> tuple[list[Batch], dict[str, float]]:
        """The next step's micro-batches, and the counts that its losses are divided by."""
        step, settings = self.facts["step"], self.settings
        at = self.start + step * settings.batch + self.first
        sizes = [min(self.micro, self.rows - done) for done in range(0, self.rows, self.micro)]
        batches = [self.data.batch(at + i * self.micro, size).to(self.device) for i, size in enumerate(sizes)]
        counts: dict[str, float] = {}
        for batch in batches:
            for name, value in self.stage.count(batch).items():
                counts[name] = counts.get(name, 0.0) + value
        return batches, add_up(counts)

    def update(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        """Move the weights by the gradients that are there; returns the step's line of metrics.

        Args:
            sums: each loss, summed over the step's micro-batches.
        """
        step, settings = self.facts["step"], self.settings
        rate = learning_rate(step, self.steps, settings)
        self.optimizer.set_rate(rate)
        self.held.take_gradients()
        norm = gradient_norm(self.parameters, settings.clip, self.held.sharded)
        loss, losses = _total(add_up({name: float(value) for name, value in sums.items()}))
        if math.isfinite(norm) and math.isfinite(loss):
            self.optimizer.step()
            if self.average is not None:
                self.average.update(step + 1)
            self.facts["in_a_row"] = 0
            self.facts["loss"] = loss
            if self.facts["first_loss"] is None:
                self.facts["first_loss"] = loss
        else:
            self._skip(loss, norm)
        self.optimizer.zero_grad()
        self.held.drop_gradients()
        self.facts["step"] += 1
        return {"step": self.facts["step"], "loss": loss, "losses": losses, "grad_norm": norm, "lr": settings.lr * rate}

    def note(self, line: dict[str, Any], seconds: float) -> None:
        """Log a step that took so long, with the loss on held-out text where that is due."""
        self.facts["seconds"] += seconds
        line["tokens_per_second"] = round(self.settings.batch * self.data.length / seconds, 1)
        self._evaluate(line)
        self.run.log({"stage": self.settings.stage, "stage_index": self.index, **line})

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

    def _evaluate(self, line: dict[str, Any]) -> None:
        """Loss on held-out text, where it is due."""
        every = self.settings.evaluate_every
        if not every or self.held_out is None or self.facts["step"] % every:
            return
        count = min(self.settings.evaluate_sequences, self.held_out.n_sequences)
        with self.average.lent() if self.average else nullcontext(), no_grad():
            # blocks that are sharded run in all processes or in none, so all of them see all of the text
            first, mine = (0, count) if self.held.sharded else share(count)
            batches = (self.held_out.batch(at, 1).to(self.device) for at in range(first, first + mine))
            found = [self.stage.evaluate(batch) for batch in batches]
        total = sum(_total({n: float(v) for n, v in losses.items()})[0] for losses in found)
        loss = total / count if self.held.sharded else add_up({"loss": total})["loss"] / count
        line["held_out_loss"] = self.facts["held_out_loss"] = loss
        if self.facts["best_loss"] is None or loss < self.facts["best_loss"]:
            self.facts["best_loss"], self.facts["waited"] = loss, 0
            if self.settings.patience:
                source = self.average.values if self.average else self.parameters
                self.best = {name: t.detach().clone() for name, t in source.items()}
        else:
            self.facts["waited"] += 1

    def _out_of_patience(self) -> bool:
        return bool(self.settings.patience and self.facts["waited"] >= self.settings.patience)

    def _resume(self) -> None:
        found = self.run.last_checkpoint(self.index)
        self.run.forget(self.index, found[2]["step"] if found else 0)
        if found is None:
            return
        tensors, optimizer, self.facts = found
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


def add_to(sums: dict[str, Tensor], losses: dict[str, Tensor]) -> None:
    """sums += losses, by name."""
    for name, value in losses.items():
        sums[name] = sums[name] + value if name in sums else value


def _total(losses: dict[str, float]) -> tuple[float, dict[str, float]]:
    """The loss, which stages of many layers do not name, and its parts."""
    parts = {name: value for name, value in losses.items() if name != "loss"}
    return losses["loss"] if "loss" in losses else sum(parts.values()) / len(parts), parts
