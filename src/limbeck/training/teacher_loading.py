"""Load the teacher of a recipe, or for a plan a placeholder of the same shape with random weights.

    teacher, tokenizer = load_recipe_teacher(recipe, device)

A plan (`--plan`) downloads, trains and writes nothing. If the teacher's weights are not on this machine, it measures
with a placeholder, with which a training step takes as long.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from limbeck.core.cache import NotCachedError, get_dry_run_notes
from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Recipe, TeacherRecipe
from limbeck.models import loading
from limbeck.models.hub import check_hub_model
from limbeck.training.pretraining import build_teacher_model

LoadedTeacher = tuple[PreTrainedModel, PreTrainedTokenizerBase]  # a teacher and its tokenizer

# Shape of the embedded teacher, SmolLM2-135M, from its config.json.
EMBEDDED_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


def load_recipe_teacher(recipe: Recipe, device: torch.device) -> LoadedTeacher:
    """Load a recipe's teacher and its tokenizer.

    Within `cache_dry_run`, if the weights are not on this machine: a placeholder with random weights, no tokenizer
    (None), and a note of what would have to be downloaded or trained first.
    """
    notes = get_dry_run_notes()
    try:
        name = loading.resolve_teacher(recipe.teacher)
    except NotCachedError as missing:
        assert notes is not None
        notes.append(f"would be created first, once: {missing}")
        return _build_placeholder(recipe.teacher, device), None  # type: ignore[return-value]
    if notes is not None and (config := load_remote_config(name)) is not None:
        model = _build_random_model(config, device)
        notes.append(f"would be downloaded first, once: {name}, {model.num_parameters() / 1e9:.2f} B parameters")
        return model, None  # type: ignore[return-value]
    return loading.load_teacher(name, device, recipe.teacher_bits)


def get_teacher_source(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the name of a teacher in memory, a folder, a Hub name or "embedded", by which its run finds it again.

    Raises:
        LimbeckError: it came from none, or its weights are not float32.
    """
    name = model.name_or_path
    if not name:
        raise LimbeckError(
            "the teacher in memory has no name, by which the run could find it again",
            expected="a model that was loaded from a folder or the Hub",
            hint='model.save_pretrained("my-teacher"), tokenizer.save_pretrained("my-teacher"), teacher="my-teacher"',
        )
    if model.dtype != torch.float32:
        raise LimbeckError(
            f"the teacher's weights are {str(model.dtype).removeprefix('torch.')}",
            expected="float32",
            hint=f'teacher="{name}", or from_pretrained("{name}", dtype=torch.float32)',
        )
    return loading.find_own_name(name)


def _build_placeholder(name: str, device: torch.device) -> PreTrainedModel:
    """Build a model of the shape of "embedded" or of a teacher that Limbeck trains."""
    if name == "embedded":
        return _build_random_model(AutoConfig.for_model(**EMBEDDED_CONFIG), device)
    return build_teacher_model(TeacherRecipe.load(name)).to(device).requires_grad_(False)  # type: ignore[arg-type]


def _build_random_model(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """Build a frozen float32 model of that config with random weights."""
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(device).eval().requires_grad_(False)


def load_remote_config(name: str) -> PreTrainedConfig | None:
    """Load the config of a model on the Hub whose weights are not on this machine; None for any other name.

    Raises:
        LimbeckError: the Hub does not have the model or cannot be reached, and the local Hub cache has no copy.
    """
    if Path(name).exists():
        return None
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in WEIGHT_FILES):
            return None
    except HFValidationError:  # not a valid name of a repository; loading reports it
        return None
    check_hub_model(name)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError):  # loading reports it, with more detail
        return None
