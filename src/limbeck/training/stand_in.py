"""Teachers for plans: models of the right shape with random weights, where the real ones are not on this machine.

    build_placeholder_teacher("small", device)                      # a teacher that Limbeck makes, before it is made
    if (config := load_remote_config("Qwen/Qwen3-0.6B")) is not None:       # on the hub, not in its local cache
        model = build_random_model(config, device)

A step takes as long with them, and nothing is trained, downloaded or written for a plan.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from limbeck.core.recipe import TeacherRecipe
from limbeck.models.hub import check_hub_model

# of the embedded teacher, SmolLM2-135M, as its config.json has it
EMBEDDED: dict[str, Any] = {
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
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def build_placeholder_teacher(name: str, device: torch.device) -> PreTrainedModel:
    """In the place of "embedded", or of a teacher that is trained here."""
    if name == "embedded":
        return build_random_model(AutoConfig.for_model(**EMBEDDED), device)
    from limbeck.training.pretraining import build_teacher_model

    return build_teacher_model(TeacherRecipe.load(name)).to(device).requires_grad_(False)  # type: ignore[arg-type]


def build_random_model(config: PreTrainedConfig, device: torch.device) -> PreTrainedModel:
    """A frozen model of that config with random weights, float32."""
    with torch.random.fork_rng():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.to(device).eval().requires_grad_(False)


def load_remote_config(name: str) -> PreTrainedConfig | None:
    """The config of a model on the hub whose weights are not on this machine; None for any other name.

    Raises:
        LimbeckError: the hub knows no such model or cannot be reached, and its local cache has none.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    if Path(name).exists():
        return None
    try:
        if any(isinstance(try_to_load_from_cache(name, file), str) for file in WEIGHTS):
            return None
    except HFValidationError:  # no name for the hub, as the loading will say
        return None
    check_hub_model(name)
    try:
        return AutoConfig.from_pretrained(name)
    except (OSError, ValueError):  # the loading itself knows more of it
        return None
