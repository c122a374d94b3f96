"""Feature alignment: the outputs of several blocks, through learned maps, against the teacher's of the same blocks.

    stages.logits.objectives.features: {weight: 1, blocks: "uniform 4", block_weights: [1, 1, 2, 4]}

    L = Σ_b w_b · mean over tokens of d(M_b h^s_b, h^t_b),     Σ_b w_b = 1

d is one of stage 2's distances; M_b is a matrix that learns along and starts as the identity, so a student that equals
its teacher has no loss.

Source: feature alignment for language models (arXiv 2412.19449), whose multi-task loss adds a sum of such distances
over several layers to the one on the outputs. Adapted: its students are narrower than their teachers and need the
maps; here both have one width, and a map takes up what may turn freely (`maps: none` leaves it out). Its loss on
attention maps is not part of it: stage 1 is that, and a student has no attention map in this pass.

Unlike stage 2 the student runs on its own states, so what one block gets wrong the next one sees.

Memory: a D × D matrix a block with its gradient and optimizer state, and the teacher's outputs of these blocks.
"""

import torch
from torch import Tensor, nn

from limbeck.core.errors import LimbeckError
from limbeck.core.objectives import Features
from limbeck.training.losses import hidden_distance
from limbeck.training.objectives.base import (
    Contribution,
    Counts,
    Models,
    Objective,
    Surroundings,
    TextPass,
    parse_blocks,
)


class FeaturesObjective(Objective):
    """Compares block outputs through learned maps."""

    name = "features"
    settings: Features

    def __init__(self, settings: Features, models: Models, seed: int):
        super().__init__(settings, models, seed)
        self.reads = [models.blocks[i] for i in parse_blocks(settings.blocks, len(models.blocks), "features.blocks")]
        given = settings.block_weights or [1.0] * len(self.reads)
        self.block_weights = [weight / sum(given) for weight in given]
        count = len(self.reads) if settings.maps == "linear" else 0
        self.maps = nn.ParameterList(nn.Parameter(torch.eye(models.width)) for _ in range(count))

    @classmethod
    def check(cls, settings: Features, around: Surroundings, key: str) -> None:
        super().check(settings, around, key)
        chosen = len(parse_blocks(settings.blocks, around.blocks, f"{key}.blocks"))
        if settings.block_weights is not None and len(settings.block_weights) != chosen:
            raise LimbeckError(
                f"{key}.block_weights has {len(settings.block_weights)} numbers",
                expected=f"{chosen}, one for each of the blocks {settings.blocks!r}",
                hint=f"--set {key}.block_weights=null",
            )

    def contribute(self, done: TextPass, counts: Counts) -> Contribution:
        total: Tensor | float = 0.0
        for number, (block, weight) in enumerate(zip(self.reads, self.block_weights)):
            ours = done.student_blocks[block]
            if self.maps:
                with torch.autocast(ours.device.type, enabled=False):
                    ours = ours.to(self.maps[number].dtype) @ self.maps[number].T
            distance = hidden_distance(ours, done.teacher_blocks[block], loss=self.settings.loss)
            total = total + weight * distance
        return self.scalar(torch.as_tensor(total) / counts["tokens"], done.loss_scale)
