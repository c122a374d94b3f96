"""Which learning rate suits each stage: a sweep on a student of its own, before a run or beside it.

    sweeps = find_rates(recipe)                    # a Sweep for each stage that learns by gradient
    sweeps[0].suggested, sweeps[0].rates, sweeps[0].losses

The range test of arXiv 1506.01186 (section 3.3): the rate grows by the same factor each step, and the loss is watched.
Two things make the curve quieter than with a batch a step: every step sees the same sequences, and its loss is that of
the weights before it. Suggested is the rate at which the loss falls fastest for a tenfold rate, among those below the
lowest loss. Nothing of the run is touched: the stages that it has finished are loaded, the others are not trained here.
Stage 0 is done here where the run has not done it. The same recipe gives the same sweep on a CPU.
"""

import math
from typing import Any

import torch

from limbeck import recipe as recipes
from limbeck.console import console, progress
from limbeck.data.packing import with_targets
from limbeck.distributed import world
from limbeck.errors import LimbeckError
from limbeck.model import unshare
from limbeck.precision import arithmetic
from limbeck.prepare import Job, new_student, prepare_job
from limbeck.recipe import Recipe
from limbeck.stages.learner import accumulate, alone_in, total_loss
from limbeck.stages.loss_scale import LossScale, needs_scale
from limbeck.stages.optimize import Optimizer, gradient_norm
from limbeck.stages.run import RunDirectory
from limbeck.stages.sweep import Sweep
from limbeck.teach import calibrate, goes_beyond_attention, load_into, make_stage

LOWEST, HIGHEST, POINTS = 1e-6, 1.0, 40
DIVERGED = 3.0  # times the first loss: the sweep ends there


def find_rates(recipe: Recipe, points: int = POINTS) -> list[Sweep]:
    """Sweep the learning rate of each stage of a recipe that learns by gradient, one after the other.

    Args:
        points: steps between the lowest and the highest rate.

    Raises:
        LimbeckError: anything wrong with the recipe, or several processes.
    """
    if world().size > 1:
        raise LimbeckError(
            f"the sweep of learning rates in {world().size} processes",
            expected="one process: a rate belongs to the batch, whatever the number of processes",
            hint="the same command without torchrun",
        )
    with arithmetic(recipe):
        torch.manual_seed(recipe.seed)
        job = prepare_job(recipe)
        run = RunDirectory(job.path, recipe)
        done: dict[int, dict[str, Any]] = {}  # what earlier stages taught, by number
        sweeps = []
        for index, settings in enumerate(recipe.stages):
            if isinstance(settings, recipes.Calibrate):
                done[index] = (
                    run.result(index) if run.finished(index, verify=True) else _calibrated(job, settings, done)
                )
                continue
            sweeps.append(_sweep(job, settings, index, done, points))
            if run.finished(index, verify=True):
                done[index] = run.result(index)
        if not sweeps:
            raise LimbeckError("no stage of this recipe learns by gradient", expected="matrix, hidden or logits")
        return sweeps


def _student(job: Job, done: dict[int, dict[str, Any]]) -> Any:
    student = new_student(job)
    for tensors in done.values():
        load_into(student, job.teacher, tensors)
    return student


def _calibrated(job: Job, settings: recipes.Calibrate, done: dict[int, dict[str, Any]]) -> dict[str, Any]:
    _, learnt = calibrate(job, _student(job, done), settings, job.training(job.recipe.text_of(settings)), 0)
    return {name: p.detach().clone() for name, p in learnt.items()}


def _sweep(job: Job, settings: Any, index: int, done: dict[int, dict[str, Any]], points: int) -> Sweep:
    student = _student(job, done)
    if job.recipe.teacher_bits is None and goes_beyond_attention(settings):
        unshare(student)
    stage = make_stage(job, student, settings, index)
    parameters = stage.parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = Optimizer(parameters, stage.learning_rates(settings), settings, stage.student)
    scale = LossScale({}, needs_scale(stage.autocast, job.device.type))
    data = job.training(job.recipe.text_of(settings))
    micro = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
    sizes = [min(micro, settings.batch_size - done) for done in range(0, settings.batch_size, micro)]
    batch = with_targets(data, 0, settings.batch_size)[0] if stage.by_targets else data.batch(0, settings.batch_size)
    batches = [batch.rows(slice(i * micro, i * micro + size)).to(job.device) for i, size in enumerate(sizes)]
    before = ", ".join(job.recipe.stages[i].stage for i in done) or "conversion"
    sweep = Sweep(index, settings.stage, before, settings.lr, settings.batch_size)
    with progress(f"{settings.stage}: rates", points, "steps") as advance:
        for point in range(points):
            rate = LOWEST * (HIGHEST / LOWEST) ** (point / (points - 1))
            optimizer.set_rate(rate / settings.lr)
            loss = math.inf
            while not math.isfinite(loss):  # in fp16 the first scale is too large for most
                stage.loss_scale = scale.value
                sums = accumulate(stage, batches)
                scale.off(parameters.values())
                norm = float(gradient_norm(parameters, settings.max_grad_norm, alone=alone_in(stage)))
                loss = total_loss({name: float(value) for name, value in sums.items()}) + 0 * norm
                if not scale.update(math.isfinite(loss)):
                    break
                optimizer.zero_grad()
            if not math.isfinite(loss) or (sweep.losses and loss > DIVERGED * sweep.losses[0]):
                console.print(f"{settings.stage}: the loss leaves at a rate of {rate:.1e}")
                break
            sweep.rates.append(rate)
            sweep.losses.append(loss)
            optimizer.step()
            optimizer.zero_grad()
            advance(1, note=f"rate {rate:.1e}, loss {loss:.4g}")
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    return sweep
