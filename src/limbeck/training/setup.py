"""Set up a run: load teacher and text, convert the student, and find every mistake in a recipe before training starts.

    job = prepare_job(Recipe.load("limbeck"))
    student = build_student(job)

Nothing is written except the caches of text and teacher.
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
from limbeck.core.repeated_text import REPEATED_TEXT_PREFIX, has_repeated_text
from limbeck.core.stage_settings import Logits
from limbeck.core.text_settings import Data
from limbeck.data.dataset import TextData, open_text_data
from limbeck.data.documents import count_stored_bytes
from limbeck.data.packing import SequenceDataset, count_eval_sequences, count_sequences_with_targets, no_targets_error
from limbeck.data.special_tokens import find_special_token_ids
from limbeck.data.synthetic import REPEATS_SOURCE
from limbeck.data.token_store import Split
from limbeck.models import Site, convert, find_attention_sites, loading
from limbeck.models.compilation import CompileLog, list_decoder_blocks, should_compile
from limbeck.models.hooks import DistillationPair, check_finite_loss
from limbeck.models.packed import force_attention_masks
from limbeck.training.automatic_heads import (
    choose_softmax_heads,
    describe_choice,
    find_chosen_heads,
    take_first_heads,
)
from limbeck.training.guard import count_guard_tokens
from limbeck.training.identity import assign_student_mixers, build_run_identity, check_run_identity
from limbeck.training.lora import check_peft, resolve_lora_targets
from limbeck.training.objectives.registry import check_objectives
from limbeck.training.precision import check_precision, resolve_autocast
from limbeck.training.run_directory import check_run
from limbeck.training.teacher_cache import require_packed
from limbeck.training.teacher_loading import LoadedTeacher, load_recipe_teacher
from limbeck.training.trackers import check_trackers

MIN_TARGET_SHARE = 0.9  # warn if fewer sequences have a target
BOS_GAIN = 0.5  # warn if BOS lowers the teacher's loss by more, in nats per token
TOKENIZED_BYTES_PER_SECOND = 1_500_000  # bytes of text per second on one core, for plans


@dataclass
class Job:
    """Everything that a run works with, checked."""

    recipe: Recipe
    student: recipes.Student  # the recipe's, its groups of heads chosen
    device: torch.device
    autocast: Callable[[], Any]
    teacher: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    texts: dict[str, TextData]  # by `dataset_key`
    num_layers: int  # attention layers of the teacher
    sites: list[Site]  # attention layers that are converted
    path: Path
    identity: dict[str, Any] = field(default_factory=dict)  # of teacher and student, for the manifest; process 0 only
    compile_failures: CompileLog = field(default_factory=CompileLog)  # blocks that torch.compile could not compile

    @property
    def compile_enabled(self) -> bool:
        """Whether torch.compile is used for blocks and losses of stage 3."""
        return should_compile(self.recipe.compile, self.device)

    @property
    def text(self) -> TextData:
        """The recipe's text; a stage may have another."""
        return self.texts[dataset_key(self.recipe.data)]

    def make_pair(self, student: PreTrainedModel) -> DistillationPair:
        """Pair the teacher with a student of this job, for the stages."""
        return DistillationPair(self.teacher, student, self.sites, self.autocast)

    def train_dataset(self, data: Data) -> SequenceDataset:
        """Return the training sequences of a text."""
        return self.texts[dataset_key(data)].train_sequences(data.seq_len, self.recipe.seed)

    def held_out_dataset(self, data: Data) -> SequenceDataset:
        """Return the held-out sequences of a text."""
        return self.texts[dataset_key(data)].held_out_sequences(data.seq_len)

    def stage_held_out_dataset(self, stage: Any) -> SequenceDataset | None:
        """Return the held-out sequences of a stage's text; None for a stage that reads none, which then needs none."""
        rewarded = getattr(getattr(stage, "objectives", None), "teachers", None)
        if getattr(stage, "eval_steps", None) or (rewarded and rewarded.rule == "reinforce"):
            return self.held_out_dataset(self.recipe.text_of(stage))
        return None


def prepare_job(
    recipe: Recipe, loaded: LoadedTeacher | None = None, before_choice: Callable[["Job"], None] | None = None
) -> Job:
    """Check a recipe and load its teacher and text.

    Within `limbeck.core.cache.cache_dry_run`, for a plan, not even the caches are written: the job has no texts and
    perhaps a placeholder for the teacher, and the notes say what the run would create first or refuse.

    Args:
        loaded: the recipe's teacher, if it is in memory already.
        before_choice: called before heads are chosen, which takes minutes, with a job that is ready but for them.

    Raises:
        LimbeckError: anything that is wrong with the recipe.
    """
    notes = get_dry_run_notes()
    _check_batch_sizes(recipe)
    mixers.resolve_options(recipe.student.mixer, recipe.student.options, recipe.student.preset)
    path = run_path(recipe)
    if get_process_info().is_main:
        try:
            check_run(path, recipe)
        except LimbeckError as error:
            if notes is None:
                raise
            notes.append(f"without --plan this would be refused: {' '.join(error.found.split())}")
    device = get_local_device(recipe.device)
    check_precision(recipe, device)
    check_trackers(recipe.trackers)
    _check_same_split(recipe)
    teacher, tokenizer = loaded or load_recipe_teacher(recipe, device)
    _check_sequence_lengths(recipe, teacher)
    sites = find_attention_sites(teacher)
    student = find_chosen_heads(recipe.student, path)
    heads_are_open = isinstance(student.softmax_heads, int)
    if heads_are_open:  # chosen last, because it takes minutes; until then some groups stand for them
        student = take_first_heads(student, sites)
    groups = [site.shape.kv_heads for site in sites]
    identity: dict[str, Any] = {}
    if get_process_info().is_main and notes is None and not heads_are_open:  # a placeholder has no identity
        identity = build_run_identity(recipe, student, teacher, tokenizer, groups)
        check_run_identity(path, identity)
    if recipe.attention == "mask":
        force_attention_masks(teacher)
    converted = [sites[i] for i in assign_student_mixers(student, groups, recipe.longest)]
    blocks = len(list_decoder_blocks(teacher, sites[0].block))
    check_objectives(recipe, blocks, tokenizer if notes is None else None)
    for stage in recipe.stages:
        if isinstance(stage, Logits) and stage.lora is not None:
            check_peft()
            resolve_lora_targets(teacher, converted, stage.lora.target_modules)
    texts = _open_texts(recipe, teacher, tokenizer) if notes is None else {}
    if notes is not None:
        _note_missing_texts(recipe, teacher, tokenizer, notes)
    autocast = resolve_autocast(recipe.precision, device)
    job = Job(recipe, student, device, autocast, teacher, tokenizer, texts, len(sites), converted, path, identity)
    if notes is not None:  # what follows reads the text, which a plan must not create
        if heads_are_open:
            notes.append(f"would be chosen first, once: {describe_choice(recipe.student, sites)}")
        return job
    _check_sequences(job)
    for stage in recipe.stages:
        if getattr(stage, "cache_teacher", None) is not None:
            require_packed(job.train_dataset(recipe.text_of(stage)))
    _check_targets(job)
    check_finite_loss(teacher, job.held_out_dataset(recipe.data).batch(0, 1).to(device), autocast)
    if get_process_info().is_main:
        _advise_bos(job)
    if heads_are_open:
        if before_choice is not None:
            before_choice(job)
        job.student = choose_softmax_heads(recipe, teacher, sites, job.text)
        job.sites = [sites[i] for i in assign_student_mixers(job.student, groups, recipe.longest)]
        if get_process_info().is_main:
            job.identity = build_run_identity(recipe, job.student, teacher, tokenizer, groups)
            check_run_identity(path, job.identity)
    return job


def _check_sequence_lengths(recipe: Recipe, teacher: PreTrainedModel) -> None:
    """Raise LimbeckError if sequences are longer than the positions that the teacher was trained on."""
    longest = getattr(teacher.config.get_text_config(), "max_position_embeddings", None)
    lengths = {"data.seq_len": recipe.data.seq_len}
    lengths |= {
        f"stages.{index}.seq_len": recipe.text_of(stage).seq_len
        for index, stage in enumerate(recipe.stages)
        if stage.seq_len is not None or stage.data is not None
    }
    too_long = {key: length for key, length in lengths.items() if longest is not None and length > longest}
    if too_long:
        raise LimbeckError(
            f"sequences of {max(too_long.values())} tokens exceed the teacher's maximum of {longest}",
            expected=f"{' and '.join(too_long)} of at most {longest}",
            hint=" ".join(f"--set {key}={longest}" for key in too_long),
        )


def build_student(job: Job) -> PreTrainedModel:
    """Convert the teacher of a job into its student, which shares all unchanged weights with it."""
    student = job.student
    teacher = job.teacher
    if job.recipe.teacher_bits is not None:
        # The student is the same as without quantization: it starts from the float weights of the checkpoint.
        teacher, _ = load_recipe_teacher(job.recipe.model_copy(update={"teacher_bits": None}), job.device)
    torch.manual_seed(job.recipe.seed)
    converted = convert(
        teacher,
        student.mixer,
        student.layers,
        student.options,
        preset=student.preset,
        softmax_layers=student.softmax_layers,
        softmax_heads=student.softmax_heads,
        softmax_window=student.softmax_window,
        rules=[rule.model_dump(exclude_none=True) for rule in student.rules],
        copy_projections=student.copy_projections,
        share_weights=True,
        seq_len=job.recipe.longest,
    ).requires_grad_(False)
    if job.recipe.attention == "mask":
        force_attention_masks(converted)
    return converted


def run_path(recipe: Recipe) -> Path:
    """Return the run directory of a recipe."""
    return Path(recipe.out or f"runs/{recipe.name}")


def assign_run_directory(recipe: Recipe) -> Recipe:
    """Return the recipe with its run directory in `out`.

    Without `out`, that is the first of runs/NAME, runs/NAME-2, ... that is free or has this very run: the same command
    resumes its run, and another command starts a new one and says how it differs.
    """
    if recipe.out is not None:
        return recipe
    first = run_path(recipe)
    reason, path = "", first
    for number in itertools.count(2):
        try:
            check_run(path, recipe)
            break
        except LimbeckError as error:
            reason = reason or " ".join(error.found.split())
            path = first.with_name(f"{first.name}-{number}")
    if path != first:
        console.print(f"{reason}; using {path} for this run")
    return recipe.model_copy(update={"out": str(path)})


def _check_batch_sizes(recipe: Recipe) -> None:
    """Raise LimbeckError if a stage cannot be distributed over the processes; each needs a sequence of every step."""
    size = get_process_info().world_size
    for index, stage in enumerate(recipe.stages):
        location = f"stages.{index} ({stage.stage}): a batch of {stage.batch_size} for {size} processes"
        next_multiple = -(-stage.batch_size // size) * size
        if stage.batch_size < size:
            raise LimbeckError(
                location,
                expected="at least one sequence for each process",
                hint=f"--set stages.{index}.batch_size={size}",
            )
        if size > 1 and getattr(stage, "sharding", "none") == "full":
            if stage.batch_size % size:
                raise LimbeckError(
                    f"{location}, sharded",
                    expected="the same number of sequences for each process",
                    hint=f"--set stages.{index}.batch_size={next_multiple}",
                )
            if recipe.teacher_bits is not None:
                raise LimbeckError(
                    f"stages.{index}: a teacher quantized to {recipe.teacher_bits} bits cannot be sharded",
                    expected="sharding: none, or no teacher_bits",
                )
            if getattr(stage, "optimizer", "adamw") == "muon":
                raise LimbeckError(
                    f"stages.{index}: muon needs whole matrices, so it cannot be combined with sharding",
                    expected="optimizer: adamw, or sharding: none",
                )


def _open_texts(recipe: Recipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, TextData]:
    """Open all texts of a recipe, each once, for the longest sequences that any stage reads of it."""
    uses = [(recipe.data, 0), *((recipe.text_of(stage), stage.tokens) for stage in recipe.stages)]
    locations = ["data", *(f"stages.{index}" for index in range(len(recipe.stages)))]  # keys that set the lengths
    if recipe.keep_better:
        uses.append((recipe.guard_text, 0))
        lengths = [use.seq_len for use, _ in uses[:-1]]
        locations.append(locations[lengths.index(recipe.longest)])
    held_out_tokens = recipe.evaluation.tokens
    if recipe.keep_better:
        held_out_tokens = max(held_out_tokens, count_guard_tokens(recipe.longest))
    texts: dict[str, TextData] = {}
    for key, data in {dataset_key(data): data for data, _ in uses}.items():
        length, location = max(
            (use.seq_len, location) for (use, _), location in zip(uses, locations) if dataset_key(use) == key
        )
        with rewrite_hints(_find_recipe_keys(recipe, key, location)):
            text = open_text_data(data, tokenizer, teacher, length=length, held_out_tokens=held_out_tokens)
        required = sum(tokens for use, tokens in uses if dataset_key(use) == key)
        if text.train_tokens is not None and required > text.train_tokens:
            console.print(
                f"Training needs {required:,} tokens but the dataset has {text.train_tokens:,}; "
                f"it will be repeated for about {required / text.train_tokens:.1f} epochs."
            )
        texts[key] = text
    return texts


def _find_recipe_keys(recipe: Recipe, key: str, location: str) -> dict[str, str]:
    """Map the keys in hints, `data.KEY`, to those of the recipe that set them.

    Args:
        key: the text, by `dataset_key`.
        location: "data" or "stages.N", which sets its longest sequence length.
    """
    if dataset_key(recipe.data) == key:
        stage = None if location == "data" else recipe.stages[int(location[7:])]
        if stage is None or (stage.seq_len is None and stage.data is None):
            return {}
        return {"data.seq_len": f"{location}.seq_len" if stage.seq_len is not None else f"{location}.data.seq_len"}
    index = next(
        i for i, stage in enumerate(recipe.stages) if stage.data is not None and dataset_key(stage.data) == key
    )
    return {"--set data.seq_len": f"--set {location}.seq_len", "--set data.": f"--set stages.{index}.data."}


def _check_same_split(recipe: Recipe) -> None:
    """Raise LimbeckError if repeated text holds out other documents than another use of the same text does."""
    uses = [("data", recipe.data)]
    uses += [(f"stages.{i}.data", stage.data) for i, stage in enumerate(recipe.stages) if stage.data is not None]
    shares: dict[str, tuple[str, float]] = {}
    for location, data in sorted(uses, key=lambda use: has_repeated_text(use[1])):
        for source in data.list_sources():
            text = source.source.removeprefix(REPEATED_TEXT_PREFIX)
            first, share = shares.setdefault(text, (location, data.held_out))
            if source.source != text and share != data.held_out:
                raise LimbeckError(
                    f"'{text}' has a held-out share of {share:g} in {first}, and of {data.held_out:g} in {location}",
                    expected="one share for a text, so that nothing that is held out is trained on",
                    hint=f"--set {location}.held_out={share:g}",
                )


def _check_sequences(job: Job) -> None:
    """Raise LimbeckError if a text has no sequences of the kind and length that a stage reads."""
    for index, stage in enumerate(job.recipe.stages):
        text = job.recipe.text_of(stage)
        if text.streaming:
            continue
        keys = {} if stage.data is None else {"--set data.": f"--set stages.{index}.data."}
        if stage.data is not None or stage.seq_len is not None:
            keys = {"--set data.seq_len": f"--set stages.{index}.seq_len", **keys}
        with rewrite_hints(keys):
            job.train_dataset(text)
            job.stage_held_out_dataset(stage)


def _check_targets(job: Job) -> None:
    """Warn if many sequences have no target; raise LimbeckError if none has.

    Stages 0 to 2 compare all tokens, so only stage 3 and the evaluation on held-out text need targets.
    """
    recipe = job.recipe
    count_eval_sequences(job.held_out_dataset(recipe.data), recipe.evaluation.tokens // recipe.data.seq_len)
    texts = [recipe.text_of(stage) for stage in recipe.stages if isinstance(stage, Logits)]
    for stage in recipe.stages:
        if isinstance(stage, Logits) and stage.eval_steps:
            count_eval_sequences(job.held_out_dataset(recipe.text_of(stage)), stage.eval_sequences)
    if recipe.keep_better:
        count_eval_sequences(job.held_out_dataset(recipe.guard_text), 1)
    uses = [(recipe.data, "held_out"), *((data, "train") for data in texts)]
    for data, name in {(dataset_key(data), data.seq_len, name): (data, name) for data, name in uses}.values():
        for part in job.texts[dataset_key(data)].sources:
            split = getattr(part, name, None)
            if not isinstance(split, Split):  # a stream, which would have to be read from end to end for this
                continue
            with_targets, total = count_sequences_with_targets(split, data.seq_len)
            if not with_targets and name == "train":
                raise no_targets_error(f"'{part.source}' that is trained on", data.seq_len)
            if with_targets < MIN_TARGET_SHARE * total:
                counts = f"{with_targets:,} of {total:,} {name} sequences of {data.seq_len} tokens have a target"
                effect = "stage logits skips the others" if name == "train" else "the others are not evaluated"
                console.print(f"'{part.source}': {counts}; {effect}", markup=False)


def _note_missing_texts(recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, notes: list[str]) -> None:
    """Note which texts of a recipe would have to be tokenized first; raises LimbeckError for unreadable ones."""
    uses = [recipe.data, *(recipe.text_of(stage) for stage in recipe.stages)]
    for data in {dataset_key(data): data for data in uses}.values():
        for source in data.list_sources():
            if source.source == REPEATS_SOURCE:
                continue
            try:
                size = count_stored_bytes(source.source.removeprefix(REPEATED_TEXT_PREFIX))
            except NotCachedError as missing:
                notes.append(f"would be created first, once: {missing}")
                continue
            if data.streaming:
                continue
            try:
                if tokenizer is not None:
                    single = {name: getattr(source, name) for name in ("source", "text_field", "chat")}
                    open_text_data(data.model_copy(update={**single, "sources": None}), tokenizer, teacher)
                    continue
            except NotCachedError:
                pass
            # no more than five bytes per token that is needed
            most = size if data.max_tokens is None else min(size, 5 * data.max_tokens)
            when = f"about {format_duration(most / TOKENIZED_BYTES_PER_SECOND)}" if size else "after its download"
            notes.append(f"would be tokenized first, once: {source.source}, {when}")


def dataset_key(data: Data) -> str:
    """Identify a text by all of its settings except the sequence length."""
    settings = data.model_dump(mode="json", exclude={"seq_len", "cache_gb"})
    if data.documents == "packed":  # a key that the manifests of earlier versions do not have
        del settings["documents"]
    return json.dumps(settings)


@torch.no_grad()
def _advise_bos(job: Job) -> None:
    """Warn if the tokenizer has a BOS but does not add it, although the teacher predicts much better after BOS.

    Compared is the teacher's loss on the first 64 tokens of four sequences, with and without BOS.
    """
    bos, name = job.tokenizer.bos_token_id, job.recipe.teacher
    if bos is None or bos in find_special_token_ids(job.tokenizer).prefix_ids:
        return
    ids = job.held_out_dataset(job.recipe.data).batch(0, 4).input_ids[:, :64].to(job.teacher.device)
    ids = ids[ids[:, 0] != bos]
    if not len(ids):
        return
    losses = []
    for prefix in (ids[:, :0], torch.full_like(ids[:, :1], bos)):
        with job.autocast():
            logits = job.teacher(input_ids=torch.cat([prefix, ids[:, :-1]], 1), use_cache=False).logits
        logits = logits[:, prefix.shape[1] :].float()
        losses.append(float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())))
    if losses[0] - losses[1] > BOS_GAIN:
        console.print(
            f"The tokenizer of '{name}' does not add its BOS token, {job.tokenizer.bos_token}, but the teacher's loss "
            f"here is {losses[0]:.2f} nats per token without BOS and {losses[1]:.2f} with it. To distil with BOS, "
            "copy the teacher with a tokenizer that adds it, and pass --teacher teacher-with-bos:\n"
            'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; '
            f"n, to = '{loading.resolve_teacher(name)}', 'teacher-with-bos'; "
            'T.from_pretrained(n, add_bos_token=True).save_pretrained(to); M.from_pretrained(n).save_pretrained(to)"',
            markup=False,
            soft_wrap=True,
        )
