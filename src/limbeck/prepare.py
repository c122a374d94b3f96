"""What a run works with, checked: everything that can be wrong with a recipe is found here, before anything is written.

    job = prepare_job(Recipe.load("quickstart"))
    student = new_student(job)

Writes nothing but the caches of text and teacher.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck import assets, mixers
from limbeck import recipe as recipes
from limbeck.adapters import check_peft, targets_of
from limbeck.console import console
from limbeck.data.packing import Sequences, count_with_targets, no_targets, share_with_targets
from limbeck.data.shards import Split
from limbeck.data.text import Text, open_text
from limbeck.distributed import local_device, world
from limbeck.errors import LimbeckError, hints_for
from limbeck.model import Site, attention_sites, convert, converted_layers
from limbeck.model.compiling import Notes, wanted
from limbeck.model.packed import use_masks
from limbeck.precision import autocast_of, check_arithmetic
from limbeck.recipe import Recipe
from limbeck.stages.cached import plain
from limbeck.stages.run import check_run
from limbeck.stages.teacher import Pair, load_teacher
from limbeck.stages.trackers import check_trackers

FEW = 0.9  # share of sequences with a target below which it is said


@dataclass
class Job:
    """What a run works with once everything has been checked."""

    recipe: Recipe
    device: torch.device
    autocast: Callable[[], Any]
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: dict[str, Text]  # by what names the text, see `name_of`
    layers: int  # of the teacher
    sites: list[Site]  # of those that are converted
    path: Path
    compiling: Notes = field(default_factory=Notes)  # what torch.compile has refused

    @property
    def compiles(self) -> bool:
        """Whether blocks and losses of stage 3 go through torch.compile."""
        return wanted(self.recipe.compile, self.device)

    @property
    def text(self) -> Text:
        """The recipe's own; a stage may have another."""
        return self.texts[name_of(self.recipe.data)]

    def pair(self, student: PreTrainedModel) -> Pair:
        """What the stages of a student of this job work on."""
        return Pair(self.teacher, student, self.sites, self.autocast)

    def training(self, data: recipes.Data) -> Sequences:
        """What a stage with that text learns from."""
        return self.texts[name_of(data)].training(data.length, self.recipe.seed)

    def held_out(self, data: recipes.Data) -> Sequences:
        """What it is measured on."""
        return self.texts[name_of(data)].held_out(data.length)


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]  # a teacher and its tokenizer


def prepare_job(recipe: Recipe, loaded: Loaded | None = None) -> Job:
    """Check a recipe and load what it names. Writes nothing but the caches.

    Args:
        loaded: the recipe's teacher where it is in memory already.
    """
    _check_shares(recipe)
    mixers.options(recipe.student.mixer, recipe.student.options, recipe.student.preset)
    path = run_path(recipe)
    if world().main:
        check_run(path, recipe)
    device = local_device(recipe.device)
    check_arithmetic(recipe, device)
    check_trackers(recipe.trackers)
    teacher, tokenizer = loaded or load_teacher(assets.resolve_teacher(recipe.teacher), device, recipe.teacher_bits)
    longest = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    lengths = {"data.length": recipe.data.length}
    lengths |= {f"stages.{i}.length": recipe.text_of(stage).length for i, stage in enumerate(recipe.stages)}
    for key, length in lengths.items():
        if longest is not None and length > longest:
            raise LimbeckError(
                f"sequences of {length} tokens, the teacher was made for {longest}",
                expected=f"{key} of at most {longest}",
                hint=f"--set {key}={longest}",
            )
    if recipe.attention == "mask":
        use_masks(teacher)
    sites = attention_sites(teacher)
    chosen = [sites[i] for i in converted_layers(recipe.student.layers, recipe.student.keep, len(sites))]
    for stage in recipe.stages:
        if isinstance(stage, recipes.Logits) and stage.lora is not None:
            check_peft()
            targets_of(teacher, chosen, stage.lora.targets)
    texts = _open_texts(recipe, teacher, tokenizer)
    autocast = autocast_of(recipe.precision, device)
    job = Job(recipe, device, autocast, teacher, tokenizer, texts, len(sites), chosen, path)
    for stage in recipe.stages:
        if getattr(stage, "cache_teacher", None) is not None:
            plain(job.training(recipe.text_of(stage)))
    _check_targets(job)
    return job


def run_path(recipe: Recipe) -> Path:
    """The run directory of a recipe."""
    return Path(recipe.out or f"runs/{recipe.name}")


def _open_texts(recipe: Recipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Text]:
    """All texts of a recipe, each opened once, for the longest sequences that are read of it."""
    uses = [(recipe.data, 0), *((recipe.text_of(stage), stage.tokens) for stage in recipe.stages)]
    places = ["data", *(f"stages.{index}" for index in range(len(recipe.stages)))]  # whose length it is
    texts: dict[str, Text] = {}
    for name, data in {name_of(data): data for data, _ in uses}.items():
        length, place = max((one.length, where) for (one, _), where in zip(uses, places) if name_of(one) == name)
        with hints_for(_keys(recipe, name, place)):
            text = open_text(data, tokenizer, teacher, length=length, held_out_tokens=recipe.evaluation.tokens)
        wanted = sum(tokens for one, tokens in uses if name_of(one) == name)
        if text.train_tokens is not None and wanted > text.train_tokens:
            console.print(f"the stages take {wanted:,} tokens, the text has {text.train_tokens:,}: it is read again")
        texts[name] = text
    return texts


def _keys(recipe: Recipe, name: str, place: str) -> dict[str, str]:
    """Where a recipe says what hints call `data.KEY`, of the text of that name.

    Args:
        place: "data" or "stages.N", whose length of sequences is the longest.
    """
    if name_of(recipe.data) == name:
        own = place != "data" and recipe.stages[int(place[7:])].length is not None
        return {"data.length": f"{place}.length"} if own else {}
    index = next(i for i, stage in enumerate(recipe.stages) if stage.data is not None and name_of(stage.data) == name)
    return {"--set data.length": f"--set {place}.length", "--set data.": f"--set stages.{index}.data."}


def _check_targets(job: Job) -> None:
    """Say where many sequences have no target; LimbeckError where none has, before anything is trained on the others.

    Stages 0 to 2 compare all tokens, so this is of stage 3 and of what is measured on held-out text.
    """
    recipe = job.recipe
    count_with_targets(job.held_out(recipe.data), recipe.evaluation.tokens // recipe.data.length)
    learnt = [recipe.text_of(stage) for stage in recipe.stages if isinstance(stage, recipes.Logits)]
    for stage in recipe.stages:
        if isinstance(stage, recipes.Logits) and stage.evaluate_every:
            count_with_targets(job.held_out(recipe.text_of(stage)), stage.evaluate_sequences)
    uses = [(recipe.data, "held_out"), *((data, "train") for data in learnt)]
    for data, name in {(name_of(data), data.length, name): (data, name) for data, name in uses}.values():
        for part in job.texts[name_of(data)].parts:
            split = getattr(part, name, None)
            if not isinstance(split, Split):  # of a stream, which is not read from end to end for this
                continue
            found, of = share_with_targets(split, data.length)
            if not found and name == "train":
                raise no_targets(f"'{part.source}' that is trained on", data.length)
            if found < FEW * of:
                have = f"{found:,} of {of:,} {name} sequences of {data.length} tokens have a target"
                passed = "stage logits passes over the others" if name == "train" else "the others count for nothing"
                console.print(f"'{part.source}': {have}; {passed}", markup=False)


def name_of(data: recipes.Data) -> str:
    """What tells one text from another: all of its settings but the length of the sequences."""
    return json.dumps(data.model_dump(mode="json", exclude={"length", "cache_gb"}))


def new_student(job: Job) -> PreTrainedModel:
    student = job.recipe.student
    teacher = job.teacher
    if job.recipe.teacher_bits is not None:
        # the student is what it would be without bits: it takes the checkpoint's own weights, and keeps all of them
        teacher, _ = load_teacher(assets.resolve_teacher(job.recipe.teacher), job.device)
    torch.manual_seed(job.recipe.seed)
    converted = convert(
        teacher,
        student.mixer,
        [site.shape.layer for site in job.sites],
        student.options,
        preset=student.preset,
        rules=[rule.model_dump(exclude_none=True) for rule in student.rules],
        copy_projections=student.copy_projections,
        share=True,
    ).requires_grad_(False)
    if job.recipe.attention == "mask":
        use_masks(converted)
    return converted


def _check_shares(recipe: Recipe) -> None:
    """Every process needs a row of every step."""
    size = world().size
    for index, stage in enumerate(recipe.stages):
        at = f"stages.{index} ({stage.stage}): a batch of {stage.batch} for {size} processes"
        whole = -(-stage.batch // size) * size
        if stage.batch < size:
            raise LimbeckError(at, expected="a sequence for each, or more", hint=f"--set stages.{index}.batch={size}")
        if size > 1 and getattr(stage, "sharding", "none") == "full":
            if stage.batch % size:
                raise LimbeckError(
                    f"{at}, sharded", expected="as many for each", hint=f"--set stages.{index}.batch={whole}"
                )
            if recipe.teacher_bits is not None:
                raise LimbeckError(
                    f"stages.{index}: a teacher in {recipe.teacher_bits} bits cannot be sharded",
                    expected="sharding: none, or no teacher_bits",
                )
            if getattr(stage, "optimizer", "adamw") == "muon":
                raise LimbeckError(
                    f"stages.{index}: muon needs whole matrices, and sharding leaves a part of each",
                    expected="optimizer: adamw, or sharding: none",
                )
