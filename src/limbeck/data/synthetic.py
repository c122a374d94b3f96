"""Rows made to be looked back in: repeated random lists (source `repeats`), repeated pieces of text (`repeated-text`).

    repeats = RepeatedSequenceDataset(vocab_size=4096, length=64, seed=0)
    batch = repeats.batch(position, size=32)        # as `packing.PackedDataset`; a pure function of the position
    source = RepeatedSequenceSource.from_tokenizer(tokenizer, vocab_size=4096)    # of `open_text_data`

A row is a list of different tokens, between 4 and half the row long, repeated to its end. Only tokens that the row has
shown before are targets, so all that there is to learn is to look back: the gradient of what cannot be predicted drowns
it otherwise. A teacher that is trained here reads them first, and a student that is to recall associations learns it
from them soonest.

    source = RepeatedTextSource(store)                                            # store: `token_store.TokenStore`

A row of `repeated-text` is a stretch of a document whose piece A comes again behind it: X A B A, X and B what stands
before and behind A there. All tokens are targets, but who looks back as far as the first A pays nearly nothing in the
second one, and the distance is anything from A's own length to that of the row. So it asks for recall in the
words of real text, at every distance.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch

from limbeck.core.errors import LimbeckError
from limbeck.core.repeated_text import REPEATED_TEXT, REPEATED_TEXT_PREFIX
from limbeck.data.packing import IGNORE_INDEX, Batch, SequenceDataset, check_position
from limbeck.data.special_tokens import find_special_token_ids
from limbeck.data.token_store import Split, TokenStore
from limbeck.data.tokenization import hash_settings

REPEATS_SOURCE = "repeats"  # the source's name
MIN_LIST_TOKENS = 4
MIN_PIECE_TOKENS = 32  # of the piece of text that comes twice; at most a third of the row
HELD_OUT_SEED = 2**31  # of the rows that are evaluated on


@dataclass(frozen=True)
class RepeatedSequenceSource:
    """The source `repeats`: lists of a tokenizer's tokens without its special ones. It has no end."""

    held_out: ClassVar[None] = None  # no text to evaluate on
    vocab_size: int
    special: tuple[int, ...]
    prefix_ids: tuple[int, ...] = ()  # what the tokenizer begins a text with

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, vocab_size: int) -> Self:
        """Take the tokens that the tokenizer has and the model has an embedding for."""
        n_tokens = min(vocab_size, len(tokenizer))
        special = sorted({0, *(i for i in tokenizer.all_special_ids if i < n_tokens)})
        return cls(n_tokens, tuple(special), find_special_token_ids(tokenizer).prefix_ids)

    @property
    def key(self) -> str:
        """Key of these lists, for the run's manifest."""
        return hash_settings({REPEATS_SOURCE: self.vocab_size, "special": self.special, "begin": self.prefix_ids})

    def train_sequences(self, length: int, seed: int) -> "RepeatedSequenceDataset":
        """Open rows of `length` tokens."""
        return RepeatedSequenceDataset(self.vocab_size, length, seed, self.special, self.prefix_ids)

    def held_out_sequences(self, length: int) -> "RepeatedSequenceDataset":
        """Open other rows than any that are trained on."""
        return RepeatedSequenceDataset(self.vocab_size, length, HELD_OUT_SEED, self.special, self.prefix_ids)


class RepeatedSequenceDataset:
    """Sequences of repeated lists; never the same twice.

    Args:
        vocab_size: tokens are drawn from 0 to `vocab_size` - 1.
        length: T, tokens in a sequence.
        seed: of what is drawn.
        special: tokens that are not drawn; 0 ends documents.
        prefix_ids: tokens that every row begins with.

    Raises:
        LimbeckError: sequences too short for two lists, or longer than there are different tokens for.
    """

    n_sequences = 2**62  # none repeats

    def __init__(
        self,
        vocab_size: int,
        length: int,
        seed: int = 0,
        special: tuple[int, ...] = (0,),
        prefix_ids: tuple[int, ...] = (),
    ):
        self.drawn = np.setdiff1d(np.arange(vocab_size), special)
        shortest, longest = 2 * MIN_LIST_TOKENS + len(prefix_ids), 2 * len(self.drawn) + 1 + len(prefix_ids)
        if not shortest <= length <= longest:
            raise LimbeckError(f"repeats of {length} tokens", expected=f"{shortest} to {longest}")
        self.length, self.seed, self.prefix_ids = length, seed, prefix_ids

    def batch(self, position: int, size: int) -> Batch:
        """Return sequences `position` to `position + size`: tensors of shape [size, length]."""
        check_position(position, size)
        rows = np.stack([self._row(position + row) for row in range(size)])
        tokens, repeated = torch.from_numpy(rows[:, 0]), torch.from_numpy(rows[:, 1])
        targets = tokens[:, 1:].masked_fill(repeated[:, 1:] == 0, IGNORE_INDEX)
        position_ids = torch.arange(self.length).expand(size, -1)
        return Batch(tokens[:, :-1].contiguous(), position_ids.contiguous(), targets)

    def position_after(self, read: SequenceDataset, position: int) -> int:
        """Return a position that `read` has not come to; rows of another length are other rows in any case."""
        return position

    def _row(self, number: int) -> np.ndarray:
        """Return [2, T + 1]: the tokens, and whether each can be predicted."""
        rng = np.random.default_rng((self.seed, self.length, number))
        body = self.length - len(self.prefix_ids)
        count = int(rng.integers(MIN_LIST_TOKENS, body // 2 + 1))
        tokens = self.drawn[rng.choice(len(self.drawn), count, replace=False)]
        places = np.arange(body + 1)
        # Not `>=`: nothing tells that the list is over before its first token comes again.
        row = np.stack([tokens[places % count], places > count])
        prefix = np.array([self.prefix_ids, [0] * len(self.prefix_ids)], row.dtype)
        return np.concatenate([prefix, row], 1)


@dataclass(frozen=True)
class RepeatedTextSource:
    """The source `repeated-text:SOURCE`: pieces of a tokenized text that come twice in a row. It has no end."""

    held_out: ClassVar[None] = None  # what a mixture is evaluated on is its other sources
    store: TokenStore

    @property
    def source(self) -> str:
        """Its name in the recipe."""
        return f"{REPEATED_TEXT_PREFIX}{self.store.source}"

    @property
    def files(self) -> dict[str, int]:
        """Files of the text and their sizes."""
        return self.store.files

    @property
    def key(self) -> str:
        """Key of these rows, for the run's manifest."""
        return hash_settings({REPEATED_TEXT: self.store.key})

    def train_sequences(self, length: int, seed: int) -> "RepeatedTextDataset":
        """Open rows of `length` tokens from the training documents."""
        return RepeatedTextDataset(self.store.train, length, seed)

    def held_out_sequences(self, length: int) -> "RepeatedTextDataset":
        """Open rows from the documents that are held out."""
        return RepeatedTextDataset(self.store.held_out, length, HELD_OUT_SEED)


class RepeatedTextDataset:
    """Rows X A B A of a split; never the same twice.

    A row begins in a document drawn in proportion to its length and lies in it, where the document is long enough;
    otherwise it begins with it and goes on with the next ones.

    Args:
        split: whose documents are read.
        length: T, tokens in a sequence.
        seed: of what is drawn.

    Raises:
        LimbeckError: sequences too short for such a row, or longer than the split.
    """

    n_sequences = 2**62  # none repeats

    def __init__(self, split: Split, length: int, seed: int = 0):
        shortest = 3 * MIN_PIECE_TOKENS + len(split.prefix_ids)
        if not shortest <= length < split.n_tokens:
            raise LimbeckError(
                f"{REPEATED_TEXT} in sequences of {length} tokens, from {split.n_tokens:,} {split.name} tokens",
                expected=f"at least {shortest}, and fewer than the text has",
                hint=f"--set data.seq_len={shortest if length < shortest else split.n_tokens - 1}"
                if shortest < split.n_tokens
                else "a longer text",
            )
        self.split, self.length, self.seed = split, length, seed

    def batch(self, position: int, size: int) -> Batch:
        """Return sequences `position` to `position + size`: tensors of shape [size, length]."""
        check_position(position, size)
        rows = np.stack([self._row(position + row) for row in range(size)])
        tokens, is_target = torch.from_numpy(rows[:, 0]), torch.from_numpy(rows[:, 1])
        targets = tokens[:, 1:].masked_fill(is_target[:, 1:] == 0, IGNORE_INDEX)
        return Batch(tokens[:, :-1].contiguous(), torch.arange(self.length).repeat(size, 1), targets)

    def position_after(self, read: SequenceDataset, position: int) -> int:
        """Return a position that `read` has not come to; rows of another length are other rows in any case."""
        return position

    def _row(self, number: int) -> np.ndarray:
        """Return [2, T + 1]: the tokens, and whether each can be predicted."""
        offsets, prefix = self.split.offsets, np.array(self.split.prefix_ids, np.int64)
        rng = np.random.default_rng((self.seed, self.length, number))
        repeated = int(rng.integers(MIN_PIECE_TOKENS, self.length // 3 + 1))  # tokens of A
        stretch = self.length + 1 - len(prefix) - repeated  # tokens of X A B
        drawn = np.searchsorted(offsets, rng.integers(self.split.n_tokens), side="right") - 1
        first = offsets[drawn] + len(prefix)  # the row has a prefix of its own
        begin = min(rng.integers(first, max(offsets[drawn + 1] - stretch, first) + 1), self.split.n_tokens - stretch)
        piece = begin + int(rng.integers(stretch - repeated + 1))  # where A is
        place = np.concatenate([np.arange(begin, begin + stretch), np.arange(piece, piece + repeated)])
        document = np.searchsorted(offsets, place, side="right") - 1
        is_target = np.zeros(len(place), np.int64)
        is_target[1:] = (document[1:] == document[:-1]) & (place[1:] - offsets[document[1:]] >= len(prefix))
        is_target[stretch] = 0  # nothing tells that A comes again before it does
        if self.split.mask is not None:
            is_target &= self.split.mask[place] != 0
        row = np.stack([self.split.tokens[place].astype(np.int64), is_target])
        return np.concatenate([np.stack([prefix, np.zeros_like(prefix)]), row], 1)
