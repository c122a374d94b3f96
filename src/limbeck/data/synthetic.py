"""Repeated random sequences, the induction-head task: the source `repeats` of a recipe.

    repeats = RepeatedSequenceDataset(vocab_size=4096, length=64, seed=0)
    batch = repeats.batch(position, size=32)        # as `packing.PackedDataset`; a pure function of the position
    source = RepeatedSequenceSource.from_tokenizer(tokenizer, vocab_size=4096)    # of `open_text_data`

A row is a list of different tokens, between 4 and half the row long, repeated to its end. Only tokens that the row has
shown before are targets, so all that there is to learn is to look back: the gradient of what cannot be predicted drowns
it otherwise. A teacher that is trained here reads them first, and a student that is to recall associations learns it
from them soonest.
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
MIN_LIST_TOKENS = 4
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
