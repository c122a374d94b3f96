"""Truncation of prompts that exceed the context length.

    room = compute_max_prompt_length(context=8192, answer=128)        # 8064 tokens
    prompt = truncate_prompt(ids, room, overlong="middle")           # the first 4032 and the last 4032 tokens of ids

Lengths are tokens of the model's own tokenizer, chat template and special tokens included, because those are what the
model reads. Truncation in the middle is LongBench's (Bai et al. 2024, arXiv 2308.14508): instructions and question are
at the two ends of a prompt. LongBench decodes both halves and tokenizes them again, which may change their length, and
adds the chat template afterwards; here tokens are cut, so the result fits exactly.
"""

from collections.abc import Sequence
from typing import Any, Literal

from limbeck.core.errors import LimbeckError

OverlongPolicy = Literal["refuse", "middle", "left"]  # see `truncate_prompt`
MIN_PROMPT_LENGTH = 2  # tokens: one for each half


def resolve_max_length(model: Any, tokenizer: Any = None, requested_length: int | None = None) -> int:
    """Determine the maximum length of prompt and answer together, in tokens.

    Args:
        requested_length: a length at most the model's own; None for the model's own.

    Raises:
        LimbeckError: the requested length exceeds the model's, or neither length is known.
    """
    config = getattr(model.config, "text_config", None) or model.config
    sizes = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
    context = next((int(size) for size in sizes if size), None)
    if context is None:
        max_length = getattr(tokenizer, "model_max_length", None)
        # transformers writes 10**30 for an unknown length
        context = int(max_length) if max_length and max_length < 10**9 else None
    if context is None and requested_length is None:
        raise LimbeckError(
            "neither the model nor its tokenizer gives a context length",
            hint="set one: --set tasks.length=4096",
        )
    if context is not None and requested_length is not None and requested_length > context:
        raise LimbeckError(
            f"tasks.length is {requested_length} tokens", expected=f"at most the model's context, {context}"
        )
    return requested_length or context or 0


def compute_max_prompt_length(
    context: int, answer: int, task: str = "", min_prompt_length: int = MIN_PROMPT_LENGTH
) -> int:
    """Compute the tokens left for the prompt in `context` tokens with an answer of at most `answer`.

    Args:
        task: name for the error message.
        min_prompt_length: minimum length of a prompt.

    Raises:
        LimbeckError: the answer leaves no room for a prompt.
    """
    room = context - answer
    if room < min_prompt_length:
        raise LimbeckError(
            f"{task + ': ' if task else ''}an answer of up to {answer} tokens does not fit into {context} tokens",
            expected=f"a context of {answer + min_prompt_length} tokens or more",
            hint="a model or a length with more room, or a shorter answer",
        )
    return room


MIDDLE_HINT = "--set tasks.overlong=middle   (keeps the first and the last half of a prompt, as LongBench does)"


def truncate_prompt(
    ids: Sequence[int], room: int, overlong: OverlongPolicy, name: str = "a prompt", hint: str = MIDDLE_HINT
) -> list[int]:
    """Return `ids` if they fit into `room` tokens, else truncate them as `overlong` says.

    Args:
        overlong: "refuse" raises an error; "middle" keeps the first and the last half, with an odd `room` one token
            more at the end, where the question is; "left" keeps the last `room` tokens, as lm-evaluation-harness does.
        name, hint: subject of the error message, and what to do.

    Raises:
        LimbeckError: `ids` do not fit and `overlong` is "refuse".
    """
    if len(ids) <= room:
        return list(ids)
    if overlong == "refuse":
        raise LimbeckError(
            f"{name} is too long: {len(ids)} tokens",
            expected=f"at most {room}, so that prompt and answer together fit",
            hint=hint,
        )
    if overlong == "left":
        return list(ids[len(ids) - room :])
    half = room // 2
    return [*ids[:half], *ids[len(ids) - (room - half) :]]
