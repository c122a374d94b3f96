"""Teachers that Limbeck trains itself, on demand and once: small ones, for studies on a laptop.

    folder = trained_teacher("small")              # an ordinary Hugging Face folder
    limbeck assets --teacher small                 # the same; `--teacher small` anywhere else too

A teacher's text is the embedded one mixed with recall tasks (`limbeck.data.recall`), its vocabulary is learnt from that
text, and it is trained by the loop that trains students. It can be killed at any moment: the same command goes on, on a
CPU bit for bit. What it cost and how well it does is in the manifest of its folder. See docs/small_teacher.md.
"""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import no_grad
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from limbeck.console import console
from limbeck.data.cache import cache_root, planning, publish, sound, would_make
from limbeck.data.packing import Packed, Sequences, count_with_targets
from limbeck.data.repeats import Repeats
from limbeck.data.text import Text, open_text
from limbeck.data.vocabulary import learn_vocabulary
from limbeck.distributed import world
from limbeck.errors import LimbeckError
from limbeck.stages.loop import train
from limbeck.stages.next_token import NextToken
from limbeck.stages.optimize import copy_into, steps_of
from limbeck.stages.run import RunDirectory, environment, open_run
from limbeck.teacher_recipe import TeacherRecipe
from limbeck.teachers.lookback import look_back

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


def trained_teacher(
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
    if sound(folder, verify=verify):
        return folder
    if planning() is not None:
        would_make(str(planned(name)))
    if world().size > 1:
        raise LimbeckError(
            f"the teacher '{recipe.name}' is not in the cache, and several processes cannot train it",
            hint=f"limbeck assets --teacher {name}   (once, in one process)",
        )
    work = cache_root() / "teachers" / f"{recipe.name}-{recipe.key[:12]}"
    with open_run(work, recipe) as run:
        tokenizer, model, text = _prepare(recipe)
        (confirm or _show)(plan_of(recipe, model))
        stages = _train(recipe, run, model, text)

        def fill(temporary: Path) -> dict[str, Any]:
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
            shutil.copy(run.metrics, temporary / run.metrics.name)
            return {
                "asset": f"teacher {recipe.name}",
                "recipe": recipe.model_dump(mode="json"),
                "key": recipe.key,
                "texts": text.key,
                "parameters": model.num_parameters(),
                "stages": stages,
                "held_out_perplexity": held_out_perplexity(recipe, model, text),
                "made_with": environment(),
            }

        publish(folder, fill, what=f"teacher '{recipe.name}'", need_bytes=6 * model.num_parameters(), verify=verify)
    shutil.rmtree(work, ignore_errors=True)
    return folder


def new_model(recipe: TeacherRecipe, tokenizer: Any = None) -> PreTrainedModel:
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
        look_back(model, recipe.seed)
    return model


def planned(name: str | Path) -> TeacherPlan:
    """What training that teacher will cost; makes nothing of it, neither its text nor its vocabulary."""
    recipe = TeacherRecipe.load(name)
    return plan_of(recipe, new_model(recipe))


def plan_of(recipe: TeacherRecipe, model: PreTrainedModel) -> TeacherPlan:
    """Cost of a teacher, from one batch of random tokens of each stage that is run forward and backward now."""
    stage, tokens, steps, seconds = NextToken(model), 0, 0, 0.0
    for index, settings in enumerate(recipe.stages):
        length = _length(recipe, index)
        count = steps_of(settings, length)
        drawn = Repeats(model.config.vocab_size, length, recipe.seed)
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
def held_out_perplexity(recipe: TeacherRecipe, model: PreTrainedModel, text: Text) -> dict[str, float]:
    """Perplexity on the held-out part of each source, in sequences of the recipe's length."""
    found = {}
    for source, part in zip(recipe.data.sources or [], text.parts):
        if part.held_out is None:
            continue
        held_out = Packed(part.held_out, recipe.data.seq_len, shuffle=False)
        stage, total, count = NextToken(model), 0.0, 0
        for at in range(count_with_targets(held_out, max(1, EVALUATED // recipe.data.seq_len))):
            batch = held_out.batch(at, 1)
            if batch.valid:
                total += float(stage.evaluate(batch)["loss"]) * batch.valid
                count += batch.valid
        found[source.source] = math.exp(total / count)
    return found


def _prepare(recipe: TeacherRecipe) -> tuple[Any, PreTrainedModel, Text]:
    """Vocabulary, the model before its first step, and the text."""
    tokenizer = _tokenizer(recipe)
    model = new_model(recipe, tokenizer)
    longest = max(_length(recipe, index) for index in range(len(recipe.stages)))
    return tokenizer, model, open_text(recipe.data, tokenizer, model, length=longest)


def _train(recipe: TeacherRecipe, run: RunDirectory, model: PreTrainedModel, text: Text) -> list[dict[str, Any]]:
    """All stages, from where the run stands; what each did."""
    stage, done = NextToken(model), []
    read: tuple[Sequences, int] | None = None
    for index, settings in enumerate(recipe.stages):
        data = _reading(recipe, index, text, model)
        if run.finished(index, verify=True):
            copy_into(stage.parameters(), run.result(index))
            facts = run.facts(index)
        else:
            position = data.after(*read) if read and settings.stage == "next_token" else 0
            facts = train(stage, settings, data, run, index, position, text.held_out(data.length))
            run.finish(index, dict(stage.parameters()), facts)
        if settings.stage == "next_token":
            read = data, facts["position"]
        kept = ("steps", "tokens", "seconds", "skipped", "first_loss", "loss", "held_out_loss")
        done.append({name: facts[name] for name in kept})
    return done


def _tokenizer(recipe: TeacherRecipe) -> Any:
    """The recipe's vocabulary: learnt from the embedded text that nobody holds out, kept in the cache."""
    from limbeck.assets import texts_for_learning

    context = recipe.model["max_position_embeddings"]
    folder = cache_root() / "teachers" / f"vocabulary-{recipe.vocab_size}-{context}"

    def fill(temporary: Path) -> dict[str, Any]:
        console.print(f"learning a vocabulary of {recipe.vocab_size:,} tokens", markup=False)
        learn_vocabulary(texts_for_learning(), recipe.vocab_size, context=context).save_pretrained(temporary)
        return {}

    publish(folder, fill, what="vocabulary", verify=True)
    return AutoTokenizer.from_pretrained(folder)


def _reading(recipe: TeacherRecipe, index: int, text: Text, model: PreTrainedModel) -> Sequences:
    """What a stage reads."""
    length = _length(recipe, index)
    if recipe.stages[index].stage == "repeats":
        return Repeats(model.config.vocab_size, length, recipe.seed)
    return text.training(length, recipe.seed)


def _length(recipe: TeacherRecipe, index: int) -> int:
    return recipe.stages[index].seq_len or recipe.data.seq_len


def _show(plan: TeacherPlan) -> None:
    console.print(f"{plan}; it can be stopped at any moment, the same command goes on", markup=False)
