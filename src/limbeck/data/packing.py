"""Packing: batches of documents without padding, as a pure function of one integer position.

    packed = PackedDataset(store.train, length=512, seed=1)
    batch = packed.batch(position, size=8).to("cuda")       # then: position += 8
    batch.metadata.documents.segments                       # which document each token belongs to

The documents of a split are laid one after another in an order drawn from (seed, epoch), and cut into sequences of
exactly `length` tokens: no padding, and no token is lost but a tail shorter than one sequence. A position counts
sequences since the start of training and runs on into the next epoch, which has another order. To resume, store the
integer; for several processes, give each its own share of the positions. Nothing crosses a document's end: position ids
start again at 0, and the last token of a document (EOS) has no target; of a conversation only the answers are targets.
Where the tokenizer begins a text with BOS, a sequence that begins inside a document begins with BOS as well: in use
there is always one, and many models know nothing without. BOS is no target, and neither is what follows a second BOS.

A batch on an accelerator carries CPU-side metadata: asking a GPU for a number ("how many targets?", "does a document
end here?") waits until all that was queued is done, and leaves it idle meanwhile.

Legend: B batch, T time.
"""

from collections import OrderedDict
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.data.token_store import Split

MIN_BOUNDARIES = 16  # documents for which there is room in `cu_seqlens`; kernels are compiled for a number of them
MAX_EMPTY_RUN = 1024  # sequences in a row without a target, after which it is checked whether any has one
MAX_SAMPLED_TOKENS = 2**24  # tokens of a split that are read to count the sequences with targets
IGNORE_INDEX = -100  # the target of a token after which nothing is to be predicted


@dataclass(frozen=True)
class DocumentBoundaries:
    """Where the documents of a packed batch of B rows of T tokens lie; all None where each row is one document.

    Args:
        segments: int64 [B, T], number of a token's document in its row.
        cu_seqlens: int32 [n + 1], the documents' ends in the B·T tokens one row after the other, from 0 to B·T, padded
            with B·T so that its length is one of few.
        cu_seqlens_cpu: the same on the CPU, without the padding.
    """

    segments: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None

    @classmethod
    def from_position_ids(cls, positions: Tensor) -> "DocumentBoundaries":
        """Find the documents in position ids [B, T] on the CPU: one begins where they do not increase by one."""
        begins = positions[:, 1:] != positions[:, :-1] + 1
        if not begins.any():
            return cls()
        first = torch.ones_like(begins[:, :1])  # a row begins a document
        starts = torch.cat([first, begins], 1)
        host = torch.cat([starts.flatten().nonzero()[:, 0], torch.tensor([starts.numel()])]).int()
        room = max(MIN_BOUNDARIES, 1 << (len(host) - 2).bit_length())
        cu_seqlens = torch.cat([host, host[-1:].expand(room + 1 - len(host))])
        return cls(starts.long().cumsum(1) - 1, cu_seqlens, host)

    def to(self, device: torch.device) -> "DocumentBoundaries":
        """Move to another device; `cu_seqlens_cpu` stays on the CPU."""
        if self.segments is None or self.cu_seqlens is None:
            return self
        segments: Any = self.segments.to(device, non_blocking=True)
        cu_seqlens = self.cu_seqlens.to(device, non_blocking=True)
        segments.limbeck_cu_seqlens = self.cu_seqlens_cpu  # kernels of mixers look there
        return DocumentBoundaries(segments, cu_seqlens, self.cu_seqlens_cpu)


@dataclass(frozen=True)
class BatchMetadata:
    """CPU-side metadata of a batch that avoids device synchronization.

    Args:
        cpu_input_ids: int64 [B, T], the tokens, on the CPU.
        target_indices: int64 [n], numbers in B·T of the tokens that have a target.
        documents: where its documents lie.
    """

    cpu_input_ids: Tensor
    target_indices: Tensor
    documents: DocumentBoundaries

    @classmethod
    def from_tensors(cls, ids: Tensor, positions: Tensor, has_target: Tensor) -> "BatchMetadata":
        """Collect the metadata from tensors [B, T] on the CPU."""
        return cls(ids, has_target.flatten().nonzero().squeeze(1), DocumentBoundaries.from_position_ids(positions))

    def to(self, device: torch.device) -> "BatchMetadata":
        """Return the metadata for the batch on another device."""
        return replace(
            self, target_indices=self.target_indices.to(device, non_blocking=True), documents=self.documents.to(device)
        )

    def pin_memory(self) -> "BatchMetadata":
        """Return a copy in pinned memory, from which a GPU copies asynchronously."""
        return replace(
            self,
            target_indices=self.target_indices.pin_memory(),
            documents=pin_tensors(self.documents, "cu_seqlens_cpu"),
        )


def pin_tensors(value: Any, *except_fields: str) -> Any:
    """Copy a dataclass with its tensors, but for the named fields, in pinned memory."""
    tensors = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in except_fields}
    return replace(value, **{name: t.pin_memory() for name, t in tensors.items() if isinstance(t, Tensor)})


@dataclass(frozen=True)
class Batch:
    """B packed sequences of T tokens.

    Args:
        input_ids: int64 [B, T].
        position_ids: int64 [B, T], 0 at each document's start and at the start of a row.
        targets: int64 [B, T], the next token; -100 where that belongs to another document or is not a target.
    """

    input_ids: Tensor
    position_ids: Tensor
    targets: Tensor
    metadata: BatchMetadata | None = field(default=None, kw_only=True)  # of a batch on an accelerator

    @property
    def n_targets(self) -> int:
        """How many tokens have a target."""
        if self.metadata is not None:
            return self.metadata.target_indices.numel()
        return int((self.targets != IGNORE_INDEX).sum())

    @property
    def cpu_input_ids(self) -> Tensor:
        """The tokens on the CPU, which can be read without waiting for a device."""
        return self.input_ids if self.metadata is None else self.metadata.cpu_input_ids

    def to(self, device: torch.device | str) -> Self:
        """Move the batch to another device."""
        device = torch.device(device)
        moved = {name: t.to(device, non_blocking=True) for name, t in vars(self).items() if isinstance(t, Tensor)}
        metadata = None if device.type == "cpu" else self.get_metadata()
        return replace(self, **moved, metadata=metadata and metadata.to(device))

    def pin_memory(self) -> Self:
        """Return a copy in pinned memory with its metadata: it goes to a GPU asynchronously."""
        return replace(pin_tensors(self), metadata=self.get_metadata().pin_memory())

    def select_rows(self, chosen: Tensor | slice) -> Self:
        """Select sequences of a batch on the CPU by a mask [B], or a slice of B."""
        return replace(
            self, **{name: t[chosen] for name, t in vars(self).items() if isinstance(t, Tensor)}, metadata=None
        )

    def get_metadata(self) -> BatchMetadata:
        """Return the metadata of the batch, collecting it first where it has none."""
        return self.metadata or BatchMetadata.from_tensors(
            self.input_ids.cpu(), self.position_ids.cpu(), self.targets.cpu() != IGNORE_INDEX
        )


class SequenceDataset(Protocol):
    """Batches by position: `PackedDataset`, `MixtureDataset`, `StreamingDataset`, `RepeatedSequenceDataset`."""

    @property
    def length(self) -> int:
        """T, tokens in a sequence."""

    @property
    def n_sequences(self) -> int:
        """How many there are before one repeats."""

    def batch(self, position: int, size: int) -> Batch:
        """Return sequences `position` to `position + size` since the start of training."""

    def position_after(self, read: "SequenceDataset", position: int) -> int:
        """Return the position here of what follows the `position` sequences of `read`, which have another length."""


class Layout(NamedTuple):
    """Which tokens an epoch reads when."""

    order: np.ndarray  # [n] of the documents
    starts: np.ndarray  # [n + 1] where each begins, and the end
    places: np.ndarray | None  # [rows] which row of that text comes when; None: in its order


class PackedDataset:
    """Sequences of a split, by position.

    Args:
        split: of a `TokenStore`.
        length: T, tokens in a sequence.
        seed: of the order of the documents.
        shuffle: False keeps the stored order in every epoch (for evaluation).
        shuffle_rows: draw the order of the sequences too, so that a long document does not fill many in a row.

    Raises:
        LimbeckError: the split has not even one sequence.
    """

    def __init__(self, split: Split, length: int, seed: int = 0, *, shuffle: bool = True, shuffle_rows: bool = False):
        self.split, self.length, self.seed = split, length, seed
        self.shuffle, self.shuffle_rows = shuffle, shuffle_rows
        # Row r reads tokens r*T to r*T + T, both included: the last one is a target here and an input in row r + 1.
        self.n_sequences = max(split.n_tokens - 1, 0) // length
        if self.n_sequences < 1:
            raise LimbeckError(
                f"{split.n_tokens:,} {split.name} tokens", expected=f"more than {length:,}, for one sequence"
            )
        self._lengths = np.diff(split.offsets)
        self._layouts: OrderedDict[int, Layout] = OrderedDict()

    def batch(self, position: int, size: int) -> Batch:
        """Return sequences `position` to `position + size` since the start of training, in whatever epoch.

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

    def position_after(self, read: SequenceDataset, position: int) -> int:
        """Return the position, in sequences of this length, of what follows the `position` sequences of `read`.

        No token is read twice in an epoch; up to a sequence is left out. With `shuffle_rows` that holds for one length:
        sequences of another one are drawn anew, and the position is that of as many tokens.
        """
        assert isinstance(read, PackedDataset)
        epoch, row = divmod(position, read.n_sequences)
        return epoch * self.n_sequences + min(-(-row * read.length // self.length), self.n_sequences)

    def _rows(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order, starts, places = self._layout(epoch)
        if places is not None:
            rows = places[rows]
        begin, columns = rows[:, None] * self.length, np.arange(self.length + 1)
        prefix = np.array(self.split.prefix_ids, np.int64)
        first = starts[np.searchsorted(starts, begin, side="right") - 1]
        # [B, 1]: a row that begins inside a document leaves out its last tokens for the prefix
        shift = np.where(first < begin, len(prefix), 0)
        at = np.maximum(begin + columns - shift, begin)  # [B, T + 1], in the stream of this epoch
        document = np.searchsorted(starts, at, side="right") - 1
        inside = at - starts[document]  # the token's place in its document
        place = self.split.offsets[order[document]] + inside
        tokens = self.split.tokens[place].astype(np.int64)
        begins = np.where(starts[document] < begin, 0, starts[document] - begin + shift)  # the document's column
        # A document's own prefix is no target; of a row with one put there neither is that nor what follows it.
        is_target = (document[:, 1:] == document[:, :-1]) & (columns[1:] > shift) & (inside[:, 1:] >= len(prefix))
        if self.split.mask is not None:
            is_target &= self.split.mask[place[:, 1:]] != 0
        if len(prefix):
            tokens[:, : len(prefix)] = np.where(shift > 0, prefix, tokens[:, : len(prefix)])
        targets = np.where(is_target, tokens[:, 1:], IGNORE_INDEX)
        return tokens[:, :-1], (columns - begins)[:, :-1], targets

    def _layout(self, epoch: int) -> Layout:
        """Lay out an epoch; the same for all lengths but for the order of the sequences."""
        if not self.shuffle:
            epoch = 0
        if epoch not in self._layouts:
            order = np.arange(len(self._lengths))
            if self.shuffle:
                order = np.argsort(splitmix64(order, self.seed, epoch), kind="stable")
            starts = np.concatenate([[0], np.cumsum(self._lengths[order])])
            places = None
            if self.shuffle_rows:
                # another stream of randomness than the documents'
                places = np.argsort(splitmix64(np.arange(self.n_sequences), ~self.seed, epoch), kind="stable")
            self._layouts[epoch] = Layout(order, starts, places)
            while len(self._layouts) > 2:  # a batch spans two epochs at most, if it is not longer than one
                self._layouts.popitem(last=False)
        return self._layouts[epoch]


def take_sequences_with_targets(data: SequenceDataset, position: int, size: int) -> tuple[Batch, int]:
    """Return the next `size` sequences that have a target, passing over those that have none.

    Args:
        position: of the first sequence that is read.
        size: B, at least 1.

    Returns:
        The batch, and the position behind the last sequence that was read; both follow from `position` alone.

    Raises:
        LimbeckError: no sequence of a whole epoch has a target.
    """
    parts: list[Batch] = []
    missing, empty = size, 0
    while missing:
        batch = data.batch(position, missing)
        has = (batch.targets != IGNORE_INDEX).any(1)
        position += missing
        if has.any():
            parts.append(batch if has.all() else batch.select_rows(has))
            missing, empty = missing - int(has.sum()), 0
        else:
            empty += missing
            if empty >= MAX_EMPTY_RUN and empty >= data.n_sequences:
                raise no_targets_error("the text", data.length)
    return concatenate_batches(parts), position


def count_eval_sequences(data: SequenceDataset, requested: int) -> int:
    """Count the sequences to evaluate from the first on: `requested` or all there are, or more until one has a target.

    Raises:
        LimbeckError: none has.
    """
    for at in range(data.n_sequences):
        if data.batch(at, 1).n_targets:
            return max(at + 1, min(requested, data.n_sequences))
    raise no_targets_error("the held-out text", data.length)


def count_sequences_with_targets(split: Split, length: int) -> tuple[int, int]:
    """Count the sequences of a split, in stored order, that have a target; return (with a target, read).

    Read are the first `MAX_SAMPLED_TOKENS` tokens, and more only until one has a target.
    """
    data = PackedDataset(split, length, shuffle=False)
    if split.mask is None and not (np.diff(split.offsets) < 2 + len(split.prefix_ids)).any():
        return data.n_sequences, data.n_sequences  # every document has a token that follows another
    with_target = at = 0
    while at < data.n_sequences and (not with_target or at * length < MAX_SAMPLED_TOKENS):
        size = min(max(1, 2**18 // length), data.n_sequences - at)
        with_target += int((data.batch(at, size).targets != IGNORE_INDEX).any(1).sum())
        at += size
    return with_target, at


def no_targets_error(what: str, length: int) -> LimbeckError:
    """Return the error where there is nothing to train or evaluate on."""
    return LimbeckError(
        f"no token of {what} is a training target in any sequence of {length} tokens",
        expected="answers of the assistant in conversations, documents of two tokens or more in other text",
    )


def concatenate_batches(parts: list[Batch]) -> Batch:
    """Concatenate batches of one kind."""
    if len(parts) == 1:
        return parts[0]
    names = [name for name, t in vars(parts[0]).items() if isinstance(t, Tensor)]
    return replace(
        parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names}, metadata=None
    )


def check_position(position: int, size: int) -> None:
    """Raise LimbeckError where no batch can be there."""
    if position < 0 or size < 1:
        raise LimbeckError(f"position {position}, size {size}", expected="position >= 0 and size >= 1")


def splitmix64(index: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Return a pseudo-random uint64 for each index; numpy's own streams may differ between its versions.

    Source: SplitMix64, Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    mask = 2**64 - 1
    with np.errstate(over="ignore"):
        x = index.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        for salt in (seed, epoch):
            x = x + np.uint64((salt * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & mask)
            x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            x = x ^ (x >> np.uint64(31))
    return x
