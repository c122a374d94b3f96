"""Statistics of mixing matrices, one number per head: where it attends, how far, how evenly, and how similarly.

    p = normalize_rows(matrix)                                    # [H, T, T], absolute values of a row sum to 1
    summarize_rows(p, position, window=16)["distance"].shape      # [H, T]: mean attended distance of each row
    row_overlap(p, normalize_rows(teacher_matrix))                # [H, T], 1 for equal rows
    with record_decays(module) as decays:
        module(...)
    compute_half_life(decays, heads=9)                            # [9] tokens; None for a mixer without decay

Entries of most recurrent mixers may be negative, and their rows have any sum. So a row is described by the absolute
values of its entries divided by their sum, and its negative part is a number of its own. Formulas:
docs/reference/measures.md.

A half-life counts the decay only. What a delta rule overwrites is forgotten sooner; softmax and windows have no decay.
Legend: H heads, T time, K key width, h heads of the mixer, P = |M| / row sums of |M|; position[t] is the number of
tokens of its document before token t.
"""

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from limbeck.mixers import Mixer
from limbeck.mixers.types import Inputs


def normalize_rows(matrix: Tensor, signed: bool = False) -> Tensor:
    """Divide rows of [H, T, T] by the sum of their absolute values, in float32 or wider; zero rows stay zero.

    Args:
        signed: keep the signs of the entries.
    """
    wide = matrix.to(torch.promote_types(matrix.dtype, torch.float32))
    total = wide.abs().sum(-1, keepdim=True).clamp_min(torch.finfo(wide.dtype).tiny)
    return (wide if signed else wide.abs()) / total


def summarize_rows(p: Tensor, position: Tensor, window: int) -> dict[str, Tensor]:
    """Describe where each row attends: sums over the row, [H, T] each.

    Args:
        p: normalized rows [H, T, T], causal.
        position: [T].
        window: number of tokens that count as local, including the token itself.

    Returns:
        first_token: mass on the first token of the document; window: on the last `window` tokens; diagonal: on the
        token itself; entropy in nats; distance: mean number of tokens between the query and what it attends to.
    """
    index = torch.arange(p.shape[-1], device=p.device)
    distance = (index[:, None] - index[None, :]).clamp_min(0)
    first = (index - position.to(p.device)).expand(p.shape[0], -1)
    return {
        "first_token": p.gather(-1, first.unsqueeze(-1)).squeeze(-1),
        "window": (p * (distance < window)).sum(-1),
        "diagonal": p.diagonal(dim1=-2, dim2=-1),
        "entropy": torch.special.entr(p).sum(-1),
        "distance": (p * distance).sum(-1),
    }


def negative_mass(matrix: Tensor) -> Tensor:
    """Compute the share of negative entries in each row's absolute values: [H, T]."""
    return normalize_rows(matrix, signed=True).clamp_max(0).abs().sum(-1)


def row_overlap(p: Tensor, other: Tensor) -> Tensor:
    """Compute 1 − ½ Σ_j |P_ij − P'_ij| of normalized rows [H, T, T]: [H, T], from 0 (disjoint) to 1 (equal)."""
    return 1 - 0.5 * (p - other).abs().sum(-1)


def head_diversity(p: Tensor) -> Tensor:
    """Average 1 − overlap of each head with the other heads of its layer: [H, T].

    Zero if all heads attend to the same places, and for a layer of one head.
    """
    heads = p.shape[0]
    # Head by head: all pairs at once would take H times the memory of p.
    return torch.stack([(1 - row_overlap(p[h].expand_as(p), p)).sum(0) / max(heads - 1, 1) for h in range(heads)])


def effective_rank(matrix: Tensor) -> Tensor:
    """Compute exp of the entropy of the normalized singular values (Roy and Vetterli 2007): [H].

    Signed rows of the matrix [H, n, n] are normalized first, so that no row counts more than another. Singular values
    are square roots of eigenvalues in float64, exact to about 1e-8 of the largest: much faster than an SVD.
    """
    rows = normalize_rows(matrix, signed=True).double()
    values = torch.linalg.eigvalsh(rows @ rows.mT).clamp_min(0).sqrt()
    values = values / values.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(values).sum(-1).exp()


def spearman_correlation(x: Tensor, y: Tensor) -> float | None:
    """Compute Spearman's correlation of two vectors [n]; ties share their rank. None if either is constant."""

    def ranks(values: Tensor) -> Tensor:
        smaller = (values[None, :] < values[:, None]).double().sum(1)
        rank = smaller + 0.5 * (values[None, :] == values[:, None]).double().sum(1)
        return rank - rank.mean()

    a, b = ranks(x.double()), ranks(y.double())
    norm = (a.square().sum() * b.square().sum()).sqrt()
    return float((a * b).sum() / norm) if norm > 0 else None


@contextmanager
def record_decays(module: nn.Module) -> Iterator[list[Tensor]]:
    """Record −log a of each call of the mixers inside `module`, averaged over tokens: [h] or, per channel, [h, K]."""
    decays: list[Tensor] = []
    with ExitStack() as stack:
        for mixer in [inner for inner in module.modules() if isinstance(inner, Mixer)]:
            stack.enter_context(_record_mixer(mixer, decays))
        yield decays


def compute_half_life(decays: list[Tensor], heads: int) -> Tensor | None:
    """Compute ln 2 over the mean decay rate in tokens, [heads], from the decays of several calls.

    A head with a decay per channel gets the median over its channels. If the mixer has fewer heads than the teacher,
    each stands for several. Infinite for a head without decay.
    """
    if not decays:
        return None
    half_lives = math.log(2) / torch.stack(decays).mean(0).clamp_min(0)
    if half_lives.dim() == 2:
        half_lives = half_lives.median(-1).values
    return half_lives.repeat_interleave(heads // len(half_lives))


def step_log_decay(inputs: Inputs) -> Tensor | None:
    """Compute the log decay of the state per token: [h], [B, T, h] or [B, T, h, K]; None without decay."""
    decay = inputs.log_decay
    if decay is None or inputs.floor is None:
        return decay
    # A running maximum stabilizes the state (mLSTM), and the operator's decay includes its steps. The denominator's
    # floor is exp(−maximum), so the steps can be removed again, from the second token on.
    maximum = -inputs.floor.log()
    return decay[:, 1:] + maximum[:, 1:] - maximum[:, :-1]


@contextmanager
def _record_mixer(mixer: Mixer, decays: list[Tensor]) -> Iterator[None]:
    original = mixer.compute_masked_inputs

    def record(*args, **kwargs) -> Inputs:
        inputs = original(*args, **kwargs)
        decay = step_log_decay(inputs)
        if decay is not None:
            decays.append(-(decay if decay.dim() == 1 else decay.flatten(0, 1).mean(0)).detach().float().cpu())
        return inputs

    mixer.compute_masked_inputs = record  # type: ignore[method-assign]
    try:
        yield
    finally:
        del mixer.compute_masked_inputs  # the attribute of the instance, which hides the method
