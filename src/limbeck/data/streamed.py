"""Sequences of a stream, by position.

    batch = Streamed(Stream("big/", tokenizer, length=2048), length=2048, seed=1).batch(position, size=8)

The order of shards and documents is `limbeck.data.streaming`'s.
"""

import numpy as np

from limbeck.data.packing import Batch, Packed, Sequences, check_position, join, mix
from limbeck.data.streaming import OPEN, Stream
from limbeck.errors import LimbeckError


class Streamed:
    """Sequences of a stream, by position.

    Args:
        stream: its shards.
        length: T, tokens in a sequence.
        seed: of the order of the shards, and of the documents in each.
    """

    def __init__(self, stream: Stream, length: int, seed: int = 0):
        self.stream, self.length, self.seed = stream, length, seed
        self._ends: list[int] = []  # of the shards of epoch 0, in its order, as far as they were needed
        self._orders: dict[int, np.ndarray] = {}
        self._open: dict[int, Packed] = {}

    @property
    def n_sequences(self) -> int:
        """Sequences in an epoch. Tokenises every shard that never was."""
        return self._epoch_end(len(self.stream.shards))

    def batch(self, position: int, size: int) -> Batch:
        """Sequences `position` to `position + size` since the start of training, wherever they are."""
        check_position(position, size)
        parts: list[Batch] = []
        while size:
            epoch, place, row = self._locate(position)
            shard = int(self._order(epoch)[place])
            packed = self._packed(shard)
            take = min(size, packed.n_sequences - row)
            parts.append(packed.batch(epoch * packed.n_sequences + row, take))
            position, size = position + take, size - take
        following = self._order(epoch + (place + 1) // len(self.stream.shards))
        self.stream.ahead(int(following[(place + 1) % len(following)]))
        return join(parts)

    def after(self, read: Sequences, position: int) -> int:
        """The position, in sequences of this length, of what follows the `position` sequences of `read`."""
        assert isinstance(read, Streamed)
        if position == 0:
            return 0
        epoch, place, row = read._locate(position - 1)
        here = min(-(-(row + 1) * read.length // self.length), self._in_shard(int(self._order(epoch)[place])))
        before = sum(self._in_shard(int(i)) for i in self._order(epoch)[:place])
        return (epoch * self.n_sequences if epoch else 0) + before + here

    def _in_shard(self, shard: int) -> int:
        return max(self.stream.n_tokens(shard) - 1, 0) // self.length

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            shards = np.arange(len(self.stream.shards))
            self._orders[epoch] = np.argsort(mix(shards, self.seed, epoch), kind="stable")
        return self._orders[epoch]

    def _epoch_end(self, places: int) -> int:
        """Sequences in the first `places` shards of epoch 0."""
        while len(self._ends) < places:
            shard = int(self._order(0)[len(self._ends)])
            self._ends.append((self._ends[-1] if self._ends else 0) + self._in_shard(shard))
        return self._ends[places - 1]

    def _locate(self, position: int) -> tuple[int, int, int]:
        """Epoch, place of the shard in the epoch's order, and row in the shard."""
        for place in range(len(self.stream.shards)):
            if self._epoch_end(place + 1) > position:
                return 0, place, position - (self._ends[place - 1] if place else 0)
        if self.n_sequences == 0:
            raise LimbeckError(
                f"no shard of '{self.stream.source}' has {self.length + 1:,} tokens",
                expected="shards of many sequences",
            )
        epoch, rest = divmod(position, self.n_sequences)
        ends = np.cumsum([self._in_shard(int(shard)) for shard in self._order(epoch)])
        place = int(np.searchsorted(ends, rest, side="right"))
        return epoch, place, rest - (int(ends[place - 1]) if place else 0)

    def _packed(self, shard: int) -> Packed:
        if shard not in self._open:
            self._open = dict(list(self._open.items())[1 - OPEN :])
            self._open[shard] = Packed(self.stream.train(shard), self.length, self.seed)
        return self._open[shard]
