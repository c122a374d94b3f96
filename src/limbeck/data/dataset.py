"""The text of a recipe, opened: one source or several, tokenised first, streamed, or made as it is read.

    text = open_text_data(recipe.data, tokenizer, teacher)
    text.train_sequences(512, seed=0).batch(0, 4)
    text.held_out_sequences(512).n_sequences

A text is opened once, for the longest sequences that are read of it.
"""

import json
from dataclasses import dataclass
from typing import Any

from limbeck.core.cache import MANIFEST
from limbeck.core.errors import LimbeckError, rewrite_hints
from limbeck.core.recipe import Data, Source
from limbeck.data.mixture import MixtureDataset
from limbeck.data.packing import PackedDataset, SequenceDataset
from limbeck.data.streaming import StreamingDataset, TokenStream
from limbeck.data.synthetic import REPEATS_SOURCE, RepeatedSequenceSource
from limbeck.data.token_store import Split, TokenStore, build_token_store
from limbeck.data.tokenization import hash_settings


@dataclass(frozen=True)
class TextData:
    """Opened sources and their weights. `key` says which tokens they are, for the run's manifest."""

    sources: list[TokenStore | TokenStream | RepeatedSequenceSource]
    weights: list[float]

    @property
    def key(self) -> str:
        """Of one source its own key, of several one of all keys and weights."""
        keys = [part.key for part in self.sources]
        return keys[0] if len(keys) == 1 else hash_settings({"parts": keys, "weights": self.weights})

    @property
    def train_tokens(self) -> int | None:
        """Training tokens of all sources; None where one is streamed, so that nobody knows, or has no end."""
        known = [part.train.n_tokens for part in self.sources if isinstance(part, TokenStore)]
        return sum(known) if len(known) == len(self.sources) else None

    @property
    def held_out_tokens(self) -> int:
        """Held-out tokens of all sources."""
        return sum(split.n_tokens for split, _ in self._held_out)

    @property
    def files(self) -> dict[str, int]:
        """Files of the sources, the shards of those that are streamed, and their sizes."""
        read = [part for part in self.sources if not isinstance(part, RepeatedSequenceSource)]
        return {f"{part.source}: {name}": size for part in read for name, size in part.files.items()}

    @property
    def content_fingerprints(self) -> list[str | None]:
        """Of each source the fingerprint of its content; None for one that is streamed, or made as it is read."""
        stores = [part if isinstance(part, TokenStore) else None for part in self.sources]
        return [None if store is None else _content(store) for store in stores]

    def train_sequences(self, length: int, seed: int) -> SequenceDataset:
        """The training text in sequences of `length` tokens."""
        made = [_training(part, length, seed) for part in self.sources]
        return made[0] if len(made) == 1 else MixtureDataset(made, self.weights, seed)

    def held_out_sequences(self, length: int) -> SequenceDataset:
        """The held-out text in sequences of `length` tokens, in a fixed order; of several sources in their shares.

        Repeated lists are no text, and are measured on only where there is nothing else.
        """
        made = [PackedDataset(split, length, shuffle=False) for split, _ in self._held_out]
        lists = [part for part in self.sources if isinstance(part, RepeatedSequenceSource)]
        if lists and not made:
            return lists[0].held_out_sequences(length)
        return (
            made[0] if len(made) == 1 else MixtureDataset(made, [weight for _, weight in self._held_out], shuffle=False)
        )

    @property
    def _held_out(self) -> list[tuple[Split, float]]:
        """What each source holds out, and its weight."""
        pairs = zip(self.sources, self.weights)
        return [(part.held_out, weight) for part, weight in pairs if part.held_out is not None]

    def all_sequences(self, length: int) -> SequenceDataset:
        """A single source's training text, which is all of it where nothing is held out, in stored order."""
        (part,) = self.sources
        if isinstance(part, RepeatedSequenceSource):
            return part.held_out_sequences(length)
        assert isinstance(part, TokenStore)
        return PackedDataset(part.train, length, shuffle=False)

    def close(self) -> None:
        """End what reads ahead."""
        for part in self.sources:
            if isinstance(part, TokenStream):
                part.close()


def open_text_data(
    data: Data,
    tokenizer: Any,
    teacher: Any,
    *,
    length: int | None = None,
    held_out: float | None = None,
    held_out_tokens: int = 8192,
) -> TextData:
    """Tokens of a recipe's text, for a teacher; made if they are not in the cache.

    Args:
        data: what to read.
        teacher: the model whose embedding table must have a row for each token.
        length: of the longest sequences that will be read; `data.seq_len` by default.
        held_out: another share than `data.held_out`, for example 0.
        held_out_tokens: how many held-out tokens a stream gathers.

    Raises:
        LimbeckError: see `shards.build_token_store` and `streaming.TokenStream`.
    """
    share = data.held_out if held_out is None else held_out
    common: dict[str, Any] = {
        "length": length or data.seq_len,
        "held_out": share,
        "vocab_size": int(teacher.get_input_embeddings().weight.shape[0]),
    }
    parts: list[TokenStore | TokenStream | RepeatedSequenceSource] = []
    sources = data.sources or [Source(source=data.source, text_field=data.text_field, chat=data.chat)]
    for number, one in enumerate(sources):
        place = "data" if data.sources is None else f"data.sources.{number}"
        common |= {"text_field": one.text_field, "chat": one.chat}
        with rewrite_hints({"data.text_field": f"{place}.text_field", "data.chat": f"{place}.chat"}):
            if one.source == REPEATS_SOURCE:
                parts.append(RepeatedSequenceSource.from_tokenizer(tokenizer, common["vocab_size"]))
            elif data.streaming:
                if share == 0:
                    raise LimbeckError("a streamed text has no end", expected="held-out text to evaluate on")
                room = data.cache_gb / len(sources)
                stream = TokenStream(one.source, tokenizer, held_out_tokens=held_out_tokens, cache_gb=room, **common)
                parts.append(stream)
            else:
                parts.append(build_token_store(one.source, tokenizer, max_tokens=data.max_tokens, **common))
    return TextData(parts, [one.weight for one in sources])


def _content(store: TokenStore) -> str:
    return json.loads((store.folder / MANIFEST).read_text(encoding="utf-8"))["content"]


def _training(part: TokenStore | TokenStream | RepeatedSequenceSource, length: int, seed: int) -> SequenceDataset:
    if isinstance(part, RepeatedSequenceSource):
        return part.train_sequences(length, seed)
    return (
        StreamingDataset(part, length, seed)
        if isinstance(part, TokenStream)
        else PackedDataset(part.train, length, seed)
    )
