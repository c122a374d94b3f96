"""Whether prompt and answer fit into a model's context, and what is done where not: an error, or a cut in the middle.

    room = compute_max_prompt_length(context=8192, answer=128)        # 8064 tokens
    prompt = truncate_prompt(ids, room, overlong="middle")           # the first 4032 and the last 4032 tokens of ids

All lengths are tokens of the model's own tokenizer, chat template and special tokens included, because those are what
the model reads. The cut in the middle is LongBench's (Bai et al. 2024, arXiv 2308.14508): instructions and question
stand at the two ends of a prompt. LongBench decodes both halves and reads them again, which may change their number,
and adds the chat template afterwards; here tokens are cut, so what fits is exact.
"""

from collections.abc import Sequence
from typing import Any, Literal

from limbeck.core.errors import LimbeckError

OverlongPolicy = Literal["refuse", "middle", "left"]  # what to do with a prompt that does not fit
MIN_PROMPT_LENGTH = 2  # tokens: a first and a last half


def resolve_max_length(model: Any, tokenizer: Any = None, requested_length: int | None = None) -> int:
    """How many tokens of prompt and answer a model is run with.

    Args:
        requested_length: a length that is asked for, at most the model's own.

    Raises:
        LimbeckError: more is asked for than the model has positions, or nobody says how many it has.
    """
    config = getattr(model.config, "text_config", None) or model.config
    sizes = [getattr(config, name, None) for name in ("max_position_embeddings", "n_positions", "n_ctx")]
    own = next((int(size) for size in sizes if size), None)
    if own is None:
        said = getattr(tokenizer, "model_max_length", None)
        own = int(said) if said and said < 10**9 else None  # transformers writes 10**30 where nothing is known
    if own is None and requested_length is None:
        raise LimbeckError(
            "the model says nowhere how long its context is", hint="give a length: --set tasks.length=4096"
        )
    if own is not None and requested_length is not None and requested_length > own:
        raise LimbeckError(
            f"a length of {requested_length} tokens is asked for", expected=f"at most the model's context, {own}"
        )
    return requested_length or own or 0


def compute_max_prompt_length(
    context: int, answer: int, what: str = "", min_prompt_length: int = MIN_PROMPT_LENGTH
) -> int:
    """Tokens left for the prompt, in `context` tokens with an answer of at most `answer`.

    Args:
        what: whose answer, for the message.
        min_prompt_length: tokens that a prompt needs.

    Raises:
        LimbeckError: the answer leaves no room for a prompt.
    """
    room = context - answer
    if room < min_prompt_length:
        raise LimbeckError(
            f"{what + ': ' if what else ''}an answer of up to {answer} tokens does not fit into {context} tokens",
            expected=f"a context of {answer + min_prompt_length} tokens or more",
            hint="a model or a length with more room, or a shorter answer",
        )
    return room


def truncate_prompt(ids: Sequence[int], room: int, overlong: OverlongPolicy, what: str = "a prompt") -> list[int]:
    """`ids` where they fit into `room` tokens, else what `overlong` says.

    Args:
        overlong: "refuse" is an error; "middle" keeps the first and the last half, of an odd room the larger one last,
            where the question is; "left" keeps the last `room` tokens, as lm-evaluation-harness does.

    Raises:
        LimbeckError: they do not fit, and `overlong` says to refuse.
    """
    if len(ids) <= room:
        return list(ids)
    if overlong == "refuse":
        raise LimbeckError(
            f"{what} is too long: {len(ids)} tokens",
            expected=f"at most {room}, so that prompt and answer together fit",
            hint="--set tasks.overlong=middle   (keeps the first and the last half of a prompt, as LongBench does)",
        )
    if overlong == "left":
        return list(ids[len(ids) - room :])
    first = room // 2
    return [*ids[:first], *ids[len(ids) - (room - first) :]]
