"""Sweeps of learning rates: a table for the screen, every number as CSV, and their curves.

output.print(build_lr_table(sweeps))
write_lr_sweeps(sweeps, Path("runs/mine-rates"))       # rates.csv, and rates.png where matplotlib is installed

Which learning rate suits each stage: a sweep on a student of its own, before a run or beside it.

    sweeps = find_learning_rates(recipe)                    # a LearningRateSweep for each stage that learns by gradient
    sweeps[0].suggested_lr, sweeps[0].learning_rates, sweeps[0].losses

The range test of arXiv 1506.01186 (section 3.3): the rate grows by the same factor each step, and the loss is watched.
Two things make the curve quieter than with a batch a step: every step sees the same sequences, and its loss is that of
the weights before it. Suggested is the rate at which the loss falls fastest for a tenfold rate, among those below the
lowest loss. Nothing of the run is touched: the stages that it has finished are loaded, the others are not trained here.
Stage 0 is done here where the run has not done it. The same recipe gives the same sweep on a CPU.

A sweep of learning rates over one stage, and the rate that it suggests.

sweep.learning_rates, sweep.losses, sweep.suggested_lr          # made by limbeck.training.lr_finder
"""

import csv
import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from limbeck.core import recipe as recipes
from limbeck.core.config import format_stage_name
from limbeck.core.console import console, progress
from limbeck.core.distributed import get_process_info
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.core.storage import convert_write_errors
from limbeck.data.packing import take_sequences_with_targets
from limbeck.models import unshare_weights
from limbeck.report.figures.style import create_figure, save_figure
from limbeck.training.calibration import calibrate
from limbeck.training.optim import LossScaler, StageOptimizer, clip_gradients, needs_loss_scaling
from limbeck.training.precision import numerics_context
from limbeck.training.run_directory import RunDirectory
from limbeck.training.setup import Job, build_student, prepare_job
from limbeck.training.stages import load_stage_weights, make_stage, trains_beyond_attention
from limbeck.training.trainer import accumulate_gradients, get_clip_groups, total_loss

SMOOTH = 0.7  # of the running mean from which slope and lowest loss are read


@dataclass
class LearningRateSweep:
    """The sweep of one stage."""

    index: int
    stage: str
    previous_stages: str  # what was done before it: stages by name
    recipe_lr: float  # the recipe's rate
    sequences: int  # that every step sees
    learning_rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # before the step of that rate

    @property
    def smoothed_losses(self) -> list[float]:
        """The running mean of the losses, corrected for its start."""
        found, mean = [], 0.0
        for number, loss in enumerate(self.losses, 1):
            mean = SMOOTH * mean + (1 - SMOOTH) * loss
            found.append(mean / (1 - SMOOTH**number))
        return found

    @property
    def lowest_index(self) -> int:
        """Where the loss is lowest."""
        smooth = self.smoothed_losses
        return min(range(len(smooth)), key=smooth.__getitem__)

    @property
    def suggested_lr(self) -> float | None:
        """The rate at which the loss falls fastest; None where it nowhere falls."""
        smooth, end = self.smoothed_losses, self.lowest_index
        falls = {i: smooth[i + 1] - smooth[i - 1] for i in range(1, end)}
        if not falls or min(falls.values()) >= 0:
            return None
        return self.learning_rates[min(falls, key=falls.__getitem__)]


def build_lr_table(sweeps: list[LearningRateSweep]) -> Table:
    """A row a stage: the recipe's rate, the suggested one, and where the loss was lowest."""
    shown = Table(title="learning rates", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "starts after", "recipe", "suggested", "lowest loss at", "loss from", "to"):
        shown.add_column(column, justify="left" if column.startswith("sta") else "right")
    for sweep in sweeps:
        suggested = "none: it never falls" if sweep.suggested_lr is None else f"{sweep.suggested_lr:.1e}"
        lowest = sweep.smoothed_losses[sweep.lowest_index]
        shown.add_row(
            format_stage_name(sweep.stage), sweep.previous_stages, f"{sweep.recipe_lr:.1e}", suggested,
            f"{sweep.learning_rates[sweep.lowest_index]:.1e}", f"{sweep.losses[0]:.4g}", f"{lowest:.4g}",
        )  # fmt: skip
    return shown


def write_lr_sweeps(sweeps: list[LearningRateSweep], folder: Path) -> list[Path]:
    """Write the numbers, and the picture where matplotlib is installed; the paths."""
    with convert_write_errors(folder):
        return _write(sweeps, folder)


def _write(sweeps: list[LearningRateSweep], folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / "rates.csv"]
    with open(paths[0], "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["stage_index", "stage", "rate", "loss", "smooth_loss"])
        for sweep in sweeps:
            rows = zip(sweep.learning_rates, sweep.losses, sweep.smoothed_losses)
            writer.writerows([sweep.index, sweep.stage, *row] for row in rows)
    if importlib.util.find_spec("matplotlib"):
        paths.append(folder / "rates.png")
        draw_lr_sweeps(sweeps, paths[1])
    return paths


def draw_lr_sweeps(sweeps: list[LearningRateSweep], path: Path) -> None:
    """The loss over the rate, a panel a stage; the dashed line is the recipe's rate, the solid one the suggested."""
    figure = create_figure(4 * len(sweeps), 3.2)
    for axes, sweep in zip(figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps):
        axes.plot(sweep.learning_rates, sweep.losses, ".", markersize=3, alpha=0.5)
        axes.plot(sweep.learning_rates, sweep.smoothed_losses)
        axes.axvline(sweep.recipe_lr, linestyle="--", color="grey", linewidth=0.8)
        if sweep.suggested_lr is not None:
            axes.axvline(sweep.suggested_lr, color="black", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_xlabel("learning rate")
        axes.set_title(format_stage_name(sweep.stage), fontsize=10)
        axes.grid(alpha=0.3)
    save_figure(figure, path)


LOWEST, HIGHEST, POINTS = 1e-6, 1.0, 40
DIVERGED = 3.0  # times the first loss: the sweep ends there


def find_learning_rates(recipe: Recipe, num_points: int = POINTS) -> list[LearningRateSweep]:
    """Sweep the learning rate of each stage of a recipe that learns by gradient, one after the other.

    Args:
        num_points: steps between the lowest and the highest rate.

    Raises:
        LimbeckError: anything wrong with the recipe, or several processes.
    """
    if get_process_info().world_size > 1:
        raise LimbeckError(
            f"the sweep of learning rates in {get_process_info().world_size} processes",
            expected="one process: a rate belongs to the batch, whatever the number of processes",
            hint="the same command without torchrun",
        )
    with numerics_context(recipe):
        torch.manual_seed(recipe.seed)
        job = prepare_job(recipe)
        run = RunDirectory(job.path, recipe)
        done: dict[int, dict[str, Any]] = {}  # what earlier stages taught, by number
        sweeps = []
        for index, settings in enumerate(recipe.stages):
            if isinstance(settings, recipes.Calibrate):
                done[index] = (
                    run.load_stage_result(index)
                    if run.is_finished(index, verify=True)
                    else _calibrated(job, settings, done)
                )
                continue
            sweeps.append(_sweep(job, settings, index, done, num_points))
            if run.is_finished(index, verify=True):
                done[index] = run.load_stage_result(index)
        if not sweeps:
            raise LimbeckError("no stage of this recipe learns by gradient", expected="matrix, hidden or logits")
        return sweeps


def _student(job: Job, done: dict[int, dict[str, Any]]) -> Any:
    student = build_student(job)
    for tensors in done.values():
        load_stage_weights(student, job.teacher, tensors)
    return student


def _calibrated(job: Job, settings: recipes.Calibrate, done: dict[int, dict[str, Any]]) -> dict[str, Any]:
    data = job.train_dataset(job.recipe.text_of(settings))
    _, learned = calibrate(job.make_pair(_student(job, done)), settings, data, 0)
    return {name: p.detach().clone() for name, p in learned.items()}


def _sweep(job: Job, settings: Any, index: int, done: dict[int, dict[str, Any]], num_points: int) -> LearningRateSweep:
    student = _student(job, done)
    if job.recipe.teacher_bits is None and trains_beyond_attention(settings):
        unshare_weights(student)
    stage = make_stage(job, student, settings, index)
    parameters = stage.parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = StageOptimizer(parameters, stage.learning_rates(settings), settings, stage.student)
    scale = LossScaler({}, needs_loss_scaling(stage.autocast, job.device.type))
    data = job.train_dataset(job.recipe.text_of(settings))
    micro = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
    sizes = [min(micro, settings.batch_size - done) for done in range(0, settings.batch_size, micro)]
    batch = (
        take_sequences_with_targets(data, 0, settings.batch_size)[0]
        if stage.requires_targets
        else data.batch(0, settings.batch_size)
    )
    batches = [batch.select_rows(slice(i * micro, i * micro + size)).to(job.device) for i, size in enumerate(sizes)]
    before = ", ".join(job.recipe.stages[i].stage for i in done) or "conversion"
    sweep = LearningRateSweep(index, settings.stage, before, settings.lr, settings.batch_size)
    with progress(f"{settings.stage}: rates", num_points, "steps") as advance:
        for point in range(num_points):
            rate = LOWEST * (HIGHEST / LOWEST) ** (point / (num_points - 1))
            optimizer.set_lr_multiplier(rate / settings.lr)
            loss = math.inf
            while not math.isfinite(loss):  # in fp16 the first scale is too large for most
                stage.loss_scale = scale.value
                sums = accumulate_gradients(stage, batches)
                scale.unscale_gradients(parameters.values())
                norm = float(clip_gradients(parameters, settings.max_grad_norm, clip_groups=get_clip_groups(stage)))
                loss = total_loss({name: float(value) for name, value in sums.items()}) + 0 * norm
                if not scale.update(math.isfinite(loss)):
                    break
                optimizer.zero_grad()
            if not math.isfinite(loss) or (sweep.losses and loss > DIVERGED * sweep.losses[0]):
                console.print(f"{settings.stage}: the loss leaves at a rate of {rate:.1e}")
                break
            sweep.learning_rates.append(rate)
            sweep.losses.append(loss)
            optimizer.step()
            optimizer.zero_grad()
            advance(1, note=f"rate {rate:.1e}, loss {loss:.4g}")
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    return sweep
