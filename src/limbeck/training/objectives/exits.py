"""Exits: predictions from the middle of the student, against the teacher's with the label's part enhanced.

    stages.logits.objectives.exits: {weight: 0.3, blocks: "uniform 2", gamma: 1.4}

From the output h_b of a block a learned map M_b, which starts as the identity, leads through the student's own final
norm and head into the space of logits, in which models of unlike construction can be compared:

    p = softmax(head(norm(M_b h_b))),    L = mean over blocks and targets of
        - (1 + q_y)^γ log p_y - Σ_{c ≠ y} q_c log p_c

with q the teacher's probabilities and y the label: the objective `enhanced` of stage 3.

Source: OFA-KD (arXiv 2310.19444), section 3, adaptive target enhancement. Adapted from vision: a position of a text has
a label where an image has one, and the branch is one matrix and the model's own norm and head, where the paper has a
small network for each kind of architecture. The formula is the paper's; the authors' code raises the other q_c to γ
too, which is the same for γ = 1.

Memory: nothing of the size of all logits, as everywhere in stage 3; a D × D matrix an exit. Time: one pass of both
heads an exit.
"""

import torch
from torch import Tensor, nn

from limbeck.core.objectives import Exits
from limbeck.models.backbone import find_final_norm
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.objectives.base import Contribution, Counts, Models, Objective, TextPass, parse_blocks


class ExitsObjective(Objective):
    """Learns from the teacher's predictions in the middle of the student."""

    name = "exits"
    settings: Exits

    def __init__(self, settings: Exits, models: Models, seed: int):
        super().__init__(settings, models, seed)
        self.reads = [models.blocks[i] for i in parse_blocks(settings.blocks, len(models.blocks), "exits.blocks")]
        self.maps = nn.ParameterList(nn.Parameter(torch.eye(models.width)) for _ in self.reads)
        self.weights = ObjectiveWeights(kl=0.0, enhanced=1.0, gamma=settings.gamma)
        # in a tuple, so that its parameters are not taken for this module's own
        self.norm = (find_final_norm(models.student, models.blocks[-1]),)

    def contribute(self, done: TextPass, counts: Counts) -> Contribution:
        assert done.logits is not None
        models, weight, divisor = self.models, self.settings.weight, counts["text_targets"] * len(self.reads)
        total: Tensor | float = 0.0
        roots = []
        for block, matrix in zip(self.reads, self.maps):
            state = done.student_blocks[block]
            state = self.norm[0]((state.to(matrix.dtype) @ matrix.T).to(state.dtype))
            scale = weight * done.loss_scale / divisor
            sums, gradient = models.measure(
                models.student_head, state, done.logits, done.batch.targets, self.weights, scale
            )
            roots.append((state, gradient))
            total = total + sums["enhanced"]
        value = torch.as_tensor(total) / divisor
        return Contribution(value, weight * value, roots)
