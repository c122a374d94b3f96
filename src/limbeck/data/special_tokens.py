"""What a tokenizer puts around a text, and which strings it keeps for that: the one place that knows.

    find_special_token_ids(tokenizer).prefix_ids                    # (128000,) where `tokenizer("x")` begins with BOS, () where it does not
    encode_prompt(tokenizer, "Once upon a")       # as the model is prompted: behind BOS, never with an EOS at the end
    encode_plain_texts(tokenizer, ["2 <s> 3"])          # text alone; what looks like a control token is split as text

Training texts, prompts and measurements all ask here, so a text reaches a model in one form. A control token is an
added token that is marked as special; other added tokens (`<think>`, `<tool_call>`) are part of what a model writes.
"""

import re
import threading
from collections.abc import Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

PROBES = ("a", "The river", "0")  # texts that the special tokens of a tokenizer are found around

# A tokenizer of transformers keeps the arguments of a call in itself, and streams tokenise in threads.
_LOCK = threading.Lock()


class SpecialTokenIds(NamedTuple):
    """Ids of the special tokens before and behind a text."""

    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]


def find_special_token_ids(tokenizer: Any) -> SpecialTokenIds:
    """The special tokens that `tokenizer(text)` puts before and behind a text."""
    for probe in PROBES:
        whole = run_tokenizer(tokenizer, probe, add_special_tokens=True)["input_ids"]
        bare = run_tokenizer(tokenizer, probe)["input_ids"]
        for at in range(len(whole) - len(bare) + 1):
            if bare and whole[at : at + len(bare)] == bare:
                return SpecialTokenIds(tuple(whole[:at]), tuple(whole[at + len(bare) :]))
    return SpecialTokenIds((), ())


def prepend_prefix(ids: list[int], prefix_ids: Sequence[int]) -> list[int]:
    """Ids that begin with `prefix_ids`, put there unless they do already (a chat template may have written BOS itself)."""
    return ids if ids[: len(prefix_ids)] == list(prefix_ids) else [*prefix_ids, *ids]


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that a model is to continue. Control tokens in it count: it may be a rendered conversation."""
    return prepend_prefix(
        run_tokenizer(tokenizer, text, split_special_tokens=False)["input_ids"],
        find_special_token_ids(tokenizer).prefix_ids,
    )


def encode_plain_texts(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Ids of each text without special tokens around it, control tokens in it split as plain text."""
    if not texts:
        return []
    if not getattr(tokenizer, "is_fast", True) and (stay := _added(tokenizer, special=False)):
        return [_between(tokenizer, text, stay) for text in texts]
    found = run_tokenizer(tokenizer, texts, split_special_tokens=True)["input_ids"]
    control, pattern = get_control_token_ids(tokenizer), None
    for at, ids in enumerate(found):
        # Unigram vocabularies hold their control tokens as pieces of text and find them again.
        if not control.isdisjoint(ids):
            pattern = pattern or compile_control_pattern(tokenizer)
            found[at] = _broken(tokenizer, texts[at], pattern)
    return found


def run_tokenizer(tokenizer: Any, text: str | list[str], **settings: Any) -> Any:
    """What the tokenizer makes of a text, whole: nothing added, cut or padded unless `settings` say so."""
    # verbose=False: no "sequence is longer than the model's maximum" for a document that is cut up later anyway.
    common = {"add_special_tokens": False, "truncation": False, "padding": False, "return_attention_mask": False}
    with _LOCK:
        return tokenizer(text, **{**common, "verbose": False, **settings})


def tokenize_inner_piece(tokenizer: Any, piece: str, *, first: bool = False, **settings: Any) -> tuple[Any, int]:
    """A piece from inside a text, tokenised, and how many tokens of it at the front belong to a newline put before it.

    Without that line SentencePiece's tokenizers would begin the piece with a space of their own. `first`: the piece is
    the beginning of the text, so none is put there.
    """
    newline = [] if first else run_tokenizer(tokenizer, "\n")["input_ids"]
    if newline:
        made = run_tokenizer(tokenizer, f"\n{piece}", **settings)
        if made["input_ids"][: len(newline)] == newline:
            return made, len(newline)
    return run_tokenizer(tokenizer, piece, **settings), 0


def get_control_token_ids(tokenizer: Any) -> set[int]:
    """Ids of the control tokens; not of the one for what is unknown, which plain text may give."""
    return set(tokenizer.convert_tokens_to_ids(_added(tokenizer, special=True))) - {tokenizer.unk_token_id}


def compile_control_pattern(tokenizer: Any) -> re.Pattern[str]:
    """Finds the control tokens in a text, the longest first."""
    # Grouped by their first three letters: some vocabularies reserve thousands, and a text has many "<".
    groups = groupby(sorted(_added(tokenizer, special=True)), key=lambda token: token[:3])
    parts = []
    for begin, tokens in groups:
        rest = sorted((re.escape(token[3:]) for token in tokens), key=len, reverse=True)
        parts.append((begin, f"{re.escape(begin)}(?:{'|'.join(rest)})"))
    parts.sort(key=lambda part: len(part[0]), reverse=True)
    return re.compile("|".join(part for _, part in parts) or "(?!)")


def _added(tokenizer: Any, *, special: bool) -> list[str]:
    """Strings of the added tokens that are marked as special, or of the others."""
    known = {str(token.content): bool(token.special) for token in tokenizer.added_tokens_decoder.values()}
    known |= dict.fromkeys(tokenizer.all_special_tokens, True)
    return [token for token, marked in known.items() if marked == special and token]


def _between(tokenizer: Any, text: str, stay: list[str]) -> list[int]:
    """Ids of a text, the added tokens `stay` in it kept: a tokenizer in Python would split them with the others."""
    ids: list[int] = []
    for piece in re.split(f"({'|'.join(map(re.escape, stay))})", text):
        if piece in stay:
            ids.append(tokenizer.convert_tokens_to_ids(piece))
        elif piece:
            ids += run_tokenizer(tokenizer, piece, split_special_tokens=True)["input_ids"]
    return ids


def _broken(tokenizer: Any, text: str, pattern: re.Pattern[str]) -> list[int]:
    """Ids of a text that is cut behind the first letter of each control token in it."""
    cuts = [0, *(match.start() + 1 for match in pattern.finditer(text)), len(text)]
    ids: list[int] = []
    for begin, end in pairwise(cuts):
        piece = text[begin:end]
        if piece:
            made, skip = tokenize_inner_piece(tokenizer, piece, first=begin == 0, split_special_tokens=True)
            ids += made["input_ids"][skip:]
    return ids
