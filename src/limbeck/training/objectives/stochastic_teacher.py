"""A stochastic teacher: several passes with dropout, of which the student's own state chooses.

    stages.logits.objectives.stochastic_teacher: {passes: 4, dropout: 0.1, temperature: 0.1}

At each token let t_0 be the teacher's final hidden state, t_1 ... t_K those of K passes in which dropout falls on what
each block adds, s the student's, and c_k = cos(s, t_k). Passes with c_k below the mean are filtered out, and

    t' = Σ_k w_k t_k,    w = softmax(c / temperature) over those that are left

stands in for t_0 in all objectives against the teacher's logits: KL(head(t') ‖ student), ...

Source: stochastic self-distillation (arXiv 2504.14307): dropout at the time of distillation makes many teachers of one,
and student-guided distillation filters their representations and weights them by what the student has. Adapted: the
paper classifies whole signals, with one representation each, and filters by the task; here each token has its own
weights, and the filter is the mean likeness. Its student is its teacher's equal, which a student here becomes late.

Time: K passes of the teacher more. Memory: K + 1 hidden states [B, T, D].
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.core.objectives import StochasticTeacher
from limbeck.data.packing import Batch
from limbeck.models.backbone import run_backbone
from limbeck.models.hooks import change_outputs
from limbeck.ops.matrix_rows import make_generators
from limbeck.training.chunked_losses import TeacherLogits, TeacherLogitsFromHidden
from limbeck.training.objectives.base import Objective, TextPass


class StochasticTeacherObjective(Objective):
    """Replaces the teacher's last states by a mean over passes with dropout."""

    name = "stochastic_teacher"
    settings: StochasticTeacher

    def change_logits(self, done: TextPass) -> TeacherLogits:
        assert done.teacher is not None
        passes = [done.teacher, *(self._run_pass(done.batch, number) for number in range(self.settings.passes))]
        states = torch.stack([one.detach() for one in passes])
        mixed = mix_by_likeness(done.student.detach(), states, self.settings.temperature)
        return TeacherLogitsFromHidden(self.models.teacher_head, mixed)

    @torch.no_grad()
    def _run_pass(self, batch: Batch, number: int) -> Tensor:
        """Run the teacher with dropout; `number` tells the passes over a batch apart."""
        models = self.models
        changes = {
            name: partial(self._drop, batch, number * len(models.blocks) + place)
            for place, name in enumerate(models.blocks)
        }
        with models.autocast(), change_outputs(models.teacher, changes):
            return run_backbone(models.teacher, batch)

    def _drop(self, batch: Batch, salt: int, given: Tensor, output: Tensor) -> Tensor:
        """Drop entries of what a block adds to its input, and scale up the others."""
        rate = self.settings.dropout
        generators = make_generators(batch.cpu_input_ids, self.seed + 1 + salt)
        kept = torch.stack([torch.rand(output.shape[1:], generator=one) >= rate for one in generators])
        return given + (output - given) * kept.to(output.device) / (1 - rate)


def mix_by_likeness(student: Tensor, passes: Tensor, temperature: float) -> Tensor:
    """Average a teacher's passes token by token, by their cosine to the student's state.

    Args:
        student: [B, T, D].
        passes: [K, B, T, D]. Those under the mean cosine of a token do not count for it.
        temperature: of the weights.

    Returns:
        [B, T, D].
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    likeness = F.cosine_similarity(student.to(dtype)[None], passes.to(dtype), dim=-1)  # [K, B, T]
    # rounding must not take out passes that are all alike
    is_near = likeness >= likeness.mean(0) - 1e-6
    weights = (likeness / temperature).masked_fill(~is_near, float("-inf")).softmax(0)
    return torch.einsum("kbt,kbtd->btd", weights, passes.to(dtype)).to(passes.dtype)
