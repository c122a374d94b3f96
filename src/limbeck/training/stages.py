"""Run the stages of a recipe in order on one student; finished stages are loaded instead.

    run_stages(job, run, student)

`StageRunner` holds how far a student is, also for students that share the teacher's passes (limbeck.study).
`make_stage` builds the object with a stage's losses: those of limbeck.training.alignment (stages 1 and 2) or
logit_distillation (stage 3).
"""

import contextlib
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from limbeck.core.console import console
from limbeck.core.distributed import get_process_info, main_process_first
from limbeck.core.live import current, open_views
from limbeck.core.stage_settings import Calibrate, Hidden, Logits, Matrix
from limbeck.core.text_settings import Data
from limbeck.data.packing import SequenceDataset, count_eval_sequences, take_sequences_with_targets
from limbeck.models import find_attention_sites, unshare_weights
from limbeck.models.backbone import supports_packed_positions
from limbeck.models.compilation import compile_blocks
from limbeck.report.run_summary import format_outcome
from limbeck.training.alignment import HiddenStage, MatrixStage
from limbeck.training.calibration import calibrate
from limbeck.training.fsdp import shard_blocks
from limbeck.training.guard import StageGuard
from limbeck.training.job import Job, dataset_key
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.lora import LoraAdapters, resolve_lora_targets
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.objectives.stage import PREFIX as OBJECTIVE_PREFIX
from limbeck.training.objectives.stage import ObjectivesStage
from limbeck.training.optim import count_training_steps
from limbeck.training.run_directory import RunDirectory
from limbeck.training.stage_protocol import Stage
from limbeck.training.teacher_cache import attach_teacher_logits, require_packed
from limbeck.training.trainer import Trainer


def run_stages(job: Job, run: RunDirectory, student: PreTrainedModel) -> None:
    """Train the student through all stages, in place."""
    runner, view = StageRunner(job, run, student), current()
    while (context := runner.next_stage()) is not None:
        settings = context.settings
        view.begin(context.index)
        if isinstance(settings, Calibrate):
            facts, learned = calibrate(job.make_pair(student), settings, context.data, context.position)
            runner.finish_stage(context, learned, facts)
            view.finish(context.index, format_outcome({"stage": settings.stage, **facts}), facts["seconds"])
            continue
        stage = make_stage(job, student, settings, context.index)
        with main_process_first():
            data, held_out, cache_facts = _open_stage_data(job, context)
        with _sharded(job, student, settings, stage), _compiled(job, student, settings):
            trainer = Trainer(
                stage, settings, data, run, index=context.index, position=context.position, held_out=held_out
            )
            facts = {**trainer.train(), **cache_facts}
        runner.finish_stage(context, _learned_parameters(stage), facts)
        view.finish(context.index, format_outcome({"stage": settings.stage, **facts}), facts["seconds"])


@dataclass
class StageContext:
    """The next stage: its number in the recipe, settings and text, and where in the text it starts."""

    index: int
    settings: Any  # Calibrate, Matrix, Hidden or Logits
    text: Data
    data: SequenceDataset
    position: int


class StageRunner:
    """Takes a student through the stages of its recipe, loading those that are finished.

    runner = StageRunner(job, run, student)
    while (context := runner.next_stage()) is not None:
        ...                                            # train it
        runner.finish_stage(context, learned, facts)
    """

    def __init__(self, job: Job, run: RunDirectory, student: PreTrainedModel):
        self.job, self.run, self.student = job, run, student
        self.index = 0
        self.guard: StageGuard | None = None
        if job.recipe.keep_better:
            self.guard = StageGuard(job.make_pair(student), job.held_out_dataset(job.recipe.guard_text))
        # until a stage trains them, weights are the teacher's own tensors; a quantized teacher's cannot be shared
        self.shares_weights = job.recipe.teacher_bits is None
        # by text: the sequences in which it was read last, and how far
        self.read_positions: dict[str, tuple[SequenceDataset, int]] = {}

    def next_stage(self) -> StageContext | None:
        """Load the finished stages; returns the first one that is not finished, None if all are."""
        while self.index < len(self.job.recipe.stages):
            index, settings = self.index, self.job.recipe.stages[self.index]
            if self.shares_weights and trains_beyond_attention(settings):
                unshare_weights(self.student)
                self.shares_weights = False
            text = self.job.recipe.text_of(settings)
            data = self.job.train_dataset(text)
            last_read = self.read_positions.get(dataset_key(text))
            context = StageContext(index, settings, text, data, data.position_after(*last_read) if last_read else 0)
            if not self.run.is_finished(index, verify=True):
                if self.guard is not None:
                    self.guard.open_stage()
                return context
            load_stage_weights(self.student, self.job.teacher, self.run.load_stage_result(index))
            facts = self.run.load_stage_metrics(index)
            self._advance(context, facts)
            if self.guard is not None:
                self.guard.load_verdict(facts)
            # in a study every arm finds the stages that it shared with others; who resumes a run wants to know
            if not open_views or open_views[0].folder == str(self.run.path):
                console.print(f"{settings.stage}: already complete ({facts['seconds']:.0f} s)")
        return None

    def finish_stage(self, context: StageContext, learned: dict[str, nn.Parameter], facts: dict[str, Any]) -> None:
        """Save the trained weights and the facts of a stage; with `keep_better` the weights from before a worse one."""
        self._advance(context, facts)
        if self.guard is not None:
            facts = {**facts, "guard": self.guard.close_stage(context.settings.stage, learned)}
        self.run.save_stage_result(context.index, dict(learned), facts)

    def _advance(self, context: StageContext, facts: dict[str, Any]) -> None:
        self.read_positions[dataset_key(context.text)] = context.data, facts["position"]
        self.index = context.index + 1


def make_stage(job: Job, student: PreTrainedModel, settings: Matrix | Hidden | Logits, index: int) -> Stage:
    """Build the stage with number `index` of a recipe: its losses and the parameters that it trains."""
    pair = job.make_pair(student)
    if isinstance(settings, Matrix):
        return MatrixStage(pair, sampled_queries=settings.sampled_queries, seed=job.recipe.seed)
    if isinstance(settings, Hidden):
        return HiddenStage(pair, target=settings.target, loss=settings.loss, train=settings.train)
    adapters = None
    if settings.lora is not None:
        lora = settings.lora
        names = resolve_lora_targets(student, job.sites, lora.target_modules)
        seed = job.recipe.seed + 1000 * index
        adapters = LoraAdapters(student, names, lora.rank, lora.alpha, lora.dropout, seed)
    weights = ObjectiveWeights(**{field.name: getattr(settings, field.name) for field in fields(ObjectiveWeights)})
    options: dict[str, Any] = {
        "train": settings.train,
        "chunk_size": settings.chunk_size,
        "adapters": adapters,
        "checkpoint_activations": settings.checkpoint_activations,
        "compiled": job.compile_enabled,
    }
    if settings.objectives.active():
        return ObjectivesStage(pair, weights, settings.objectives, job.recipe.seed + 1000 * index, **options)
    return LogitsStage(pair, weights, **options)


def _learned_parameters(stage: Stage) -> dict[str, nn.Parameter]:
    """Return what a stage hands on: the student's parameters that it trained, with its adapters merged."""
    adapters = getattr(stage, "adapters", None)
    learned = stage.parameters() if adapters is None else adapters.merge()
    return {name: parameter for name, parameter in learned.items() if not name.startswith(OBJECTIVE_PREFIX)}


def trains_beyond_attention(settings: Any) -> bool:
    """Tell whether a stage changes weights that a student may share with its teacher."""
    return getattr(settings, "train", "attention") not in ("mixer", "attention", "lora")


def _open_stage_data(job: Job, context: StageContext) -> tuple[SequenceDataset, SequenceDataset | None, dict[str, Any]]:
    """Open a stage's training and held-out text, with cached teacher logits if it has them, and facts about these."""
    settings, data = context.settings, context.data
    held_out = job.stage_held_out_dataset(settings)
    if getattr(settings, "cache_teacher", None) is None:
        return data, held_out, {}
    store = job.texts[dataset_key(context.text)].key
    attach = partial(attach_teacher_logits, job.teacher, store=store, top_k=settings.top_k, autocast=job.autocast)
    end = context.position
    for _ in range(count_training_steps(settings, data.length)):
        _, end = take_sequences_with_targets(data, end, settings.batch_size)
    cached, facts = attach(data=require_packed(data), begin=context.position, end=end)
    if held_out is not None:
        count = count_eval_sequences(held_out, settings.eval_sequences)
        held_out, _ = attach(data=require_packed(held_out), begin=0, end=count)
    return cached, held_out, {"cached_teacher": facts}


def _sharded(job: Job, student: PreTrainedModel, settings: Any, stage: Stage) -> contextlib.AbstractContextManager:
    """Return the context in which the blocks of both models are sharded over the processes, if settings say so."""
    if getattr(settings, "sharding", "none") == "none":
        return contextlib.nullcontext()
    blocks = [site.block for site in find_attention_sites(job.teacher)]
    return shard_blocks(job.teacher, student, blocks, set(stage.parameters()))


def _compiled(job: Job, student: PreTrainedModel, settings: Any) -> contextlib.AbstractContextManager:
    """Return the context in which the blocks of both models go through torch.compile.

    Only in stage 3: there blocks run whole, without hooks inside.
    """
    if not isinstance(settings, Logits) or not job.compile_enabled:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    if settings.objectives.active():
        job.compile_failures.record_fallback("objectives read and change what blocks return")
        return stack
    if settings.sharding == "full" and get_process_info().world_size > 1:
        job.compile_failures.record_fallback("sharded blocks are gathered when they run")
        return stack
    blocks = [site.block for site in find_attention_sites(job.teacher)]
    for model in (student, job.teacher):
        supports_packed_positions(model)  # runs the model once, the first time, which should not be compiled
        stack.enter_context(compile_blocks(model, blocks, job.compile_failures))
    return stack


@torch.no_grad()
def load_stage_weights(student: PreTrainedModel, teacher: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Copy the weights of a finished stage into the student; those shared with the teacher are unshared first."""
    teacher_ids = {id(p) for p in teacher.parameters()}
    for name, tensor in tensors.items():
        parameter = student.get_parameter(name)
        if id(parameter) in teacher_ids:  # a LoRA adapter outside the attention was merged
            unshare_weights(student.get_submodule(name.rpartition(".")[0]))
            parameter = student.get_parameter(name)
        parameter.copy_(tensor)
