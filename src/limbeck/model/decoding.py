"""Ways of decoding that a student cannot follow, refused before any work with the reason.

check_decoding(student, prompt_lookup_num_tokens=3)          # a LimbeckError

A recurrent state is what is left of all tokens so far; none can be taken back. Whatever tries tokens and drops them
again (assisted and speculative decoding, prompt lookup, contrastive search) needs a cache that can be cropped.
"""

import copy
import inspect
from typing import Any

from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import GenerationMode

from limbeck.errors import LimbeckError

_ARGUMENTS = inspect.signature(GenerationMixin.generate)
# what stops with an error or a download of its own otherwise, by mode
GOES_BACK = {
    GenerationMode.ASSISTED_GENERATION: "assisted decoding",
    GenerationMode.CONTRASTIVE_SEARCH: "contrastive search",
}
FORWARD = "generation that only goes forward: greedy, sampling, beam search"


def check_decoding(model: PreTrainedModel, *args, **kwargs) -> None:
    """Raises a LimbeckError where `model.generate(*args, **kwargs)` would have to take tokens back.

    Args:
        model: a student.
        args, kwargs: as given to `generate`.
    """
    given = _ARGUMENTS.bind_partial(model, *args, **kwargs).arguments
    asked = {**given.pop("kwargs", {}), **given}
    config = _config(asked.get("generation_config") or model.generation_config, asked)  # type: ignore[arg-type]
    if getattr(config, "is_assistant", False):
        raise _refused("a student as the assistant of another model", "a softmax model as the assistant")
    if asked.get("cache_implementation") == "paged":
        raise LimbeckError(
            "continuous batching pages keys and values, and a student keeps none",
            expected="cache_implementation: dynamic, static or offloaded",
            hint="pad the batch on the left: generate(input_ids, attention_mask=mask)",
        )
    name = GOES_BACK.get(config.get_generation_mode(asked.get("assistant_model")))
    if name is None:
        return
    if config.prompt_lookup_num_tokens is not None:
        name = "prompt lookup"
    raise _refused(name, FORWARD)


def _config(config: GenerationConfig, asked: dict[str, Any]) -> GenerationConfig:
    """The generation config with what stands beside it in the call."""
    merged = copy.copy(config)
    for name, value in asked.items():
        if value is not None and hasattr(merged, name):
            setattr(merged, name, value)
    return merged


def _refused(what: str, expected: str) -> LimbeckError:
    return LimbeckError(
        f"{what} drops tokens again, and a recurrent state cannot: it has no memory of its earlier self",
        expected=expected,
        hint="leave out assistant_model, prompt_lookup_num_tokens, assistant_early_exit, use_mtp and penalty_alpha",
    )
