"""Packed documents as the kernels take them: all rows of a batch end to end, with the place where each document begins.

    packed = Sequences.of(segments)
    q = packed.flat(q)                              # [B, T, ...] -> [1, B·T, ...]
    o, states = kernel(q, ..., packed.offsets, packed.incoming(state))
    packed.rows(o), packed.outgoing(states)         # [B, T, ...] and [B, ...]

Shapes: B batch, T time, N documents of the whole batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sequences:
    """offsets: [N + 1] where documents begin, and the end; first, last: [B] the documents of a row's ends; goes_on: [B]
    does a row's first document go on from the incoming state?"""

    offsets: Tensor
    first: Tensor
    last: Tensor
    goes_on: Tensor
    shape: tuple[int, int]

    @classmethod
    def of(cls, segments: Tensor) -> "Sequences":
        """The documents of segments [B, T]. Found once for all layers that are given the same tensor: how many there
        are has to be known on the host."""
        known = getattr(segments, "_limbeck_sequences", None)
        if known is not None:
            return known
        ends = getattr(segments, "limbeck_ends", None)  # on the host (limbeck.data.known): nothing is waited for
        if ends is not None:
            rows = torch.arange(segments.shape[0] + 1) * segments.shape[1]
            place = torch.searchsorted(ends.long(), rows)  # every row begins a document
            offsets, first, last = (
                x.to(segments.device, non_blocking=True) for x in (ends.long(), place[:-1], place[1:] - 1)
            )
            packed = cls(offsets, first, last, segments[:, 0] == 0, (segments.shape[0], segments.shape[1]))
            segments._limbeck_sequences = packed  # type: ignore[attr-defined]
            return packed
        begins = torch.ones_like(segments, dtype=torch.bool)
        begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
        offsets = begins.flatten().nonzero().squeeze(1)
        last = begins.sum(1).cumsum(0) - 1
        packed = cls(
            offsets=torch.cat([offsets, offsets.new_full((1,), begins.numel())]),
            first=torch.cat([last.new_zeros(1), last[:-1] + 1]),
            last=last,
            goes_on=segments[:, 0] == 0,
            shape=(segments.shape[0], segments.shape[1]),
        )
        segments._limbeck_sequences = packed  # type: ignore[attr-defined]
        return packed

    def flat(self, x: Tensor) -> Tensor:
        """[B, T, ...] -> [1, B·T, ...]."""
        return x.flatten(0, 1).unsqueeze(0)

    def rows(self, x: Tensor) -> Tensor:
        """[1, B·T, ...] -> [B, T, ...]."""
        return x.squeeze(0).unflatten(0, self.shape)

    def incoming(self, state: Tensor | None) -> Tensor | None:
        """States [B, ...] of the rows -> [N, ...] of the documents, zeros where one begins."""
        if state is None:
            return None
        kept = state * self.goes_on.view(-1, *(1,) * (state.dim() - 1))
        return state.new_zeros(len(self.offsets) - 1, *state.shape[1:]).index_copy(0, self.first, kept)

    def outgoing(self, states: Tensor) -> Tensor:
        """States [N, ...] of the documents -> [B, ...], that of each row's last."""
        return states.index_select(0, self.last)
