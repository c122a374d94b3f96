"""Find a learning rate for each stage of a recipe by a range test (arXiv 1506.01186, section 3.3).

    sweeps = find_learning_rates(recipe)                       # a LearningRateSweep per stage with gradients
    sweeps[0].suggested_lr, sweeps[0].learning_rates, sweeps[0].losses
    output.print(build_lr_table(sweeps))
    write_lr_sweeps(sweeps, Path("runs/mine-rates"))           # rates.csv, and rates.png if matplotlib is installed

The learning rate grows by the same factor at each step while the loss is recorded. To keep the curve smooth, every step
sees the same sequences, and its loss is that of the weights before the step. The suggested rate is where the loss falls
fastest per decade, below the rate of the lowest loss. The run itself is not changed: results of its finished stages are
loaded, other stages are skipped, and stage 0 is solved here if needed. On a CPU the sweep is deterministic.
"""

import csv
import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from limbeck.core.config import format_stage_name
from limbeck.core.console import console, progress
from limbeck.core.distributed import get_process_info
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.core.stage_settings import Calibrate
from limbeck.core.storage import convert_write_errors
from limbeck.data.packing import take_sequences_with_targets
from limbeck.models import unshare_weights
from limbeck.report.figures.style import create_figure, save_figure
from limbeck.training.calibration import calibrate
from limbeck.training.job import Job
from limbeck.training.optim import LossScaler, StageOptimizer, clip_gradients, needs_loss_scaling
from limbeck.training.precision import numerics_context
from limbeck.training.run_directory import RunDirectory
from limbeck.training.setup import build_student, prepare_job
from limbeck.training.stage_protocol import accumulate_gradients, get_clip_groups, total_loss
from limbeck.training.stages import load_stage_weights, make_stage, trains_beyond_attention

MIN_LR, MAX_LR, NUM_POINTS = 1e-6, 1.0, 40
DIVERGENCE_FACTOR = 3.0  # the sweep ends when the loss exceeds the first loss by this factor
SMOOTHING = 0.7  # of the running mean from which slope and lowest loss are taken


@dataclass
class LearningRateSweep:
    """Learning rates and losses of one stage."""

    index: int
    stage: str
    previous_stages: str  # names of the stages before it
    recipe_lr: float
    sequences: int  # in each step, always the same
    learning_rates: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)  # before the step with that rate

    @property
    def smoothed_losses(self) -> list[float]:
        """Running mean of the losses, with bias correction."""
        smoothed, mean = [], 0.0
        for number, loss in enumerate(self.losses, 1):
            mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
            smoothed.append(mean / (1 - SMOOTHING**number))
        return smoothed

    @property
    def lowest_index(self) -> int:
        """Index of the lowest smoothed loss."""
        smooth = self.smoothed_losses
        return min(range(len(smooth)), key=smooth.__getitem__)

    @property
    def suggested_lr(self) -> float | None:
        """Learning rate at which the loss falls fastest, or None if it never falls."""
        smooth, end = self.smoothed_losses, self.lowest_index
        slopes = {i: smooth[i + 1] - smooth[i - 1] for i in range(1, end)}
        if not slopes or min(slopes.values()) >= 0:
            return None
        return self.learning_rates[min(slopes, key=slopes.__getitem__)]


def find_learning_rates(recipe: Recipe, num_points: int = NUM_POINTS) -> list[LearningRateSweep]:
    """Sweep the learning rate of each stage that trains by gradient descent.

    Args:
        num_points: number of learning rates between the lowest and the highest.

    Raises:
        LimbeckError: anything wrong with the recipe, or several processes.
    """
    if get_process_info().world_size > 1:
        raise LimbeckError(
            f"learning rates cannot be swept in {get_process_info().world_size} processes",
            expected="one process: the best rate depends on the batch, not on the number of processes",
            hint="the same command without torchrun",
        )
    with numerics_context(recipe):
        torch.manual_seed(recipe.seed)
        job = prepare_job(recipe)
        run = RunDirectory(job.path, recipe)
        results: dict[int, dict[str, Any]] = {}  # parameters trained by earlier stages, by index
        sweeps = []
        for index, settings in enumerate(recipe.stages):
            if isinstance(settings, Calibrate):
                is_finished = run.is_finished(index, verify=True)
                results[index] = run.load_stage_result(index) if is_finished else _calibrate(job, settings, results)
                continue
            sweeps.append(_sweep(job, settings, index, results, num_points))
            if run.is_finished(index, verify=True):
                results[index] = run.load_stage_result(index)
        if not sweeps:
            raise LimbeckError("no stage of this recipe has a learning rate", expected="matrix, hidden or logits")
        return sweeps


def _build_student(job: Job, results: dict[int, dict[str, Any]]) -> Any:
    """Build a student and load the results of earlier stages."""
    student = build_student(job)
    for tensors in results.values():
        load_stage_weights(student, job.teacher, tensors)
    return student


def _calibrate(job: Job, settings: Calibrate, results: dict[int, dict[str, Any]]) -> dict[str, Any]:
    """Run stage 0 on a new student; returns its output projections."""
    data = job.train_dataset(job.recipe.text_of(settings))
    _, projections = calibrate(job.make_pair(_build_student(job, results)), settings, data, 0)
    return {name: p.detach().clone() for name, p in projections.items()}


def _sweep(
    job: Job, settings: Any, index: int, results: dict[int, dict[str, Any]], num_points: int
) -> LearningRateSweep:
    """Train a new student with one step per learning rate, from the lowest to the highest."""
    student = _build_student(job, results)
    if job.recipe.teacher_bits is None and trains_beyond_attention(settings):
        unshare_weights(student)
    stage = make_stage(job, student, settings, index)
    parameters = stage.parameters()
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    optimizer = StageOptimizer(parameters, stage.learning_rates(settings), settings, stage.student)
    scaler = LossScaler({}, needs_loss_scaling(stage.autocast, job.device.type))
    data = job.train_dataset(job.recipe.text_of(settings))
    micro = min(settings.micro_batch_size or settings.batch_size, settings.batch_size)
    batch = (
        take_sequences_with_targets(data, 0, settings.batch_size)[0]
        if stage.requires_targets
        else data.batch(0, settings.batch_size)
    )
    batches = [
        batch.select_rows(slice(start, min(start + micro, settings.batch_size))).to(job.device)
        for start in range(0, settings.batch_size, micro)
    ]
    previous = ", ".join(job.recipe.stages[i].stage for i in results) or "conversion"
    sweep = LearningRateSweep(index, settings.stage, previous, settings.lr, settings.batch_size)
    with progress(f"{settings.stage}: learning rates", num_points, "steps") as advance:
        for point in range(num_points):
            lr = MIN_LR * (MAX_LR / MIN_LR) ** (point / (num_points - 1))
            optimizer.set_lr_multiplier(lr / settings.lr)
            loss = math.inf
            while not math.isfinite(loss):  # in fp16 the initial loss scale is often too large
                stage.loss_scale = scaler.value
                sums = accumulate_gradients(stage, batches)
                scaler.unscale_gradients(parameters.values())
                norm = float(clip_gradients(parameters, settings.max_grad_norm, clip_groups=get_clip_groups(stage)))
                loss = total_loss({name: float(value) for name, value in sums.items()}) + 0 * norm
                if not scaler.update(math.isfinite(loss)):
                    break
                optimizer.zero_grad()
            if not math.isfinite(loss) or (sweep.losses and loss > DIVERGENCE_FACTOR * sweep.losses[0]):
                console.print(f"{settings.stage}: the loss diverges at a learning rate of {lr:.1e}")
                break
            sweep.learning_rates.append(lr)
            sweep.losses.append(loss)
            optimizer.step()
            optimizer.zero_grad()
            advance(1, note=f"lr {lr:.1e}, loss {loss:.4g}")
    for parameter in parameters.values():
        parameter.requires_grad_(False)
        parameter.grad = None
    return sweep


def build_lr_table(sweeps: list[LearningRateSweep]) -> Table:
    """Build a table with a row per stage: the recipe's rate, the suggested one, and the rate of the lowest loss."""
    table = Table(title="learning rates", title_justify="left", box=None, pad_edge=False)
    for column in ("stage", "starts after", "recipe", "suggested", "lowest loss at", "loss from", "to"):
        table.add_column(column, justify="left" if column.startswith("sta") else "right")
    for sweep in sweeps:
        suggested = "none: the loss never falls" if sweep.suggested_lr is None else f"{sweep.suggested_lr:.1e}"
        lowest = sweep.smoothed_losses[sweep.lowest_index]
        table.add_row(
            format_stage_name(sweep.stage), sweep.previous_stages, f"{sweep.recipe_lr:.1e}", suggested,
            f"{sweep.learning_rates[sweep.lowest_index]:.1e}", f"{sweep.losses[0]:.4g}", f"{lowest:.4g}",
        )  # fmt: skip
    return table


def write_lr_sweeps(sweeps: list[LearningRateSweep], folder: Path) -> list[Path]:
    """Write rates.csv, and rates.png if matplotlib is installed; returns their paths."""
    with convert_write_errors(folder):
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
    """Plot loss over learning rate, a panel per stage; dashed: the recipe's rate, solid: the suggested one."""
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
