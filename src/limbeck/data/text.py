"""The text of a recipe, opened: one source or several, tokenised first, streamed, or made as it is read.

    text = open_text(recipe.data, tokenizer, teacher)
    text.training(512, seed=0).batch(0, 4)
    text.held_out(512).n_sequences

A text is opened once, for the longest sequences that are read of it.
"""

import json
from dataclasses import dataclass
from typing import Any

from limbeck.data.cache import MANIFEST
from limbeck.data.encode import key_of
from limbeck.data.mixture import Mixture
from limbeck.data.packing import Packed, Sequences
from limbeck.data.repeats import REPEATS, Lists
from limbeck.data.shards import Split, TokenStore, prepare
from limbeck.data.streamed import Streamed
from limbeck.data.streaming import Stream
from limbeck.errors import LimbeckError, hints_for
from limbeck.recipe import Data, Source


@dataclass(frozen=True)
class Text:
    """Opened sources and their weights. `key` says which tokens they are, for the run's manifest."""

    parts: list[TokenStore | Stream | Lists]
    weights: list[float]

    @property
    def key(self) -> str:
        """Of one source its own key, of several one of all keys and weights."""
        keys = [part.key for part in self.parts]
        return keys[0] if len(keys) == 1 else key_of({"parts": keys, "weights": self.weights})

    @property
    def train_tokens(self) -> int | None:
        """Training tokens of all sources; None where one is streamed, so that nobody knows, or has no end."""
        known = [part.train.n_tokens for part in self.parts if isinstance(part, TokenStore)]
        return sum(known) if len(known) == len(self.parts) else None

    @property
    def held_out_tokens(self) -> int:
        """Held-out tokens of all sources."""
        return sum(split.n_tokens for split, _ in self._held_out)

    @property
    def files(self) -> dict[str, int]:
        """Files of the sources, the shards of those that are streamed, and their sizes."""
        read = [part for part in self.parts if not isinstance(part, Lists)]
        return {f"{part.source}: {name}": size for part in read for name, size in part.files.items()}

    @property
    def contents(self) -> list[str | None]:
        """Of each source the fingerprint of its content; None for one that is streamed, or made as it is read."""
        stores = [part if isinstance(part, TokenStore) else None for part in self.parts]
        return [None if store is None else _content(store) for store in stores]

    def training(self, length: int, seed: int) -> Sequences:
        """The training text in sequences of `length` tokens."""
        made = [_training(part, length, seed) for part in self.parts]
        return made[0] if len(made) == 1 else Mixture(made, self.weights, seed)

    def held_out(self, length: int) -> Sequences:
        """The held-out text in sequences of `length` tokens, in a fixed order; of several sources in their shares.

        Repeated lists are no text, and are measured on only where there is nothing else.
        """
        made = [Packed(split, length, shuffle=False) for split, _ in self._held_out]
        lists = [part for part in self.parts if isinstance(part, Lists)]
        if lists and not made:
            return lists[0].measured(length)
        return made[0] if len(made) == 1 else Mixture(made, [weight for _, weight in self._held_out], shuffle=False)

    @property
    def _held_out(self) -> list[tuple[Split, float]]:
        """What each source holds out, and its weight."""
        pairs = zip(self.parts, self.weights)
        return [(part.held_out, weight) for part, weight in pairs if part.held_out is not None]

    def all_in_order(self, length: int) -> Sequences:
        """A single source's training text, which is all of it where nothing is held out, in stored order."""
        (part,) = self.parts
        if isinstance(part, Lists):
            return part.measured(length)
        assert isinstance(part, TokenStore)
        return Packed(part.train, length, shuffle=False)

    def close(self) -> None:
        """End what reads ahead."""
        for part in self.parts:
            if isinstance(part, Stream):
                part.close()


def open_text(
    data: Data,
    tokenizer: Any,
    teacher: Any,
    *,
    length: int | None = None,
    held_out: float | None = None,
    held_out_tokens: int = 8192,
) -> Text:
    """Tokens of a recipe's text, for a teacher; made if they are not in the cache.

    Args:
        data: what to read.
        teacher: the model whose embedding table must have a row for each token.
        length: of the longest sequences that will be read; `data.seq_len` by default.
        held_out: another share than `data.held_out`, for example 0.
        held_out_tokens: how many held-out tokens a stream gathers.

    Raises:
        LimbeckError: see `shards.prepare` and `streaming.Stream`.
    """
    share = data.held_out if held_out is None else held_out
    common: dict[str, Any] = {
        "length": length or data.seq_len,
        "held_out": share,
        "vocab_size": int(teacher.get_input_embeddings().weight.shape[0]),
    }
    parts: list[TokenStore | Stream | Lists] = []
    sources = data.sources or [Source(source=data.source, text_field=data.text_field, chat=data.chat)]
    for number, one in enumerate(sources):
        place = "data" if data.sources is None else f"data.sources.{number}"
        common |= {"text_field": one.text_field, "chat": one.chat}
        with hints_for({"data.text_field": f"{place}.text_field", "data.chat": f"{place}.chat"}):
            if one.source == REPEATS:
                parts.append(Lists.of(tokenizer, common["vocab_size"]))
            elif data.streaming:
                if share == 0:
                    raise LimbeckError("a streamed text has no end", expected="held-out text to evaluate on")
                room = data.cache_gb / len(sources)
                stream = Stream(one.source, tokenizer, held_out_tokens=held_out_tokens, cache_gb=room, **common)
                parts.append(stream)
            else:
                parts.append(prepare(one.source, tokenizer, max_tokens=data.max_tokens, **common))
    return Text(parts, [one.weight for one in sources])


def _content(store: TokenStore) -> str:
    return json.loads((store.folder / MANIFEST).read_text(encoding="utf-8"))["content"]


def _training(part: TokenStore | Stream | Lists, length: int, seed: int) -> Sequences:
    if isinstance(part, Lists):
        return part.training(length, seed)
    return Streamed(part, length, seed) if isinstance(part, Stream) else Packed(part.train, length, seed)
