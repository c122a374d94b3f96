"""The one training loop of all stages that learn by gradient; it knows no stage.

    train(stage, settings, data, run, index, position, held_out)

Gradient accumulation with counts taken over the whole step first (so a split changes nothing), clipping, non-finite
steps skipped and counted, a line of metrics a step, checkpoints by the clock and on a signal to stop. A resumed run
continues bit for bit on a CPU: weights, optimiser, averages and data position are all its state.

Of several processes each takes its rows of a step. Counts are summed over them before the first gradient, gradients
after the last one, so a step is that of one process with all rows (docs/scaling.md).

One student in one stage: what moves its weights, how far it is, and what it keeps.

    trainer = Trainer(stage, settings, data, run, index, position, parameters)
    line = trainer.train_step()           # prepare_stage(), gradients of next_batches(), apply_gradients()
    trainer.log_step(line, seconds)
    trainer.finish()

The loop trains one (`limbeck.training.trainer`), or several on the same passes of the teacher (`limbeck.training.joint_trainer`).
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn, no_grad

from limbeck.core.console import console, progress
from limbeck.core.distributed import all_reduce_scalars, broadcast_from_main, get_local_rows, sync_stop_and_save
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Trained
from limbeck.core.signals import TrainingInterrupted, graceful_shutdown
from limbeck.data.dataset import BatchPrefetcher
from limbeck.data.packing import Batch, SequenceDataset, count_eval_sequences, take_sequences_with_targets
from limbeck.training.fsdp import ShardedParameters
from limbeck.training.optim import (
    ExponentialMovingAverage,
    LayerEarlyStopping,
    LossScaler,
    StageOptimizer,
    assign_parameters,
    clip_gradients,
    count_training_steps,
    get_lr_multiplier,
    needs_loss_scaling,
)
from limbeck.training.run_directory import RunDirectory

MAX_SKIPPED_STEPS = 5  # non-finite steps in a row


class Stage(Protocol):
    """What the loop asks of a stage."""

    autocast: Callable[[], Any]
    loss_scale: float
    stopped: set[str]  # names of those of its losses that are taken no more
    requires_targets: bool  # sequences without a target are passed over

    @property
    def student(self) -> nn.Module: ...

    def parameters(self) -> dict[str, nn.Parameter]: ...

    def learning_rates(self, recipe: Any) -> dict[str, float]: ...

    def count(self, batch: Batch) -> dict[str, float]: ...

    def backward(self, batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]: ...

    def evaluate(self, batch: Batch, counts: dict[str, float] | None = None) -> dict[str, Tensor]: ...


class Trainer:
    """One student in one stage: its parameters, optimiser and averages, and how far it is. See `train`."""

    def __init__(self, stage, settings, data, run, index, position, parameters, held_out):
        self.stage, self.settings, self.data, self.run, self.index = stage, settings, data, run, index
        self.start, self.held_out = position, held_out
        self.sharded_parameters = ShardedParameters(parameters)
        self.parameters = (
            self.sharded_parameters.local
        )  # what is kept and moved here: all, or a part of each that is sharded
        broadcast_from_main(p for name, p in self.parameters.items() if name not in self.sharded_parameters.sharded)
        self.device = next(iter(parameters.values())).device
        self.steps = count_training_steps(settings, data.length)
        self.first, self.rows = get_local_rows(settings.batch_size)
        self.micro = min(settings.micro_batch_size or self.rows, self.rows)
        self.prefetcher = BatchPrefetcher(self._batches_of, self.device)
        self.optimizer = StageOptimizer(self.parameters, stage.learning_rates(settings), settings, stage.student)
        self.ema = ExponentialMovingAverage(self.parameters, settings.ema_decay) if settings.ema_decay else None
        self.best: dict[str, Tensor] | None = None  # weights of the best held-out loss, where there is patience
        self.state: dict[str, Any] = {
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
        self.scale = LossScaler(self.state, needs_loss_scaling(stage.autocast, self.device.type))
        self.early_stopping = LayerEarlyStopping(getattr(settings, "layer_early_stopping", None), self.state)

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.state["step"]

    @property
    def is_done(self) -> bool:
        """Whether no step is left, or nothing to learn: no better loss for long, or no layer that still learns."""
        out_of_patience = bool(self.settings.patience and self.state["waited"] >= self.settings.patience)
        return self.step >= self.steps or out_of_patience or self.early_stopping.all_stopped

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second so far."""
        return self.settings.batch_size * self.data.length * self.step / max(self.state["seconds"], 1e-9)

    def finish(self) -> dict[str, Any]:
        """Leave the weights that are handed on; returns what `train` returns.

        Raises:
            LimbeckError: all steps were skipped, so that nothing was learnt.
        """
        if self.state["loss"] is None and self.state["skipped"]:
            raise self._not_finite(f"all of its {self.state['skipped']} steps were skipped")
        if self.best is not None:
            assign_parameters(self.parameters, self.best)
        elif self.ema is not None:
            self.ema.copy_to_parameters()
        return {
            **self.state,
            "steps": self.state["step"],
            "tokens": self.state["step"] * self.settings.batch_size * self.data.length,
            "trained_parameters": self.sharded_parameters.numel,
        }

    def train_step(self) -> dict[str, Any]:
        """A whole step of this student alone; returns its line of metrics."""
        self.prepare_stage()
        return self.apply_gradients(accumulate_gradients(self.stage, self.next_batches()))

    def prepare_stage(self) -> None:
        """Tell the stage what it has to know of the next step."""
        self.stage.loss_scale = self.scale.value
        self.stage.stopped = self.early_stopping.stopped

    def next_batches(self) -> list[Batch]:
        """The next step's micro-batches."""
        return self.prefetcher.get_batches(self.step, last=self.step + 1 >= self.steps)

    def _batches_of(self, step: int) -> list[Batch]:
        sizes = [min(self.micro, self.rows - done) for done in range(0, self.rows, self.micro)]
        if self.stage.requires_targets:
            # which sequences have targets nobody knows before they are read, so every process reads the whole batch
            at = self.places.setdefault(step, self.state["position"])
            batch, self.places[step + 1] = take_sequences_with_targets(self.data, at, self.settings.batch_size)
            begins = [self.first + i * self.micro for i in range(len(sizes))]
            return [batch.select_rows(slice(begin, begin + size)) for begin, size in zip(begins, sizes)]
        at = self._place(step) + self.first
        return [self.data.batch(at + i * self.micro, size) for i, size in enumerate(sizes)]

    def _place(self, step: int) -> int:
        """Position of a step's first sequence, where every sequence counts."""
        return self.start + step * self.settings.batch_size

    def apply_gradients(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        """Move the weights by the gradients that are there; returns the step's line of metrics.

        Args:
            sums: each loss, summed over the step's micro-batches.
        """
        step, settings = self.state["step"], self.settings
        rate = get_lr_multiplier(step, self.steps, settings)
        self.optimizer.set_lr_multiplier(rate)
        self.sharded_parameters.reduce_gradients()
        self.scale.unscale_gradients(self.parameters.values())
        norm, mine = fetch_scalars(
            clip_gradients(
                self.parameters, settings.max_grad_norm, self.sharded_parameters.sharded, get_clip_groups(self.stage)
            ),
            sums,
        )
        losses = all_reduce_scalars(mine)
        loss = total_loss({**self.early_stopping.final_losses, **losses})
        finite = math.isfinite(norm) and math.isfinite(loss)
        lowered = self.scale.update(finite)
        if finite:
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(step + 1)
            self.state["in_a_row"] = 0
            self.state["loss"] = loss
            if self.state["first_loss"] is None:
                self.state["first_loss"] = loss
            for name in self.early_stopping.update(step + 1, losses):
                console.print(f"{settings.stage}: {name} has converged in step {step + 1}")
        else:
            self._skip(loss, norm, lowered)
        self.optimizer.zero_grad()
        self.sharded_parameters.clear_gradients()
        self.state["step"] += 1
        self.state["position"] = self.places.get(step + 1, self._place(step + 1))
        self.places.pop(step, None)
        line = {"step": self.state["step"], "loss": loss, "losses": parts_of(losses), "grad_norm": norm}
        line |= {"lr": settings.lr * rate, "skipped": self.state["skipped"]}
        if self.scale.enabled:
            line["loss_scale"] = self.stage.loss_scale
        return line

    def log_step(self, line: dict[str, Any], seconds: float) -> None:
        """Log a step that took so long, with the loss on held-out text where that is due."""
        self.state["seconds"] += seconds
        line["tokens_per_second"] = round(self.settings.batch_size * self.data.length / seconds, 1)
        self._evaluate(line)
        self.run.log({"stage": self.settings.stage, "stage_index": self.index, **line})

    def _skip(self, loss: float, norm: float, lowered: bool) -> None:
        self.state["skipped"] += 1
        if lowered:  # fp16 begins with a scale that is too large for most
            return
        self.state["in_a_row"] += 1
        console.print(f"step {self.state['step'] + 1} skipped: loss {loss:g}, gradient norm {norm:g}")
        if self.state["in_a_row"] >= MAX_SKIPPED_STEPS:
            raise self._not_finite(f"{MAX_SKIPPED_STEPS} steps in a row were not finite")

    def _not_finite(self, what: str) -> LimbeckError:
        """What is said where steps are skipped; before the first good one, no rate can be what was wrong."""
        lower = f"--set stages.{self.index}.lr={self.settings.lr / 3:.1e} --out another-folder"
        return LimbeckError(
            f"stage {self.settings.stage}: {what}",
            expected="a finite loss and gradient",
            hint=lower
            if self.state["loss"] is not None
            else "--set precision=fp32; the rate is not the cause, no step has moved a weight yet",
        )

    def _evaluate(self, line: dict[str, Any]) -> None:
        """Loss on held-out text, where it is due."""
        every = self.settings.eval_steps
        if not every or self.held_out is None or self.state["step"] % every:
            return
        count, counts = self._judged
        with self.ema.average_parameters() if self.ema else nullcontext(), no_grad():
            # blocks that are sharded run in all processes or in none, so all of them see all of the text
            first, mine = (0, count) if self.sharded_parameters.sharded else get_local_rows(count)
            batches = (self.held_out.batch(at, 1).to(self.device) for at in range(first, first + mine))
            found = [losses for batch in batches if (losses := self.stage.evaluate(batch, counts))]
        total = sum(total_loss(fetch_scalars(0.0, losses)[1]) for losses in found)
        loss = total if self.sharded_parameters.sharded else all_reduce_scalars({"loss": total})["loss"]
        line["held_out_loss"] = self.state["held_out_loss"] = loss
        if self.state["best_loss"] is None or loss < self.state["best_loss"]:
            self.state["best_loss"], self.state["waited"] = loss, 0
            if self.settings.patience:
                source = self.ema.values if self.ema else self.parameters
                self.best = {name: t.detach().clone() for name, t in source.items()}
        else:
            self.state["waited"] += 1

    @cached_property
    def _judged(self) -> tuple[int, dict[str, float]]:
        """How many held-out sequences are measured, and what their losses are divided by: the counts of all of them."""
        assert self.held_out is not None
        count = min(self.settings.eval_sequences, self.held_out.n_sequences)
        if self.stage.requires_targets:
            count = count_eval_sequences(self.held_out, count)
        counts: dict[str, float] = {}
        for at in range(count):  # every process counts all of them itself
            for name, value in self.stage.count(self.held_out.batch(at, 1)).items():
                counts[name] = counts.get(name, 0.0) + value
        return count, counts

    def _resume(self) -> None:
        found = self.run.load_last_checkpoint(self.index)
        self.run.truncate_log(self.index, found[2]["step"] if found else 0)
        if found is None:
            return
        tensors, optimizer, state = found
        self.state |= {"position": self._place(state["step"]), **state}
        kinds: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("|")
            kinds.setdefault(kind, {})[name] = self.sharded_parameters.local_shard(name, tensor).to(self.device)
        assign_parameters(self.parameters, kinds["last"])
        if self.ema is not None:
            self.ema.values = kinds["average"]
        self.best = kinds.get("best")
        self.optimizer.load_state_dict(self.optimizer.map_state_tensors(optimizer, self.sharded_parameters.local_shard))
        console.print(f"{self.settings.stage}: going on from step {self.state['step']} of {self.steps}")

    def save_checkpoint(self) -> None:
        """Keep a checkpoint."""
        kinds = {"last": self.parameters, "average": self.ema and self.ema.values, "best": self.best}
        whole = self.sharded_parameters.gather
        tensors = {f"{kind}|{name}": whole(name, t) for kind, held in kinds.items() for name, t in (held or {}).items()}
        optimizer = self.optimizer.map_state_tensors(self.optimizer.state_dict(), whole)
        self.run.save_checkpoint(self.index, self.state["step"], tensors, optimizer, self.state)


def accumulate_gradients(stage: Stage, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Gradients of a step, by counts taken over all of its micro-batches and processes first; this process's losses."""
    counts = reduce_counts(stage, batches)
    sums: dict[str, Tensor] = {}
    for batch in batches:
        add_losses(sums, stage.backward(batch, counts))
    return sums


def get_clip_groups(stage: Stage) -> list[list[str]]:
    """Names of the parameters that learn apart from all others, layer by layer; none where all learn together."""
    return getattr(stage, "clip_groups", list)()


def fetch_scalars(norm: Tensor | float, sums: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """The norm of the gradient and the losses as numbers: the one time in a step that a device is waited for."""
    values = [torch.as_tensor(value, dtype=torch.float64) for value in (norm, *sums.values())]
    where = next((v.device for v in values if v.device.type != "cpu"), values[0].device)
    found = torch.stack([v.to(where, non_blocking=True) for v in values]).tolist()
    return found[0], dict(zip(sums, found[1:]))


def reduce_counts(stage: Stage, batches: Sequence[Batch]) -> dict[str, float]:
    """What the losses of a step are divided by, over all of its micro-batches and processes."""
    counts: dict[str, float] = {}
    for batch in batches:
        for name, value in stage.count(batch).items():
            counts[name] = counts.get(name, 0.0) + value
    return all_reduce_scalars(counts)


def add_losses(sums: dict[str, Tensor], losses: dict[str, Tensor]) -> None:
    """sums += losses, by name."""
    for name, value in losses.items():
        sums[name] = sums[name] + value if name in sums else value


def total_loss(losses: dict[str, float]) -> float:
    """The loss; that of stages of many layers is the mean over them."""
    return losses["loss"] if "loss" in losses else sum(losses.values()) / len(losses)


def parts_of(losses: dict[str, float]) -> dict[str, float]:
    """The losses without their total."""
    return {name: value for name, value in losses.items() if name != "loss"}


def train(
    stage: Stage,
    settings: Trained,
    data: SequenceDataset,
    run: RunDirectory,
    index: int,
    position: int,
    held_out: SequenceDataset | None = None,
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
        TrainingInterrupted: a signal to stop came; the state is kept.
    """
    with enable_gradients(stage) as parameters, graceful_shutdown() as stop_requested:
        trainer = Trainer(stage, settings, data, run, index, position, parameters, held_out)
        with closing(trainer.prefetcher):
            return _go(trainer, stop_requested)


@contextmanager
def enable_gradients(stage: Stage) -> Iterator[dict[str, nn.Parameter]]:
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


def _go(trainer: Trainer, stop_requested: Callable[[], bool]) -> dict[str, Any]:
    settings, saved = trainer.settings, time.monotonic()
    with progress(f"{settings.stage}", trainer.steps, "steps", initial=trainer.step) as advance:
        while not trainer.is_done:
            began = time.monotonic()
            line = trainer.train_step()
            trainer.log_step(line, time.monotonic() - began)
            advance(1, note=f"loss {line['loss']:.4g}, {trainer.tokens_per_second:.0f} tokens/s")
            stop, save = sync_stop_and_save(
                stop_requested(), time.monotonic() - saved > trainer.run.recipe.checkpoint_seconds
            )
            if stop or (save and trainer.step < trainer.steps):
                trainer.save_checkpoint()
                saved = time.monotonic()
            if stop:
                raise TrainingInterrupted(f"asked to stop in step {trainer.step} of {trainer.steps}, state kept")
    return trainer.finish()
