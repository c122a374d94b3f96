"""Set up a run: load teacher and text, convert the student, and find every mistake in a recipe before training starts.

    job = prepare_job(Recipe.load("limbeck"))
    student = build_student(job)

Nothing is written except the caches of text and teacher.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from limbeck import mixers
from limbeck.core.cache import get_dry_run_notes
from limbeck.core.console import console
from limbeck.core.distributed import get_local_device, get_process_info
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.core.stage_settings import Logits
from limbeck.models import convert, find_attention_sites
from limbeck.models.compilation import list_decoder_blocks
from limbeck.models.hooks import check_finite_loss
from limbeck.models.packed import force_attention_masks
from limbeck.training.automatic_heads import (
    choose_softmax_heads,
    describe_choice,
    find_chosen_heads,
    take_first_heads,
)
from limbeck.training.identity import assign_student_mixers, build_run_identity, check_run_identity
from limbeck.training.job import Job
from limbeck.training.lora import check_peft, resolve_lora_targets
from limbeck.training.objectives.registry import check_objectives
from limbeck.training.precision import check_precision, resolve_autocast
from limbeck.training.recipe_texts import (
    advise_bos,
    check_same_split,
    check_sequences,
    check_targets,
    note_missing_texts,
    open_recipe_texts,
)
from limbeck.training.run_directory import check_run
from limbeck.training.teacher_cache import require_packed
from limbeck.training.teacher_loading import LoadedTeacher, load_recipe_teacher
from limbeck.training.trackers import check_trackers


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
    check_same_split(recipe)
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
    texts = open_recipe_texts(recipe, teacher, tokenizer) if notes is None else {}
    if notes is not None:
        note_missing_texts(recipe, teacher, tokenizer, notes)
    autocast = resolve_autocast(recipe.precision, device)
    job = Job(recipe, student, device, autocast, teacher, tokenizer, texts, len(sites), converted, path, identity)
    if notes is not None:  # what follows reads the text, which a plan must not create
        if heads_are_open:
            notes.append(f"would be chosen first, once: {describe_choice(recipe.student, sites)}")
        return job
    check_sequences(job)
    for stage in recipe.stages:
        if getattr(stage, "cache_teacher", None) is not None:
            require_packed(job.train_dataset(recipe.text_of(stage)))
    check_targets(job)
    check_finite_loss(teacher, job.held_out_dataset(recipe.data).batch(0, 1).to(device), autocast)
    if get_process_info().is_main:
        advise_bos(job)
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
        **student.collect_placement(),
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
