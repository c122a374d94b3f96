"""From a document to token ids: plain text, conversations, or tokens that are there already.

    encoder = encoder_of("chats.jsonl", tokenizer, eos=0, text_field="text", chat=None)
    for ids, mask in encoder.encode([next(encoder.read("chats.jsonl"))]):
        ...

A document travels as bytes: UTF-8 text, the JSON of a conversation, or uint32 tokens. It is stored as a model is given
it: behind the special tokens that a tokenizer puts before a text (`limbeck.data.special_tokens`), with EOS at the end.
"""

import hashlib
import json
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from limbeck.console import console
from limbeck.data import sources, tokens
from limbeck.data.hub import Rows
from limbeck.data.sources import MESSAGES
from limbeck.data.special_tokens import around, control_pattern, plain_ids

FORMAT = 2  # raise when the files or the rules of split and order change
PIECE_CHARACTERS = 4_000_000  # a longer document is tokenised in pieces: the tokenizer needs some 40 bytes a character

Encoded = tuple[np.ndarray, np.ndarray | None]  # ids, and 1 where a token is to be learnt


class Encoder(Protocol):
    """Reads a source's documents and turns them into ids."""

    eos: int
    begin: tuple[int, ...]  # what every document begins with, BOS as a rule; no target
    masked: bool  # some tokens are not to be learnt, so a mask is stored
    settings: dict[str, Any]  # what the cache key must know beyond the tokenizer

    @property
    def highest(self) -> int:
        """Largest id that can come."""

    def read(self, source: str | Rows, *, part: bool = False) -> Iterator[bytes]:
        """The documents of a source, or of a part of one that may be empty."""

    def encode(self, documents: list[bytes]) -> list[Encoded]:
        """Ids of each; none for a document that has to be dropped."""

    def report(self, source: str) -> None:
        """Says what was dropped, or raises where that was all."""


def encoder_of(source: str | Rows, tokenizer: Any, eos: int, text_field: str, chat: bool | None) -> Encoder:
    """The encoder for a source.

    Args:
        source: see `limbeck.data.sources`, or a folder of tokens (`limbeck.data.tokens`).
        eos: token that ends a document.
        chat: the records are conversations; None: where they have `messages` and no field `text_field`.
    """
    if isinstance(source, str) and tokens.is_tokens(source):
        return tokens.TokenEncoder(source, eos, around(tokenizer).begin)
    if chat is None:
        chat = sources.holds_messages(source, text_field)
    if chat:
        from limbeck.data.chat import ChatEncoder

        return ChatEncoder(tokenizer, eos, MESSAGES if text_field == "text" else text_field)
    return TextEncoder(tokenizer, eos, text_field)


class TextEncoder:
    """Plain text; every document begins as the tokenizer begins a text, and ends with EOS.

    What looks like a control token in it (`</s>` in a page of HTML) is split as the text it is.
    """

    masked = False

    def __init__(self, tokenizer: Any, eos: int, text_field: str):
        self.tokenizer, self.eos, self.text_field = tokenizer, eos, text_field
        self.begin = around(tokenizer).begin
        self.settings: dict[str, Any] = {}
        self.control = control_pattern(tokenizer)
        self.seen, self.split, self.example = 0, 0, ""

    @property
    def highest(self) -> int:
        """Largest id that can come."""
        return max(self.eos, *self.tokenizer.get_vocab().values())

    def read(self, source: str | Rows, *, part: bool = False) -> Iterator[bytes]:
        """The documents as UTF-8."""
        for text in sources.documents(source, text_field=self.text_field, part=part):
            yield text.encode("utf-8", "replace")

    def encode(self, documents: list[bytes]) -> list[Encoded]:
        """Ids of each with what begins and ends it; everything is learnt but the beginning."""
        texts = [raw.decode("utf-8") for raw in documents]
        self.seen += len(texts)
        for text in texts:
            if found := self.control.search(text):
                self.split, self.example = self.split + 1, self.example or found[0]
        if all(len(text) <= PIECE_CHARACTERS for text in texts):
            made = plain_ids(self.tokenizer, texts)
        else:
            made = [[i for ids in plain_ids(self.tokenizer, list(_pieces(text))) for i in ids] for text in texts]
        return [(np.array([*self.begin, *ids, self.eos], np.int64), None) for ids in made]

    def report(self, source: str) -> None:
        """Says in how many documents control tokens stood."""
        if self.split:
            console.print(
                f"in {self.split:,} of {self.seen:,} documents of '{source}' stand strings of the tokenizer's control "
                f"tokens, such as {self.example}: read as plain text (conversations belong in a field '{MESSAGES}')",
                markup=False,
            )
        self.seen, self.split, self.example = 0, 0, ""


def _pieces(text: str) -> Iterator[str]:
    """Cuts at line ends, where most tokenizers cut in any case, into pieces of about `PIECE_CHARACTERS`."""
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        end = text.rfind("\n", begin, begin + PIECE_CHARACTERS) + 1 or begin + PIECE_CHARACTERS
        yield text[begin:end]
        begin = end
    yield text[begin:]


def tokenizer_key(tokenizer: Any) -> str:
    """Hex sha256 of all that decides how the tokenizer splits text; padding and truncation settings do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: dict[str, Any] = {"vocab": tokenizer.get_vocab(), "settings": tokenizer.init_kwargs}
    else:
        rules = json.loads(backend.to_str())
        rules["truncation"] = rules["padding"] = None  # what the last call asked for
    rules["class"] = type(tokenizer).__name__
    rules["split_special_tokens"] = getattr(tokenizer, "split_special_tokens", False)
    return hashlib.sha256(json.dumps(rules, sort_keys=True, default=str).encode()).hexdigest()


def stored_settings(encoder: Encoder, tokenizer: Any, text_field: str, held_out: float) -> dict[str, Any]:
    """What decides on the stored tokens of given content."""
    return {
        "format": FORMAT,
        "text_field": text_field,
        "tokenizer": tokenizer_key(tokenizer),
        "begin_ids": list(encoder.begin),
        "eos_id": encoder.eos,
        "held_out": float(held_out),
        **encoder.settings,
    }


def key_of(settings: dict[str, Any]) -> str:
    """A short hex key of plain values."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:24]
