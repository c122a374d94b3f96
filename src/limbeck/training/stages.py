"""The stages of a recipe in their order, on one student; what is finished is loaded instead.

run_stages(job, run, student)
make_stage(job, student, job.recipe.stages[1], 1).backward(batch, counts)
"""

import contextlib
import math
import time
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from limbeck.core import recipe as recipes
from limbeck.core.console import console, progress
from limbeck.core.distributed import (
    broadcast_from_main,
    get_local_rows,
    get_process_info,
    main_process_first,
    run_on_main,
)
from limbeck.core.errors import LimbeckError
from limbeck.data.packing import SequenceDataset, count_eval_sequences, take_sequences_with_targets
from limbeck.models import find_attention_sites, unshare_weights
from limbeck.models.backbone import supports_packed_positions
from limbeck.models.compilation import compile_blocks
from limbeck.training.alignment import HiddenStage, MatrixStage
from limbeck.training.calibration import RIDGES, NormalEquations, add_batch
from limbeck.training.fsdp import shard_blocks
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.lora import LoraAdapters, resolve_lora_targets
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.optim import count_training_steps
from limbeck.training.rehearsal import RIDGE_EVAL_SEQUENCES
from limbeck.training.run_directory import RunDirectory
from limbeck.training.setup import Job, dataset_key
from limbeck.training.teacher_cache import attach_teacher_logits, require_packed
from limbeck.training.trainer import Stage, train


@dataclass
class StageContext:
    """A stage that is next: its place in the recipe, settings and text, and where in the text it begins."""

    index: int
    settings: Any  # recipes.Calibrate, Matrix, Hidden or Logits
    text: recipes.Data
    data: SequenceDataset
    position: int


class StageRunner:
    """A student on its way through the stages of its recipe; what is finished is loaded.

    stage_runner = StageRunner(job, run, student)
    while (context := stage_runner.next_stage()) is not None:
        stage_runner.finish_stage(context, stage.parameters(), train(stage, context.settings, context.data, ...))
    """

    def __init__(self, job: Job, run: RunDirectory, student: PreTrainedModel):
        self.job, self.run, self.student = job, run, student
        self.index = 0
        self.shares_weights = job.recipe.teacher_bits is None  # with the teacher: what no stage has trained so far
        self.read_positions: dict[
            str, tuple[SequenceDataset, int]
        ] = {}  # of each text, how far it was read, in which sequences

    def next_stage(self) -> StageContext | None:
        """The first stage that is not finished, those before it loaded; None where all are finished."""
        while self.index < len(self.job.recipe.stages):
            index, settings = self.index, self.job.recipe.stages[self.index]
            if self.shares_weights and trains_beyond_attention(settings):
                unshare_weights(self.student)
                self.shares_weights = False
            text = self.job.recipe.text_of(settings)
            data = self.job.train_dataset(text)
            before = self.read_positions.get(dataset_key(text))
            context = StageContext(index, settings, text, data, data.position_after(*before) if before else 0)
            if not self.run.is_finished(index, verify=True):
                return context
            load_stage_weights(self.student, self.job.teacher, self.run.load_stage_result(index))
            facts = self.run.load_stage_metrics(index)
            self._passed(context, facts)
            console.print(f"{settings.stage}: finished before ({facts['seconds']:.0f} s)")
        return None

    def finish_stage(self, context: StageContext, learned: dict[str, nn.Parameter], facts: dict[str, Any]) -> None:
        """Keep what a stage taught."""
        self._passed(context, facts)
        self.run.save_stage_result(context.index, dict(learned), facts)

    def _passed(self, context: StageContext, facts: dict[str, Any]) -> None:
        self.read_positions[dataset_key(context.text)] = context.data, facts["position"]
        self.index = context.index + 1


def run_stages(job: Job, run: RunDirectory, student: PreTrainedModel) -> None:
    """Bring the student through all stages, skipping what is finished."""
    stage_runner = StageRunner(job, run, student)
    while (context := stage_runner.next_stage()) is not None:
        settings = context.settings
        if isinstance(settings, recipes.Calibrate):
            facts, learned = calibrate(job, student, settings, context.data, context.position)
            stage_runner.finish_stage(context, learned, facts)
            continue
        stage = make_stage(job, student, settings, context.index)
        with main_process_first():
            learn, held_out, cached = _texts(job, settings, context.text, context.data, context.position)
        with _sharded(job, student, settings, stage), _compiled(job, student, settings):
            facts = {**train(stage, settings, learn, run, context.index, context.position, held_out), **cached}
        adapters = getattr(stage, "adapters", None)
        stage_runner.finish_stage(context, stage.parameters() if adapters is None else adapters.merge(), facts)


def get_output_projections(job: Job, student: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The output projections of the converted layers, which calibration writes, by parameter name."""
    names = [f"{site.module}.{site.output}" for site in job.sites]
    return {f"{name}.{key}": p for name in names for key, p in student.get_submodule(name).named_parameters()}


def trains_beyond_attention(settings: Any) -> bool:
    """Does this stage change weights that a student may share with its teacher?"""
    return getattr(settings, "train", "attention") not in ("mixer", "attention", "lora")


def _sharded(job: Job, student: PreTrainedModel, settings: Any, stage: Stage) -> contextlib.AbstractContextManager:
    if getattr(settings, "sharding", "none") == "none":
        return contextlib.nullcontext()
    blocks = [site.block for site in find_attention_sites(job.teacher)]
    return shard_blocks(job.teacher, student, blocks, set(stage.parameters()))


def _compiled(job: Job, student: PreTrainedModel, settings: Any) -> contextlib.AbstractContextManager:
    """Blocks of both models through torch.compile, in the stage in which they run whole and nothing listens inside."""
    if not isinstance(settings, recipes.Logits) or not job.compile_enabled:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    if settings.sharding == "full" and get_process_info().world_size > 1:
        job.compile_failures.record_fallback("blocks that are sharded are gathered when they run")
        return stack
    blocks = [site.block for site in find_attention_sites(job.teacher)]
    for model in (student, job.teacher):
        supports_packed_positions(model)  # tries the model on its first call
        stack.enter_context(compile_blocks(model, blocks, job.compile_failures))
    return stack


def make_stage(
    job: Job, student: PreTrainedModel, settings: recipes.Matrix | recipes.Hidden | recipes.Logits, index: int
) -> Stage:
    pair = job.make_pair(student)
    if isinstance(settings, recipes.Matrix):
        return MatrixStage(pair, sampled_queries=settings.sampled_queries, seed=job.recipe.seed)
    if isinstance(settings, recipes.Hidden):
        return HiddenStage(pair, target=settings.target, loss=settings.loss, train=settings.train)
    weights = ObjectiveWeights(**{f.name: getattr(settings, f.name) for f in fields(ObjectiveWeights)})
    adapters = None
    if settings.lora is not None:
        lora = settings.lora
        names = resolve_lora_targets(student, job.sites, lora.target_modules)
        seed = job.recipe.seed + 1000 * index
        adapters = LoraAdapters(student, names, lora.rank, lora.alpha, lora.dropout, seed)
    return LogitsStage(
        pair,
        weights,
        train=settings.train,
        chunk_size=settings.chunk_size,
        adapters=adapters,
        checkpoint_activations=settings.checkpoint_activations,
        compiled=job.compile_enabled,
    )


def _texts(
    job: Job, settings: recipes.Trained, text: recipes.Data, data: SequenceDataset, position: int
) -> tuple[SequenceDataset, SequenceDataset, dict[str, Any]]:
    """A stage's text and the held-out text, with the teacher's signals where they are cached, and facts about those."""
    held_out = job.held_out_dataset(text)
    if getattr(settings, "cache_teacher", None) is None:
        return data, held_out, {}
    assert isinstance(settings, recipes.Logits)
    store = job.texts[dataset_key(text)].key
    ask = partial(attach_teacher_logits, job.teacher, store=store, top_k=settings.top_k, autocast=job.autocast)
    end = position
    for _ in range(count_training_steps(settings, data.length)):
        _, end = take_sequences_with_targets(data, end, settings.batch_size)
    learn, facts = ask(data=require_packed(data), begin=position, end=end)
    if settings.eval_steps:
        count = count_eval_sequences(held_out, settings.eval_sequences)
        held_out, _ = ask(data=require_packed(held_out), begin=0, end=count)
    return learn, held_out, {"cached_teacher": facts}


def calibrate(
    job: Job, student: PreTrainedModel, settings: recipes.Calibrate, data: SequenceDataset, position: int
) -> tuple[dict[str, Any], dict[str, nn.Parameter]]:
    """Stage 0; its facts and the output projections, by name."""
    fits = NormalEquations(job.make_pair(student), settings.weight)
    seconds = accumulate_normal_equations([fits], settings, data, position, job.device)
    fits.all_reduce()
    return solve_calibration(job, student, settings, data, position, fits, seconds), get_output_projections(
        job, student
    )


def accumulate_normal_equations(
    fits: list[NormalEquations], settings: recipes.Calibrate, data: SequenceDataset, position: int, device: torch.device
) -> float:
    """Sum the normal equations of one or several students over the stage's tokens; returns the seconds it took."""
    began, length = time.monotonic(), data.length
    sequences = count_calibration_sequences(settings, length)
    with progress("calibrate", sequences, "sequences") as advance:
        for at in range(0, sequences, settings.batch_size):
            size = min(settings.batch_size, sequences - at)
            first, mine = get_local_rows(size)
            if mine:
                add_batch(fits, data.batch(position + at + first, mine).to(device))
            advance(size, note=f"{(at + size) * length / (time.monotonic() - began):.0f} tokens/s")
    return time.monotonic() - began


def count_calibration_sequences(settings: recipes.Calibrate, length: int) -> int:
    """Sequences that the normal equations are summed over."""
    return max(1, round(settings.tokens / length))


def solve_calibration(
    job: Job,
    student: PreTrainedModel,
    settings: recipes.Calibrate,
    data: SequenceDataset,
    position: int,
    fits: NormalEquations,
    fit_seconds: float,
) -> dict[str, Any]:
    """Write the output projections that the sums lead to; returns the stage's facts."""
    began, sequences = time.monotonic(), count_calibration_sequences(settings, data.length)
    position += sequences
    tried: dict[str, dict[str, float]] = {}
    ridge = settings.ridge
    if ridge == "auto":
        judge = LogitsStage(job.make_pair(student), ObjectiveWeights())
        batch, position = take_sequences_with_targets(data, position, RIDGE_EVAL_SEQUENCES)
        batch = batch.to(job.device)
        with progress("choose the ridge", len(RIDGES), "fits") as advance:
            for candidate in RIDGES:
                unexplained = fits.solve(candidate)
                loss = float(judge.evaluate(batch)["ce"])
                tried[f"{candidate:g}"] = {"unexplained": unexplained, "loss": loss}
                advance(1, note=f"ridge {candidate:g}: loss {loss:.3f}")
        ridge = run_on_main(lambda: float(_best_ridge(tried)))
    unexplained = fits.solve(float(ridge))
    broadcast_from_main(p for projection in fits.projections.values() for p in projection.parameters())
    return {
        "fit_seconds": fit_seconds,
        "ridge": ridge,
        "unexplained": unexplained,
        "tried": tried,
        "tokens": sequences * data.length,
        "seconds": fit_seconds + time.monotonic() - began,
        "position": position,
        "trained_parameters": sum(p.numel() for m in fits.projections.values() for p in m.parameters()),
    }


def _best_ridge(tried: dict[str, dict[str, float]]) -> str:
    """The ridge of the lowest loss; one whose loss is not a number is none."""
    losses = {name: found["loss"] for name, found in tried.items() if math.isfinite(found["loss"])}
    if not losses:
        raise LimbeckError(
            "stage calibrate: the loss is not finite with any ridge",
            expected="a finite loss with one of them",
            hint="--set precision=fp32, or another mixer; more tokens do not help",
        )
    return min(losses, key=losses.__getitem__)


@torch.no_grad()
def load_stage_weights(student: PreTrainedModel, teacher: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Give the student what a finished stage taught; what it shares with the teacher becomes its own before."""
    theirs = {id(p) for p in teacher.parameters()}
    for name, tensor in tensors.items():
        parameter = student.get_parameter(name)
        if id(parameter) in theirs:  # an adapter outside the attention was merged
            unshare_weights(student.get_submodule(name.rpartition(".")[0]))
            parameter = student.get_parameter(name)
        parameter.copy_(tensor)
