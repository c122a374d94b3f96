"""Rows that hold one document each, from its start: `documents: whole` of a recipe's data.

    whole = WholeDocumentDataset(store.train, length=2048, seed=1)
    batch = whole.batch(position, size=4)              # as `packing.PackedDataset`; a pure function of the position

Only documents of at least `length` tokens come, each once in an epoch, in an order drawn from (seed, epoch); of a
longer one the first `length` tokens are read. So the last tokens of every row have all of the row as their past, which
packed pieces of short documents do not have.
"""

import numpy as np
import torch

from limbeck.core.errors import LimbeckError
from limbeck.data.packing import IGNORE_INDEX, Batch, SequenceDataset, check_position, splitmix64
from limbeck.data.token_store import MIN_SEQ_LEN, Split


class WholeDocumentDataset:
    """Beginnings of long documents, by position.

    Args:
        split: of a `TokenStore`.
        length: T, tokens in a sequence.
        seed: of the order of the documents.
        shuffle: False keeps the stored order in every epoch (for evaluation).

    Raises:
        LimbeckError: no document of the split is that long.
    """

    def __init__(self, split: Split, length: int, seed: int = 0, *, shuffle: bool = True):
        self.split, self.length, self.seed, self.shuffle = split, length, seed, shuffle
        sizes = np.diff(split.offsets)
        self._long = np.flatnonzero(sizes >= length)  # documents, in stored order
        self.n_sequences = len(self._long)
        if not self.n_sequences:
            longest = int(sizes.max(initial=0))
            fitting = [f"--set data.seq_len={longest}"] if longest >= MIN_SEQ_LEN else []
            raise LimbeckError(
                f"no {split.name.replace('_', ' ')} document has {length:,} tokens, the longest has {longest:,}",
                expected="with documents: whole, sequences no longer than some document of each side of the split",
                hint="   or   ".join([*fitting, "--set data.documents=packed"]),
            )

    def batch(self, position: int, size: int) -> Batch:
        """Return sequences `position` to `position + size` since the start of training: tensors [size, length]."""
        check_position(position, size)
        epochs, rows = np.divmod(np.arange(position, position + size), self.n_sequences)
        chosen = [self._order(epoch)[row] for epoch, row in zip(epochs.tolist(), rows.tolist())]
        begins, ends = self.split.offsets[chosen][:, None], self.split.offsets[np.array(chosen) + 1][:, None]
        columns = np.arange(self.length + 1)
        # a document of just `length` tokens has no token after its last
        at = np.minimum(begins + columns, ends - 1)  # [size, T + 1]
        tokens = self.split.tokens[at].astype(np.int64)
        is_target = (begins + columns < ends)[:, 1:] & (columns[1:] >= len(self.split.prefix_ids))
        if self.split.mask is not None:
            is_target &= self.split.mask[at[:, 1:]] != 0
        targets = np.where(is_target, tokens[:, 1:], IGNORE_INDEX)
        position_ids = torch.arange(self.length).repeat(size, 1)
        return Batch(torch.from_numpy(tokens[:, :-1].copy()), position_ids, torch.from_numpy(targets))

    def position_after(self, read: SequenceDataset, position: int) -> int:
        """Return the position behind the documents that the `position` sequences of `read`, of another length, hold."""
        assert isinstance(read, WholeDocumentDataset)
        epoch, row = divmod(position, read.n_sequences)
        done = read._order(epoch)[:row]
        # both orders sort by the same number, so what has been read here is what comes first here
        return epoch * self.n_sequences + int(np.isin(self._order(epoch), done).nonzero()[0].max(initial=-1)) + 1

    def _order(self, epoch: int) -> np.ndarray:
        """Return the documents in the order of an epoch [n_sequences]."""
        if not self.shuffle:
            return self._long
        return self._long[np.argsort(splitmix64(self._long, self.seed, epoch), kind="stable")]
