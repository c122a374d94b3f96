"""The training loop of stages 1, 2 and 3 and of small teachers. It knows no stage: a `Stage` brings the loss.

    facts = Trainer(stage, settings, data, run, index=2, position=0, held_out=held_out).train()

`train` is the loop, `train_step` one step of it: batches, forward, loss and backward of each micro-batch, then gradient
clipping and the optimizer (`apply_gradients`). `limbeck.training.joint_trainer` drives several trainers on the same
passes of the teacher.

Losses are divided by counts taken over the whole step before its first backward pass, so micro-batches change nothing.
With several processes each takes its rows of a step; counts are summed over processes before the first backward pass
and gradients after the last, so a step equals that of one process with all rows (docs/guides/gpu.md).

A resumed stage continues bit for bit on a CPU: weights, optimizer, averages and data position are its whole state.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, no_grad

from limbeck.core.collectives import all_reduce_scalars, broadcast_from_main, sync_stop_and_save
from limbeck.core.console import console, progress
from limbeck.core.distributed import get_local_rows
from limbeck.core.errors import LimbeckError
from limbeck.core.live import current
from limbeck.core.screen import is_drawn
from limbeck.core.signals import TrainingInterrupted, graceful_shutdown
from limbeck.core.stage_settings import Trained
from limbeck.data.dataset import BatchPrefetcher
from limbeck.data.packing import Batch, SequenceDataset, count_eval_sequences, take_sequences_with_targets
from limbeck.report.figures.curves import read_metrics
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
from limbeck.training.stage_protocol import (
    Stage,
    add_losses,
    get_buffers,
    get_clip_groups,
    reduce_counts,
    sum_counts,
    total_loss,
)

MAX_SKIPPED_STEPS = 5  # non-finite steps in a row


class Trainer:
    """Trains one student in one stage, from its last checkpoint if there is one.

    Args:
        stage: what to minimize, and by which parameters.
        settings: the stage's part of the recipe.
        data: training text, as sequences.
        run: where metrics and checkpoints go.
        index: number of the stage in the recipe.
        position: of the stage's first sequence in `data`.
        held_out: text for the held-out loss every `settings.eval_steps` steps.
    """

    def __init__(
        self,
        stage: Stage,
        settings: Trained,
        data: SequenceDataset,
        run: RunDirectory,
        *,
        index: int,
        position: int,
        held_out: SequenceDataset | None = None,
    ):
        self.stage, self.settings, self.data, self.run, self.index = stage, settings, data, run, index
        self.name: str = settings.stage  # type: ignore[attr-defined]
        self.start, self.held_out = position, held_out
        self.model_parameters = stage.parameters()
        self.sharded_parameters = ShardedParameters(self.model_parameters)
        # what this process updates and saves: whole parameters, or its shard of those that are sharded
        self.parameters = self.sharded_parameters.local
        broadcast_from_main(p for name, p in self.parameters.items() if name not in self.sharded_parameters.sharded)
        self.device = next(iter(self.model_parameters.values())).device
        self.steps = count_training_steps(settings, data.length)
        self.tokens_per_step = settings.batch_size * data.length
        self.first_row, self.rows = get_local_rows(settings.batch_size)
        self.micro_batch_size = min(settings.micro_batch_size or self.rows, self.rows)
        self.prefetcher = BatchPrefetcher(self._read_batches, self.device)
        self.optimizer = StageOptimizer(self.parameters, stage.learning_rates(settings), settings, stage.student)
        self.ema = ExponentialMovingAverage(self.parameters, settings.ema_decay) if settings.ema_decay else None
        self.best: dict[str, Tensor] | None = None  # weights of the best held-out loss, where `patience` is set
        self.state: dict[str, Any] = {  # saved with each checkpoint, so these names are stored
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
        self.positions: dict[int, int] = {}  # where the sequences of a step begin, of those that have been read
        self._resume()
        self.scaler = LossScaler(self.state, needs_loss_scaling(stage.autocast, self.device.type))
        self.early_stopping = LayerEarlyStopping(getattr(settings, "layer_early_stopping", None), self.state)

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.state["step"]

    @property
    def is_done(self) -> bool:
        """Whether the steps are used up, the patience is over, or every layer has converged."""
        out_of_patience = bool(self.settings.patience and self.state["waited"] >= self.settings.patience)
        return self.step >= self.steps or out_of_patience or self.early_stopping.all_stopped

    def train(self) -> dict[str, Any]:
        """Train to the end of the stage's token budget.

        Returns:
            steps, tokens, seconds, skipped steps, the data position after the stage, first and last loss.

        Raises:
            LimbeckError: the loss was not finite for `MAX_SKIPPED_STEPS` steps in a row.
            TrainingInterrupted: the process was signaled to stop; a checkpoint was saved.
        """
        saved_at = time.monotonic()
        if self.step:
            self._show_earlier_steps()
        with (
            self.training_mode(),
            graceful_shutdown() as stop_requested,
            progress(self.name, self.steps, "steps", initial=self.step) as advance,
        ):
            while not self.is_done:
                step_began = time.monotonic()
                metrics = self.train_step()
                self.log_step(metrics, time.monotonic() - step_began)
                speed = self.tokens_per_step * self.step / max(self.state["seconds"], 1e-9)
                advance(1, note=f"loss {metrics['loss']:.4g}, {speed:.0f} tokens/s")
                current().record(metrics["loss"], metrics["tokens_per_second"], metrics.get("held_out_loss"))
                checkpoint_due = time.monotonic() - saved_at > self.run.recipe.checkpoint_seconds
                stop, save = sync_stop_and_save(stop_requested(), checkpoint_due)
                if stop or (save and self.step < self.steps):  # after the last step the result itself is saved
                    self.save_checkpoint()
                    saved_at = time.monotonic()
                    current().save(self.step)
                if stop:
                    raise TrainingInterrupted(f"Interrupted at step {self.step}/{self.steps}; checkpoint saved.")
        return self.finish()

    @contextmanager
    def training_mode(self) -> Iterator[None]:
        """Let the stage's parameters take gradients; at the end, free these and stop reading batches."""
        parameters = self.model_parameters.values()
        for parameter in parameters:
            parameter.requires_grad_(True)
        try:
            yield
        finally:
            self.prefetcher.close()
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None

    def train_step(self) -> dict[str, Any]:
        """Do one optimizer step; returns its metrics."""
        self.prepare_stage()
        batches = self.next_batches()
        counts = reduce_counts(self.stage, batches)
        losses: dict[str, Tensor] = {}
        for batch in batches:
            # forward, loss and backward, one micro-batch at a time; gradients add up in the parameters
            add_losses(losses, self.stage.backward(batch, counts))
        return self.apply_gradients(losses)

    def prepare_stage(self) -> None:
        """Set the loss scale and the converged layers for the next step, and let objectives prepare for it."""
        self.stage.loss_scale = self.scaler.value
        self.stage.stopped = self.early_stopping.stopped
        getattr(self.stage, "begin_step", _ignore)(self.held_out)

    def next_batches(self) -> list[Batch]:
        """Return the micro-batches of the next step that are this process's, on the device."""
        return self.prefetcher.get_batches(self.step, last=self.step + 1 >= self.steps)

    def apply_gradients(self, losses: dict[str, Tensor]) -> dict[str, Any]:
        """Clip the accumulated gradients and do the optimizer step; returns the step's metrics.

        Args:
            losses: each loss, summed over this process's micro-batches.
        """
        step, settings = self.step, self.settings
        lr_multiplier = get_lr_multiplier(step, self.steps, settings)
        self.optimizer.set_lr_multiplier(lr_multiplier)
        self.sharded_parameters.reduce_gradients()
        self.scaler.unscale_gradients(self.parameters.values())
        grad_norm = clip_gradients(
            self.parameters, settings.max_grad_norm, self.sharded_parameters.sharded, get_clip_groups(self.stage)
        )
        norm, local_losses = fetch_scalars(grad_norm, losses)
        reduced = all_reduce_scalars(local_losses)
        loss = total_loss({**self.early_stopping.final_losses, **reduced})
        finite = math.isfinite(norm) and math.isfinite(loss)
        scale_lowered = self.scaler.update(finite)
        if finite:
            self.optimizer.step()
            if self.ema is not None:
                self.ema.update(step + 1)
            self.state["in_a_row"] = 0
            self.state["loss"] = loss
            if self.state["first_loss"] is None:
                self.state["first_loss"] = loss
            for layer in self.early_stopping.update(step + 1, reduced):
                console.print(f"{self.name}: {layer} converged at step {step + 1}")
        else:
            self._skip_step(loss, norm, scale_lowered)
        self.optimizer.zero_grad()
        self.sharded_parameters.clear_gradients()
        self.state["step"] += 1
        self.state["position"] = self.positions.get(step + 1, self._position_of(step + 1))
        self.positions.pop(step, None)
        metrics = {
            "step": self.step,
            "loss": loss,
            "losses": {name: value for name, value in reduced.items() if name != "loss"},
            "grad_norm": norm,
            "lr": settings.lr * lr_multiplier,
            "skipped": self.state["skipped"],
        }
        if self.scaler.enabled:
            metrics["loss_scale"] = self.stage.loss_scale
        return metrics

    def log_step(self, metrics: dict[str, Any], seconds: float) -> None:
        """Log a step that took `seconds`, with the held-out loss every `eval_steps` steps."""
        self.state["seconds"] += seconds
        metrics["tokens_per_second"] = round(self.tokens_per_step / seconds, 1)
        if self.settings.eval_steps and self.held_out is not None and self.step % self.settings.eval_steps == 0:
            metrics["held_out_loss"] = self._evaluate()
        self.run.log({"stage": self.name, "stage_index": self.index, **metrics})

    def save_checkpoint(self) -> None:
        """Write weights, averages, optimizer and state to the run directory; every process takes part."""
        weights = {"last": self.parameters, "average": self.ema and self.ema.values, "best": self.best}
        gather = self.sharded_parameters.gather
        tensors = {
            f"{kind}|{name}": gather(name, tensor)
            for kind, by_name in weights.items()
            for name, tensor in (by_name or {}).items()
        }
        tensors |= {f"memory|{name}": tensor for name, tensor in get_buffers(self.stage).items()}
        optimizer = self.optimizer.map_state_tensors(self.optimizer.state_dict(), gather)
        self.run.save_checkpoint(self.index, self.step, tensors, optimizer, self.state)

    def finish(self) -> dict[str, Any]:
        """Put the best or averaged weights, if any, into the parameters; returns what `train` returns.

        Raises:
            LimbeckError: every step was skipped.
        """
        if self.state["loss"] is None and self.state["skipped"]:
            raise self._not_finite_error(f"all {self.state['skipped']} steps were skipped")
        if self.best is not None:
            assign_parameters(self.parameters, self.best)
        elif self.ema is not None:
            self.ema.copy_to_parameters()
        return {
            **self.state,
            "steps": self.step,
            "tokens": self.step * self.tokens_per_step,
            "trained_parameters": self.sharded_parameters.numel,
        }

    def _read_batches(self, step: int) -> list[Batch]:
        """Read this process's micro-batches of a step, on the CPU."""
        offsets = range(0, self.rows, self.micro_batch_size)
        sizes = [min(self.micro_batch_size, self.rows - offset) for offset in offsets]
        if not self.stage.requires_targets:
            first = self._position_of(step) + self.first_row
            return [self.data.batch(first + offset, size) for offset, size in zip(offsets, sizes)]
        # which sequences have targets is unknown before they are read, so every process reads the whole batch
        position = self.positions.setdefault(step, self.state["position"])
        batch, self.positions[step + 1] = take_sequences_with_targets(self.data, position, self.settings.batch_size)
        starts = [self.first_row + offset for offset in offsets]
        return [batch.select_rows(slice(start, start + size)) for start, size in zip(starts, sizes)]

    def _position_of(self, step: int) -> int:
        """Return the position of a step's first sequence if no sequence was skipped."""
        return self.start + step * self.settings.batch_size

    def _skip_step(self, loss: float, norm: float, scale_lowered: bool) -> None:
        """Count a step whose loss or gradient is not finite; raises when too many follow each other."""
        self.state["skipped"] += 1
        if scale_lowered:  # the first loss scales of fp16 are too large for most models
            return
        self.state["in_a_row"] += 1
        console.print(f"step {self.step + 1} skipped: loss {loss:g}, gradient norm {norm:g}")
        if self.state["in_a_row"] >= MAX_SKIPPED_STEPS:
            raise self._not_finite_error(f"{MAX_SKIPPED_STEPS} steps in a row were not finite")

    def _not_finite_error(self, problem: str) -> LimbeckError:
        lower_lr = f"--set stages.{self.index}.lr={self.settings.lr / 3:.1e} --out another-folder"
        precision = "--set precision=fp32; the learning rate is not the cause, no step has changed a weight yet"
        return LimbeckError(
            f"stage {self.name}: {problem}",
            expected="a finite loss and gradient",
            hint=precision if self.state["loss"] is None else lower_lr,
        )

    def _evaluate(self) -> float:
        """Compute the held-out loss, with averaged weights if there are any, and note whether it is the best."""
        assert self.held_out is not None
        n_sequences, counts = self._held_out_counts
        is_sharded = bool(self.sharded_parameters.sharded)
        with self.ema.average_parameters() if self.ema else nullcontext(), no_grad():
            # sharded blocks run in all processes or in none, so every process evaluates all sequences
            first, n_local = (0, n_sequences) if is_sharded else get_local_rows(n_sequences)
            batches = (self.held_out.batch(at, 1).to(self.device) for at in range(first, first + n_local))
            evaluated = [losses for batch in batches if (losses := self.stage.evaluate(batch, counts))]
        local = sum(total_loss(fetch_scalars(0.0, losses)[1]) for losses in evaluated)
        loss = local if is_sharded else all_reduce_scalars({"loss": local})["loss"]
        self.state["held_out_loss"] = loss
        if self.state["best_loss"] is None or loss < self.state["best_loss"]:
            self.state["best_loss"], self.state["waited"] = loss, 0
            if self.settings.patience:
                weights = self.ema.values if self.ema else self.parameters
                self.best = {name: t.detach().clone() for name, t in weights.items()}
        else:
            self.state["waited"] += 1
        return loss

    @cached_property
    def _held_out_counts(self) -> tuple[int, dict[str, float]]:
        """Number of held-out sequences that are evaluated, and the counts of all of them for `Stage.evaluate`."""
        assert self.held_out is not None
        n_sequences = min(self.settings.eval_sequences, self.held_out.n_sequences)
        if self.stage.requires_targets:
            n_sequences = count_eval_sequences(self.held_out, n_sequences)
        # every process counts all of them itself, so nothing is communicated
        return n_sequences, sum_counts(self.stage, (self.held_out.batch(at, 1) for at in range(n_sequences)))

    def _resume(self) -> None:
        """Load the last checkpoint, if there is one, and cut the log after its step."""
        checkpoint = self.run.load_last_checkpoint(self.index)
        self.run.truncate_log(self.index, checkpoint[2]["step"] if checkpoint else 0)
        if checkpoint is None:
            return
        tensors, optimizer, state = checkpoint
        self.state |= {"position": self._position_of(state["step"]), **state}
        weights: dict[str, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            kind, _, name = key.partition("|")
            weights.setdefault(kind, {})[name] = self.sharded_parameters.local_shard(name, tensor).to(self.device)
        assign_parameters(self.parameters, weights["last"])
        for name, buffer in get_buffers(self.stage).items():
            buffer.copy_(weights["memory"][name])
        if self.ema is not None:
            self.ema.values = weights["average"]
        self.best = weights.get("best")
        self.optimizer.load_state_dict(self.optimizer.map_state_tensors(optimizer, self.sharded_parameters.local_shard))
        console.print(f"{self.name}: resuming at step {self.step}/{self.steps}")

    def _show_earlier_steps(self) -> None:
        """Show what earlier processes have done of this stage."""
        view = current()
        view.resume(self.step, self.steps, self.state["seconds"])
        if not is_drawn():
            return
        for step in read_metrics(self.run.metrics_path).get((self.index, self.name), []):
            view.record(step["loss"], step.get("tokens_per_second"), step.get("held_out_loss"))


def _ignore(held_out: SequenceDataset | None) -> None:
    """Stand in for `begin_step` of stages that have none."""


def fetch_scalars(norm: Tensor | float, losses: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """Copy gradient norm and losses to the CPU: the one device synchronization of a step."""
    values = [torch.as_tensor(value, dtype=torch.float64) for value in (norm, *losses.values())]
    device = next((v.device for v in values if v.device.type != "cpu"), values[0].device)
    numbers = torch.stack([v.to(device, non_blocking=True) for v in values]).tolist()
    return numbers[0], dict(zip(losses, numbers[1:]))
