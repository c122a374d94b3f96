"""Stages 1 and 2 of several students at once: the teacher runs once a batch, and every student's layers learn from it.

    ends = train_together([Member(stage, settings, data, run, 1, position) for ...])
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

from limbeck.console import progress
from limbeck.data.packing import Batch, Sequences
from limbeck.model.body import run_body
from limbeck.recipe import Trained
from limbeck.stages.interrupt import Stopped, watch
from limbeck.stages.layerwise import LayerStage, run_layers
from limbeck.stages.learner import Learner, add_to, counts_of
from limbeck.stages.loop import learning
from limbeck.stages.run import RunDirectory
from limbeck.stages.teacher import tap


@dataclass
class Member:
    """One student in its stage; see `limbeck.stages.loop.train`."""

    stage: LayerStage
    settings: Trained
    data: Sequences
    run: RunDirectory
    index: int
    position: int
    held_out: Sequences | None = None


def train_together(members: list[Member]) -> list[dict[str, Any] | Exception]:
    """Train all members to the end of their stages, from their last checkpoints where there are some.

    Args:
        members: of one kind of stage, with the same teacher, text, position, batch and micro-batch.

    Returns:
        Of each member the facts that `train` returns, with `together` (how many shared the teacher) and
        `saved_seconds` (its part of the teacher's time that sharing saved), or the error that ended it.

    Raises:
        Stopped: a signal to stop came; the state of all is kept.
    """
    with ExitStack() as stack, watch() as asked_to_stop:
        learners = [
            Learner(
                one.stage,
                one.settings,
                one.data,
                one.run,
                one.index,
                one.position,
                stack.enter_context(learning(one.stage)),
                one.held_out,
            )
            for one in members
        ]
        for learner in learners:
            stack.callback(learner.ahead.close)
        ends: dict[int, Exception] = {}
        first, saved = learners[0], time.monotonic()
        left = sum(max(one.steps - one.step, 0) for one in learners)
        teacher = _teacher_seconds(first) if left else 0.0  # of a step
        spared = [0.0] * len(members)
        title = f"{first.settings.stage}, {len(members)} students"
        with progress(title, left, "steps") as advance:
            while active := [i for i, one in enumerate(learners) if i not in ends and not one.over]:
                step = min(learners[i].step for i in active)
                here = [i for i in active if learners[i].step == step]
                began = time.monotonic()
                for i in here:
                    learners[i].ready()
                batches = learners[here[0]].batches()
                counts = counts_of(members[here[0]].stage, batches)
                sums: list[dict[str, Tensor]] = [{} for _ in here]
                failed: dict[int, Exception] = {}  # by place in `here`
                for batch in batches:
                    found = run_layers([members[i].stage for i in here], batch, counts, True, failed)
                    for mine, losses in zip(sums, found):
                        add_to(mine, losses)
                lines = _update([learners[i] for i in here], sums, failed)
                share = (time.monotonic() - began) / len(here)
                for place, i in enumerate(here):
                    if place in failed:
                        ends[i] = failed[place]
                        continue
                    learners[i].note(lines[place], share)
                    spared[i] += teacher * (len(here) - 1) / len(here)
                speed = len(here) * first.settings.batch_size * first.data.length / (time.monotonic() - began)
                advance(len(here), note=f"{speed:.0f} tokens/s of all")
                stop = asked_to_stop()
                if stop or time.monotonic() - saved > first.run.recipe.checkpoint_seconds:
                    for i in range(len(learners)) if stop else here:
                        if i not in ends and (stop or learners[i].step < learners[i].steps):
                            learners[i].save()
                    saved = time.monotonic()
                if stop:
                    raise Stopped(f"asked to stop in step {step + 1} of {first.steps}, state kept")
        return [
            ends[i] if i in ends else {**one.finish(), "together": len(members), "saved_seconds": spared[i]}
            for i, one in enumerate(learners)
        ]


def _update(
    learners: list[Learner], sums: list[dict[str, Tensor]], failed: dict[int, Exception]
) -> dict[int, dict[str, Any]]:
    """Move the weights of those that have not failed; who fails now is added to `failed`."""
    lines = {}
    for place, learner in enumerate(learners):
        if place in failed:
            continue
        try:
            lines[place] = learner.update(sums[place])
        except Exception as error:
            failed[place] = error
    return lines


@torch.no_grad()
def _teacher_seconds(learner: Learner) -> float:
    """Seconds of the teacher in a step, measured on a pass with no student behind it."""
    batches = learner.batches()
    taken = min(bare_pass(learner.stage, batches[0]) for _ in range(2))
    return taken * len(batches)


@torch.no_grad()
def bare_pass(stage: LayerStage, batch: Batch) -> float:
    """Seconds of the teacher's pass as the stage needs it, without any student."""
    _wait()
    began = time.monotonic()
    stage.meet(batch)
    with stage.passing(stage.trained()), stage.autocast(), tap(stage.teacher, {}, stage.eager):
        run_body(stage.teacher, batch)
    _wait()
    return time.monotonic() - began


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
