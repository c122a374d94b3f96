"""What a run works with, checked: everything that can be wrong with a recipe is found here, before anything is written.

    job = prepare_job(Recipe.load("quickstart"))
    student = new_student(job)

Writes nothing but the caches of text and teacher.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck import assets, mixers
from limbeck import recipe as recipes
from limbeck.adapters import check_peft, targets_of
from limbeck.console import as_time, console
from limbeck.data.cache import NotMade, planning
from limbeck.data.packing import Sequences, count_with_targets, no_targets, share_with_targets
from limbeck.data.repeats import REPEATS
from limbeck.data.shards import Split
from limbeck.data.sources import stored_bytes
from limbeck.data.special_tokens import around
from limbeck.data.text import Text, open_text
from limbeck.distributed import local_device, world
from limbeck.errors import LimbeckError, hints_for
from limbeck.identity import check_identity, identity_of
from limbeck.model import Site, attention_sites, convert, converted_layers
from limbeck.model.compiling import Notes, wanted
from limbeck.model.packed import use_masks
from limbeck.precision import autocast_of, check_arithmetic
from limbeck.recipe import Recipe
from limbeck.stages.cached import plain
from limbeck.stages.run import check_run
from limbeck.stages.teacher import Pair, check_finite_loss, load_teacher
from limbeck.stages.trackers import check_trackers
from limbeck.stand_in import random_model, remote_config, stand_in

FEW = 0.9  # share of sequences with a target below which it is said
WITHOUT_BOS = 0.5  # nats a token that the teacher's loss has to fall behind BOS before anybody is told


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
    identity: dict[str, Any] = field(default_factory=dict)  # of teacher and student, for the manifest; in process 0
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
        return self.texts[name_of(data)].training(data.seq_len, self.recipe.seed)

    def held_out(self, data: recipes.Data) -> Sequences:
        """What it is measured on."""
        return self.texts[name_of(data)].held_out(data.seq_len)


Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]  # a teacher and its tokenizer
TOKENISED = 1_500_000  # bytes of text a second, on one core: for plans


def prepare_job(recipe: Recipe, loaded: Loaded | None = None) -> Job:
    """Check a recipe and load what it names. Writes nothing but the caches.

    Within `limbeck.data.cache.looking`, for a plan, it writes nothing at all: the job has no texts, perhaps a stand-in
    for the teacher, and what the run would make first or refuse is told there.

    Args:
        loaded: the recipe's teacher where it is in memory already.
    """
    told = planning()
    _check_shares(recipe)
    mixers.options(recipe.student.mixer, recipe.student.options, recipe.student.preset)
    path = run_path(recipe)
    if world().main:
        try:
            check_run(path, recipe)
        except LimbeckError as error:
            if told is None:
                raise
            told.append(f"without --plan this is refused: {' '.join(error.found.split())}")
    device = local_device(recipe.device)
    check_arithmetic(recipe, device)
    check_trackers(recipe.trackers)
    teacher, tokenizer = loaded or teacher_of(recipe, device)
    longest = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    lengths = {"data.seq_len": recipe.data.seq_len}
    lengths |= {f"stages.{i}.seq_len": recipe.text_of(stage).seq_len for i, stage in enumerate(recipe.stages)}
    for key, length in lengths.items():
        if longest is not None and length > longest:
            raise LimbeckError(
                f"sequences of {length} tokens, the teacher was made for {longest}",
                expected=f"{key} of at most {longest}",
                hint=f"--set {key}={longest}",
            )
    identity: dict[str, Any] = {}
    if world().main and told is None:  # of a stand-in there are no files to know it by
        identity = identity_of(recipe, teacher, tokenizer, len(attention_sites(teacher)))
        check_identity(path, identity)
    if recipe.attention == "mask":
        use_masks(teacher)
    sites = attention_sites(teacher)
    chosen = [sites[i] for i in converted_layers(recipe.student.layers, recipe.student.softmax_layers, len(sites))]
    for stage in recipe.stages:
        if isinstance(stage, recipes.Logits) and stage.lora is not None:
            check_peft()
            targets_of(teacher, chosen, stage.lora.target_modules)
    texts = _open_texts(recipe, teacher, tokenizer) if told is None else {}
    if told is not None:
        _look_at_texts(recipe, teacher, tokenizer, told)
    autocast = autocast_of(recipe.precision, device)
    job = Job(recipe, device, autocast, teacher, tokenizer, texts, len(sites), chosen, path, identity)
    if told is not None:
        return job
    for stage in recipe.stages:
        if getattr(stage, "cache_teacher", None) is not None:
            plain(job.training(recipe.text_of(stage)))
    _check_targets(job)
    check_finite_loss(teacher, job.held_out(recipe.data).batch(0, 1).to(device), autocast)
    if world().main:
        _advise_bos(job)
    return job


def run_path(recipe: Recipe) -> Path:
    """The run directory of a recipe."""
    return Path(recipe.out or f"runs/{recipe.name}")


def placed(recipe: Recipe) -> Recipe:
    """The recipe with its run directory in `out`.

    Where none is given that is the first of runs/NAME, runs/NAME-2, ... that is free or holds this very run: so the
    same command goes on with it, and another one does not meet it. A number is told, with the difference.
    """
    if recipe.out is not None:
        return recipe
    first = run_path(recipe)
    why, path = "", first
    for number in itertools.count(2):
        try:
            check_run(path, recipe)
            break
        except LimbeckError as error:
            why = why or " ".join(error.found.split())
            path = first.with_name(f"{first.name}-{number}")
    if path != first:
        console.print(f"{why}; this run is {path}")
    return recipe.model_copy(update={"out": str(path)})


def teacher_of(recipe: Recipe, device: torch.device) -> Loaded:
    """The recipe's teacher and its tokenizer; for a plan, where its weights are not here, a stand-in of its shape.

    A stand-in has random weights and no tokenizer; a step takes as long with it.
    """
    told = planning()
    try:
        name = assets.resolve_teacher(recipe.teacher)
    except NotMade as missing:
        assert told is not None
        told.append(f"would be made first, once: {missing}")
        return stand_in(recipe.teacher, device), None  # type: ignore[return-value]
    if told is not None and (config := remote_config(name)) is not None:
        model = random_model(config, device)
        told.append(f"would be downloaded first, once: {name}, {model.num_parameters() / 1e9:.2f} B parameters")
        return model, None  # type: ignore[return-value]
    return load_teacher(name, device, recipe.teacher_bits)


def _open_texts(recipe: Recipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Text]:
    """All texts of a recipe, each opened once, for the longest sequences that are read of it."""
    uses = [(recipe.data, 0), *((recipe.text_of(stage), stage.tokens) for stage in recipe.stages)]
    places = ["data", *(f"stages.{index}" for index in range(len(recipe.stages)))]  # whose length it is
    texts: dict[str, Text] = {}
    for name, data in {name_of(data): data for data, _ in uses}.items():
        length, place = max((one.seq_len, where) for (one, _), where in zip(uses, places) if name_of(one) == name)
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
        own = place != "data" and recipe.stages[int(place[7:])].seq_len is not None
        return {"data.seq_len": f"{place}.seq_len"} if own else {}
    index = next(i for i, stage in enumerate(recipe.stages) if stage.data is not None and name_of(stage.data) == name)
    return {"--set data.seq_len": f"--set {place}.seq_len", "--set data.": f"--set stages.{index}.data."}


def _check_targets(job: Job) -> None:
    """Say where many sequences have no target; LimbeckError where none has, before anything is trained on the others.

    Stages 0 to 2 compare all tokens, so this is of stage 3 and of what is measured on held-out text.
    """
    recipe = job.recipe
    count_with_targets(job.held_out(recipe.data), recipe.evaluation.tokens // recipe.data.seq_len)
    learnt = [recipe.text_of(stage) for stage in recipe.stages if isinstance(stage, recipes.Logits)]
    for stage in recipe.stages:
        if isinstance(stage, recipes.Logits) and stage.eval_steps:
            count_with_targets(job.held_out(recipe.text_of(stage)), stage.eval_sequences)
    uses = [(recipe.data, "held_out"), *((data, "train") for data in learnt)]
    for data, name in {(name_of(data), data.seq_len, name): (data, name) for data, name in uses}.values():
        for part in job.texts[name_of(data)].parts:
            split = getattr(part, name, None)
            if not isinstance(split, Split):  # of a stream, which is not read from end to end for this
                continue
            found, of = share_with_targets(split, data.seq_len)
            if not found and name == "train":
                raise no_targets(f"'{part.source}' that is trained on", data.seq_len)
            if found < FEW * of:
                have = f"{found:,} of {of:,} {name} sequences of {data.seq_len} tokens have a target"
                passed = "stage logits passes over the others" if name == "train" else "the others count for nothing"
                console.print(f"'{part.source}': {have}; {passed}", markup=False)


def _look_at_texts(recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, told: list[str]) -> None:
    """Tell which texts of a recipe would have to be tokenised first, and find those that cannot be read."""
    uses = [recipe.data, *(recipe.text_of(stage) for stage in recipe.stages)]
    for data in {name_of(data): data for data in uses}.values():
        for one in data.sources or [recipes.Source(source=data.source, text_field=data.text_field, chat=data.chat)]:
            if one.source == REPEATS:
                continue
            try:
                size = stored_bytes(one.source)
            except NotMade as missing:
                told.append(f"would be made first, once: {missing}")
                continue
            if data.streaming:
                continue
            try:
                if tokenizer is not None:
                    same = {"source": one.source, "text_field": one.text_field, "chat": one.chat, "sources": None}
                    open_text(data.model_copy(update=same), tokenizer, teacher)
                    continue
            except NotMade:
                pass
            most = size if data.max_tokens is None else min(size, 5 * data.max_tokens)
            takes = f"about {as_time(most / TOKENISED)}" if size else "after its download"
            told.append(f"would be tokenized first, once: {one.source}, {takes}")


def name_of(data: recipes.Data) -> str:
    """What tells one text from another: all of its settings but the length of the sequences."""
    return json.dumps(data.model_dump(mode="json", exclude={"seq_len", "cache_gb"}))


@torch.no_grad()
def _advise_bos(job: Job) -> None:
    """Says where the tokenizer has a BOS that it does not put before a text, and the teacher needs it.

    Looked at are the first 64 tokens of four sequences; what is compared is the loss of the same tokens.
    """
    bos, name = job.tokenizer.bos_token_id, job.recipe.teacher
    if bos is None or bos in around(job.tokenizer).begin:
        return
    ids = job.held_out(job.recipe.data).batch(0, 4).input_ids[:, :64].to(job.teacher.device)
    ids = ids[ids[:, 0] != bos]
    if not len(ids):
        return
    losses = []
    for lead in (ids[:, :0], torch.full_like(ids[:, :1], bos)):
        with job.autocast():
            logits = job.teacher(input_ids=torch.cat([lead, ids[:, :-1]], 1), use_cache=False).logits
        logits = logits[:, lead.shape[1] :].float()
        losses.append(float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())))
    if losses[0] - losses[1] > WITHOUT_BOS:
        console.print(
            f"the tokenizer of '{name}' does not put its BOS, {job.tokenizer.bos_token}, before a text; the teacher's "
            f"loss here is {losses[0]:.2f} nats a token without and {losses[1]:.2f} behind it. To teach and use it "
            "with BOS, make a copy whose tokenizer does, and take --teacher teacher-with-bos:\n"
            'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"n, to = '{assets.resolve_teacher(name)}', 'teacher-with-bos'; "
            'T.from_pretrained(n, add_bos_token=True).save_pretrained(to); M.from_pretrained(n).save_pretrained(to)"',
            markup=False,
            soft_wrap=True,
        )


def new_student(job: Job) -> PreTrainedModel:
    student = job.recipe.student
    teacher = job.teacher
    if job.recipe.teacher_bits is not None:
        # the student is what it would be without bits: it takes the checkpoint's own weights, and keeps all of them
        teacher, _ = teacher_of(job.recipe.model_copy(update={"teacher_bits": None}), job.device)
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
        length=job.recipe.longest,
    ).requires_grad_(False)
    if job.recipe.attention == "mask":
        use_masks(converted)
    return converted


def _check_shares(recipe: Recipe) -> None:
    """Every process needs a row of every step."""
    size = world().size
    for index, stage in enumerate(recipe.stages):
        at = f"stages.{index} ({stage.stage}): a batch of {stage.batch_size} for {size} processes"
        whole = -(-stage.batch_size // size) * size
        if stage.batch_size < size:
            raise LimbeckError(
                at, expected="a sequence for each, or more", hint=f"--set stages.{index}.batch_size={size}"
            )
        if size > 1 and getattr(stage, "sharding", "none") == "full":
            if stage.batch_size % size:
                raise LimbeckError(
                    f"{at}, sharded", expected="as many for each", hint=f"--set stages.{index}.batch_size={whole}"
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
