"""On-policy distillation: the student continues a prompt from the text and learns from its teacher on what it wrote.

    stages.logits.objectives.on_policy: {share: 0.5, divergence: reverse, new_tokens: 64}

GKD (arXiv 2306.13649, section 3, algorithm 1): with x a prompt, y what the student wrote after it, and n its tokens,

    L = (1 - λ) E_text[L_text] + λ E_{x, y ~ student}[ 1/n Σ_t D(teacher(· | x, y_<t), student(· | x, y_<t)) ]

D is the forward KL, the reverse KL (MiniLLM, arXiv 2306.08543, equation 1) or the generalized Jensen-Shannon divergence
(GKD, section 2), each taken token by token. As in GKD no gradient goes through the sampling, so MiniLLM's term for what
a token does to the tokens behind it is left out, and with it its policy gradient.

Adapted: a share λ of the sequences gives up its last tokens for the student's own, and both kinds of tokens are one
mean: with 64 new tokens in sequences of 512, half of the sequences have a ninth of the tokens, and `weight: 8` gives
both kinds the same say. Documents of packed text stay apart: the prompt is the last document before the student begins.
An end of text ends nothing, as in packed text, so the number of tokens is known before the first pass.

Memory: the passes over what was written are those over a sequence of text, and while it writes the student has its
own cache of constant size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from limbeck.core.errors import LimbeckError
from limbeck.core.objectives import OnPolicy
from limbeck.data.packing import IGNORE_INDEX, Batch
from limbeck.models import build_cache_kwargs
from limbeck.models.backbone import run_backbone
from limbeck.ops.matrix_rows import make_generators
from limbeck.training.chunked_losses import TeacherLogitsFromHidden
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.objectives.base import Contribution, Counts, Models, Objective, Surroundings

CHOICE, WRITING = 0, 1  # what is drawn, added to the seed


class OnPolicyObjective(Objective):
    """Learns from the student's own continuations."""

    name = "on_policy"
    settings: OnPolicy
    reads_text = False

    def __init__(self, settings: OnPolicy, models: Models, seed: int):
        super().__init__(settings, models, seed)
        divergence = {"forward": "kl", "reverse": "reverse_kl", "jsd": "jsd"}[settings.divergence]
        self.divergence = divergence
        weights: dict[str, Any] = {"kl": 0.0, divergence: 1.0, "beta": settings.beta}
        self.weights = ObjectiveWeights(**weights)

    @classmethod
    def check(cls, settings: OnPolicy, around: Surroundings, key: str) -> None:
        length = around.length
        if settings.new_tokens >= length:
            raise LimbeckError(
                f"{key}.new_tokens is {settings.new_tokens}, of sequences of {length} tokens",
                expected=f"at most {length - 1}, which leaves a token for the prompt",
                hint=f"--set {key}.new_tokens={length // 4}",
            )

    @property
    def share(self) -> float:
        return self.settings.share

    def choose_rows(self, batch: Batch) -> Tensor:
        draws = [torch.rand((), generator=one) for one in make_generators(batch.cpu_input_ids, self.seed + CHOICE)]
        return torch.stack(draws) < self.settings.share

    def count(self, own: Batch | None) -> dict[str, float]:
        written = 0 if own is None else len(own.input_ids) * self._count_new_tokens(own)
        return {"targets": float(written), "written": float(written)}

    def is_found_in(self, counts: Counts) -> bool:
        return counts["written"] > 0

    def run_own(self, own: Batch, counts: Counts, loss_scale: float) -> Contribution:
        models, weight = self.models, self.settings.weight
        with torch.no_grad(), models.autocast():
            written = self.write(own)
            teacher = TeacherLogitsFromHidden(models.teacher_head, run_backbone(models.teacher, written))
        with models.autocast():
            hidden = models.run_student(written)
            scale = weight * loss_scale / counts["targets"]
            sums, gradient = models.measure(models.student_head, hidden, teacher, written.targets, self.weights, scale)
        total = sums[self.divergence]
        return Contribution(total / counts["written"], weight * total / counts["targets"], [(hidden, gradient)])

    @torch.no_grad()
    def write(self, batch: Batch) -> Batch:
        """Return the sequences with their last tokens replaced by the student's own, which alone are targets."""
        new = self._count_new_tokens(batch)
        prompt = batch.input_ids.shape[1] - new
        generators = make_generators(batch.cpu_input_ids, self.seed + WRITING)
        draws = torch.stack([torch.rand(new, generator=one, dtype=torch.float64) for one in generators])
        ids, positions = batch.input_ids[:, :prompt], batch.position_ids[:, :prompt]
        text = continue_documents(self.models, ids, positions, draws.to(ids.device), self.settings.temperature)
        after = positions[:, -1:] + torch.arange(1, new + 1, device=ids.device)
        ignored = torch.full_like(ids[:, 1:], IGNORE_INDEX), torch.full_like(ids[:, :1], IGNORE_INDEX)
        targets = torch.cat([ignored[0], text, ignored[1]], 1)
        written = Batch(torch.cat([ids, text], 1), torch.cat([positions, after], 1), targets)
        return written.to(ids.device)

    def _count_new_tokens(self, batch: Batch) -> int:
        # a rehearsal warms up with short sequences
        return min(self.settings.new_tokens, batch.input_ids.shape[1] - 1)


def continue_documents(models: Models, ids: Tensor, positions: Tensor, draws: Tensor, temperature: float) -> Tensor:
    """Let the student continue the last document of each packed sequence, sampling from all tokens.

    Args:
        ids, positions: [B, P], the sequences so far; positions begin at 0 in each document.
        draws: uniform numbers [B, N], one for each token that is written.

    Returns:
        The new tokens [B, N].
    """
    student, backbone = models.student, models.student.get_decoder()
    lengths = positions[:, -1] + 1
    length = int(lengths.max())
    # the documents before are neither read nor remembered: they are padding on the left
    mask = torch.arange(length, device=ids.device) >= length - lengths[:, None]
    has_padding = not bool(mask.all())
    step_ids, step_positions = ids[:, -length:], (mask.long().cumsum(1) - 1).clamp_min(0)
    cache, written = DynamicCache(config=student.config), []
    for draw in draws.unbind(1):
        masked = {"attention_mask": mask.long()} if has_padding else {}
        output = backbone(
            input_ids=step_ids, position_ids=step_positions, **masked, **build_cache_kwargs(backbone, cache)
        )
        logits = models.student_head(output.last_hidden_state[:, -1]).double() / temperature
        # inverse of the distribution function; rounding may leave its last value under one
        step_ids = (logits.softmax(-1).cumsum(-1) < draw[:, None]).sum(-1, keepdim=True).clamp_max(logits.shape[-1] - 1)
        written.append(step_ids)
        step_positions = step_positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return torch.cat(written, 1)
