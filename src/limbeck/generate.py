"""Text out of a model, token by token, with a cache of constant size for a student.

    for piece in stream(model, tokenizer, "The capital of France is", new_tokens=20):
        print(piece, end="", flush=True)

Generation itself is transformers' own.
"""

from collections.abc import Iterator
from threading import Thread

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextIteratorStreamer


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    new_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """The continuation of `prompt` in pieces as they come.

    Args:
        temperature: 0 takes the most likely token each time.
        top_p: sample from the smallest set of tokens that has this probability.
    """
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    failure: list[BaseException] = []

    def work() -> None:
        try:
            _generate(model, tokenizer, prompt, new_tokens, temperature, top_p, seed, streamer)
        except BaseException as error:  # handed to the reader below
            failure.append(error)
            streamer.end()

    thread = Thread(target=work, daemon=True)
    thread.start()
    yield from streamer
    thread.join()
    if failure:
        raise failure[0]


def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, new_tokens: int = 48) -> str:
    """The greedy continuation of `prompt` as text."""
    ids = _generate(model, tokenizer, prompt, new_tokens, 0.0, 1.0, 0)
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def _generate(model, tokenizer, prompt, new_tokens, temperature, top_p, seed, streamer=None) -> torch.Tensor:
    torch.manual_seed(seed)
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=True).input_ids.to(model.device)
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_p": top_p} if temperature > 0 else {"do_sample": False}
    )
    settings = GenerationConfig(
        max_new_tokens=new_tokens,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=settings, streamer=streamer)
    return out[0, ids.shape[1] :]
