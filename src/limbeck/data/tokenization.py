"""From a document to token ids: plain text, conversations, or tokens that exist already.

    encoder = create_encoder("chats.jsonl", tokenizer, eos=0, text_field="text", chat=None)
    for ids, mask in encoder.encode([next(encoder.read("chats.jsonl"))]):
        ...
    tokenizer = train_tokenizer(texts, 4096, max_length=2048)        # a byte-level BPE vocabulary of its own

A document travels as bytes: UTF-8 text, the JSON of a conversation, or uint32 tokens. It is stored as a model is given
it: behind the special tokens that a tokenizer puts before a text (`limbeck.data.special_tokens`), with EOS at the end.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from limbeck.core.console import console
from limbeck.core.digests import digest_facts
from limbeck.data.chat import ChatEncoder
from limbeck.data.documents import has_messages, iter_documents
from limbeck.data.hub import LoadedDataset
from limbeck.data.pretokenized import TokenEncoder, is_token_source
from limbeck.data.records import MESSAGES_FIELD
from limbeck.data.special_tokens import Encoded, compile_control_pattern, encode_plain_texts, find_special_token_ids

STORE_FORMAT_VERSION = 2  # raise when the files or the rules of split and order change
PIECE_CHARACTERS = 4_000_000  # a longer document is tokenized in pieces: the tokenizer needs some 40 bytes a character
END_OF_TEXT = "<|endoftext|>"


class Encoder(Protocol):
    """Reads a source's documents and turns them into ids."""

    eos: int
    prefix_ids: tuple[int, ...]  # what every document begins with, BOS as a rule; no target
    has_mask: bool  # some tokens are not trained on, so a mask is stored
    settings: dict[str, Any]  # what the cache key must know beyond the tokenizer

    @property
    def max_token_id(self) -> int:
        """Largest id that can come."""

    def read(self, source: Any, *, allow_empty: bool = False) -> Iterator[bytes]:
        """Yield the documents of a source, or of a `SourceShard.part`, which may be empty."""

    def encode(self, documents: list[bytes]) -> list[Encoded]:
        """Return ids and mask of each; no ids for a document that has to be dropped."""

    def find_cut(self, document: bytes, near: int) -> int | None:
        """Return the byte near `near` where a document can be cut in two; None where it has to stay whole."""

    def report(self, source: str) -> None:
        """Print what was dropped or changed since the last report; LimbeckError where everything was dropped."""


def create_encoder(
    source: str | LoadedDataset, tokenizer: Any, eos: int, text_field: str, chat: bool | None
) -> Encoder:
    """Create the encoder for a source.

    Args:
        source: see `limbeck.data.documents`, or a folder of tokens (`limbeck.data.pretokenized`).
        eos: token that ends a document.
        chat: the records are conversations; None: where they have `messages` and no field `text_field`.
    """
    if isinstance(source, str) and is_token_source(source):
        return TokenEncoder(source, eos, find_special_token_ids(tokenizer).prefix_ids)
    if chat is None:
        chat = has_messages(source, text_field)
    if chat:
        return ChatEncoder(tokenizer, eos, MESSAGES_FIELD if text_field == "text" else text_field)
    return TextEncoder(tokenizer, eos, text_field)


class TextEncoder:
    """Plain text; every document begins as the tokenizer begins a text, and ends with EOS.

    What looks like a control token in it (`</s>` in a page of HTML) is split as the text it is.
    """

    has_mask = False

    def __init__(self, tokenizer: Any, eos: int, text_field: str):
        self.tokenizer, self.eos, self.text_field = tokenizer, eos, text_field
        self.prefix_ids = find_special_token_ids(tokenizer).prefix_ids
        self.settings: dict[str, Any] = {}
        self._control_pattern = compile_control_pattern(tokenizer)
        self._reset_counts()

    def _reset_counts(self) -> None:
        self._documents, self._with_control_tokens, self._example = 0, 0, ""

    @property
    def max_token_id(self) -> int:
        """Largest id that can come."""
        return max(self.eos, *self.tokenizer.get_vocab().values())

    def read(self, source: str | LoadedDataset, *, allow_empty: bool = False) -> Iterator[bytes]:
        """Yield the documents as UTF-8."""
        for text in iter_documents(source, text_field=self.text_field, allow_empty=allow_empty):
            yield text.encode("utf-8", "replace")

    def encode(self, documents: list[bytes]) -> list[Encoded]:
        """Return the ids of each with what begins and ends it; no mask, as everything but the beginning is a target."""
        texts = [raw.decode("utf-8") for raw in documents]
        self._documents += len(texts)
        for text in texts:
            if match := self._control_pattern.search(text):
                self._with_control_tokens, self._example = self._with_control_tokens + 1, self._example or match[0]
        if all(len(text) <= PIECE_CHARACTERS for text in texts):
            encoded = encode_plain_texts(self.tokenizer, texts)
        else:
            encoded = [
                [i for ids in encode_plain_texts(self.tokenizer, list(_cut_into_pieces(text))) for i in ids]
                for text in texts
            ]
        return [(np.array([*self.prefix_ids, *ids, self.eos], np.int64), None) for ids in encoded]

    def find_cut(self, document: bytes, near: int) -> int | None:
        """Cut behind a blank line, a line or a space where there is one, else between two characters."""
        window = min(near, (len(document) - near) // 2)
        for mark in (b"\n\n", b"\n", b" "):
            at = document.rfind(mark, near - window, near)
            if at > 0 and document[: at + len(mark)].strip() and document[at + len(mark) :].strip():
                return at + len(mark)
        while near and document[near] & 0xC0 == 0x80:  # inside a character of UTF-8
            near -= 1
        return near or None

    def report(self, source: str) -> None:
        """Print in how many documents control tokens stood."""
        if self._with_control_tokens:
            console.print(
                f"{self._with_control_tokens:,} of {self._documents:,} documents of '{source}' contain control tokens "
                f"such as {self._example}: read as plain text (conversations belong in a field '{MESSAGES_FIELD}')",
                markup=False,
            )
        self._reset_counts()


def _cut_into_pieces(text: str) -> Iterator[str]:
    """Cut at line ends, where most tokenizers cut in any case, into pieces of about `PIECE_CHARACTERS`."""
    begin = 0
    while len(text) - begin > PIECE_CHARACTERS:
        end = text.rfind("\n", begin, begin + PIECE_CHARACTERS) + 1 or begin + PIECE_CHARACTERS
        yield text[begin:end]
        begin = end
    yield text[begin:]


def collect_store_settings(encoder: Encoder, tokenizer: Any, text_field: str, held_out: float) -> dict[str, Any]:
    """Return what decides on the stored tokens of given content: the cache key of a token store."""
    return {
        "format": STORE_FORMAT_VERSION,
        "text_field": text_field,
        "tokenizer": hash_tokenizer_rules(tokenizer),
        "begin_ids": list(encoder.prefix_ids),
        "eos_id": encoder.eos,
        "held_out": float(held_out),
        **encoder.settings,
    }


def hash_tokenizer_rules(tokenizer: Any) -> str:
    """Return the hex sha256 of all that decides how text is split; padding and truncation settings do not count."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules: dict[str, Any] = {"vocab": tokenizer.get_vocab(), "settings": tokenizer.init_kwargs}
    else:
        rules = json.loads(backend.to_str())
        rules["truncation"] = rules["padding"] = None  # what the last call set
    rules["class"] = type(tokenizer).__name__
    rules["split_special_tokens"] = getattr(tokenizer, "split_special_tokens", False)
    return digest_facts(rules)


def hash_settings(settings: dict[str, Any]) -> str:
    """Return a short hex key of plain values."""
    return digest_facts(settings, 24)


def train_tokenizer(texts: Iterable[str], size: int, *, max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of `size` tokens, the first of which ends a document (and begins one, and pads).

    Digits stand alone, so a number of any length is written in ten tokens; every byte has a token, so nothing is
    unknown.

    Args:
        texts: what is counted.
        max_length: the longest sequence of the model that it is for.
    """
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
    )
