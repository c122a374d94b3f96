"""Lists of random tokens over and over: what a model learns to look back on; the source `repeats` of a recipe.

    repeats = Repeats(vocabulary=4096, length=64, seed=0)
    batch = repeats.batch(position, size=32)        # as `packing.Packed`; a pure function of the position
    lists = Lists.of(tokenizer, vocabulary=4096)    # what `open_text` has for {source: repeats}

A row is a list of different tokens, as long as chance says between 4 and half the row, again and again to its end.
Targets are those tokens alone that the row has shown already, so all that there is to learn is to look back: the
gradient of what cannot be foretold drowns it otherwise. A teacher that is trained here reads them first, and a student
that is to keep associations learns it from them soonest.
"""

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
import torch

from limbeck.data.encode import key_of
from limbeck.data.packing import IGNORE, Batch, Sequences, check_position
from limbeck.data.special_tokens import around
from limbeck.errors import LimbeckError

REPEATS = "repeats"  # the source's name
SHORTEST = 4  # tokens in a list
HELD_OUT = 2**31  # the seed of what is measured on


@dataclass(frozen=True)
class Lists:
    """The source `repeats`: lists of a tokenizer's tokens without its special ones. It has no end."""

    held_out: ClassVar[None] = None  # no text to measure on
    vocabulary: int
    special: tuple[int, ...]
    begin: tuple[int, ...] = ()  # what the tokenizer begins a text with

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int) -> Self:
        """Of the tokens that the tokenizer has and the model has a row for."""
        most = min(vocabulary, len(tokenizer))
        special = sorted({0, *(one for one in tokenizer.all_special_ids if one < most)})
        return cls(most, tuple(special), around(tokenizer).begin)

    @property
    def key(self) -> str:
        """Which lists these are, for the run's manifest."""
        return key_of({REPEATS: self.vocabulary, "special": self.special, "begin": self.begin})

    def training(self, length: int, seed: int) -> "Repeats":
        """Rows of `length` tokens."""
        return Repeats(self.vocabulary, length, seed, self.special, self.begin)

    def measured(self, length: int) -> "Repeats":
        """Other rows than any that are trained on."""
        return Repeats(self.vocabulary, length, HELD_OUT, self.special, self.begin)


class Repeats:
    """Sequences of repeated lists; never the same twice.

    Args:
        vocabulary: tokens are drawn from 0 to `vocabulary` - 1.
        length: T, tokens in a sequence.
        seed: of what is drawn.
        special: tokens that are not drawn; 0 ends documents.
        begin: tokens that every row begins with.

    Raises:
        LimbeckError: sequences too short for two lists, or longer than there are different tokens for.
    """

    n_sequences = 2**62  # none comes again

    def __init__(
        self,
        vocabulary: int,
        length: int,
        seed: int = 0,
        special: tuple[int, ...] = (0,),
        begin: tuple[int, ...] = (),
    ):
        self.drawn = np.setdiff1d(np.arange(vocabulary), special)
        least, most = 2 * SHORTEST + len(begin), 2 * len(self.drawn) + 1 + len(begin)
        if not least <= length <= most:
            raise LimbeckError(f"repeats of {length} tokens", expected=f"{least} to {most}")
        self.length, self.seed, self.begin = length, seed, begin

    def batch(self, position: int, size: int) -> Batch:
        """Sequences `position` to `position + size`: tensors of shape [size, length]."""
        check_position(position, size)
        rows = np.stack([self._row(position + row) for row in range(size)])
        tokens, shown = torch.from_numpy(rows[:, 0]), torch.from_numpy(rows[:, 1])
        targets = tokens[:, 1:].masked_fill(shown[:, 1:] == 0, IGNORE)
        places = torch.arange(self.length).expand(size, -1)
        return Batch(tokens[:, :-1].contiguous(), places.contiguous(), targets)

    def after(self, read: Sequences, position: int) -> int:
        """A place that `read` has not come to; rows of another length are other rows in any case."""
        return position

    def _row(self, number: int) -> np.ndarray:
        """[2, T + 1]: the tokens, and whether each could be foretold."""
        rng = np.random.default_rng((self.seed, self.length, number))
        room = self.length - len(self.begin)
        count = int(rng.integers(SHORTEST, room // 2 + 1))
        listed = self.drawn[rng.choice(len(self.drawn), count, replace=False)]
        places = np.arange(room + 1)
        # the first repeated token tells the way
        row = np.stack([listed[places % count], places > count])
        lead = np.array([self.begin, [0] * len(self.begin)], row.dtype)
        return np.concatenate([lead, row], 1)
