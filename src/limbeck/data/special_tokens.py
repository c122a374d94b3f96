"""Special tokens: what a tokenizer puts around a text (BOS, EOS), and control tokens that stand inside one.

    find_special_token_ids(tokenizer).prefix_ids  # (128000,) where `tokenizer("x")` begins with BOS, else ()
    encode_prompt(tokenizer, "Once upon a")       # as the model is prompted: behind BOS, never with an EOS at the end
    encode_plain_texts(tokenizer, ["2 <s> 3"])    # text alone; what looks like a control token is split as text

Training texts, prompts and evaluations are all tokenized by these functions, so a text reaches a model in one form. A
control token is an added token that is marked as special; other added tokens (`<think>`, `<tool_call>`) are part of
what a model writes.
"""

import re
import threading
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np

Encoded = tuple[np.ndarray, np.ndarray | None]  # ids [n], and 1 where a token is a target; None: all of them are

# Texts between whose tokens and their special ones a tokenizer's prefix and suffix are told apart. Several, because
# one that changes beside BOS is not found again in the whole.
PROBES = ("a", "The river", "0")

# A tokenizer of transformers stores the arguments of a call in itself, and streams tokenize in threads.
_LOCK = threading.Lock()


class SpecialTokenIds(NamedTuple):
    """Ids of the special tokens before and behind a text."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]


def find_special_token_ids(tokenizer: Any) -> SpecialTokenIds:
    """Find the special tokens that `tokenizer(text)` puts before and behind a text."""
    for probe in PROBES:
        whole = run_tokenizer(tokenizer, probe, add_special_tokens=True)["input_ids"]
        bare = run_tokenizer(tokenizer, probe)["input_ids"]
        for at in range(len(whole) - len(bare) + 1):
            if bare and whole[at : at + len(bare)] == bare:
                return SpecialTokenIds(tuple(whole[:at]), tuple(whole[at + len(bare) :]))
    return SpecialTokenIds((), ())


def prepend_prefix(ids: list[int], prefix_ids: Sequence[int]) -> list[int]:
    """Put `prefix_ids` before ids that do not begin with them (a chat template may have written BOS itself)."""
    return ids if ids[: len(prefix_ids)] == list(prefix_ids) else [*prefix_ids, *ids]


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Encode a text that a model is to continue. Control tokens in it count: it may be a rendered conversation."""
    return prepend_prefix(
        run_tokenizer(tokenizer, text, split_special_tokens=False)["input_ids"],
        find_special_token_ids(tokenizer).prefix_ids,
    )


def encode_plain_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Encode each text without special tokens around it, and control tokens in it split as plain text."""
    if not texts:
        return []
    # A tokenizer in Python splits all added tokens or none.
    if not getattr(tokenizer, "is_fast", True) and (unsplit := _added_tokens(tokenizer, special=False)):
        return [_encode_around(tokenizer, text, unsplit) for text in texts]
    encoded = run_tokenizer(tokenizer, texts, split_special_tokens=True)["input_ids"]
    control_ids, pattern = get_control_token_ids(tokenizer), None
    for at, ids in enumerate(encoded):
        # Unigram vocabularies hold their control tokens as pieces of text and find them again.
        if not control_ids.isdisjoint(ids):
            pattern = pattern or compile_control_pattern(tokenizer)
            encoded[at] = _encode_broken(tokenizer, texts[at], pattern)
    return encoded


def encode_continuations(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Encode texts that continue a prompt, as they stand inside a text, control tokens in them split as plain text.

    Alone, " Paris" would get a second space from the tokenizers of Llama 2 and Mistral.
    """
    pieces = (tokenize_inner_piece(tokenizer, text, split_special_tokens=True) for text in texts)
    return [output["input_ids"][skip:] for output, skip in pieces]


def _encode_around(tokenizer: Any, text: str, unsplit: list[str]) -> list[int]:
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, unsplit))})", text):
        if piece in unsplit:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        elif piece:
            ids += run_tokenizer(tokenizer, piece, split_special_tokens=True)["input_ids"]
    return ids


def _encode_broken(tokenizer: Any, text: str, pattern: re.Pattern[str]) -> list[int]:
    """Cut behind the first letter of each control token, so that no vocabulary finds it whole."""
    cuts = [0, *(match.start() + 1 for match in pattern.finditer(text)), len(text)]
    ids: list[int] = []
    for begin, end in pairwise(cuts):
        piece = text[begin:end]
        if piece:
            output, skip = tokenize_inner_piece(tokenizer, piece, first=begin == 0, split_special_tokens=True)
            ids += output["input_ids"][skip:]
    return ids


def run_tokenizer(tokenizer: Any, text: str | list[str], **settings: Any) -> Any:
    """Call the tokenizer on a whole text: nothing is added, truncated or padded unless `settings` say so."""
    # verbose=False: no "sequence is longer than the model's maximum" for a document that is cut up later anyway.
    common = {"add_special_tokens": False, "truncation": False, "padding": False, "return_attention_mask": False}
    with _LOCK:
        return tokenizer(text, **{**common, "verbose": False, **settings})


def tokenize_inner_piece(tokenizer: Any, piece: str, *, first: bool = False, **settings: Any) -> tuple[Any, int]:
    """Tokenize a piece from inside a text; also return how many tokens at its front belong to a newline put before it.

    Without that newline SentencePiece's tokenizers would begin the piece with a space of their own.

    Args:
        first: the piece is the beginning of the text, so no newline is put there.
    """
    newline = [] if first else run_tokenizer(tokenizer, "\n")["input_ids"]
    if newline:
        output = run_tokenizer(tokenizer, f"\n{piece}", **settings)
        if output["input_ids"][: len(newline)] == newline:
            return output, len(newline)
    return run_tokenizer(tokenizer, piece, **settings), 0


def get_control_token_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the control tokens; not of the one for unknown text, which plain text may give."""
    return set(tokenizer.convert_tokens_to_ids(_added_tokens(tokenizer, special=True))) - {tokenizer.unk_token_id}


def compile_control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Return a pattern that finds the control tokens in a text, the longest first."""
    # Grouped by their first three letters: some vocabularies reserve thousands, and a text has many "<".
    groups = groupby(sorted(_added_tokens(tokenizer, special=True)), key=lambda token: token[:3])
    parts = []
    for begin, tokens in groups:
        rest = sorted((re.escape(token[3:]) for token in tokens), key=len, reverse=True)
        parts.append((begin, f"{re.escape(begin)}(?:{'|'.join(rest)})"))
    parts.sort(key=lambda part: len(part[0]), reverse=True)
    return re.compile("|".join(part for _, part in parts) or "(?!)")


def _added_tokens(tokenizer: Any, *, special: bool) -> list[str]:
    """Strings of the added tokens that are marked as special, or of the others."""
    is_special = {str(token.content): bool(token.special) for token in tokenizer.added_tokens_decoder.values()}
    is_special |= dict.fromkeys(tokenizer.all_special_tokens, True)
    return [token for token, marked in is_special.items() if marked == special and token]
