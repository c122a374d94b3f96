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

from limbeck import recipe as recipes
from limbeck.adapters import Adapters, targets_of
from limbeck.console import console, progress
from limbeck.data.packing import Sequences, count_with_targets, with_targets
from limbeck.distributed import main_first, on_main, share, take_from_main, world
from limbeck.errors import LimbeckError
from limbeck.losses import Weights
from limbeck.model import attention_sites, unshare
from limbeck.model.body import packs_by_position
from limbeck.model.compiling import compiled
from limbeck.prepare import Job, name_of
from limbeck.rehearsal import CHOOSING
from limbeck.stages.cached import plain, taught
from limbeck.stages.calibrate import RIDGES, NormalEquations, add_together
from limbeck.stages.end_to_end import Logits
from limbeck.stages.layerwise import Hidden, Matrix
from limbeck.stages.learner import Stage
from limbeck.stages.loop import train
from limbeck.stages.optimize import steps_of
from limbeck.stages.run import RunDirectory
from limbeck.stages.shards import sharded


@dataclass
class Lesson:
    """A stage that is next: its place in the recipe, settings and text, and where in the text it begins."""

    index: int
    settings: Any  # recipes.Calibrate, Matrix, Hidden or Logits
    text: recipes.Data
    data: Sequences
    position: int


class Course:
    """A student on its way through the stages of its recipe; what is finished is loaded.

    course = Course(job, run, student)
    while (lesson := course.next()) is not None:
        course.finish(lesson, stage.parameters(), train(stage, lesson.settings, lesson.data, ...))
    """

    def __init__(self, job: Job, run: RunDirectory, student: PreTrainedModel):
        self.job, self.run, self.student = job, run, student
        self.at = 0
        self.shared = job.recipe.teacher_bits is None  # with the teacher: what no stage has trained so far
        self.reached: dict[str, tuple[Sequences, int]] = {}  # of each text, how far it was read, in which sequences

    def next(self) -> Lesson | None:
        """The first stage that is not finished, those before it loaded; None where all are finished."""
        while self.at < len(self.job.recipe.stages):
            index, settings = self.at, self.job.recipe.stages[self.at]
            if self.shared and goes_beyond_attention(settings):
                unshare(self.student)
                self.shared = False
            text = self.job.recipe.text_of(settings)
            data = self.job.training(text)
            before = self.reached.get(name_of(text))
            lesson = Lesson(index, settings, text, data, data.after(*before) if before else 0)
            if not self.run.finished(index, verify=True):
                return lesson
            load_into(self.student, self.job.teacher, self.run.result(index))
            facts = self.run.facts(index)
            self._passed(lesson, facts)
            console.print(f"{settings.stage}: finished before ({facts['seconds']:.0f} s)")
        return None

    def finish(self, lesson: Lesson, learnt: dict[str, nn.Parameter], facts: dict[str, Any]) -> None:
        """Keep what a stage taught."""
        self._passed(lesson, facts)
        self.run.finish(lesson.index, dict(learnt), facts)

    def _passed(self, lesson: Lesson, facts: dict[str, Any]) -> None:
        self.reached[name_of(lesson.text)] = lesson.data, facts["position"]
        self.at = lesson.index + 1


def run_stages(job: Job, run: RunDirectory, student: PreTrainedModel) -> None:
    """Bring the student through all stages, skipping what is finished."""
    course = Course(job, run, student)
    while (lesson := course.next()) is not None:
        settings = lesson.settings
        if isinstance(settings, recipes.Calibrate):
            facts, learnt = calibrate(job, student, settings, lesson.data, lesson.position)
            course.finish(lesson, learnt, facts)
            continue
        stage = make_stage(job, student, settings, lesson.index)
        with main_first():
            learn, held_out, cached = _texts(job, settings, lesson.text, lesson.data, lesson.position)
        with _sharded(job, student, settings, stage), _compiled(job, student, settings):
            facts = {**train(stage, settings, learn, run, lesson.index, lesson.position, held_out), **cached}
        adapters = getattr(stage, "adapters", None)
        course.finish(lesson, stage.parameters() if adapters is None else adapters.merge(), facts)


def projections_of(job: Job, student: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The output projections of the converted layers, which calibration writes, by parameter name."""
    names = [f"{site.module}.{site.output}" for site in job.sites]
    return {f"{name}.{key}": p for name in names for key, p in student.get_submodule(name).named_parameters()}


def goes_beyond_attention(settings: Any) -> bool:
    """Does this stage change weights that a student may share with its teacher?"""
    return getattr(settings, "train", "attention") not in ("mixer", "attention", "lora")


def _sharded(job: Job, student: PreTrainedModel, settings: Any, stage: Stage) -> contextlib.AbstractContextManager:
    if getattr(settings, "sharding", "none") == "none":
        return contextlib.nullcontext()
    blocks = [site.block for site in attention_sites(job.teacher)]
    return sharded(job.teacher, student, blocks, set(stage.parameters()))


def _compiled(job: Job, student: PreTrainedModel, settings: Any) -> contextlib.AbstractContextManager:
    """Blocks of both models through torch.compile, in the stage in which they run whole and nothing listens inside."""
    if not isinstance(settings, recipes.Logits) or not job.compiles:
        return contextlib.nullcontext()
    stack = contextlib.ExitStack()
    if settings.sharding == "full" and world().size > 1:
        job.compiling.refused("blocks that are sharded are gathered when they run")
        return stack
    blocks = [site.block for site in attention_sites(job.teacher)]
    for model in (student, job.teacher):
        packs_by_position(model)  # tries the model on its first call
        stack.enter_context(compiled(model, blocks, job.compiling))
    return stack


def make_stage(
    job: Job, student: PreTrainedModel, settings: recipes.Matrix | recipes.Hidden | recipes.Logits, index: int
) -> Stage:
    pair = job.pair(student)
    if isinstance(settings, recipes.Matrix):
        return Matrix(pair, rows=settings.sampled_queries, seed=job.recipe.seed)
    if isinstance(settings, recipes.Hidden):
        return Hidden(pair, target=settings.target, loss=settings.loss, train=settings.train)
    weights = Weights(**{f.name: getattr(settings, f.name) for f in fields(Weights)})
    adapters = None
    if settings.lora is not None:
        lora = settings.lora
        names = targets_of(student, job.sites, lora.target_modules)
        seed = job.recipe.seed + 1000 * index
        adapters = Adapters(student, names, lora.rank, lora.alpha, lora.dropout, seed)
    return Logits(
        pair,
        weights,
        train=settings.train,
        chunk=settings.chunk_size,
        adapters=adapters,
        checkpoint_activations=settings.checkpoint_activations,
        compiled=job.compiles,
    )


def _texts(
    job: Job, settings: recipes.Trained, text: recipes.Data, data: Sequences, position: int
) -> tuple[Sequences, Sequences, dict[str, Any]]:
    """A stage's text and the held-out text, with the teacher's signals where they are cached, and facts about those."""
    held_out = job.held_out(text)
    if getattr(settings, "cache_teacher", None) is None:
        return data, held_out, {}
    assert isinstance(settings, recipes.Logits)
    store = job.texts[name_of(text)].key
    ask = partial(taught, job.teacher, store=store, top=settings.top_k, autocast=job.autocast)
    end = position
    for _ in range(steps_of(settings, data.length)):
        _, end = with_targets(data, end, settings.batch_size)
    learn, facts = ask(data=plain(data), begin=position, end=end)
    if settings.eval_steps:
        count = count_with_targets(held_out, settings.eval_sequences)
        held_out, _ = ask(data=plain(held_out), begin=0, end=count)
    return learn, held_out, {"cached_teacher": facts}


def calibrate(
    job: Job, student: PreTrainedModel, settings: recipes.Calibrate, data: Sequences, position: int
) -> tuple[dict[str, Any], dict[str, nn.Parameter]]:
    """Stage 0; its facts and the output projections, by name."""
    fits = NormalEquations(job.pair(student), settings.weight)
    seconds = gather([fits], settings, data, position, job.device)
    fits.add_processes()
    return solve(job, student, settings, data, position, fits, seconds), projections_of(job, student)


def gather(
    fits: list[NormalEquations], settings: recipes.Calibrate, data: Sequences, position: int, device: torch.device
) -> float:
    """Sum the normal equations of one or several students over the stage's tokens; returns the seconds it took."""
    began, length = time.monotonic(), data.length
    sequences = sequences_of(settings, length)
    with progress("calibrate", sequences, "sequences") as advance:
        for at in range(0, sequences, settings.batch_size):
            size = min(settings.batch_size, sequences - at)
            first, mine = share(size)
            if mine:
                add_together(fits, data.batch(position + at + first, mine).to(device))
            advance(size, note=f"{(at + size) * length / (time.monotonic() - began):.0f} tokens/s")
    return time.monotonic() - began


def sequences_of(settings: recipes.Calibrate, length: int) -> int:
    """Sequences that the normal equations are summed over."""
    return max(1, round(settings.tokens / length))


def solve(
    job: Job,
    student: PreTrainedModel,
    settings: recipes.Calibrate,
    data: Sequences,
    position: int,
    fits: NormalEquations,
    fit_seconds: float,
) -> dict[str, Any]:
    """Write the output projections that the sums lead to; returns the stage's facts."""
    began, sequences = time.monotonic(), sequences_of(settings, data.length)
    position += sequences
    tried: dict[str, dict[str, float]] = {}
    ridge = settings.ridge
    if ridge == "auto":
        judge = Logits(job.pair(student), Weights())
        batch, position = with_targets(data, position, CHOOSING)
        batch = batch.to(job.device)
        with progress("choose the ridge", len(RIDGES), "fits") as advance:
            for candidate in RIDGES:
                unexplained = fits.solve(candidate)
                loss = float(judge.evaluate(batch)["ce"])
                tried[f"{candidate:g}"] = {"unexplained": unexplained, "loss": loss}
                advance(1, note=f"ridge {candidate:g}: loss {loss:.3f}")
        ridge = on_main(lambda: float(_best_ridge(tried)))
    unexplained = fits.solve(float(ridge))
    take_from_main(p for projection in fits.projections.values() for p in projection.parameters())
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
def load_into(student: PreTrainedModel, teacher: PreTrainedModel, tensors: dict[str, torch.Tensor]) -> None:
    """Give the student what a finished stage taught; what it shares with the teacher becomes its own before."""
    theirs = {id(p) for p in teacher.parameters()}
    for name, tensor in tensors.items():
        parameter = student.get_parameter(name)
        if id(parameter) in theirs:  # an adapter outside the attention was merged
            unshare(student.get_submodule(name.rpartition(".")[0]))
            parameter = student.get_parameter(name)
        parameter.copy_(tensor)
