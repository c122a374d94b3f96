"""What the host knows of a batch before it goes to an accelerator, so that nothing has to be asked of it there.

    batch = packed.batch(0, 8).to("cuda")
    batch.metadata.target_indices                      # which tokens have a target
    batch.metadata.documents.segments        # which document each token belongs to

Asking a GPU for a number ("how many targets?", "does a document end here?") waits until all that was queued is done,
and leaves it idle meanwhile. All of this follows from what is on the host anyway.

Batches as a pure function of one integer position.

    packed = PackedDataset(store.train, length=512, seed=1)
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
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import LimbeckError
from limbeck.data.token_store import Split

MIN_BOUNDARIES = 16  # documents for which there is room in `cu_seqlens`; kernels are compiled for a number of them


@dataclass(frozen=True)
class DocumentBoundaries:
    """Where the documents of a packed batch of B rows of T tokens lie; all None where each row is one document.

    Args:
        segments: int64 [B, T], number of a token's document in its row.
        cu_seqlens: int32 [n + 1], the documents' ends in the B·T tokens one row after the other, from 0 to B·T; repeats of
            B·T fill it up, so that its length is one of few.
        cu_seqlens_cpu: the same on the CPU, without the repeats.
    """

    segments: Tensor | None = None
    cu_seqlens: Tensor | None = None
    cu_seqlens_cpu: Tensor | None = None

    @classmethod
    def from_position_ids(cls, positions: Tensor) -> "DocumentBoundaries":
        """From position ids [B, T] on the CPU: a document begins where they do not go on by one."""
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
        """The same for tensors on another device; what is for the host stays there."""
        if self.segments is None or self.cu_seqlens is None:
            return self
        segments: Any = self.segments.to(device, non_blocking=True)
        cu_seqlens = self.cu_seqlens.to(device, non_blocking=True)
        segments.limbeck_cu_seqlens = self.cu_seqlens_cpu  # kernels of mixers look there
        return DocumentBoundaries(segments, cu_seqlens, self.cu_seqlens_cpu)


@dataclass(frozen=True)
class BatchMetadata:
    """Facts of a batch.

    Args:
        cpu_input_ids: int64 [B, T], the tokens, on the CPU.
        target_indices: int64 [n], numbers in B·T of the tokens that have a target.
        documents: see there.
    """

    cpu_input_ids: Tensor
    target_indices: Tensor
    documents: DocumentBoundaries

    @classmethod
    def from_tensors(cls, ids: Tensor, positions: Tensor, has_target: Tensor) -> "BatchMetadata":
        """From tensors [B, T] on the CPU."""
        return cls(ids, has_target.flatten().nonzero().squeeze(1), DocumentBoundaries.from_position_ids(positions))

    def to(self, device: torch.device) -> "BatchMetadata":
        """The same for a batch on that device."""
        return replace(
            self, target_indices=self.target_indices.to(device, non_blocking=True), documents=self.documents.to(device)
        )

    def pin_memory(self) -> "BatchMetadata":
        """The same in memory that a GPU can copy from without waiting."""
        return replace(
            self,
            target_indices=self.target_indices.pin_memory(),
            documents=pin_tensors(self.documents, "cu_seqlens_cpu"),
        )


def pin_tensors(facts: Any, *but: str) -> Any:
    """A dataclass of tensors, in pinned memory but for the named ones."""
    tensors = {f.name: getattr(facts, f.name) for f in fields(facts) if f.name not in but}
    return replace(facts, **{name: t.pin_memory() for name, t in tensors.items() if isinstance(t, Tensor)})


EMPTY = 1024  # sequences without a target in a row, after which it is asked whether there are any with one
LOOKED_AT = 2**24  # tokens of a split, to tell how many sequences have targets
IGNORE_INDEX = -100  # the target of a token after which nothing is to be predicted


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
    metadata: BatchMetadata | None = field(
        default=None, kw_only=True
    )  # of one on an accelerator: what the host knows of it

    @property
    def n_targets(self) -> int:
        """How many tokens have a target."""
        return (
            int((self.targets != IGNORE_INDEX).sum()) if self.metadata is None else self.metadata.target_indices.numel()
        )

    @property
    def cpu_input_ids(self) -> Tensor:
        """The tokens where they can be looked at without waiting for a device."""
        return self.input_ids if self.metadata is None else self.metadata.cpu_input_ids

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device."""
        device = torch.device(device)
        moved = {name: t.to(device, non_blocking=True) for name, t in vars(self).items() if isinstance(t, Tensor)}
        metadata = None if device.type == "cpu" else self.get_metadata()
        return replace(self, **moved, metadata=metadata and metadata.to(device))

    def pin_memory(self) -> Self:
        """The same in pinned memory, with what is known of it: it goes to a GPU without waiting."""
        return replace(pin_tensors(self), metadata=self.get_metadata().pin_memory())

    def select_rows(self, chosen: Tensor | slice) -> Self:
        """Some of the sequences, of a batch on the CPU: a mask [B], or a slice of B."""
        return replace(
            self, **{name: t[chosen] for name, t in vars(self).items() if isinstance(t, Tensor)}, metadata=None
        )

    def get_metadata(self) -> BatchMetadata:
        """What the host can know of the batch."""
        return self.metadata or BatchMetadata.from_tensors(
            self.input_ids.cpu(), self.position_ids.cpu(), self.targets.cpu() != IGNORE_INDEX
        )


class SequenceDataset(Protocol):
    """Batches by position, whatever they are made of: `PackedDataset`, `mixture.MixtureDataset`, `streamed.StreamingDataset`."""

    @property
    def length(self) -> int:
        """T, tokens in a sequence."""

    @property
    def n_sequences(self) -> int:
        """How many there are before one comes again."""

    def batch(self, position: int, size: int) -> Batch:
        """Sequences `position` to `position + size` since the start of training."""

    def position_after(self, read: "SequenceDataset", position: int) -> int:
        """The position here, in sequences of another length, of what follows all that was read there."""


class PackedDataset:
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

    def position_after(self, read: SequenceDataset, position: int) -> int:
        """The position, in sequences of this length, of what follows the `position` sequences of `read`.

        No token is read twice in an epoch; up to a sequence is left out.
        """
        assert isinstance(read, PackedDataset)
        epoch, row = divmod(position, read.n_sequences)
        return epoch * self.n_sequences + min(-(-row * read.length // self.length), self.n_sequences)

    def _rows(self, epoch: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        order, starts = self._layout(epoch)
        begin, columns = rows[:, None] * self.length, np.arange(self.length + 1)
        lead = np.array(self.split.prefix_ids, np.int64)
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
        targets = np.where(wanted, tokens[:, 1:], IGNORE_INDEX)
        return tokens[:, :-1], (columns - begins)[:, :-1], targets

    def _layout(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the documents in an epoch [n], and where each begins in the stream, with the end [n + 1]."""
        if not self.shuffle:
            epoch = 0
        if epoch not in self._layouts:
            order = np.arange(len(self._lengths))
            if self.shuffle:
                order = np.argsort(splitmix64(order, self.seed, epoch), kind="stable")
            starts = np.concatenate([[0], np.cumsum(self._lengths[order])])
            self._layouts[epoch] = order, starts
            while len(self._layouts) > 2:  # a batch spans two epochs at most, if it is not longer than one
                self._layouts.popitem(last=False)
        return self._layouts[epoch]


def take_sequences_with_targets(data: SequenceDataset, position: int, size: int) -> tuple[Batch, int]:
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
        has = (batch.targets != IGNORE_INDEX).any(1)
        position += missing
        if has.any():
            parts.append(batch if has.all() else batch.select_rows(has))
            missing, empty = missing - int(has.sum()), 0
        else:
            empty += missing
            if empty >= EMPTY and empty >= data.n_sequences:
                raise no_targets_error("the text", data.length)
    return concatenate_batches(parts), position


def count_eval_sequences(data: SequenceDataset, wanted: int) -> int:
    """How many sequences from the first on to measure: `wanted` or all there are, or more until one has a target.

    Raises:
        LimbeckError: none has.
    """
    for at in range(data.n_sequences):
        if data.batch(at, 1).n_targets:
            return max(at + 1, min(wanted, data.n_sequences))
    raise no_targets_error("the held-out text", data.length)


def count_sequences_with_targets(split: Split, length: int) -> tuple[int, int]:
    """How many sequences of a split, in stored order, have a target, and of how many.

    Looked at are the first `LOOKED_AT` tokens, and more only until one has a target.
    """
    data = PackedDataset(split, length, shuffle=False)
    if split.mask is None and not (np.diff(split.offsets) < 2 + len(split.prefix_ids)).any():
        return data.n_sequences, data.n_sequences  # every document has a token that follows another
    found = at = 0
    while at < data.n_sequences and (not found or at * length < LOOKED_AT):
        size = min(max(1, 2**18 // length), data.n_sequences - at)
        found += int((data.batch(at, size).targets != IGNORE_INDEX).any(1).sum())
        at += size
    return found, at


def no_targets_error(what: str, length: int) -> LimbeckError:
    """The error where there is nothing to learn or to measure."""
    return LimbeckError(
        f"no token of {what} is to be learnt, in no sequence of {length} tokens",
        expected="answers of the assistant in conversations, documents of two tokens or more in other text",
    )


def concatenate_batches(parts: list[Batch]) -> Batch:
    """The sequences of several batches of one kind, one after another."""
    if len(parts) == 1:
        return parts[0]
    names = [name for name, t in vars(parts[0]).items() if isinstance(t, Tensor)]
    return replace(
        parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in names}, metadata=None
    )


def check_position(position: int, size: int) -> None:
    """Raises LimbeckError where no batch can be there."""
    if position < 0 or size < 1:
        raise LimbeckError(f"position {position}, size {size}", expected="position >= 0 and size >= 1")


def splitmix64(index: np.ndarray, seed: int, epoch: int) -> np.ndarray:
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
