"""Stages 1 and 2 of several students at once: the teacher runs once a batch, and every student's layers learn from it.

    ends = train_jointly([StudentTraining(stage, settings, data, run, 1, position) for ...])
    ends[0]                # the facts of the first one's stage, or the error that it ended with

Each member keeps its own optimiser, log and checkpoints in its own run directory, as if it were alone, and gets the
same weights: the teacher's pass is the same, and no member sees another's gradients. Members may differ in all that
does not change the teacher's pass: mixer, layers, target, loss, rates, number of steps. In each step those take part
that are furthest behind, so members that were stopped in different steps meet again.

One process only: several share out the rows of one student's step instead.
"""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from limbeck.core.console import progress
from limbeck.core.recipe import Trained
from limbeck.core.signals import TrainingInterrupted, graceful_shutdown
from limbeck.data.packing import Batch, SequenceDataset
from limbeck.models.backbone import run_backbone
from limbeck.models.hooks import hook_modules
from limbeck.training.alignment import LayerwiseStage, run_layerwise_pass
from limbeck.training.run_directory import RunDirectory
from limbeck.training.trainer import Trainer, add_losses, enable_gradients, reduce_counts


@dataclass
class StudentTraining:
    """One student in its stage; see `limbeck.training.trainer.train`."""

    stage: LayerwiseStage
    settings: Trained
    data: SequenceDataset
    run: RunDirectory
    index: int
    position: int
    held_out: SequenceDataset | None = None


def train_jointly(members: list[StudentTraining]) -> list[dict[str, Any] | Exception]:
    """Train all members to the end of their stages, from their last checkpoints where there are some.

    Args:
        members: of one kind of stage, with the same teacher, text, position, batch and micro-batch.

    Returns:
        Of each member the facts that `train` returns, with `students_sharing_pass` (how many shared the teacher) and
        `saved_seconds` (its part of the teacher's time that sharing saved), or the error that ended it.

    Raises:
        TrainingInterrupted: a signal to stop came; the state of all is kept.
    """
    with ExitStack() as stack, graceful_shutdown() as stop_requested:
        trainers = [
            Trainer(
                one.stage,
                one.settings,
                one.data,
                one.run,
                one.index,
                one.position,
                stack.enter_context(enable_gradients(one.stage)),
                one.held_out,
            )
            for one in members
        ]
        for trainer in trainers:
            stack.callback(trainer.prefetcher.close)
        ends: dict[int, Exception] = {}
        first, saved = trainers[0], time.monotonic()
        left = sum(max(one.steps - one.step, 0) for one in trainers)
        teacher = _teacher_seconds(first) if left else 0.0  # of a step
        spared = [0.0] * len(members)
        title = f"{first.settings.stage}, {len(members)} students"
        with progress(title, left, "steps") as advance:
            while active := [i for i, one in enumerate(trainers) if i not in ends and not one.is_done]:
                step = min(trainers[i].step for i in active)
                here = [i for i in active if trainers[i].step == step]
                began = time.monotonic()
                for i in here:
                    trainers[i].prepare_stage()
                batches = trainers[here[0]].next_batches()
                counts = reduce_counts(members[here[0]].stage, batches)
                sums: list[dict[str, Tensor]] = [{} for _ in here]
                failed: dict[int, Exception] = {}  # by place in `here`
                for batch in batches:
                    found = run_layerwise_pass([members[i].stage for i in here], batch, counts, True, failed)
                    for mine, losses in zip(sums, found):
                        add_losses(mine, losses)
                lines = _update([trainers[i] for i in here], sums, failed)
                share = (time.monotonic() - began) / len(here)
                for place, i in enumerate(here):
                    if place in failed:
                        ends[i] = failed[place]
                        continue
                    trainers[i].log_step(lines[place], share)
                    spared[i] += teacher * (len(here) - 1) / len(here)
                speed = len(here) * first.settings.batch_size * first.data.length / (time.monotonic() - began)
                advance(len(here), note=f"{speed:.0f} tokens/s of all")
                stop = stop_requested()
                if stop or time.monotonic() - saved > first.run.recipe.checkpoint_seconds:
                    for i in range(len(trainers)) if stop else here:
                        if i not in ends and (stop or trainers[i].step < trainers[i].steps):
                            trainers[i].save_checkpoint()
                    saved = time.monotonic()
                if stop:
                    raise TrainingInterrupted(f"asked to stop in step {step + 1} of {first.steps}, state kept")
        return [
            ends[i]
            if i in ends
            else {**one.finish(), "students_sharing_pass": len(members), "saved_seconds": spared[i]}
            for i, one in enumerate(trainers)
        ]


def _update(
    trainers: list[Trainer], sums: list[dict[str, Tensor]], failed: dict[int, Exception]
) -> dict[int, dict[str, Any]]:
    """Move the weights of those that have not failed; who fails now is added to `failed`."""
    lines = {}
    for place, trainer in enumerate(trainers):
        if place in failed:
            continue
        try:
            lines[place] = trainer.apply_gradients(sums[place])
        except Exception as error:
            failed[place] = error
    return lines


@torch.no_grad()
def _teacher_seconds(trainer: Trainer) -> float:
    """Seconds of the teacher in a step, measured on a pass with no student behind it."""
    batches = trainer.next_batches()
    taken = min(time_teacher_pass(trainer.stage, batches[0]) for _ in range(2))
    return taken * len(batches)


@torch.no_grad()
def time_teacher_pass(stage: LayerwiseStage, batch: Batch) -> float:
    """Seconds of the teacher's pass as the stage needs it, without any student."""
    _wait()
    began = time.monotonic()
    stage.prepare_batch(batch)
    with stage.teacher_pass(stage.trained_modules()), stage.autocast(), hook_modules(stage.teacher, {}, stage.eager):
        run_backbone(stage.teacher, batch)
    _wait()
    return time.monotonic() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
