"""The one training loop of all stages that learn by gradient; it knows no stage.

    train(stage, settings, data, run, index, position, held_out)

Gradient accumulation with counts taken over the whole step first (so a split changes nothing), clipping, non-finite
steps skipped and counted, a line of metrics a step, checkpoints by the clock and on a signal to stop. A resumed run
continues bit for bit on a CPU: weights, optimiser, averages and data position are all its state.

Of several processes each takes its rows of a step. Counts are summed over them before the first gradient, gradients
after the last one, so a step is that of one process with all rows (docs/scaling.md).
"""

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

from torch import nn

from limbeck.console import progress
from limbeck.data.packing import Sequences
from limbeck.distributed import agree
from limbeck.recipe import Trained
from limbeck.stages.interrupt import Stopped, watch
from limbeck.stages.learner import Learner, Stage
from limbeck.stages.run import RunDirectory


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
        Stopped: a signal to stop came; the state is kept.
    """
    with learning(stage) as parameters, watch() as asked_to_stop:
        learner = Learner(stage, settings, data, run, index, position, parameters, held_out)
        with closing(learner.ahead):
            return _go(learner, asked_to_stop)


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


def _go(learner: Learner, asked_to_stop: Callable[[], bool]) -> dict[str, Any]:
    settings, saved = learner.settings, time.monotonic()
    with progress(f"{settings.stage}", learner.steps, "steps", done=learner.step) as advance:
        while not learner.over:
            began = time.monotonic()
            line = learner.take_step()
            learner.note(line, time.monotonic() - began)
            advance(1, note=f"loss {line['loss']:.4g}, {learner.speed:.0f} tokens/s")
            stop, save = agree(asked_to_stop(), time.monotonic() - saved > learner.run.recipe.checkpoint_seconds)
            if stop or (save and learner.step < learner.steps):
                learner.save()
                saved = time.monotonic()
            if stop:
                raise Stopped(f"asked to stop in step {learner.step} of {learner.steps}, state kept")
    return learner.finish()
