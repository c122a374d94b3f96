"""A teacher whose features adapt to the student: low-rank prompts that see the student's error move the target.

    stages.logits.objectives.adapted_features: {weight: 1, blocks: "uniform 4", rank: 8, stay: 1}

With t and s the teacher's and the student's output of a block, and e = s - t the student's error, of which no gradient
is taken,

    t' = t + (t A + e E) B,    L = mean over blocks and tokens of  ( ‖s - t'‖² + stay · ‖t' - t‖² ) / ‖t‖²

A and E [D, r] start at random and B [r, D] at zero, so at first the target is the teacher's own. The second term keeps
the prompts from carrying the target over to the student, which would end all learning.

Source: FOFA (arXiv 2501.08885, later called PAT), whose prompt tuning blocks take in the student's features so that
the teacher's become learnable for it. Adapted from vision: its prompts stand inside the teacher and are held by the
teacher's own classification loss; here they stand behind a block and are held by the distance that they move. Its other
half, attention over regions of an image, has no counterpart in a text whose tokens both models have in common. The
target is one of stage 3: there the student's error includes what its earlier blocks got wrong.

Memory: three D × r matrices a block, and both models' outputs of these blocks.
"""

import torch
from torch import Tensor, nn

from limbeck.core.objectives import AdaptedFeatures
from limbeck.training.objectives.base import Contribution, Counts, Models, Objective, TextPass, parse_blocks


class AdaptedFeaturesObjective(Objective):
    """Compares block outputs with the teacher's after prompts have moved these."""

    name = "adapted_features"
    settings: AdaptedFeatures

    def __init__(self, settings: AdaptedFeatures, models: Models, seed: int):
        super().__init__(settings, models, seed)
        chosen = parse_blocks(settings.blocks, len(models.blocks), "adapted_features.blocks")
        self.reads = [models.blocks[i] for i in chosen]
        width, rank = models.width, settings.rank
        self.from_teacher = nn.ParameterList(nn.Parameter(torch.randn(width, rank) / width**0.5) for _ in chosen)
        self.from_error = nn.ParameterList(nn.Parameter(torch.randn(width, rank) / width**0.5) for _ in chosen)
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(rank, width)) for _ in chosen)

    def adapt(self, number: int, teacher: Tensor, student: Tensor) -> Tensor:
        """Return the teacher's outputs [B, T, D] of the block with this number among those that are read, adapted."""
        error = student.detach() - teacher
        return teacher + (teacher @ self.from_teacher[number] + error @ self.from_error[number]) @ self.up[number]

    def contribute(self, done: TextPass, counts: Counts) -> Contribution:
        total: Tensor | float = 0.0
        for number, block in enumerate(self.reads):
            dtype = torch.promote_types(self.up[number].dtype, torch.float32)
            ours, theirs = done.student_blocks[block].to(dtype), done.teacher_blocks[block].detach().to(dtype)
            with torch.autocast(ours.device.type, enabled=False):
                target = self.adapt(number, theirs, ours)
                distance = (ours - target).square().sum(-1) + self.settings.stay * (target - theirs).square().sum(-1)
                total = total + (distance / theirs.square().sum(-1).clamp_min(1e-8)).sum()
        return self.scalar(torch.as_tensor(total) / (counts["tokens"] * len(self.reads)), done.loss_scale)
