"""Stages 1 and 2 of several students at once: one pass of the teacher per batch, from which all students learn.

    results = train_jointly([Trainer(stage, settings, data, run, index=1, position=0) for ...])
    results[0]             # the facts of the first student's stage, or the error that ended it

Each student keeps its own optimizer, log and checkpoints in its own run directory, and gets the same weights as if it
were trained alone: the teacher's pass is the same, and no student sees another's gradients. Students may differ in all
that does not change the teacher's pass: mixer, layers, target, loss, learning rate, number of steps. In each step those
take part that have done the fewest steps, so students that were interrupted at different steps meet again.

One process only; several processes share out the rows of one student's step instead.
"""

import time
from contextlib import ExitStack
from typing import Any, cast

import torch
from torch import Tensor

from limbeck.core.console import progress
from limbeck.core.live import current
from limbeck.core.signals import TrainingInterrupted, graceful_shutdown
from limbeck.core.system import synchronize_device
from limbeck.data.packing import Batch
from limbeck.models.backbone import run_backbone
from limbeck.training.alignment import LayerwiseStage, layerwise_losses, teacher_hooks
from limbeck.training.stage_protocol import add_losses, reduce_counts
from limbeck.training.trainer import Trainer


def train_jointly(trainers: list[Trainer]) -> list[dict[str, Any] | Exception]:
    """Train all students to the end of their stages.

    Args:
        trainers: of one kind of stage, with the same teacher, text, position, batch and micro-batch size.

    Returns:
        For each student the facts that `Trainer.train` returns, with `students_sharing_pass` (how many shared the
        teacher) and `saved_seconds` (its part of the teacher's time that sharing saved), or the error that ended it.

    Raises:
        TrainingInterrupted: the process was signaled to stop; checkpoints of all were saved.
    """
    errors: dict[int, Exception] = {}  # by place in `trainers`
    saved_seconds = [0.0] * len(trainers)
    first = trainers[0]
    with ExitStack() as stack, graceful_shutdown() as stop_requested:
        for trainer in trainers:
            stack.enter_context(trainer.training_mode())
        steps_left = sum(max(trainer.steps - trainer.step, 0) for trainer in trainers)
        teacher_seconds = _teacher_seconds_per_step(first) if steps_left else 0.0
        saved_at = time.monotonic()
        current().clear()
        with progress(f"{first.name}, {len(trainers)} students", steps_left, "steps") as advance:
            while running := [i for i, one in enumerate(trainers) if i not in errors and not one.is_done]:
                step = min(trainers[i].step for i in running)
                active = [i for i in running if trainers[i].step == step]
                step_began = time.monotonic()
                metrics = _train_step({i: trainers[i] for i in active}, errors)
                seconds = time.monotonic() - step_began
                for i in metrics:
                    trainers[i].log_step(metrics[i], seconds / len(active))
                    saved_seconds[i] += teacher_seconds * (len(active) - 1) / len(active)
                speed = len(active) * first.tokens_per_step / (time.monotonic() - step_began)
                advance(len(active), note=f"{speed:.0f} tokens/s over all students")
                losses = [one["loss"] for one in metrics.values()]
                current().record(sum(losses) / len(losses) if losses else None, speed)
                stop = stop_requested()
                if stop or time.monotonic() - saved_at > first.run.recipe.checkpoint_seconds:
                    for i in range(len(trainers)) if stop else active:
                        if i not in errors and (stop or trainers[i].step < trainers[i].steps):
                            trainers[i].save_checkpoint()
                    saved_at = time.monotonic()
                if stop:
                    raise TrainingInterrupted(f"Interrupted at step {step + 1}/{first.steps}; checkpoints saved.")
        return [
            errors[i]
            if i in errors
            else {**one.finish(), "students_sharing_pass": len(trainers), "saved_seconds": saved_seconds[i]}
            for i, one in enumerate(trainers)
        ]


def _train_step(trainers: dict[int, Trainer], errors: dict[int, Exception]) -> dict[int, dict[str, Any]]:
    """Do one step of students that have done equally many; returns the metrics of those that did not fail.

    Args:
        trainers: by place in the list of all.
        errors: where the errors of students that fail are added, by place.
    """
    for trainer in trainers.values():
        trainer.prepare_stage()
    stages = {i: cast(LayerwiseStage, trainer.stage) for i, trainer in trainers.items()}
    first = next(iter(trainers.values()))
    batches = first.next_batches()
    counts = reduce_counts(first.stage, batches)
    totals: dict[int, dict[str, Tensor]] = {i: {} for i in trainers}
    for batch in batches:
        with layerwise_losses(stages, batch, counts, train=True, errors=errors) as losses:
            run_backbone(first.stage.teacher, batch)  # type: ignore[attr-defined]
        for i in trainers:
            add_losses(totals[i], losses[i])
    metrics = {}
    for i, trainer in trainers.items():
        if i in errors:
            continue
        try:
            metrics[i] = trainer.apply_gradients(totals[i])
        except Exception as error:
            errors[i] = error
    return metrics


@torch.no_grad()
def _teacher_seconds_per_step(trainer: Trainer) -> float:
    """Measure the seconds of the teacher's passes in a step, without any student."""
    batches = trainer.next_batches()
    # the first pass warms up caches and allocators
    seconds = min(_time_teacher_pass(cast(LayerwiseStage, trainer.stage), batches[0]) for _ in range(2))
    return seconds * len(batches)


def _time_teacher_pass(stage: LayerwiseStage, batch: Batch) -> float:
    device = stage.teacher.device
    synchronize_device(device)
    began = time.monotonic()
    with teacher_hooks([stage], batch, {}, stage.trained_modules()):
        run_backbone(stage.teacher, batch)
    synchronize_device(device)
    return time.monotonic() - began
