"""Mixtures: several sources by their weights; which one a position takes is a pure function of the position.

    mixture = MixtureDataset([PackedDataset(a, 512), PackedDataset(b, 512)], weights=[0.7, 0.3], seed=1)
    batch = mixture.batch(position, size=8)

The sources take turns in a fixed pattern of 10,000 sequences in which every stretch has its share: after n sequences
a source of share w has come w * n times, less than one off (Tijdeman's rule), so shares hold from the first steps on
and no draw is needed. The seed says where in the pattern a run begins. Each source counts its own sequences and goes
through its own epochs. Shares are of sequences, which all have the same number of tokens.
"""

from collections.abc import Sequence

import numpy as np
import torch

from limbeck.core.errors import LimbeckError
from limbeck.data.packing import Batch, SequenceDataset, check_position, splitmix64

PERIOD = 10_000


class MixtureDataset:
    """Sequences of several sources.

    Args:
        datasets: one `SequenceDataset` each, all of one length.
        weights: positive; only their ratio counts. A share below 1/10,000 is taken as that.
        seed: of the place where the pattern begins.
        shuffle: False begins at the pattern's own start (for evaluation).
    """

    def __init__(
        self, datasets: Sequence[SequenceDataset], weights: Sequence[float], seed: int = 0, *, shuffle: bool = True
    ):
        if not datasets or len(datasets) != len(weights) or min(weights) <= 0:
            raise LimbeckError(
                f"weights {list(weights)} for {len(datasets)} sources", expected="a positive one for each"
            )
        self.datasets, self.length = list(datasets), datasets[0].length
        self.shares = _shares(weights)
        begin = int(splitmix64(np.array([0]), seed, 0)[0] % PERIOD) if shuffle else 0
        self._order = np.roll(_pattern(self.shares), -begin)  # [PERIOD], the source of each place
        is_source = self._order[None, :] == np.arange(len(self.datasets))[:, None]
        # [sources, PERIOD + 1]: how many sequences of a source come before each place
        self._before = np.concatenate([np.zeros((len(self.datasets), 1), np.int64), np.cumsum(is_source, 1)], 1)

    @property
    def n_sequences(self) -> int:
        """How many there are before a sequence of any source repeats."""
        return min(self._first_with(i, part.n_sequences + 1) for i, part in enumerate(self.datasets)) - 1

    def count_per_dataset(self, position: int) -> list[int]:
        """Count the sequences of each source before `position`."""
        rounds, place = divmod(position, PERIOD)
        return [rounds * share + int(n) for share, n in zip(self.shares, self._before[:, place])]

    def batch(self, position: int, size: int) -> Batch:
        """Return sequences `position` to `position + size` since the start of training."""
        check_position(position, size)
        sources = self._order[np.arange(position, position + size) % PERIOD]
        before = self.count_per_dataset(position)
        rows: dict[int, tuple[Batch, int]] = {}
        for i in np.unique(sources).tolist():
            of_source = self.datasets[i].batch(before[i], int((sources == i).sum()))
            rows |= {int(row): (of_source, n) for n, row in enumerate(np.flatnonzero(sources == i))}
        chosen = [rows[row] for row in range(size)]
        names = ("input_ids", "position_ids", "targets")
        return Batch(*(torch.stack([getattr(batch, name)[n] for batch, n in chosen]) for name in names))

    def position_after(self, read: SequenceDataset, position: int) -> int:
        """Return the position of what follows the `position` sequences of `read`, which have another length."""
        assert isinstance(read, MixtureDataset)
        pairs = zip(self.datasets, read.datasets, read.count_per_dataset(position))
        counts = [dataset.position_after(read_dataset, count) for dataset, read_dataset, count in pairs]
        return max(self._first_with(i, count) for i, count in enumerate(counts))

    def _first_with(self, source: int, count: int) -> int:
        """Return the smallest position before which `count` sequences of a source come."""
        rounds, rest = divmod(count, self.shares[source])
        if rest == 0:  # the last of a round, not the first place of the next
            rounds, rest = rounds - 1, self.shares[source]
        if count <= 0:
            return 0
        return rounds * PERIOD + int(np.searchsorted(self._before[source], rest, side="left"))


def _shares(weights: Sequence[float]) -> list[int]:
    """Round the weights to integers of at least 1 that add up to PERIOD (largest remainders)."""
    total = sum(weights)
    exact = [weight / total * PERIOD for weight in weights]
    shares = [max(1, int(share)) for share in exact]
    while sum(shares) != PERIOD:
        step = 1 if sum(shares) < PERIOD else -1
        eligible = [i for i, share in enumerate(shares) if share + step >= 1]
        shares[max(eligible, key=lambda i: step * (exact[i] - shares[i]))] += step
    return shares


def _pattern(shares: list[int]) -> np.ndarray:
    """Order the sources, each less than one off its share after any number of turns (Tijdeman 1980)."""
    n = len(shares)
    if n == 1:
        return np.zeros(PERIOD, np.int64)
    slack = 2 * n - 2
    counts = [0] * n
    order = np.empty(PERIOD, np.int64)
    for turn in range(1, PERIOD + 1):
        # What a source is owed after this turn, in units of 1 / PERIOD; of those owed enough the most urgent comes.
        owed = [share * turn - PERIOD * count for share, count in zip(shares, counts)]
        eligible = [i for i in range(n) if slack * owed[i] >= PERIOD]
        chosen = min(eligible, key=lambda i: ((slack - 1) * PERIOD - slack * owed[i]) / shares[i])
        counts[chosen] += 1
        order[turn - 1] = chosen
    return order
