"""Generation: text from a model token by token, and the refusal of decoding methods that a student cannot follow.

    for piece in stream_text(model, tokenizer, "The capital of France is", max_new_tokens=20):
        print(piece, end="", flush=True)
    check_decoding(student, prompt_lookup_num_tokens=3)     # raises LimbeckError

Generation itself is transformers' own. A recurrent state summarizes all tokens so far, and none can be removed from it.
Methods that try tokens and drop them again (assisted and speculative decoding, prompt lookup, contrastive search) need
a cache that can be cropped, so a student refuses them before any work is done.
"""

import copy
import inspect
from collections.abc import Generator
from threading import Event, Thread
from typing import Any, NoReturn

import torch
from transformers import (
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)
from transformers.cache_utils import Cache
from transformers.generation import GenerationMode

from limbeck.core.errors import LimbeckError
from limbeck.data.special_tokens import encode_prompt

_GENERATE_SIGNATURE = inspect.signature(GenerationMixin.generate)
# modes that would otherwise fail late, or download code first
_CROPPING_MODES = {
    GenerationMode.ASSISTED_GENERATION: "assisted decoding",
    GenerationMode.CONTRASTIVE_SEARCH: "contrastive search",
}


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Generator[str, None, int]:
    """Yield the continuation of `prompt` in pieces as they are generated.

    Args:
        temperature: 0 takes the most likely token each time.
        top_p: sample from the smallest set of tokens that has this probability.

    Returns:
        The number of generated tokens, once all pieces are read. Closing the generator earlier, also by an interrupt,
        stops the model at the next token.
    """
    stop = _StopOnRequest()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []
    new_tokens: list[int] = []

    def generate() -> None:
        try:
            ids = _generate(model, tokenizer, prompt, max_new_tokens, temperature, top_p, seed, streamer, stop)
            new_tokens.extend(ids.tolist())
        except BaseException as error:  # raised again by the reader below
            failure.append(error)
            streamer.end()

    thread = Thread(target=generate, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        # a thread that is still computing when the interpreter exits aborts the whole process
        stop.requested.set()
        thread.join()
    if failure:
        raise failure[0]
    return len(new_tokens)


def generate_continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 48
) -> str:
    """Return the greedy continuation of `prompt` as text."""
    ids = _generate(model, tokenizer, prompt, max_new_tokens, 0.0, 1.0, 0)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def with_default_generation_config(model: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    """Return the model with a generation config of end-of-text and padding tokens only, which changes no probability.

    The other settings of a checkpoint's generation_config.json (penalties, beams, top_k, forced tokens) are meant for
    its chat program. `generate` would apply them to every call, and greedy decoding would not take the likeliest token.
    """
    config = model.generation_config
    eos = tokenizer.eos_token_id if config is None or config.eos_token_id is None else config.eos_token_id
    first_eos = eos[0] if isinstance(eos, list) else eos
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), first_eos)
    shallow = copy.copy(model)  # copies the module object only: weights are shared, the caller's config is untouched
    shallow.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    return shallow


class _StopOnRequest(StoppingCriteria):
    """Stops generation at the next token once another thread sets `requested`."""

    def __init__(self) -> None:
        self.requested = Event()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **rest: Any) -> torch.Tensor:  # type: ignore[override]
        return torch.full((input_ids.shape[0],), self.requested.is_set(), device=input_ids.device)


def _generate(
    model, tokenizer, prompt, max_new_tokens, temperature, top_p, seed, streamer=None, stop=None
) -> torch.Tensor:
    torch.manual_seed(seed)
    ids = torch.tensor([encode_prompt(tokenizer, prompt)], device=model.device)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": 0,
        }  # transformers' default is 50
    try:
        out = with_default_generation_config(model, tokenizer).generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([stop] if stop else []),
            **sampling,
        )
    except RuntimeError as error:
        if "probability tensor" not in str(error):
            raise
        raise not_finite_error() from error
    return out[0, ids.shape[1] :]


def check_finite(scores: torch.Tensor) -> torch.Tensor:
    """Return what tokens are chosen by; raises LimbeckError where it is that of a model that has diverged."""
    if not scores.isfinite().all():
        raise not_finite_error()
    return scores


def not_finite_error() -> LimbeckError:
    """Return the error where no token can be chosen."""
    return LimbeckError(
        "the model's logits are not finite, so no token can be chosen by them",
        expected="a model whose training did not diverge",
        hint="limbeck eval, which shows its perplexity beside its teacher's",
    )


def check_decoding(model: PreTrainedModel, *args, **kwargs) -> None:
    """Raise LimbeckError if `model.generate(*args, **kwargs)` would have to remove tokens from the cache.

    Args:
        model: a student.
        args, kwargs: as given to `generate`.
    """
    bound = _GENERATE_SIGNATURE.bind_partial(model, *args, **kwargs).arguments
    arguments = {**bound.pop("kwargs", {}), **bound}
    config = copy.copy(arguments.get("generation_config") or model.generation_config)
    for name, value in arguments.items():  # arguments of the call override the config
        if value is not None and hasattr(config, name):
            setattr(config, name, value)
    if getattr(config, "is_assistant", False):
        raise _cropping_error("a student as the assistant of another model", "a softmax model as the assistant")
    if arguments.get("cache_implementation") == "paged":
        raise_paged_unsupported()
    _check_prompt_is_longer_than_cache(arguments)
    method = _CROPPING_MODES.get(config.get_generation_mode(arguments.get("assistant_model")))  # type: ignore[union-attr]
    if method is None:
        return
    if config.prompt_lookup_num_tokens is not None:  # type: ignore[union-attr]
        method = "prompt lookup"
    raise _cropping_error(method, "generation that only goes forward: greedy, sampling, beam search")


def raise_paged_unsupported(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise the LimbeckError of continuous batching; stands in for any method that begins it."""
    raise LimbeckError(
        "continuous batching pages keys and values, and a student has none",
        expected="generate(), with cache_implementation: dynamic, static or offloaded",
        hint="pad the batch on the left: generate(input_ids, attention_mask=mask)",
    )


def _check_prompt_is_longer_than_cache(arguments: dict[str, Any]) -> None:
    cache = next(
        (arguments[name] for name in ("past_key_values", "cache") if isinstance(arguments.get(name), Cache)), None
    )
    tokens = next(
        (arguments[name] for name in ("inputs", "input_ids", "inputs_embeds") if arguments.get(name) is not None), None
    )
    if cache is None or tokens is None:
        return
    cached, length = int(cache.get_seq_length()), tokens.shape[1]
    if 0 < length <= cached:
        raise LimbeckError(
            f"the prompt has {length} tokens, but its cache has read {cached} already",
            expected="the whole text so far: all tokens that the cache has read, followed by new ones",
            hint="to go back to an earlier point, keep a copy of the cache made there: copy.deepcopy(cache)",
        )


def _cropping_error(method: str, expected: str) -> LimbeckError:
    return LimbeckError(
        f"{method} drops tokens again, which a recurrent state cannot do: it keeps no earlier states",
        expected=expected,
        hint="leave out assistant_model, prompt_lookup_num_tokens, assistant_early_exit, use_mtp and penalty_alpha",
    )
