"""Relative geometry: the angles between the tokens of a document, in the student as in the teacher.

    stages.logits.objectives.gram: {weight: 0.1, blocks: "uniform 4", chunk: 64}

With ĥ_i = h_i / ‖h_i‖ the direction of a block's output at token i, C(i) the tokens of its document in the same stretch
of `chunk` tokens, and s, t for student and teacher,

    L = mean over blocks and tokens i of  1/|C(i)| Σ_{j in C(i)} (ĥ^s_i · ĥ^s_j - ĥ^t_i · ĥ^t_j)²

Source: EmbedDistill (arXiv 2301.12005), which goes beyond matching a retriever's scores: it keeps the relative geometry
of queries and documents in the teacher's space. Adapted from retrieval: the points are not queries and documents, for
which there is one vector each, but the tokens of a text; and angles are compared, not the vectors themselves, which
`features` compares. A student may therefore turn its space as a whole.

Stretches begin with their document, so packing changes nothing. Memory: the Gram matrices of `GROUP` stretches at a
time, and the teacher's outputs of the chosen blocks.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.objectives import Gram
from limbeck.training.objectives.base import Contribution, Counts, Models, Objective, TextPass, parse_blocks

GROUP = 16  # stretches whose matrices exist at a time


class GramObjective(Objective):
    """Compares Gram matrices of block outputs within stretches of a document."""

    name = "gram"
    settings: Gram

    def __init__(self, settings: Gram, models: Models, seed: int):
        super().__init__(settings, models, seed)
        self.reads = [models.blocks[i] for i in parse_blocks(settings.blocks, len(models.blocks), "gram.blocks")]

    def contribute(self, done: TextPass, counts: Counts) -> Contribution:
        stretches = list_stretches(done.batch.position_ids, self.settings.chunk)
        divisor = counts["tokens"] * len(self.reads)
        weight = self.settings.weight
        total: Tensor | float = 0.0
        roots = []
        for block in self.reads:
            student, teacher = done.student_blocks[block], done.teacher_blocks[block]
            distance, gradient = gram_distance(student.detach(), teacher.detach(), stretches)
            roots.append((student, (gradient * (weight * done.loss_scale / divisor)).to(student.dtype)))
            total = total + distance
        value = torch.as_tensor(total).double() / divisor
        return Contribution(value, weight * value, roots)


def list_stretches(position_ids: Tensor, chunk: int) -> Tensor:
    """List the tokens of each stretch of at most `chunk` tokens of a document: numbers in B · T, [stretches, longest].

    Places behind the end of a stretch are -1.

    Args:
        position_ids: [B, T], which begin at 0 in each document and row.
    """
    place = position_ids.flatten() % chunk
    stretch = (place == 0).cumsum(0) - 1
    listed = place.new_full((int(stretch[-1]) + 1, int(place.max()) + 1), -1)
    listed[stretch, place] = torch.arange(len(place), device=place.device)
    return listed


@torch.enable_grad()
def gram_distance(student: Tensor, teacher: Tensor, stretches: Tensor) -> tuple[Tensor, Tensor]:
    """Sum over tokens the mean squared difference of their rows of the two Gram matrices.

    Args:
        student, teacher: [B, T, D], without a graph.
        stretches: as of `list_stretches`.

    Returns:
        The sum, in float32 or wider, and its gradient at `student`.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    gradient = torch.zeros(student.shape, dtype=dtype, device=student.device).flatten(0, 1)
    total = gradient.new_zeros(())
    with torch.autocast(student.device.type, enabled=False):
        for listed in stretches.split(GROUP):
            exists = listed >= 0
            tokens = listed.clamp_min(0)
            states = student.flatten(0, 1)[tokens].to(dtype).requires_grad_()
            ours, theirs = (
                F.normalize(x, dim=-1) * exists[..., None] for x in (states, teacher.flatten(0, 1)[tokens].to(dtype))
            )
            squares = (ours @ ours.mT - theirs @ theirs.mT).square().sum((1, 2))
            distance = (squares / exists.sum(1)).sum()
            (slope,) = torch.autograd.grad(distance, states)
            gradient.index_add_(0, tokens[exists], slope[exists])
            total = total + distance.detach()
    return total, gradient.view(student.shape)
