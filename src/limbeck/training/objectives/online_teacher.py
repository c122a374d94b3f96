"""A teacher that learns along: small modules behind some of its blocks train with the student.

    stages.logits.objectives.online_teacher: {blocks: "uniform 4", rank: 8, ce: 1, kl: 1}

Behind a block with output h stands h + (h A) B, with A [D, r] at random and B [r, D] zero at first, so the first step's
teacher is the teacher. With q the teacher so extended, p the student and y the labels,

    the student learns from the stage's own objectives, against q:  KL(q ‖ p), ...
    the modules learn from  ce · (- log q_y) + kl · KL(p ‖ q)

No gradient goes from one to the other. The teacher's own weights are untouched, and the modules are dropped at the end.

Source: online knowledge distillation for autoregressive models (arXiv 2409.12512), in which a teacher with small
trainable modules adapts to its student, in the place of sampling from the student. Adapted: low-rank maps behind
blocks, where the paper puts adapters into the linear layers, whose tensors the student may share here.

Value in the log: what the modules learn from, a target. It is no part of `loss`, which is the student's. Memory: the
teacher's activations from the first chosen block on, which a teacher without modules does not keep. Time: a backward
pass of the teacher from there, and both heads once more.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from limbeck.core.objectives import OnlineTeacher
from limbeck.data.packing import Batch
from limbeck.models.hooks import change_outputs
from limbeck.training.chunked_losses import TeacherLogitsFromHidden
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.objectives.base import Contribution, Counts, Models, Objective, TextPass, parse_blocks


class OnlineTeacherObjective(Objective):
    """Trains low-rank modules in the teacher along with the student."""

    name = "online_teacher"
    settings: OnlineTeacher
    trains_teacher = True

    def __init__(self, settings: OnlineTeacher, models: Models, seed: int):
        super().__init__(settings, models, seed)
        chosen = parse_blocks(settings.blocks, len(models.blocks), "online_teacher.blocks")
        self.names = [models.blocks[i] for i in chosen]
        width, rank = models.width, settings.rank
        self.down = nn.ParameterList(nn.Parameter(torch.randn(width, rank) / width**0.5) for _ in chosen)
        self.up = nn.ParameterList(nn.Parameter(torch.zeros(rank, width)) for _ in chosen)
        self.weights = ObjectiveWeights(ce=settings.ce, kl=settings.kl)

    def teacher_pass(self, batch: Batch) -> AbstractContextManager:
        changes: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            name: partial(self._extend, number) for number, name in enumerate(self.names)
        }
        return change_outputs(self.models.teacher, changes)

    def contribute(self, done: TextPass, counts: Counts) -> Contribution | None:
        models, teacher = self.models, done.teacher
        assert teacher is not None
        if not teacher.requires_grad:  # nothing learns in this pass, as in a measurement
            return None
        student = TeacherLogitsFromHidden(models.student_head, done.student)
        scale = done.loss_scale / counts["text_targets"]
        sums, gradient = models.measure(models.teacher_head, teacher, student, done.batch.targets, self.weights, scale)
        value = sums["loss"] / counts["text_targets"]
        return Contribution(value, torch.zeros_like(value), [(teacher, gradient)])

    def _extend(self, number: int, given: Tensor, output: Tensor) -> Tensor:
        return output + ((output @ self.down[number]) @ self.up[number]).to(output.dtype)
