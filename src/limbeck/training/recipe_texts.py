"""Open the texts of a recipe, and find what is wrong with them for the stages that read them.

    texts = open_recipe_texts(recipe, teacher, tokenizer)
    texts[dataset_key(recipe.data)].train_sequences(512, seed=0)

Refusals name the keys of the recipe that set the text and its lengths, not those of the text alone.
"""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from limbeck.core.cache import NotCachedError
from limbeck.core.console import console, format_duration
from limbeck.core.errors import LimbeckError, rewrite_hints
from limbeck.core.recipe import Recipe
from limbeck.core.repeated_text import REPEATED_TEXT_PREFIX, has_repeated_text
from limbeck.core.stage_settings import Logits
from limbeck.data.dataset import TextData, open_text_data
from limbeck.data.documents import count_stored_bytes
from limbeck.data.packing import count_eval_sequences, count_sequences_with_targets, no_targets_error
from limbeck.data.special_tokens import find_special_token_ids
from limbeck.data.synthetic import REPEATS_SOURCE
from limbeck.data.token_store import Split
from limbeck.models import loading
from limbeck.training.guard import count_guard_tokens
from limbeck.training.job import Job, dataset_key

MIN_TARGET_SHARE = 0.9  # warn if fewer sequences have a target
BOS_GAIN = 0.5  # warn if BOS lowers the teacher's loss by more, in nats per token
TOKENIZED_BYTES_PER_SECOND = 1_500_000  # bytes of text per second on one core, for plans


def open_recipe_texts(
    recipe: Recipe, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> dict[str, TextData]:
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


def check_same_split(recipe: Recipe) -> None:
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


def check_sequences(job: Job) -> None:
    """Raise LimbeckError if a text has no sequences of the kind and length that a stage reads."""
    for index, stage in enumerate(job.recipe.stages):
        text = job.recipe.text_of(stage)
        if text.streaming:
            continue
        own = stage.data is not None or stage.seq_len is not None
        location = f"stages.{index}" if own else "data"
        with rewrite_hints(_find_recipe_keys(job.recipe, dataset_key(text), location)):
            job.train_dataset(text)
            job.stage_held_out_dataset(stage)


def check_targets(job: Job) -> None:
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


def note_missing_texts(recipe: Recipe, teacher: PreTrainedModel, tokenizer: Any, notes: list[str]) -> None:
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


@torch.no_grad()
def advise_bos(job: Job) -> None:
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
