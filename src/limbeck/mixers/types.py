"""Inputs of a mixer and of its operator: the attention's shape, the tokens' masks, the operator's arguments.

    shape = HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64)
    tokens = Tokens(valid=mask)
    inputs = Inputs(q, k, v, log_decay).mask_padding(tokens.valid)

Shapes: B batch, T time, H query heads, G key/value heads, K key width, V value width.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from limbeck.ops.common import repeat_kv

State = dict[str, Tensor]


@dataclass(frozen=True)
class HeadShape:
    """Shape and place of the attention module that a mixer replaces."""

    hidden: int  # the model width D
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    scale: float = 1.0  # what the teacher multiplies q·k by
    layer: int = 0  # counted from 0
    layers: int = 1  # of the model


@dataclass(frozen=True)
class Tokens:
    """Padding and packed documents of a batch.

    Attributes:
        valid: [B, T] bool, False for padding; None when every token counts.
        segments: [B, T] int, number of the packed document, 0 for the one that the incoming state belongs to; None
            where each row is one document.
    """

    valid: Tensor | None = None
    segments: Tensor | None = None


@dataclass
class Inputs:
    """The operator's arguments for one call, and state that the mixer carries besides the operator's."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None
    erase: tuple[Tensor, Tensor] | None = None  # a and b of the rank-one update b (aᵀ S) in dplr
    floor: Tensor | None = None  # [B, T, H] lower bound of the normalizer's denominator
    diagonal: Tensor | None = None  # [B, T, H] weight with which each token adds its own value
    carry: State = field(default_factory=dict)  # state tensors besides the operator's

    @property
    def gates(self) -> tuple[Tensor | None, ...]:
        """Return the operator's arguments after q, k and v."""
        if self.beta is not None:
            return self.beta, self.log_decay
        return (*(self.erase or ()), self.log_decay)

    def mask_padding(self, valid: Tensor) -> "Inputs":
        """Turn tokens that are not valid [B, T] into no-ops: they write nothing, and nothing decays."""
        masked = ~valid[..., None]  # [B, T, 1], for what there is one of per head
        masked_channels = masked[..., None]
        decay, erase = self.log_decay, self.erase
        if decay is not None:
            decay = decay.expand(*valid.shape, -1) if decay.dim() == 1 else decay
            decay = decay.masked_fill(masked if decay.dim() == 3 else masked_channels, 0)
        return replace(
            self,
            k=self.k.masked_fill(masked_channels, 0),
            v=self.v.masked_fill(masked_channels, 0),
            beta=None if self.beta is None else self.beta.masked_fill(masked, 0),
            erase=None if erase is None else (erase[0].masked_fill(masked_channels, 0), erase[1]),
            log_decay=decay,
        )

    def add_diagonal_to_output(self, o: Tensor) -> Tensor:
        """Add each token's share of its own value to outputs o [B, T, H, V]."""
        if self.diagonal is None:
            return o
        return o + self.diagonal.unsqueeze(-1).to(o.dtype) * repeat_kv(self.v, o.shape[2]).to(o.dtype)

    def add_diagonal_to_matrix(self, matrix: Tensor) -> Tensor:
        """Add the same to the diagonal of the mixing matrix [B, H, T, T]."""
        if self.diagonal is None:
            return matrix
        return matrix + torch.diag_embed(self.diagonal.transpose(1, 2).to(matrix.dtype))
