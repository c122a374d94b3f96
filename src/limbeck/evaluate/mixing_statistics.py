"""Numbers that describe a mixing matrix, one per head: where a head looks, how far, how evenly, and like whom.

    p = shares(matrix)                                           # [H, T, T], rows of sizes that sum to 1
    where(p, position, window=16)["distance"].shape              # [H, T]: mean attended distance of each row
    overlap(p, shares(teacher_matrix))                           # [H, T], 1 where the rows are the same

Entries of most recurrent mixers may be negative and their rows sum to anything. A row is therefore read by the sizes of
its entries, divided by their sum; how much of it is negative is a number of its own. Formulas: docs/analysis.md.
Legend: H heads, T time, P = |M| / row sums of |M|; position[t] counts the tokens of its document before token t.
"""

import torch
from torch import Tensor


def shares(matrix: Tensor, signed: bool = False) -> Tensor:
    """[H, T, T] divided by the sum of each row's sizes, in float32 or wider; a row of zeros stays one.

    Args:
        signed: keep the signs, so that rows of sizes sum to 1 and not rows of entries.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    total = wide.abs().sum(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    return (wide if signed else wide.abs()) / total


def where(p: Tensor, position: Tensor, window: int) -> dict[str, Tensor]:
    """Where each row looks: sums over the row, [H, T] each.

    Args:
        p: shares [H, T, T], causal.
        position: [T].
        window: tokens that count as local, the token itself among them.

    Returns:
        first_token: on the first token of the document; window: on the last `window` tokens; diagonal: on the token
        itself; entropy in nats; distance: mean number of tokens between the query and where it looks.
    """
    index = torch.arange(p.shape[-1], device=p.device)
    apart = (index[:, None] - index[None, :]).clamp_min(0)
    first = (index - position.to(p.device)).expand(p.shape[0], -1)
    return {
        "first_token": p.gather(-1, first.unsqueeze(-1)).squeeze(-1),
        "window": (p * (apart < window)).sum(-1),
        "diagonal": p.diagonal(dim1=-2, dim2=-1),
        "entropy": torch.special.entr(p).sum(-1),
        "distance": (p * apart).sum(-1),
    }


def negative(matrix: Tensor) -> Tensor:
    """Share of each row's sizes that belongs to negative entries: [H, T]."""
    return shares(matrix, signed=True).clamp_max(0).abs().sum(-1)


def overlap(p: Tensor, other: Tensor) -> Tensor:
    """1 − ½ Σ_j |P_ij − P'_ij| of shares [H, T, T]: [H, T], from 0 (never in the same place) to 1 (the same)."""
    return 1 - 0.5 * (p - other).abs().sum(-1)


def diversity(p: Tensor) -> Tensor:
    """How unlike the other heads of its layer each head is: mean of 1 − overlap with each of them, [H, T].

    Zero where all heads look at the same places, and for a layer of one head.
    """
    heads = p.shape[0]
    apart = [(1 - overlap(p[h].expand_as(p), p)).sum(0) / max(heads - 1, 1) for h in range(heads)]
    return torch.stack(apart)


def effective_rank(matrix: Tensor) -> Tensor:
    """exp of the entropy of the singular values, divided by their sum (Roy and Vetterli 2007), [H].

    Of the matrix [H, n, n] with its signs, each row divided by the sum of its sizes, so that no row counts more than
    another. The singular values are roots of eigenvalues in float64, exact to about 1e-8 of the largest.
    """
    rows = shares(matrix, signed=True).double()
    values = torch.linalg.eigvalsh(rows @ rows.mT).clamp_min(0).sqrt()
    values = values / values.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(values).sum(-1).exp()


def rank_correlation(x: Tensor, y: Tensor) -> float | None:
    """Spearman's correlation of two lists [n], ties sharing their rank; None where either is constant."""

    def ranks(values: Tensor) -> Tensor:
        smaller = (values[None, :] < values[:, None]).double().sum(1)
        rank = smaller + 0.5 * (values[None, :] == values[:, None]).double().sum(1)
        return rank - rank.mean()

    a, b = ranks(x.double()), ranks(y.double())
    size = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / size) if size > 0 else None
