"""Lists of random tokens over and over: what a model learns to look back on before it reads anything.

    repeats = Repeats(vocabulary=4096, length=64, seed=0)
    batch = repeats.batch(position, size=32)        # as `packing.Packed`; a pure function of the position

A row is a list of different tokens, as long as chance says between 4 and half the row, again and again to its end.
Targets are those tokens alone that the row has shown already, so all that there is to learn is to look back: the
gradient of what cannot be foretold drowns it otherwise.
"""

import numpy as np
import torch

from limbeck.data.packing import IGNORE, Batch, Sequences, check_position
from limbeck.errors import LimbeckError

SHORTEST = 4  # tokens in a list


class Repeats:
    """Sequences of repeated lists; never the same twice.

    Args:
        vocabulary: tokens are drawn from 1 to `vocabulary` - 1; 0 ends documents.
        length: T, tokens in a sequence.
        seed: of what is drawn.

    Raises:
        LimbeckError: sequences too short for two lists, or longer than there are different tokens for.
    """

    n_sequences = 2**62  # none comes again

    def __init__(self, vocabulary: int, length: int, seed: int = 0):
        if not 2 * SHORTEST <= length < 2 * vocabulary:
            raise LimbeckError(f"repeats of {length} tokens", expected=f"{2 * SHORTEST} to {2 * vocabulary - 1}")
        self.vocabulary, self.length, self.seed = vocabulary, length, seed

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
        count = int(rng.integers(SHORTEST, self.length // 2 + 1))
        listed = 1 + rng.choice(self.vocabulary - 1, count, replace=False)
        places = np.arange(self.length + 1)
        return np.stack([listed[places % count], places > count])  # the first repeated token tells the way
