"""Some rows of a mixing matrix, in memory that grows with their number and not with the square of the length.

    rows = sample_query_positions(ids, 64, seed=0)                                        # [B, 64] queries
    m = matrix_rows(delta_rule, q, k, (beta, log_decay), rows, segments)     # [B, H, 64, T]

An operator that can give its rows at once has a `compute_rows` of its own; where states go from chunk to chunk these walk back
over them (`scan_chunk_rows`). Any other is run on a block of columns of the identity in the place of v, from the
block's first token on: that gives the block's columns, of which the rows are kept. A block's graph is let go and made
again in the backward pass. This saves memory, not time.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from limbeck.ops.fla import use_backend

BLOCK = 128  # columns at a time


def sample_query_positions(ids: Tensor, count: int, seed: int) -> Tensor:
    """`count` different positions of each sequence, in order: [B, count], all of them where there are no more.

    They are a function of the seed and the sequence's tokens, so neither a resumed run nor the way in which a step is
    split draws other ones.

    Args:
        ids: [B, T] tokens.
    """
    length = ids.shape[1]
    count = min(count, length)
    place = torch.arange(1, length + 1)
    drawn = []
    for row in ids.cpu():
        generator = torch.Generator().manual_seed((int((row * place).sum()) * 1_000_003 + seed) % 2**63)
        drawn.append(torch.randperm(length, generator=generator)[:count].sort().values)
    return torch.stack(drawn).to(ids.device)


def gather_rows(x: Tensor, rows: Tensor, dim: int) -> Tensor:
    """x along `dim` (of size T) at rows [B, R], sequence by sequence; dimension 0 of x is B or 1."""
    shape = [1] * x.dim()
    shape[0], shape[dim] = rows.shape
    index = rows.view(shape)
    sizes = [len(rows), *x.shape[1:]]
    return x.expand(sizes).gather(dim, index.expand([n if d != dim else rows.shape[1] for d, n in enumerate(sizes)]))


def scan_chunk_rows(
    reads: Tensor,
    writes: Tensor,
    mixing: Tensor,
    decay: Tensor | None,
    rows: Tensor,
    length: int,
    corrections: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Rows [B, R] of the mixing matrix of `O_n = Q̂_n S_n + P_n U_n, S_{n+1} = Diag(D_n) S_n + K̃_nᵀ U_n`: [B, H, R, T].

    From the last chunk to the first, what each row reads of the state [B, H, R, K] is carried back: at first the row's
    own Q̂, then faded by D. So the cost is that of a few products of R rows with each chunk, whatever v's width.

    Args:
        reads, writes: Q̂ and K̃ [N, B, H, C, K]; mixing: P [N, B, H, C, C]; decay: D [N, B, H, K or 1, 1] or None.
        length: T; the last chunk may be filled up.
        corrections: of the delta rule, where U_n = (I + L_n)⁻¹ (β V_n − E_n S_n): β [N, B, H, C, 1], E [N, B, H, C, K]
            and L [N, B, H, C, C], of which the strictly lower part counts. Otherwise U is V.
    """
    chunk, inside = reads.shape[-2], rows // reads.shape[-2]
    own, first = (gather_rows(x.permute(1, 2, 0, 3, 4).flatten(2, 3), rows, 2) for x in (mixing, reads))
    if corrections is not None:
        rate, erases, system = corrections
        eye = torch.eye(chunk, dtype=system.dtype, device=system.device).expand_as(system)
        inverse = torch.linalg.solve_triangular(system, eye, upper=False, unitriangular=True)
    carried, blocks = torch.zeros_like(first), []
    for n in reversed(range(len(reads))):
        here = (inside == n)[:, None, :, None]
        weights = torch.where(here, own, carried @ writes[n].mT)
        carried = torch.where(here, first, carried if decay is None else carried * decay[n].mT)
        if corrections is not None:
            weights = weights @ inverse[n]
            carried = carried - weights @ erases[n]
            weights = weights * rate[n].mT
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
    """Rows [B, R] of the operator's mixing matrix: [B, H, R, T], with gradients.

    Args:
        operator: one of `limbeck.ops`.
        q: [B, T, H, K]; k: [B, T, G, K]; gates: what the operator takes after v.
        rows: [B, R] queries, in order.
        segments: [B, T] document numbers.
        block: columns at a time.
    """
    own = getattr(operator, "compute_rows", None)
    if own is not None:
        return own(q, k, *gates, rows=rows, segments=segments)

    def columns(begin: int, width: int, q: Tensor, k: Tensor, *gates: Tensor | None) -> Tensor:
        identity = torch.eye(q.shape[1], width, dtype=q.dtype, device=q.device)[None, :, None]
        number = None if segments is None else segments[:, begin:end] - segments[:, begin, None]
        with use_backend("torch"):  # in here: the backward pass, which may have a thread of its own, comes by again
            o, _ = operator.chunked(q, k, identity.expand(len(q), -1, 1, -1), *gates, segments=number)
        later = (rows >= begin)[:, None, :, None]
        return gather_rows(o, (rows - begin).clamp_min(0), 1).transpose(1, 2) * later

    end = int(rows.max()) + 1  # no query looks further
    parts = []
    for begin in range(0, end, block):
        width = min(block, end - begin)
        given = (x if x is None or x.dim() == 1 else x[:, begin:end] for x in (q, k, *gates))
        parts.append(checkpoint(columns, begin, width, *given, use_reentrant=False))
    found = torch.cat(parts, -1)
    return torch.nn.functional.pad(found, (0, q.shape[1] - end))
