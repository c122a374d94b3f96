"""Weights of tokens in stage 3 by how much the teacher loses on them without the far past (key `context_weight`).

    context = ContextWeights(pair, weight=2.0)
    weights = context.weigh(batch, teacher_logits)            # [B, T], mean 1 over the targets of each sequence

The weight of a token is 1 + c KL(teacher || teacher with the student's window and sinks), with c the `context_weight`,
divided by the mean over its sequence's targets. Most tokens follow from the tokens just before them, and there the two
teachers agree; where they differ, something outside the window is needed. The mean is taken over a sequence, not over a
step, so a loss does not depend on how a step is split.

Legend: B batch, T time, n tokens.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.data.packing import Batch
from limbeck.mixers.sliding_window import SlidingWindowOptions
from limbeck.models import convert, get_mixers
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.hooks import DistillationPair
from limbeck.training.chunked_losses import TeacherLogits, choose_logit_chunk_size
from limbeck.training.losses import TokenLogits


class ContextWeights:
    """The teacher beside itself with a sliding window in the converted layers.

    Args:
        pair: teacher and student; the window is that of the student's mixer in each layer, where it has one.
        weight: c, at least 0.
        chunk_size: tokens whose logits exist at a time; None chooses it.
    """

    def __init__(self, pair: DistillationPair, weight: float, chunk_size: int | None = None):
        self.weight = weight
        self.windowed = build_windowed_teacher(pair)
        self.head = LMHead(self.windowed)
        self.chunk_size = chunk_size or choose_logit_chunk_size(pair.teacher)

    @torch.no_grad()
    def weigh(self, batch: Batch, teacher: TeacherLogits) -> Tensor:
        """Return the weights of a batch [B, T], 0 where there is no target; under the autocast of the caller."""
        targets = batch.targets
        hidden, labels = run_backbone(self.windowed, batch).flatten(0, 1), targets.flatten()
        divergence = torch.zeros_like(labels, dtype=torch.float32)
        for tokens in (labels != -100).nonzero().squeeze(1).split(self.chunk_size):
            whole = teacher.for_tokens(tokens)
            assert isinstance(whole, Tensor), "the most likely tokens alone do not tell what the window costs"
            windowed = self.head(hidden[tokens]).to(whole.dtype)
            # a rounding error may be negative
            divergence[tokens] = TokenLogits(windowed, whole, labels[tokens]).kl_divergence().clamp_min(0)
        weights = (1 + self.weight * divergence.view_as(targets)) * (targets != -100)
        counts = (targets != -100).sum(1, keepdim=True).clamp_min(1)
        return weights / (weights.sum(1, keepdim=True) / counts).clamp_min(1)


def build_windowed_teacher(pair: DistillationPair) -> PreTrainedModel:
    """Build the teacher with sliding-window attention in the converted layers, from the teacher's own tensors.

    Window and sinks are those of the student's mixer in that layer, or of a mixer inside it; the defaults of
    `sliding_window` where it has none.
    """
    teacher, student, sites, _ = pair
    mixers = get_mixers(student)
    rules = [{"layers": [site.shape.layer], "options": find_window(mixers[site.module])} for site in sites]
    layers = [site.shape.layer for site in sites]
    windowed = convert(teacher, "sliding_window", layers, rules=rules, share_weights=True)
    for name, parameter in teacher.named_parameters():  # converted modules have copies, which nothing trains here
        module, _, leaf = name.rpartition(".")
        setattr(windowed.get_submodule(module), leaf, parameter)
    return windowed.eval().requires_grad_(False)


def find_window(mixer: nn.Module) -> dict[str, int]:
    """Return window and sinks of a mixer, or of the first one inside it that has them."""
    for module in mixer.modules():
        if isinstance(window := getattr(module, "window", None), int):
            return {"window": window, "sinks": int(getattr(module.options, "sinks", 0))}  # type: ignore[union-attr]
    default = SlidingWindowOptions()
    return {"window": default.window, "sinks": default.sinks}
