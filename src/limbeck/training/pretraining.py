"""Teachers that Limbeck trains itself: the start that looks back, and the training.

Teachers that Limbeck trains itself, on demand and once: small ones, for studies on a laptop.

    folder = train_or_load_teacher("small")              # an ordinary Hugging Face folder
    limbeck assets --teacher small                 # the same; `--teacher small` anywhere else too

A teacher's text is the embedded one mixed with recall tasks (`limbeck.data.offline.recall`), its vocabulary is learnt from that
text, and it is trained by the loop that trains students. It can be killed at any moment: the same command goes on, on a
CPU bit for bit. What it cost and how well it does is in the manifest of its folder. See docs/small_teacher.md.

A start from which looking back is learnt at once: two layers of attention that already do so, roughly.

    init_induction_heads(model)            # in place, right after the model was drawn; a Llama-like one with tied embeddings

Copying from the context takes two steps in a row (an induction head, arXiv 2209.11895): a head that fetches the token
before each place, and a later one that finds the place whose predecessor is the token at hand. Neither earns anything
without the other, so from a random start both wait for chance: the small teacher had no trace of them after
1.66 M tokens (docs/small_teacher.md). Here both are in the initial weights, in the manner of mimetic initialisation
(arXiv 2305.09828), weak enough that training shapes them; all else stays random.

- Embeddings get a component u that all tokens share. Heads of the first layer form their queries and keys from it
  alone: the fastest rotations of RoPE, the query turned back by one token, so each looks at the place before it.
- They write a projection P of that place's token into directions Q of the residual stream.
- A head of each key-value group in the second layer compares P of its own token with what stands in Q, by the slow
  rotations that hardly know the distance, and adds the token that it finds to the stream; the tied head reads it there.

Plain language modelling: a model learns the next token of text, from labels alone.

    stage = NextTokenStage(model)
    Trainer(stage, settings, data, run, index=index, position=position).train()

This is how Limbeck trains a small teacher of its own (`limbeck.training.pretraining`); a student learns by the other stages.
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

from limbeck.core.console import console
from limbeck.core.distributed import get_process_info
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import TeacherRecipe, Trained
from limbeck.core.storage import (
    cache_root,
    ensure_cached_folder,
    get_dry_run_notes,
    load_valid_manifest,
    raise_if_dry_run,
)
from limbeck.data.dataset import TextData, open_text_data
from limbeck.data.packing import IGNORE_INDEX, Batch, PackedDataset, SequenceDataset, count_eval_sequences
from limbeck.data.synthetic import RepeatedSequenceDataset
from limbeck.data.tokenization import train_tokenizer
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.training.optim import assign_parameters, count_training_steps
from limbeck.training.run_directory import RunDirectory, collect_environment, open_run
from limbeck.training.trainer import Trainer

FAST = 5  # rotations that tell one token's distance from two
BEFORE = 6.0  # size of the queries and keys that look at the place before
WRITE = 0.1  # of what the first layer writes
MATCH = 25.0  # score of a place whose predecessor is the same token
COPY = 3.0  # of what the second layer writes


@torch.no_grad()
def init_induction_heads(model: PreTrainedModel, seed: int = 0) -> None:
    """Set queries, keys, values and outputs of some heads in the first two layers.

    Raises:
        LimbeckError: a model without such layers, RoPE or tied embeddings.
    """
    try:
        config, (first, second) = model.config, [layer.self_attn for layer in model.get_decoder().layers[:2]]
        rotations = model.get_decoder().rotary_emb.inv_freq  # [K / 2], radians a token
        parts = [getattr(layer, f"{name}_proj").weight for layer in (first, second) for name in "qkvo"]
    except (AttributeError, ValueError) as error:
        raise LimbeckError(
            f"a {type(model).__name__} cannot start looking back", expected="model_type: llama"
        ) from error
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        raise LimbeckError("a start that looks back needs tied embeddings", hint="tie_word_embeddings: true")
    table: Tensor = model.get_input_embeddings().weight  # type: ignore[assignment]
    width, groups, half = table.shape[1], config.num_key_value_heads, len(rotations)
    per_group, key = config.num_attention_heads // groups, 2 * half
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0].to(table.dtype)
    shared, codes, places, copies = _split(basis.T, [1, key, key, groups * key])
    size = float(table.norm(dim=1).mean())
    table -= table @ shared.T @ shared
    table += size * shared
    unit = math.sqrt(width) / (size * math.sqrt(2))  # the first norm's factor
    for module in model.get_decoder().layers.modules():  # nothing but those heads hears the shared component
        if isinstance(module, nn.Linear) and module.in_features == width:
            module.weight -= module.weight @ shared.T @ shared

    q, k, v, o = parts[:4]  # the first layer: one head, the first group
    k[:key], q[:key] = 0.0, 0.0
    fast = torch.arange(min(FAST, half))
    strength = BEFORE / (unit * size)
    k[fast] = strength * shared
    q[fast] = strength * rotations[fast, None].cos() * shared
    q[fast + half] = -strength * rotations[fast, None].sin() * shared
    v[:key] = codes
    o[:, :key] = WRITE * places.T

    q, k, v, o = parts[4:]  # the second layer: the first head of each group, with its share of the code
    slow = torch.arange(half - half // 2, half)
    slots = torch.cat([slow, slow + half])
    step = key // groups
    for group in range(groups):
        share = slice(group * step, group * step + min(step, len(slots)))
        head, mine = group * per_group * key, slots[: share.stop - share.start]
        k[group * key : (group + 1) * key], q[head : head + key] = 0.0, 0.0
        norm = math.sqrt(2) * size  # roughly, of the stream here
        now = math.sqrt(width) / norm
        token = len(mine) * size**2 / width  # squared length of a token's share of the code
        gain = math.sqrt(MATCH * math.sqrt(key) / (token * now * now * WRITE * unit))
        q[head + mine] = gain * codes[share]
        k[group * key + mine] = gain * places[share]
        copied = copies[group * key : (group + 1) * key]
        v[group * key : (group + 1) * key] = copied
        o[:, head : head + key] = COPY * size * copied.T


def _split(rows: Tensor, sizes: list[int]) -> list[Tensor]:
    """Consecutive rows in stretches; LimbeckError where the width has no room for them."""
    if sum(sizes) > len(rows):
        raise LimbeckError(f"a width of {len(rows)}", expected=f"at least {sum(sizes)}, to start looking back")
    return list(rows[: sum(sizes)].split(sizes))


class NextTokenStage:
    """A stage for the training loop: cross-entropy over the valid targets of a step."""

    requires_targets = True

    def __init__(self, model: PreTrainedModel):
        self.student, self.head = model, LMHead(model)
        self.autocast: Callable[[], Any] = nullcontext
        self.loss_scale = 1.0
        self.stopped: set[str] = set()

    def parameters(self) -> dict[str, nn.Parameter]:
        """All of the model."""
        return dict(self.student.named_parameters())

    def learning_rates(self, recipe: Trained) -> dict[str, float]:
        """One for all."""
        return dict.fromkeys(self.parameters(), recipe.lr)

    def count(self, batch: Batch) -> dict[str, float]:
        """What this batch adds to the count that the loss is divided by."""
        return {"targets": float(batch.n_targets)}

    def backward(self, batch: Batch, counts: dict[str, float]) -> dict[str, Tensor]:
        """Add the gradients of one micro-batch; returns its share of the loss."""
        loss = self._loss(batch) / max(counts["targets"], 1.0)
        (loss * self.loss_scale).backward()
        return {"loss": loss.detach().double()}

    @torch.no_grad()
    def evaluate(self, batch: Batch, counts: dict[str, float] | None = None) -> dict[str, Tensor]:
        """The loss on a batch, without gradients: its share, given the counts of all; none without any target."""
        count = (counts or self.count(batch))["targets"]
        return {"loss": self._loss(batch).double() / count} if count else {}

    def _loss(self, batch: Batch) -> Tensor:
        """Summed over the valid targets."""
        rows = (batch.targets.flatten() != IGNORE_INDEX).nonzero().squeeze(1)
        logits = self.head(run_backbone(self.student, batch).flatten(0, 1)[rows])
        return F.cross_entropy(logits, batch.targets.flatten()[rows], reduction="sum")


EVALUATED = 65_536  # held-out tokens of each source that a finished teacher is measured on


@dataclass(frozen=True)
class TeacherPlan:
    """What training will cost: parameters, tokens, optimiser steps, seconds on this machine."""

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
    """The folder of a teacher, which is trained first where it is not in the cache.

    Args:
        name: a built-in teacher ("small", "tiny") or a YAML file.
        verify: compare the sha256 of each file.
        confirm: called with the plan before training begins or goes on; prints it by default.

    Raises:
        LimbeckError: no such teacher, another process is training it, no room, no text.
    """
    recipe = TeacherRecipe.load(name)
    folder = recipe.folder
    if load_valid_manifest(folder, verify=verify):
        return folder
    if get_dry_run_notes() is not None:
        raise_if_dry_run(str(plan_teacher_training(name)))
    if get_process_info().world_size > 1:
        raise LimbeckError(
            f"the teacher '{recipe.name}' is not in the cache, and several processes cannot train it",
            hint=f"limbeck assets --teacher {name}   (once, in one process)",
        )
    work = cache_root() / "teachers" / f"{recipe.name}-{recipe.key[:12]}"
    with open_run(work, recipe) as run:
        tokenizer, model, text = _prepare(recipe)
        (confirm or _show)(estimate_teacher_training(recipe, model))
        stages = _train(recipe, run, model, text)

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
    """The model before its first step, drawn from the recipe's seed; float32. For a plan no tokenizer is needed."""
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
    """What training that teacher will cost; makes nothing of it, neither its text nor its vocabulary."""
    recipe = TeacherRecipe.load(name)
    return estimate_teacher_training(recipe, build_teacher_model(recipe))


def estimate_teacher_training(recipe: TeacherRecipe, model: PreTrainedModel) -> TeacherPlan:
    """Cost of a teacher, from one batch of random tokens of each stage that is run forward and backward now."""
    stage, tokens, steps, seconds = NextTokenStage(model), 0, 0, 0.0
    for index, settings in enumerate(recipe.stages):
        length = _length(recipe, index)
        count = count_training_steps(settings, length)
        drawn = RepeatedSequenceDataset(model.config.vocab_size, length, recipe.seed)
        batch = drawn.batch(0, settings.micro_batch_size or settings.batch_size)
        took = []
        for _ in range(2):  # the first one warms up
            began = time.monotonic()
            stage.backward(batch, stage.count(batch))
            took.append(time.monotonic() - began)
        tokens, steps = tokens + count * settings.batch_size * length, steps + count
        seconds += count * min(took) * settings.batch_size / len(batch.input_ids)
    model.zero_grad()
    return TeacherPlan(recipe.name, model.num_parameters(), tokens, steps, seconds)


@no_grad()
def held_out_perplexity(recipe: TeacherRecipe, model: PreTrainedModel, text: TextData) -> dict[str, float]:
    """Perplexity on the held-out part of each source, in sequences of the recipe's length."""
    found = {}
    for source, part in zip(recipe.data.sources or [], text.sources):
        if part.held_out is None:
            continue
        held_out = PackedDataset(part.held_out, recipe.data.seq_len, shuffle=False)
        stage, total, count = NextTokenStage(model), 0.0, 0
        for at in range(count_eval_sequences(held_out, max(1, EVALUATED // recipe.data.seq_len))):
            batch = held_out.batch(at, 1)
            if batch.n_targets:
                total += float(stage.evaluate(batch)["loss"]) * batch.n_targets
                count += batch.n_targets
        found[source.source] = math.exp(total / count)
    return found


def _prepare(recipe: TeacherRecipe) -> tuple[Any, PreTrainedModel, TextData]:
    """Vocabulary, the model before its first step, and the text."""
    tokenizer = _tokenizer(recipe)
    model = build_teacher_model(recipe, tokenizer)
    longest = max(_length(recipe, index) for index in range(len(recipe.stages)))
    return tokenizer, model, open_text_data(recipe.data, tokenizer, model, length=longest)


def _train(recipe: TeacherRecipe, run: RunDirectory, model: PreTrainedModel, text: TextData) -> list[dict[str, Any]]:
    """All stages, from where the run stands; what each did."""
    stage, done = NextTokenStage(model), []
    read: tuple[SequenceDataset, int] | None = None
    for index, settings in enumerate(recipe.stages):
        data = _reading(recipe, index, text, model)
        if run.is_finished(index, verify=True):
            assign_parameters(stage.parameters(), run.load_stage_result(index))
            facts = run.load_stage_metrics(index)
        else:
            position = data.position_after(*read) if read and settings.stage == "next_token" else 0
            held_out = text.held_out_sequences(data.length)
            facts = Trainer(stage, settings, data, run, index=index, position=position, held_out=held_out).train()
            run.save_stage_result(index, dict(stage.parameters()), facts)
        if settings.stage == "next_token":
            read = data, facts["position"]
        kept = ("steps", "tokens", "seconds", "skipped", "first_loss", "loss", "held_out_loss")
        done.append({name: facts[name] for name in kept})
    return done


def _tokenizer(recipe: TeacherRecipe) -> Any:
    """The recipe's vocabulary: learnt from the embedded text that nobody holds out, kept in the cache."""
    from limbeck.data.offline.embedded import load_training_texts

    context = recipe.model["max_position_embeddings"]
    folder = cache_root() / "teachers" / f"vocabulary-{recipe.vocab_size}-{context}"

    def fill(temporary: Path) -> dict[str, Any]:
        console.print(f"learning a vocabulary of {recipe.vocab_size:,} tokens", markup=False)
        train_tokenizer(load_training_texts(), recipe.vocab_size, max_length=context).save_pretrained(temporary)
        return {}

    ensure_cached_folder(folder, fill, what="vocabulary", verify=True)
    return AutoTokenizer.from_pretrained(folder)


def _reading(recipe: TeacherRecipe, index: int, text: TextData, model: PreTrainedModel) -> SequenceDataset:
    """What a stage reads."""
    length = _length(recipe, index)
    if recipe.stages[index].stage == "repeats":
        return RepeatedSequenceDataset(model.config.vocab_size, length, recipe.seed)
    return text.train_sequences(length, recipe.seed)


def _length(recipe: TeacherRecipe, index: int) -> int:
    return recipe.stages[index].seq_len or recipe.data.seq_len


def _show(plan: TeacherPlan) -> None:
    console.print(f"{plan}; it can be stopped at any moment, the same command goes on", markup=False)
