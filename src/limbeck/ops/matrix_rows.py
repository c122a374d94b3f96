"""Selected rows of a mixing matrix, in memory that grows with their number and not with the square of the length.

    rows = sample_query_positions(ids, 64, seed=0)                           # [B, 64] queries
    m = matrix_rows(delta_rule, q, k, (beta, log_decay), rows, segments)     # [B, H, 64, T]

An operator that can compute rows directly has a function `compute_rows`; those with states between chunks walk back
over the chunks there (`scan_chunk_rows`). Any other operator is run with a block of columns of the identity for v, from
the block's first token on, which gives those columns of the matrix. A block's graph is freed and computed again in the
backward pass. This saves memory, not time.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.ops.fla import use_backend

BLOCK = 128  # columns at a time


def sample_query_positions(ids: Tensor, count: int, seed: int) -> Tensor:
    """Draw `count` different positions of each sequence of tokens ids [B, T], sorted: [B, min(count, T)]."""
    length = ids.shape[1]
    count = min(count, length)
    samples = [
        torch.randperm(length, generator=generator)[:count].sort().values for generator in make_generators(ids, seed)
    ]
    return torch.stack(samples).to(ids.device)


def make_generators(ids: Tensor, seed: int) -> list[torch.Generator]:
    """Return a generator of random numbers for each sequence of tokens ids [B, T].

    It is seeded by the tokens themselves, so resuming a run or splitting a step differently draws the same numbers.
    """
    weights = torch.arange(1, ids.shape[1] + 1)
    sums = (int((row * weights).sum()) for row in ids.cpu())
    return [torch.Generator().manual_seed((total * 1_000_003 + seed) % 2**63) for total in sums]


def gather_rows(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """Select rows [B, R] of x along `dim` (of size T), sequence by sequence; dimension 0 of x is B or 1."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = rows.shape
    index = rows.view(shape)
    sizes = [len(rows), *x.shape[1:]]
    return x.expand(sizes).gather(dim, index.expand([n if d != dim else rows.shape[1] for d, n in enumerate(sizes)]))


def scan_chunk_rows(
    q_decayed: Tensor,
    k_decayed: Tensor,
    scores: Tensor,
    decay: Tensor | None,
    rows: Tensor,
    length: int,
    corrections: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Compute rows [B, R] of the mixing matrix of a recurrence over chunks: [B, H, R, T].

        O_n = Q̂_n S_n + P_n U_n,    S_{n+1} = Diag(D_n) S_n + K̃_nᵀ U_n

    From the last chunk to the first, the vector [B, H, R, K] with which each row reads the state is carried back: it
    starts as the row's own Q̂ and then decays by D. The cost is a few products of R rows with each chunk, whatever V.

    Args:
        q_decayed, k_decayed: Q̂ and K̃ [N, B, H, C, K].
        scores: P [N, B, H, C, C].
        decay: D [N, B, H, K or 1, 1] or None.
        length: T; the last chunk may be padded.
        corrections: of the delta rule, where U_n = (I + L_n)⁻¹ (β V_n − E_n S_n): β [N, B, H, C, 1], E [N, B, H, C, K]
            and L [N, B, H, C, C], of which the strictly lower part counts. Otherwise U is V.
    """
    chunk, chunk_of_row = q_decayed.shape[-2], rows // q_decayed.shape[-2]
    own_scores, own_query = (gather_rows(x.permute(1, 2, 0, 3, 4).flatten(2, 3), rows, 2) for x in (scores, q_decayed))
    if corrections is not None:
        rate, erase_keys, overlap = corrections
        eye = torch.eye(chunk, dtype=overlap.dtype, device=overlap.device).expand_as(overlap)
        inverse = torch.linalg.solve_triangular(overlap, eye, upper=False, unitriangular=True)
        # Unbound at once: the gradient of x[n] is as large as all of x, and there are as many of them as chunks.
        inverses, erased, rates = (x.unbind() for x in (inverse, erase_keys, rate))
    keys, decays = k_decayed.unbind(), None if decay is None else decay.unbind()
    carried, blocks = torch.zeros_like(own_query), []
    for n in reversed(range(len(keys))):
        is_here = (chunk_of_row == n)[:, None, :, None]
        weights = torch.where(is_here, own_scores, carried @ keys[n].mT)
        carried = torch.where(is_here, own_query, carried if decays is None else carried * decays[n].mT)
        if corrections is not None:
            weights = weights @ inverses[n]
            carried = carried - weights @ erased[n]
            weights = weights * rates[n].mT
        blocks.append(weights)
    return torch.cat(blocks[::-1], -1)[..., :length]


def matrix_rows(
    operator: ModuleType,
    q: Tensor,
    k: Tensor,
    gates: tuple[Tensor | None, ...],
    rows: Tensor,
    segments: Tensor | None = None,
    block: int = BLOCK,
) -> Tensor:
    """Compute rows [B, R] of the operator's mixing matrix: [B, H, R, T], with gradients.

    Args:
        operator: a module of `limbeck.ops`.
        q: [B, T, H, K].
        k: [B, T, G, K].
        gates: the operator's arguments after v.
        rows: [B, R] positions of queries, sorted.
        segments: [B, T] document numbers.
        block: columns to compute at a time.
    """
    compute_rows = getattr(operator, "compute_rows", None)
    if compute_rows is not None:
        return compute_rows(q, k, *gates, rows=rows, segments=segments)

    def columns(begin: int, width: int, q: Tensor, k: Tensor, *gates: Tensor | None) -> Tensor:
        identity = torch.eye(q.shape[1], width, dtype=q.dtype, device=q.device)[None, :, None]
        number = None if segments is None else segments[:, begin:end] - segments[:, begin, None]
        # Not around the loop: the backward pass calls this again, and may do so in a thread of its own.
        with use_backend("torch"):
            o, _ = operator.chunked(q, k, identity.expand(len(q), -1, 1, -1), *gates, segments=number)
        is_causal = (rows >= begin)[:, None, :, None]
        return gather_rows(o, (rows - begin).clamp_min(0), 1).transpose(1, 2) * is_causal

    end = int(rows.max()) + 1  # no query looks further
    blocks = []
    for begin in range(0, end, block):
        width = min(block, end - begin)
        arguments = (x if x is None or x.dim() == 1 else x[:, begin:end] for x in (q, k, *gates))
        blocks.append(checkpoint(columns, begin, width, *arguments, use_reentrant=False))
    return torch.nn.functional.pad(torch.cat(blocks, -1), (0, q.shape[1] - end))
