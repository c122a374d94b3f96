"""Text out of a model, token by token, with a cache of constant size for a student.

    for piece in stream_text(model, tokenizer, "The capital of France is", max_new_tokens=20):
        print(piece, end="", flush=True)

Generation itself is transformers' own.
"""

import copy
from collections.abc import Generator
from threading import Event, Thread
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
)

from limbeck.data.special_tokens import encode_prompt


def stream_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Generator[str, None, int]:
    """The continuation of `prompt` in pieces as they come.

    Args:
        temperature: 0 takes the most likely token each time.
        top_p: sample from the smallest set of tokens that has this probability.

    Returns:
        How many tokens were generated, once the pieces are at their end. Who reads no further, or is interrupted,
        closes the generator: the model stops at the next token.
    """
    stop = _Stop()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []
    made: list[int] = []

    def work() -> None:
        try:
            ids = _generate(model, tokenizer, prompt, max_new_tokens, temperature, top_p, seed, streamer, stop)
            made.extend(ids.tolist())
        except BaseException as error:  # handed to the reader below
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        # a thread that still computes while the interpreter ends takes the whole process down with an abort
        stop.requested.set()
        thread.join()
    if failure:
        raise failure[0]
    return len(made)


def generate_continuation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 48
) -> str:
    """The greedy continuation of `prompt` as text."""
    ids = _generate(model, tokenizer, prompt, max_new_tokens, 0.0, 1.0, 0)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def with_default_generation_config(model: PreTrainedModel, tokenizer: Any) -> PreTrainedModel:
    """The model with a generation config that changes no probability: only the tokens that end a text, and padding.

    What else a checkpoint's generation_config.json says (penalties, beams, a top_k, forced tokens) is for its chat
    program. `generate` would mix it into every call, and a greedy continuation would not be the likeliest tokens.
    """
    known = model.generation_config
    eos = tokenizer.eos_token_id if known is None or known.eos_token_id is None else known.eos_token_id
    last = eos[0] if isinstance(eos, list) else eos
    pad = next((one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None), last)
    lent = copy.copy(model)  # of the module alone: weights are shared, and the caller's model keeps its config
    lent.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=pad)
    return lent


class _Stop(StoppingCriteria):
    """Ends generation at the next token once that is requested, from another thread."""

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
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}  # not transformers' 50
    out = with_default_generation_config(model, tokenizer).generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([stop] if stop else []),
        **sampling,
    )
    return out[0, ids.shape[1] :]
