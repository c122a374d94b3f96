"""What a run works with, checked: everything that can be wrong with a recipe is found here, before anything is written.

    job = prepare_job(Recipe.load("quickstart"))
    student = build_student(job)

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

from limbeck import mixers
from limbeck.core import recipe as recipes
from limbeck.core.cache import NotCachedError, get_dry_run_notes
from limbeck.core.console import console, format_duration
from limbeck.core.distributed import get_local_device, get_process_info
from limbeck.core.errors import LimbeckError, rewrite_hints
from limbeck.core.recipe import Recipe
from limbeck.data.dataset import TextData, open_text_data
from limbeck.data.documents import count_stored_bytes
from limbeck.data.packing import SequenceDataset, count_eval_sequences, count_sequences_with_targets, no_targets_error
from limbeck.data.special_tokens import find_special_token_ids
from limbeck.data.synthetic import REPEATS_SOURCE
from limbeck.data.token_store import Split
from limbeck.models import Site, convert, find_attention_sites, loading, select_converted_layers
from limbeck.models.compilation import CompileLog, should_compile
from limbeck.models.hooks import DistillationPair, check_finite_loss, load_teacher
from limbeck.models.packed import force_attention_masks
from limbeck.training.identity import build_run_identity, check_run_identity
from limbeck.training.lora import check_peft, resolve_lora_targets
from limbeck.training.precision import check_precision, resolve_autocast
from limbeck.training.run_directory import check_run
from limbeck.training.stand_in import build_placeholder_teacher, build_random_model, load_remote_config
from limbeck.training.teacher_cache import require_packed
from limbeck.training.trackers import check_trackers

MIN_TARGET_SHARE = 0.9  # share of sequences with a target below which it is said
WITHOUT_BOS = 0.5  # nats a token that the teacher's loss has to fall behind BOS before anybody is told


@dataclass
class Job:
    """What a run works with once everything has been checked."""

    recipe: Recipe
    device: torch.device
    autocast: Callable[[], Any]
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: dict[str, TextData]  # by what names the text, see `dataset_key`
    num_layers: int  # of the teacher
    sites: list[Site]  # of those that are converted
    path: Path
    identity: dict[str, Any] = field(default_factory=dict)  # of teacher and student, for the manifest; in process 0
    compile_failures: CompileLog = field(default_factory=CompileLog)  # what torch.compile has refused

    @property
    def compile_enabled(self) -> bool:
        """Whether blocks and losses of stage 3 go through torch.compile."""
        return should_compile(self.recipe.compile, self.device)

    @property
    def text(self) -> TextData:
        """The recipe's own; a stage may have another."""
        return self.texts[dataset_key(self.recipe.data)]

    def make_pair(self, student: PreTrainedModel) -> DistillationPair:
        """What the stages of a student of this job work on."""
        return DistillationPair(self.teacher, student, self.sites, self.autocast)

    def train_dataset(self, data: recipes.Data) -> SequenceDataset:
        """What a stage with that text learns from."""
        return self.texts[dataset_key(data)].train_sequences(data.seq_len, self.recipe.seed)

    def held_out_dataset(self, data: recipes.Data) -> SequenceDataset:
        """What it is measured on."""
        return self.texts[dataset_key(data)].held_out_sequences(data.seq_len)


LoadedTeacher = tuple[PreTrainedModel, PreTrainedTokenizerBase]  # a teacher and its tokenizer
TOKENIZED_BYTES_PER_SECOND = 1_500_000  # bytes of text a second, on one core: for plans


def prepare_job(recipe: Recipe, loaded: LoadedTeacher | None = None) -> Job:
    """Check a recipe and load what it names. Writes nothing but the caches.

    Within `limbeck.core.storage.cache_dry_run`, for a plan, it writes nothing at all: the job has no texts, perhaps a stand-in
    for the teacher, and what the run would make first or refuse is told there.

    Args:
        loaded: the recipe's teacher where it is in memory already.
    """
    plan_messages = get_dry_run_notes()
    _check_shares(recipe)
    mixers.resolve_options(recipe.student.mixer, recipe.student.options, recipe.student.preset)
    path = run_path(recipe)
    if get_process_info().is_main:
        try:
            check_run(path, recipe)
        except LimbeckError as error:
            if plan_messages is None:
                raise
            plan_messages.append(f"without --plan this is refused: {' '.join(error.found.split())}")
    device = get_local_device(recipe.device)
    check_precision(recipe, device)
    check_trackers(recipe.trackers)
    teacher, tokenizer = loaded or load_recipe_teacher(recipe, device)
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
    if get_process_info().is_main and plan_messages is None:  # of a stand-in there are no files to know it by
        identity = build_run_identity(recipe, teacher, tokenizer, len(find_attention_sites(teacher)))
        check_run_identity(path, identity)
    if recipe.attention == "mask":
        force_attention_masks(teacher)
    sites = find_attention_sites(teacher)
    chosen = [
        sites[i] for i in select_converted_layers(recipe.student.layers, recipe.student.softmax_layers, len(sites))
    ]
    for stage in recipe.stages:
        if isinstance(stage, recipes.Logits) and stage.lora is not None:
            check_peft()
            resolve_lora_targets(teacher, chosen, stage.lora.target_modules)
    texts = _open_texts(recipe, teacher, tokenizer) if plan_messages is None else {}
    if plan_messages is not None:
        _look_at_texts(recipe, teacher, tokenizer, plan_messages)
    autocast = resolve_autocast(recipe.precision, device)
    job = Job(recipe, device, autocast, teacher, tokenizer, texts, len(sites), chosen, path, identity)
    if plan_messages is not None:
        return job
    for stage in recipe.stages:
        if getattr(stage, "cache_teacher", None) is not None:
            require_packed(job.train_dataset(recipe.text_of(stage)))
    _check_targets(job)
    check_finite_loss(teacher, job.held_out_dataset(recipe.data).batch(0, 1).to(device), autocast)
    if get_process_info().is_main:
        _advise_bos(job)
    return job


def run_path(recipe: Recipe) -> Path:
    """The run directory of a recipe."""
    return Path(recipe.out or f"runs/{recipe.name}")


def assign_run_directory(recipe: Recipe) -> Recipe:
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


def load_recipe_teacher(recipe: Recipe, device: torch.device) -> LoadedTeacher:
    """The recipe's teacher and its tokenizer; for a plan, where its weights are not here, a stand-in of its shape.

    A stand-in has random weights and no tokenizer; a step takes as long with it.
    """
    plan_messages = get_dry_run_notes()
    try:
        name = loading.resolve_teacher(recipe.teacher)
    except NotCachedError as missing:
        assert plan_messages is not None
        plan_messages.append(f"would be made first, once: {missing}")
        return build_placeholder_teacher(recipe.teacher, device), None  # type: ignore[return-value]
    if plan_messages is not None and (config := load_remote_config(name)) is not None:
        model = build_random_model(config, device)
        plan_messages.append(
            f"would be downloaded first, once: {name}, {model.num_parameters() / 1e9:.2f} B parameters"
        )
        return model, None  # type: ignore[return-value]
    return load_teacher(name, device, recipe.teacher_bits)


def _open_texts(recipe: Recipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, TextData]:
    """All texts of a recipe, each opened once, for the longest sequences that are read of it."""
    uses = [(recipe.data, 0), *((recipe.text_of(stage), stage.tokens) for stage in recipe.stages)]
    places = ["data", *(f"stages.{index}" for index in range(len(recipe.stages)))]  # whose length it is
    texts: dict[str, TextData] = {}
    for name, data in {dataset_key(data): data for data, _ in uses}.items():
        length, place = max((one.seq_len, where) for (one, _), where in zip(uses, places) if dataset_key(one) == name)
        with rewrite_hints(_keys(recipe, name, place)):
            text = open_text_data(data, tokenizer, teacher, length=length, held_out_tokens=recipe.evaluation.tokens)
        wanted = sum(tokens for one, tokens in uses if dataset_key(one) == name)
        if text.train_tokens is not None and wanted > text.train_tokens:
            console.print(f"the stages take {wanted:,} tokens, the text has {text.train_tokens:,}: it is read again")
        texts[name] = text
    return texts


def _keys(recipe: Recipe, name: str, place: str) -> dict[str, str]:
    """Where a recipe says what hints call `data.KEY`, of the text of that name.

    Args:
        place: "data" or "stages.N", whose length of sequences is the longest.
    """
    if dataset_key(recipe.data) == name:
        own = place != "data" and recipe.stages[int(place[7:])].seq_len is not None
        return {"data.seq_len": f"{place}.seq_len"} if own else {}
    index = next(
        i for i, stage in enumerate(recipe.stages) if stage.data is not None and dataset_key(stage.data) == name
    )
    return {"--set data.seq_len": f"--set {place}.seq_len", "--set data.": f"--set stages.{index}.data."}


def _check_targets(job: Job) -> None:
    """Say where many sequences have no target; LimbeckError where none has, before anything is trained on the others.

    Stages 0 to 2 compare all tokens, so this is of stage 3 and of what is measured on held-out text.
    """
    recipe = job.recipe
    count_eval_sequences(job.held_out_dataset(recipe.data), recipe.evaluation.tokens // recipe.data.seq_len)
    learnt = [recipe.text_of(stage) for stage in recipe.stages if isinstance(stage, recipes.Logits)]
    for stage in recipe.stages:
        if isinstance(stage, recipes.Logits) and stage.eval_steps:
            count_eval_sequences(job.held_out_dataset(recipe.text_of(stage)), stage.eval_sequences)
    uses = [(recipe.data, "held_out"), *((data, "train") for data in learnt)]
    for data, name in {(dataset_key(data), data.seq_len, name): (data, name) for data, name in uses}.values():
        for part in job.texts[dataset_key(data)].sources:
            split = getattr(part, name, None)
            if not isinstance(split, Split):  # of a stream, which is not read from end to end for this
                continue
            found, of = count_sequences_with_targets(split, data.seq_len)
            if not found and name == "train":
                raise no_targets_error(f"'{part.source}' that is trained on", data.seq_len)
            if found < MIN_TARGET_SHARE * of:
                have = f"{found:,} of {of:,} {name} sequences of {data.seq_len} tokens have a target"
                passed = "stage logits passes over the others" if name == "train" else "the others count for nothing"
                console.print(f"'{part.source}': {have}; {passed}", markup=False)


def _look_at_texts(recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, plan_messages: list[str]) -> None:
    """Tell which texts of a recipe would have to be tokenised first, and find those that cannot be read."""
    uses = [recipe.data, *(recipe.text_of(stage) for stage in recipe.stages)]
    for data in {dataset_key(data): data for data in uses}.values():
        for one in data.sources or [recipes.Source(source=data.source, text_field=data.text_field, chat=data.chat)]:
            if one.source == REPEATS_SOURCE:
                continue
            try:
                size = count_stored_bytes(one.source)
            except NotCachedError as missing:
                plan_messages.append(f"would be made first, once: {missing}")
                continue
            if data.streaming:
                continue
            try:
                if tokenizer is not None:
                    same = {"source": one.source, "text_field": one.text_field, "chat": one.chat, "sources": None}
                    open_text_data(data.model_copy(update=same), tokenizer, teacher)
                    continue
            except NotCachedError:
                pass
            most = size if data.max_tokens is None else min(size, 5 * data.max_tokens)
            takes = f"about {format_duration(most / TOKENIZED_BYTES_PER_SECOND)}" if size else "after its download"
            plan_messages.append(f"would be tokenized first, once: {one.source}, {takes}")


def dataset_key(data: recipes.Data) -> str:
    """What tells one text from another: all of its settings but the length of the sequences."""
    return json.dumps(data.model_dump(mode="json", exclude={"seq_len", "cache_gb"}))


@torch.no_grad()
def _advise_bos(job: Job) -> None:
    """Says where the tokenizer has a BOS that it does not put before a text, and the teacher needs it.

    Looked at are the first 64 tokens of four sequences; what is compared is the loss of the same tokens.
    """
    bos, name = job.tokenizer.bos_token_id, job.recipe.teacher
    if bos is None or bos in find_special_token_ids(job.tokenizer).prefix_ids:
        return
    ids = job.held_out_dataset(job.recipe.data).batch(0, 4).input_ids[:, :64].to(job.teacher.device)
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
            f"n, to = '{loading.resolve_teacher(name)}', 'teacher-with-bos'; "
            'T.from_pretrained(n, add_bos_token=True).save_pretrained(to); M.from_pretrained(n).save_pretrained(to)"',
            markup=False,
            soft_wrap=True,
        )


def build_student(job: Job) -> PreTrainedModel:
    student = job.recipe.student
    teacher = job.teacher
    if job.recipe.teacher_bits is not None:
        # the student is what it would be without bits: it takes the checkpoint's own weights, and keeps all of them
        teacher, _ = load_recipe_teacher(job.recipe.model_copy(update={"teacher_bits": None}), job.device)
    torch.manual_seed(job.recipe.seed)
    converted = convert(
        teacher,
        student.mixer,
        [site.shape.layer for site in job.sites],
        student.options,
        preset=student.preset,
        rules=[rule.model_dump(exclude_none=True) for rule in student.rules],
        copy_projections=student.copy_projections,
        share_weights=True,
        seq_len=job.recipe.longest,
    ).requires_grad_(False)
    if job.recipe.attention == "mask":
        force_attention_masks(converted)
    return converted


def _check_shares(recipe: Recipe) -> None:
    """Every process needs a row of every step."""
    size = get_process_info().world_size
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
