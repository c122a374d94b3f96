"""Ways of decoding that a student cannot follow, refused before any work with the reason.

check_decoding(student, prompt_lookup_num_tokens=3)          # a LimbeckError

A recurrent state is what is left of all tokens so far; none can be taken back. Whatever tries tokens and drops them
again (assisted and speculative decoding, prompt lookup, contrastive search) needs a cache that can be cropped.
"""

import copy
import inspect
from typing import Any, NoReturn

from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
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
        refuse_paged()
    _check_prompt(asked)
    name = GOES_BACK.get(config.get_generation_mode(asked.get("assistant_model")))
    if name is None:
        return
    if config.prompt_lookup_num_tokens is not None:
        name = "prompt lookup"
    raise _refused(name, FORWARD)


def refuse_paged(*args: Any, **kwargs: Any) -> NoReturn:
    """Raises the LimbeckError of continuous batching, in the place of any method that begins it."""
    raise LimbeckError(
        "continuous batching pages keys and values, and a student keeps none",
        expected="generate(), with cache_implementation: dynamic, static or offloaded",
        hint="pad the batch on the left: generate(input_ids, attention_mask=mask)",
    )


def _check_prompt(asked: dict[str, Any]) -> None:
    """Raises LimbeckError where a prompt brings nothing new to the cache that it comes with."""
    cache = next((asked[name] for name in ("past_key_values", "cache") if isinstance(asked.get(name), Cache)), None)
    tokens = next(
        (asked[name] for name in ("inputs", "input_ids", "inputs_embeds") if asked.get(name) is not None), None
    )
    if cache is None or tokens is None:
        return
    held, length = int(cache.get_seq_length()), tokens.shape[1]
    if 0 < length <= held:
        raise LimbeckError(
            f"the prompt has {length} tokens, and its cache has read {held} already",
            expected="the whole text so far: all that the cache has read, and new tokens behind it",
            hint="to go back to an earlier point, keep a copy of the cache made there: copy.deepcopy(cache)",
        )


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
