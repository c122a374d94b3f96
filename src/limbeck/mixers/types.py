"""What goes into a mixer and into its operator: the attention's shape, the tokens' masks, the operator's arguments.

    shape = HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64)
    tokens = TokenMask(valid=mask)
    OperatorInputs(q, k, v, log_decay).mask_padding(tokens.valid)

Shapes: B batch, T time, H query heads, G key/value heads, K key width, V value width.
"""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from limbeck.ops.common import repeat_kv

State = dict[str, Tensor]


@dataclass(frozen=True)
class HeadShape:
    """The attention module that a mixer replaces: widths, head counts and where it stands."""

    hidden: int
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    scale: float = 1.0  # what the teacher multiplies q·k by
    layer: int = 0
    layers: int = 1


@dataclass(frozen=True)
class TokenMask:
    """What a mixer knows of its tokens beside their content.

    valid: [B, T] bool, False for padding; None when every token counts.
    segments: [B, T] int, number of the packed document, 0 for the one that the incoming state belongs to; None for one.
    """

    valid: Tensor | None = None
    segments: Tensor | None = None


@dataclass
class OperatorInputs:
    """The operator's arguments for one call, and what the mixer carries on beside the operator's state."""

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None = None
    beta: Tensor | None = None
    erase: tuple[Tensor, Tensor] | None = None  # a and b of a rank-one change b aᵀ to the state
    denominator_floor: Tensor | None = None  # [B, T, H] least size of the normaliser's denominator
    diagonal: Tensor | None = None  # [B, T, H] what each token adds of its own value
    carried_state: State = field(default_factory=dict)  # state tensors beside the operator's

    @property
    def gates(self) -> tuple[Tensor | None, ...]:
        """What the operator takes after q, k and v."""
        if self.beta is not None:
            return self.beta, self.log_decay
        return (*(self.erase or ()), self.log_decay)

    def mask_padding(self, valid: Tensor) -> "OperatorInputs":
        """With no-ops in place of masked tokens: they write nothing and nothing decays. valid: [B, T] bool."""
        blank = ~valid[..., None]
        wide = blank[..., None]
        decay, erase = self.log_decay, self.erase
        if decay is not None:
            decay = decay.expand(*valid.shape, -1) if decay.dim() == 1 else decay
            decay = decay.masked_fill(blank if decay.dim() == 3 else wide, 0)
        return replace(
            self,
            k=self.k.masked_fill(wide, 0),
            v=self.v.masked_fill(wide, 0),
            beta=None if self.beta is None else self.beta.masked_fill(blank, 0),
            erase=None if erase is None else (erase[0].masked_fill(wide, 0), erase[1]),
            log_decay=decay,
        )

    def add_diagonal_to_output(self, o: Tensor) -> Tensor:
        """o [B, T, H, V] plus each token's share of its own value."""
        if self.diagonal is None:
            return o
        return o + self.diagonal.unsqueeze(-1).to(o.dtype) * repeat_kv(self.v, o.shape[2]).to(o.dtype)

    def add_diagonal_to_matrix(self, matrix: Tensor) -> Tensor:
        """The same in the mixing matrix [B, H, T, T]."""
        if self.diagonal is None:
            return matrix
        return matrix + torch.diag_embed(self.diagonal.transpose(1, 2).to(matrix.dtype))
