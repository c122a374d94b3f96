"""Batches as a pure function of one integer position.

    packed = Packed(store.train, length=512, seed=1)
    batch = packed.batch(position, size=8).to("cuda")       # then: position += 8

The documents of a split are laid one after another in an order drawn from (seed, epoch), and cut into sequences of
exactly `length` tokens: no padding, and no token is lost but a tail shorter than one sequence. A position counts
sequences since the start of training and runs on into the next epoch, which has another order. To resume, keep the
integer; for several processes, give each its own share of the positions. Nothing crosses a document's end: position ids
start again at 0, and the last token of a document (EOS) has no target; of a conversation only the answers are targets.
Where the tokenizer begins a text with BOS, a sequence that begins inside a document begins with BOS as well: in use
there is always one, and many models know nothing without. BOS is no target, and neither is what follows a second BOS.
Legend: B batch, T time.
"""

from collections import OrderedDict
from dataclasses import dataclass, field, replace
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

from limbeck.data.known import Known, pinned
from limbeck.data.shards import Split
from limbeck.errors import LimbeckError

EMPTY = 1024  # sequences without a target in a row, after which it is asked whether there are any with one
LOOKED_AT = 2**24  # tokens of a split, to tell how many sequences have targets
IGNORE = -100  # the target of a token after which nothing is to be predicted


@dataclass(frozen=True)
class Batch:
    """B packed sequences of T tokens.

    Args:
        input_ids: int64 [B, T].
        position_ids: int64 [B, T], 0 at each document's start and at the start of a row.
        targets: int64 [B, T], the next token; -100 where that belongs to another document or is not to be learnt.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    known: Known | None = field(default=None, kw_only=True)  # of one on an accelerator: what the host knows of it

    @property
    def valid(self) -> int:
        """How many tokens have a target."""
        return int((self.targets != IGNORE).sum()) if self.known is None else self.known.rows.numel()

    @property
    def ids(self) -> Tensor:
        """The tokens where they can be looked at without waiting for a device."""
        return self.input_ids if self.known is None else self.known.ids

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        device = torch.device(device)
        moved = {name: t.to(device, non_blocking=True) for name, t in vars(self).items() if isinstance(t, Tensor)}
        known = None if device.type == "cpu" else self.facts()
        return replace(self, **moved, known=known and known.to(device))

    def pinned(self) -> Self:
        """The same in pinned memory, with what is known of it: it goes to a GPU without waiting."""
        return replace(pinned(self), known=self.facts().pinned())

    def rows(self, chosen: Tensor | slice) -> Self:
        """Some of the sequences, of a batch on the CPU: a mask [B], or a slice of B."""
        return replace(self, **{name: t[chosen] for name, t in vars(self).items() if isinstance(t, Tensor)}, known=None)

    def facts(self) -> Known:
        """What the host can know of the batch."""
        return self.known or Known.of(self.input_ids.cpu(), self.position_ids.cpu(), self.targets.cpu() != IGNORE)


class Sequences(Protocol):
    """Batches by position, whatever they are made of: `Packed`, `mixture.Mixture`, `streamed.Streamed`."""

    @property
    def length(self) -> int:
        """T, tokens in a sequence."""

    @property
    def n_sequences(self) -> int:
        """How many there are before one comes again."""

    def batch(self, position: int, size: int) -> Batch:
        """Sequences `position` to `position + size` since the start of training."""

    def after(self, read: "Sequences", position: int) -> int:
        """The position here, in sequences of another length, of what follows all that was read there."""


class Packed:
    """Sequences of a split, by position.

    Args:
        split: of a `TokenStore`.
        length: T, tokens in a sequence.
        seed: of the order of the documents.
        shuffle: False keeps the stored order in every epoch (for evaluation).

    Raises:
        LimbeckError: the split has not even one sequence.
    """

    def __init__(self, split: Split, length: int, seed: int = 0, *, shuffle: bool = True):
        self.split, self.length, self.seed, self.shuffle = split, length, seed, shuffle
        # Row r reads tokens r*T to r*T + T, both included: the last one is a target here and an input in row r + 1.
        self.n_sequences = max(split.n_tokens - 1, 0) // length
        if self.n_sequences < 1:
            raise LimbeckError(
                f"{split.n_tokens:,} {split.name} tokens", expected=f"more than {length:,}, for one sequence"
            )
        self._lengths = np.diff(split.offsets)
        self._layouts: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def batch(self, position: int, size: int) -> Batch:
        """Sequences `position` to `position + size` since the start of training, wherever that is in which epoch.

        Args:
            position: at least 0.
            size: B, at least 1.

        Returns:
            Tensors of shape [size, length].
        """
        check_position(position, size)
        epochs, rows = np.divmod(np.arange(position, position + size), self.n_sequences)
        parts = [self._rows(int(epoch), rows[epochs == epoch]) for epoch in np.unique(epochs)]
        return Batch(*(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts)))

    def after(self, read: Sequences, position: int) -> int:
        """The position, in sequences of this length, of what follows the `position` sequences of `read`.

        No token is read twice in an epoch; up to a sequence is left out.
        """
        assert isinstance(read, Packed)
        epoch, row = divmod(position, read.n_sequences)
        return epoch * self.n_sequences + min(-(-row * read.length // self.length), self.n_sequences)

    def _rows(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order, starts = self._layout(epoch)
        begin, columns = rows[:, None] * self.length, np.arange(self.length + 1)
        lead = np.array(self.split.begin, np.int64)
        first = starts[np.searchsorted(starts, begin, side="right") - 1]
        shift = np.where(first < begin, len(lead), 0)  # [B, 1]: such a row leaves out its last tokens for the lead
        where = np.maximum(begin + columns - shift, begin)  # [B, T + 1], in the stream of this epoch
        document = np.searchsorted(starts, where, side="right") - 1
        inside = where - starts[document]  # the token's place in its document
        place = self.split.offsets[order[document]] + inside
        tokens = self.split.tokens[place].astype(np.int64)
        begins = np.where(starts[document] < begin, 0, starts[document] - begin + shift)  # the document's column
        # What a document begins with is no target; of a row with a lead neither is the lead nor what follows it.
        wanted = (document[:, 1:] == document[:, :-1]) & (columns[1:] > shift) & (inside[:, 1:] >= len(lead))
        if self.split.mask is not None:
            wanted &= self.split.mask[place[:, 1:]] != 0
        if len(lead):
            tokens[:, : len(lead)] = np.where(shift > 0, lead, tokens[:, : len(lead)])
        targets = np.where(wanted, tokens[:, 1:], IGNORE)
        return tokens[:, :-1], (columns - begins)[:, :-1], targets

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the documents in an epoch [n], and where each begins in the stream, with the end [n + 1]."""
        if not self.shuffle:
            epoch = 0
        if epoch not in self._layouts:
            order = np.arange(len(self._lengths))
            if self.shuffle:
                order = np.argsort(mix(order, self.seed, epoch), kind="stable")
            starts = np.concatenate([[0], np.cumsum(self._lengths[order])])
            self._layouts[epoch] = order, starts
            while len(self._layouts) > 2:  # a batch spans two epochs at most, if it is not longer than one
                self._layouts.popitem(last=False)
        return self._layouts[epoch]


def with_targets(data: Sequences, position: int, size: int) -> tuple[Batch, int]:
    """The next `size` sequences that have a target: what is learnt from targets reads on over those that have none.

    Args:
        position: where to begin to look.
        size: B, at least 1.

    Returns:
        The batch, and the position behind the last sequence that was looked at; both follow from `position` alone.

    Raises:
        LimbeckError: no sequence of a whole epoch has a target.
    """
    parts: list[Batch] = []
    missing, empty = size, 0
    while missing:
        batch = data.batch(position, missing)
        has = (batch.targets != IGNORE).any(1)
        position += missing
        if has.any():
            parts.append(batch if has.all() else batch.rows(has))
            missing, empty = missing - int(has.sum()), 0
        else:
            empty += missing
            if empty >= EMPTY and empty >= data.n_sequences:
                raise no_targets("the text", data.length)
    return join(parts), position


def count_with_targets(data: Sequences, wanted: int) -> int:
    """How many sequences from the first on to measure: `wanted` or all there are, or more until one has a target.

    Raises:
        LimbeckError: none has.
    """
    for at in range(data.n_sequences):
        if data.batch(at, 1).valid:
            return max(at + 1, min(wanted, data.n_sequences))
    raise no_targets("the held-out text", data.length)


def share_with_targets(split: Split, length: int) -> tuple[int, int]:
    """How many sequences of a split, in stored order, have a target, and of how many.

    Looked at are the first `LOOKED_AT` tokens, and more only until one has a target.
    """
    data = Packed(split, length, shuffle=False)
    if split.mask is None and not (np.diff(split.offsets) < 2 + len(split.begin)).any():
        return data.n_sequences, data.n_sequences  # every document has a token that follows another
    found = at = 0
    while at < data.n_sequences and (not found or at * length < LOOKED_AT):
        size = min(max(1, 2**18 // length), data.n_sequences - at)
        found += int((data.batch(at, size).targets != IGNORE).any(1).sum())
        at += size
    return found, at


def no_targets(what: str, length: int) -> LimbeckError:
    """The error where there is nothing to learn or to measure."""
    return LimbeckError(
        f"no token of {what} is to be learnt, in no sequence of {length} tokens",
        expected="answers of the assistant in conversations, documents of two tokens or more in other text",
    )


def join(parts: list[Batch]) -> Batch:
    """The sequences of several batches of one kind, one after another."""
    if len(parts) == 1:
        return parts[0]
    names = [name for name, t in vars(parts[0]).items() if isinstance(t, Tensor)]
    return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names}, known=None)


def check_position(position: int, size: int) -> None:
    """Raises LimbeckError where no batch can be there."""
    if position < 0 or size < 1:
        raise LimbeckError(f"position {position}, size {size}", expected="position >= 0 and size >= 1")


def mix(index: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """A pseudo-random uint64 for each index (SplitMix64); numpy's own streams may differ between its versions."""
    mask = 2**64 - 1
    with np.errstate(over="ignore"):
        x = index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for salt in (seed, epoch):
            x = x + np.uint64((salt * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & mask)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return x
