"""Pretrain small teachers on demand, once each: for studies on a laptop.

    folder = train_or_load_teacher("small")              # an ordinary Hugging Face folder, in the cache
    limbeck assets --teacher small                       # the same on the command line; so does any `--teacher small`

A teacher trains on the embedded text mixed with recall tasks (`limbeck.data.offline.recall`); its tokenizer is trained
on that text too. Training uses the training loop of students with a stage of its own, next-token prediction. It can be
killed at any time: the same command resumes it, on a CPU bit for bit. The manifest of the teacher's folder records
training time and quality. See docs/guides/studies.md.
"""

import math
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn, no_grad
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from limbeck.core.cache import ensure_cached_folder, get_dry_run_notes, load_valid_manifest, raise_if_dry_run
from limbeck.core.console import console
from limbeck.core.distributed import get_process_info
from limbeck.core.errors import LimbeckError
from limbeck.core.live import Phase, View
from limbeck.core.recipe import TeacherRecipe
from limbeck.core.screen import watch
from limbeck.core.stage_settings import Trained
from limbeck.core.storage import cache_root
from limbeck.data.dataset import TextData, open_text_data
from limbeck.data.offline.embedded import load_training_texts
from limbeck.data.packing import IGNORE_INDEX, Batch, PackedDataset, SequenceDataset, count_eval_sequences
from limbeck.data.synthetic import RepeatedSequenceDataset
from limbeck.data.tokenization import train_tokenizer
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.training.induction_init import init_induction_heads
from limbeck.training.optim import assign_parameters, count_training_steps
from limbeck.training.run_directory import RunDirectory, collect_environment, open_run
from limbeck.training.trainer import Trainer

EVAL_TOKENS = 65_536  # held-out tokens of each source on which a trained teacher is evaluated


@dataclass(frozen=True)
class TeacherPlan:
    """Cost of training a teacher: parameters, tokens, optimizer steps, seconds on this machine."""

    name: str
    parameters: int
    tokens: int
    steps: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"teacher '{self.name}': {self.parameters / 1e6:.2f} M parameters, {self.tokens / 1e6:.2f} M tokens in "
            f"{self.steps:,} steps, about {self.seconds / 60:.0f} min with {torch.get_num_threads()} threads"
        )


def train_or_load_teacher(
    name: str | Path, *, verify: bool = False, confirm: Callable[[TeacherPlan], None] | None = None
) -> Path:
    """Return the folder of a teacher, which is trained first if it is not in the cache.

    Args:
        name: a built-in teacher ("small", "tiny") or a YAML file.
        verify: compare the sha256 of each file.
        confirm: called with the plan before training starts or resumes; prints it by default.

    Raises:
        LimbeckError: no such teacher, another process is training it, no disk space, no text.
    """
    recipe = TeacherRecipe.load(name)
    folder = recipe.folder
    if load_valid_manifest(folder, verify=verify):
        return folder
    if get_dry_run_notes() is not None:
        raise_if_dry_run(str(plan_teacher_training(name)))
    if get_process_info().world_size > 1:
        raise LimbeckError(
            f"the teacher '{recipe.name}' is not in the cache, and it has to be trained in a single process",
            hint=f"limbeck assets --teacher {name}   (once, in one process)",
        )
    work = cache_root() / "teachers" / f"{recipe.name}-{recipe.key[:12]}"
    with open_run(work, recipe) as run:
        tokenizer = _load_or_train_tokenizer(recipe)
        model = build_teacher_model(recipe, tokenizer)
        longest = max(_sequence_length(recipe, index) for index in range(len(recipe.stages)))
        text = open_text_data(recipe.data, tokenizer, model, length=longest)
        (confirm or _print_plan)(estimate_teacher_training(recipe, model))
        stages = _train_stages(recipe, run, model, text)

        def fill(temporary: Path) -> dict[str, Any]:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            shutil.copy(run.metrics_path, temporary / run.metrics_path.name)
            return {
                "asset": f"teacher {recipe.name}",
                "recipe": recipe.model_dump(mode="json"),
                "key": recipe.key,
                "texts": text.key,
                "parameters": model.num_parameters(),
                "stages": stages,
                "held_out_perplexity": held_out_perplexity(recipe, model, text),
                "made_with": collect_environment(),
            }

        ensure_cached_folder(
            folder, fill, what=f"teacher '{recipe.name}'", required_bytes=6 * model.num_parameters(), verify=verify
        )
    shutil.rmtree(work, ignore_errors=True)
    return folder


def build_teacher_model(recipe: TeacherRecipe, tokenizer: Any = None) -> PreTrainedModel:
    """Build the untrained float32 model from the recipe's seed; for a plan, no tokenizer is needed."""
    fields: dict[str, Any] = {"vocab_size": recipe.vocab_size, "pad_token_id": None}
    if tokenizer is not None:
        fields |= {"vocab_size": len(tokenizer), "bos_token_id": tokenizer.bos_token_id}
        fields |= {"eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(**{**fields, **recipe.model})
    with torch.random.fork_rng():
        torch.manual_seed(recipe.seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    if recipe.init == "look_back":
        init_induction_heads(model, recipe.seed)
    return model


def plan_teacher_training(name: str | Path) -> TeacherPlan:
    """Estimate the cost of training a teacher, without creating its text or tokenizer."""
    recipe = TeacherRecipe.load(name)
    return estimate_teacher_training(recipe, build_teacher_model(recipe))


def estimate_teacher_training(recipe: TeacherRecipe, model: PreTrainedModel) -> TeacherPlan:
    """Estimate the cost of training a teacher by timing one batch of random tokens for each stage."""
    stage, tokens, steps, seconds = NextTokenStage(model), 0, 0, 0.0
    for index, settings in enumerate(recipe.stages):
        length = _sequence_length(recipe, index)
        stage_steps = count_training_steps(settings, length)
        dataset = RepeatedSequenceDataset(model.config.vocab_size, length, recipe.seed)
        batch = dataset.batch(0, settings.micro_batch_size or settings.batch_size)
        times = []
        for _ in range(2):  # the first pass warms up
            start = time.monotonic()
            stage.backward(batch, stage.count(batch))
            times.append(time.monotonic() - start)
        tokens, steps = tokens + stage_steps * settings.batch_size * length, steps + stage_steps
        seconds += stage_steps * min(times) * settings.batch_size / len(batch.input_ids)
    model.zero_grad()
    return TeacherPlan(recipe.name, model.num_parameters(), tokens, steps, seconds)


@no_grad()
def held_out_perplexity(recipe: TeacherRecipe, model: PreTrainedModel, text: TextData) -> dict[str, float]:
    """Measure the perplexity on the held-out part of each source, in sequences of the recipe's length."""
    perplexities = {}
    for source, part in zip(recipe.data.sources or [], text.sources):
        if part.held_out is None:
            continue
        held_out = PackedDataset(part.held_out, recipe.data.seq_len, shuffle=False)
        stage, total, count = NextTokenStage(model), 0.0, 0
        for index in range(count_eval_sequences(held_out, max(1, EVAL_TOKENS // recipe.data.seq_len))):
            batch = held_out.batch(index, 1)
            if batch.n_targets:
                total += float(stage.evaluate(batch)["loss"]) * batch.n_targets
                count += batch.n_targets
        perplexities[source.source] = math.exp(total / count)
    return perplexities


def _train_stages(
    recipe: TeacherRecipe, run: RunDirectory, model: PreTrainedModel, text: TextData
) -> list[dict[str, Any]]:
    """Train all stages that are not finished yet; returns the results of each stage."""
    stage, results = NextTokenStage(model), []
    previous: tuple[SequenceDataset, int] | None = None  # the text stage before, and where it stopped reading
    phases = [
        Phase(i, settings.stage, settings.tokens, f"{settings.tokens:,} tokens")
        for i, settings in enumerate(recipe.stages)
    ]
    with watch(View(f"teacher '{recipe.name}'", phases, str(run.path), in_seconds=False)) as view:
        for index, settings in enumerate(recipe.stages):
            length = _sequence_length(recipe, index)
            data: SequenceDataset
            if settings.stage == "repeats":
                data = RepeatedSequenceDataset(model.config.vocab_size, length, recipe.seed)
            else:
                data = text.train_sequences(length, recipe.seed)
            if run.is_finished(index, verify=True):
                assign_parameters(stage.parameters(), run.load_stage_result(index))
                facts = run.load_stage_metrics(index)
            else:
                view.begin(index)
                # text stages read on where the previous one stopped, whatever its sequence length
                position = data.position_after(*previous) if previous and settings.stage == "next_token" else 0
                held_out = text.held_out_sequences(data.length)
                facts = Trainer(stage, settings, data, run, index=index, position=position, held_out=held_out).train()
                run.save_stage_result(index, dict(stage.parameters()), facts)
            view.finish(index, f"loss {facts['first_loss']:.3f} to {facts['loss']:.3f}", facts["seconds"])
            if settings.stage == "next_token":
                previous = data, facts["position"]
            fields = ("steps", "tokens", "seconds", "skipped", "first_loss", "loss", "held_out_loss")
            results.append({name: facts[name] for name in fields})
    return results


def _load_or_train_tokenizer(recipe: TeacherRecipe) -> Any:
    """Load the recipe's tokenizer from the cache, or train it on the training split of the embedded text."""
    context = recipe.model["max_position_embeddings"]
    folder = cache_root() / "teachers" / f"vocabulary-{recipe.vocab_size}-{context}"

    def fill(temporary: Path) -> dict[str, Any]:
        console.print(f"training a tokenizer with {recipe.vocab_size:,} tokens", markup=False)
        train_tokenizer(load_training_texts(), recipe.vocab_size, max_length=context).save_pretrained(temporary)
        return {}

    ensure_cached_folder(folder, fill, what="vocabulary", verify=True)
    return AutoTokenizer.from_pretrained(folder)


def _sequence_length(recipe: TeacherRecipe, index: int) -> int:
    return recipe.stages[index].seq_len or recipe.data.seq_len


def _print_plan(plan: TeacherPlan) -> None:
    console.print(f"{plan}; it can be interrupted at any time, and the same command resumes it", markup=False)


class NextTokenStage:
    """A stage for the training loop: cross-entropy, averaged over the valid targets of an optimizer step."""

    requires_targets = True

    def __init__(self, model: PreTrainedModel):
        self.student, self.head = model, LMHead(model)
        self.autocast: Callable[[], Any] = nullcontext
        self.loss_scale = 1.0
        self.stopped: set[str] = set()

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return all parameters of the model."""
        return dict(self.student.named_parameters())

    def learning_rates(self, recipe: Trained) -> dict[str, float]:
        """Return the same learning rate for all parameters."""
        return dict.fromkeys(self.parameters(), recipe.lr)

    def count(self, batch: Batch) -> dict[str, float]:
        """Count the valid targets of a batch; the loss is divided by their sum over the step."""
        return {"targets": float(batch.n_targets)}

    def backward(self, batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch; returns its part of the step's loss.

        Args:
            counts: sums of `count` over all micro-batches of the step.
        """
        loss = self._loss(batch) / max(counts["targets"], 1.0)
        (loss * self.loss_scale).backward()
        return {"loss": loss.detach().double()}

    @torch.no_grad()
    def evaluate(self, batch: Batch, counts: dict[str, float] | None = None) -> dict[str, Tensor]:
        """Compute the loss of a batch, or its part given the counts of all batches; empty without targets."""
        count = (counts or self.count(batch))["targets"]
        return {"loss": self._loss(batch).double() / count} if count else {}

    def _loss(self, batch: Batch) -> Tensor:
        """Sum the cross-entropy over the valid targets."""
        rows = (batch.targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        logits = self.head(run_backbone(self.student, batch).flatten(0, 1)[rows])
        return F.cross_entropy(logits, batch.targets.flatten()[rows], reduction="sum")
