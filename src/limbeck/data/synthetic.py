"""Lists of random tokens over and over: what a model learns to look back on; the source `repeats` of a recipe.

    repeats = RepeatedSequenceDataset(vocab_size=4096, length=64, seed=0)
    batch = repeats.batch(position, size=32)        # as `packing.PackedDataset`; a pure function of the position
    lists = Lists.from_tokenizer(tokenizer, vocab_size=4096)    # what `open_text` has for {source: repeats}

A row is a list of different tokens, as long as chance says between 4 and half the row, again and again to its end.
Targets are those tokens alone that the row has shown already, so all that there is to learn is to look back: the
gradient of what cannot be foretold drowns it otherwise. A teacher that is trained here reads them first, and a student
that is to keep associations learns it from them soonest.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch

from limbeck.core.errors import LimbeckError
from limbeck.data.packing import IGNORE_INDEX, Batch, SequenceDataset, check_position
from limbeck.data.special_tokens import find_special_token_ids
from limbeck.data.tokenization import hash_settings

REPEATS_SOURCE = "repeats"  # the source's name
MIN_LIST_TOKENS = 4  # tokens in a list
HELD_OUT_SEED = 2**31  # the seed of what is measured on


@dataclass(frozen=True)
class RepeatedSequenceSource:
    """The source `repeats`: lists of a tokenizer's tokens without its special ones. It has no end."""

    held_out: ClassVar[None] = None  # no text to measure on
    vocab_size: int
    special: tuple[int, ...]
    prefix_ids: tuple[int, ...] = ()  # what the tokenizer begins a text with

    @classmethod
    def from_tokenizer(cls, tokenizer: Any, vocab_size: int) -> Self:
        """Of the tokens that the tokenizer has and the model has a row for."""
        most = min(vocab_size, len(tokenizer))
        special = sorted({0, *(one for one in tokenizer.all_special_ids if one < most)})
        return cls(most, tuple(special), find_special_token_ids(tokenizer).prefix_ids)

    @property
    def key(self) -> str:
        """Which lists these are, for the run's manifest."""
        return hash_settings({REPEATS_SOURCE: self.vocab_size, "special": self.special, "begin": self.prefix_ids})

    def train_sequences(self, length: int, seed: int) -> "RepeatedSequenceDataset":
        """Rows of `length` tokens."""
        return RepeatedSequenceDataset(self.vocab_size, length, seed, self.special, self.prefix_ids)

    def held_out_sequences(self, length: int) -> "RepeatedSequenceDataset":
        """Other rows than any that are trained on."""
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

    n_sequences = 2**62  # none comes again

    def __init__(
        self,
        vocab_size: int,
        length: int,
        seed: int = 0,
        special: tuple[int, ...] = (0,),
        prefix_ids: tuple[int, ...] = (),
    ):
        self.drawn = np.setdiff1d(np.arange(vocab_size), special)
        least, most = 2 * MIN_LIST_TOKENS + len(prefix_ids), 2 * len(self.drawn) + 1 + len(prefix_ids)
        if not least <= length <= most:
            raise LimbeckError(f"repeats of {length} tokens", expected=f"{least} to {most}")
        self.length, self.seed, self.prefix_ids = length, seed, prefix_ids

    def batch(self, position: int, size: int) -> Batch:
        """Sequences `position` to `position + size`: tensors of shape [size, length]."""
        check_position(position, size)
        rows = np.stack([self._row(position + row) for row in range(size)])
        tokens, shown = torch.from_numpy(rows[:, 0]), torch.from_numpy(rows[:, 1])
        targets = tokens[:, 1:].masked_fill(shown[:, 1:] == 0, IGNORE_INDEX)
        places = torch.arange(self.length).expand(size, -1)
        return Batch(tokens[:, :-1].contiguous(), places.contiguous(), targets)

    def position_after(self, read: SequenceDataset, position: int) -> int:
        """A place that `read` has not come to; rows of another length are other rows in any case."""
        return position

    def _row(self, number: int) -> np.ndarray:
        """[2, T + 1]: the tokens, and whether each could be foretold."""
        rng = np.random.default_rng((self.seed, self.length, number))
        room = self.length - len(self.prefix_ids)
        count = int(rng.integers(MIN_LIST_TOKENS, room // 2 + 1))
        listed = self.drawn[rng.choice(len(self.drawn), count, replace=False)]
        places = np.arange(room + 1)
        # the first repeated token tells the way
        row = np.stack([listed[places % count], places > count])
        lead = np.array([self.prefix_ids, [0] * len(self.prefix_ids)], row.dtype)
        return np.concatenate([lead, row], 1)
