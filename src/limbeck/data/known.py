"""What the host knows of a batch before it goes to an accelerator, so that nothing has to be asked of it there.

    batch = packed.batch(0, 8).to("cuda")
    batch.known.rows                      # which tokens have a target
    batch.known.documents.segments        # which document each token belongs to

Asking a GPU for a number ("how many targets?", "does a document end here?") waits until all that was queued is done,
and leaves it idle meanwhile. All of this follows from what is on the host anyway.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

LEAST = 16  # documents for which there is room in `offsets`; kernels are compiled for a number of them


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed batch of B rows of T tokens lie; all None where each row is one document.

    Args:
        segments: int64 [B, T], number of a token's document in its row.
        offsets: int32 [n + 1], the documents' ends in the B·T tokens one row after the other, from 0 to B·T; repeats of
            B·T fill it up, so that its length is one of few.
        host: the same on the CPU, without the repeats.
    """

    segments: Tensor | None = None
    offsets: Tensor | None = None
    host: Tensor | None = None

    @classmethod
    def of(cls, positions: Tensor) -> "Documents":
        """From position ids [B, T] on the CPU: a document begins where they do not go on by one."""
        begins = positions[:, 1:] != positions[:, :-1] + 1
        if not begins.any():
            return cls()
        first = torch.ones_like(begins[:, :1])  # a row begins a document
        starts = torch.cat([first, begins], 1)
        host = torch.cat([starts.flatten().nonzero()[:, 0], torch.tensor([starts.numel()])]).int()
        room = max(LEAST, 1 << (len(host) - 2).bit_length())
        offsets = torch.cat([host, host[-1:].expand(room + 1 - len(host))])
        return cls(starts.long().cumsum(1) - 1, offsets, host)

    def to(self, device: torch.device) -> "Documents":
        """The same for tensors on another device; what is for the host stays there."""
        if self.segments is None or self.offsets is None:
            return self
        segments: Any = self.segments.to(device, non_blocking=True)
        offsets = self.offsets.to(device, non_blocking=True)
        segments.limbeck_ends = self.host  # kernels of mixers look there
        return Documents(segments, offsets, self.host)


@dataclass(frozen=True)
class Known:
    """Facts of a batch.

    Args:
        ids: int64 [B, T], the tokens, on the CPU.
        rows: int64 [n], numbers in B·T of the tokens that have a target.
        documents: see there.
    """

    ids: Tensor
    rows: Tensor
    documents: Documents

    @classmethod
    def of(cls, ids: Tensor, positions: Tensor, has_target: Tensor) -> "Known":
        """From tensors [B, T] on the CPU."""
        return cls(ids, has_target.flatten().nonzero().squeeze(1), Documents.of(positions))

    def to(self, device: torch.device) -> "Known":
        """The same for a batch on that device."""
        return replace(self, rows=self.rows.to(device, non_blocking=True), documents=self.documents.to(device))

    def pinned(self) -> "Known":
        """The same in memory that a GPU can copy from without waiting."""
        return replace(self, rows=self.rows.pin_memory(), documents=pinned(self.documents, "host"))


def pinned(facts: Any, *but: str) -> Any:
    """A dataclass of tensors, in pinned memory but for the named ones."""
    tensors = {f.name: getattr(facts, f.name) for f in fields(facts) if f.name not in but}
    return replace(facts, **{name: t.pin_memory() for name, t in tensors.items() if isinstance(t, Tensor)})
