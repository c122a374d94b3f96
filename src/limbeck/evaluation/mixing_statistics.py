"""Numbers that describe a mixing matrix, one per head: where a head looks, how far, how evenly, and like whom.

    p = normalize_rows(matrix)                                           # [H, T, T], rows of sizes that sum to 1
    summarize_rows(p, position, window=16)["distance"].shape              # [H, T]: mean attended distance of each row
    row_overlap(p, normalize_rows(teacher_matrix))                           # [H, T], 1 where the rows are the same

Entries of most recurrent mixers may be negative and their rows sum to anything. A row is therefore read by the sizes of
its entries, divided by their sum; how much of it is negative is a number of its own. Formulas: docs/analysis.md.
Legend: H heads, T time, P = |M| / row sums of |M|; position[t] counts the tokens of its document before token t.

How long a head's state remembers: half-lives of the decays that a mixer has on some text.

    with record_decays(module) as found:
        module(...)                              # the mixer's operands are looked at as they go by
    compute_half_life(found, heads=9)                    # [9] tokens; None where the mixer has no decay

Only the decay counts. What a delta rule overwrites is forgotten sooner, and what softmax or a window drops is no decay.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from limbeck.mixers import Mixer
from limbeck.mixers.types import OperatorInputs


def normalize_rows(matrix: Tensor, signed: bool = False) -> Tensor:
    """[H, T, T] divided by the sum of each row's sizes, in float32 or wider; a row of zeros stays one.

    Args:
        signed: keep the signs, so that rows of sizes sum to 1 and not rows of entries.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    total = wide.abs().sum(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    return (wide if signed else wide.abs()) / total


def summarize_rows(p: Tensor, position: Tensor, window: int) -> dict[str, Tensor]:
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


def negative_mass(matrix: Tensor) -> Tensor:
    """Share of each row's sizes that belongs to negative entries: [H, T]."""
    return normalize_rows(matrix, signed=True).clamp_max(0).abs().sum(-1)


def row_overlap(p: Tensor, other: Tensor) -> Tensor:
    """1 − ½ Σ_j |P_ij − P'_ij| of shares [H, T, T]: [H, T], from 0 (never in the same place) to 1 (the same)."""
    return 1 - 0.5 * (p - other).abs().sum(-1)


def head_diversity(p: Tensor) -> Tensor:
    """How unlike the other heads of its layer each head is: mean of 1 − overlap with each of them, [H, T].

    Zero where all heads look at the same places, and for a layer of one head.
    """
    heads = p.shape[0]
    apart = [(1 - row_overlap(p[h].expand_as(p), p)).sum(0) / max(heads - 1, 1) for h in range(heads)]
    return torch.stack(apart)


def effective_rank(matrix: Tensor) -> Tensor:
    """exp of the entropy of the singular values, divided by their sum (Roy and Vetterli 2007), [H].

    Of the matrix [H, n, n] with its signs, each row divided by the sum of its sizes, so that no row counts more than
    another. The singular values are roots of eigenvalues in float64, exact to about 1e-8 of the largest.
    """
    rows = normalize_rows(matrix, signed=True).double()
    values = torch.linalg.eigvalsh(rows @ rows.mT).clamp_min(0).sqrt()
    values = values / values.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(values).sum(-1).exp()


def spearman_correlation(x: Tensor, y: Tensor) -> float | None:
    """Spearman's correlation of two lists [n], ties sharing their rank; None where either is constant."""

    def ranks(values: Tensor) -> Tensor:
        smaller = (values[None, :] < values[:, None]).double().sum(1)
        rank = smaller + 0.5 * (values[None, :] == values[:, None]).double().sum(1)
        return rank - rank.mean()

    a, b = ranks(x.double()), ranks(y.double())
    size = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / size) if size > 0 else None


@contextmanager
def record_decays(module: nn.Module) -> Iterator[list[Tensor]]:
    """The mean of −log a over the tokens of each call of a mixer inside `module`, per head [h] or channel [h, K]."""
    found: list[Tensor] = []
    with ExitStack() as stack:
        for mixer in [inner for inner in module.modules() if isinstance(inner, Mixer)]:
            stack.enter_context(_watched(mixer, found))
        yield found


def compute_half_life(found: list[Tensor], heads: int) -> Tensor | None:
    """ln 2 over the mean decay rate, [heads]: of a head with a decay per channel the median over its channels.

    Where the mixer works with fewer heads than the teacher, each stands for several. Infinite where nothing decays.
    """
    if not found:
        return None
    lives = math.log(2) / torch.stack(found).mean(0).clamp_min(0)
    if lives.dim() == 2:
        lives = lives.median(-1).values
    return lives.repeat_interleave(heads // len(lives))


def step_log_decay(inputs: OperatorInputs) -> Tensor | None:
    """[h], [B, T, h] or [B, T, h, K]: the logarithm of what is left of the state after one more token.

    Where a running maximum stabilises the state (mLSTM), the operator's decay holds its steps too. The floor of the
    denominator is exp(−maximum), so they can be taken out again, from the second token on.
    """
    decay = inputs.log_decay
    if decay is None or inputs.denominator_floor is None:
        return decay
    maximum = -inputs.denominator_floor.log()
    return decay[:, 1:] + maximum[:, 1:] - maximum[:, :-1]


@contextmanager
def _watched(mixer: Mixer, found: list[Tensor]) -> Iterator[None]:
    operands = mixer.compute_masked_inputs

    def watched(*args, **kwargs) -> OperatorInputs:
        inputs = operands(*args, **kwargs)
        decay = step_log_decay(inputs)
        if decay is not None:
            found.append(-(decay if decay.dim() == 1 else decay.flatten(0, 1).mean(0)).detach().float().cpu())
        return inputs

    mixer.compute_masked_inputs = watched  # type: ignore[method-assign]
    try:
        yield
    finally:
        del mixer.compute_masked_inputs
