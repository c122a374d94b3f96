"""Stage 3's losses without a tensor of all logits: the heads run on a chunk of tokens at a time, forward and backward.

    teacher = TeacherLogitsFromHidden(teacher_head, teacher_hidden)         # or TeacherLogitsFromCache(index, log_q)
    sums, gradient = logit_losses(student_head, student_hidden, teacher, targets, ObjectiveWeights(ce=0.5, kl=0.5))

Losses are summed over tokens; the caller divides by a count known beforehand.

Legend: B batch, T time, D model width, V vocabulary, n tokens of a chunk, k most likely tokens of the teacher.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.errors import LimbeckError
from limbeck.training.losses import OBJECTIVES, ObjectiveWeights, TokenLogits, TopLogProbs, combine_objectives

Head = Callable[[Tensor], Tensor]  # [N, D] -> [N, V]
GPU_CHUNK_BYTES = 2**29  # of float32 logits; the losses of a chunk take about six times as much
CPU_CHUNK_TOKENS = 128  # whose logits stay in the cache


class TeacherLogits(Protocol):
    """The teacher's logits for the tokens of a batch."""

    def for_tokens(self, tokens: Tensor) -> Tensor | TopLogProbs:
        """Return the logits [n, V] of these tokens (indices into [B · T]), or their most likely entries."""


@dataclass(frozen=True)
class TeacherLogitsFromHidden:
    """The teacher's logits from its hidden states [B, T, D], computed for each chunk."""

    head: Head
    hidden: Tensor

    @cached_property
    def product(self) -> Tensor | None:
        """The head's weight in the dtype of autocast, cast once, not for each chunk; None if it needs no cast."""
        weight = _plain_weight(self.head)
        if weight is None or _product_dtype(weight) == weight.dtype:
            return None
        return weight.detach().to(_product_dtype(weight))

    def for_tokens(self, tokens: Tensor) -> Tensor:
        hidden = self.hidden.detach().flatten(0, 1)[tokens]
        if self.product is None:
            return self.head(hidden).float()
        return F.linear(hidden.to(self.product.dtype), self.product).float()


@dataclass(frozen=True)
class TeacherLogitsFromCache:
    """The teacher's k most likely tokens, saved in an earlier pass: index [B, T, k] and log probability [B, T, k]."""

    index: Tensor
    log_q: Tensor

    def for_tokens(self, tokens: Tensor) -> TopLogProbs:
        return TopLogProbs(self.index.flatten(0, 1)[tokens].long(), self.log_q.flatten(0, 1)[tokens].float())


def logit_losses(
    student_head: Head,
    student: Tensor,
    teacher: TeacherLogits | None,
    targets: Tensor,
    weights: ObjectiveWeights | None = None,
    scale: float = 1.0,
    chunk_size: int = 256,
    compute_grad: bool = True,
    rows: Tensor | None = None,
    compiled: bool = False,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Sum objectives and metrics over the tokens with a target, a chunk of tokens at a time.

    With `weights` and `compute_grad`, the gradient of the weighted sum of objectives is computed on the way: that of
    the head's parameters is added to their `.grad`, that of the hidden states is returned for the caller's backward
    pass.

    Args:
        student: [B, T, D] hidden states.
        teacher: None if no objective needs it; then there are no metrics of it either.
        targets: [B, T] next tokens, -100 where there is none.
        weights: None computes metrics only.
        scale: factor on the gradient (one over the global number of targets).
        rows: indices into [B · T] of the tokens with a target, if they are known, which saves a device
            synchronization.
        compiled: fuse the passes over the logits by torch.compile.

    Returns:
        Sums over tokens with a target, by name: count, ce and, with a teacher, agree (same most likely token); with all
        of its logits teacher_ce and kl, and reverse_kl where no gradient is computed; each active objective, and
        `loss`, their weighted sum. And the gradient with respect to `student` [B, T, D], or None.

    Raises:
        LimbeckError: an objective needs all of the teacher's logits, and only the most likely ones are cached.
    """
    compute_grad = compute_grad and weights is not None
    if weights is not None and isinstance(teacher, TeacherLogitsFromCache):
        check_top_k_objectives(weights)
    rows = (targets.flatten() != -100).nonzero().squeeze(1) if rows is None else rows
    hidden, labels = student.detach().flatten(0, 1), targets.flatten()
    gradient = torch.zeros_like(hidden) if compute_grad else None
    weight = _plain_weight(student_head) if compute_grad else None
    product = None if weight is None else weight.detach().to(_product_dtype(weight))  # cast once, not for each chunk
    token_losses = _compile(_token_losses) if compiled else _token_losses
    sums: dict[str, Tensor] = {}
    for tokens in rows.split(chunk_size):
        with torch.no_grad():
            teacher_logits = None if teacher is None else teacher.for_tokens(tokens)
        h = hidden[tokens].requires_grad_(compute_grad and weight is None)
        with torch.set_grad_enabled(compute_grad and weight is None):
            logits = student_head(h) if product is None else F.linear(h.to(product.dtype), product)
        with torch.no_grad():
            s = logits.float()
            width = s.shape[-1]
            if isinstance(teacher_logits, Tensor):
                width = min(width, teacher_logits.shape[-1])  # one model's vocabulary may be padded
                teacher_logits = teacher_logits[:, :width]
            losses, slope = token_losses(s[:, :width], teacher_logits, labels[tokens], weights, compute_grad)
            for name, value in losses.items():
                sums[name] = sums[name] + value if name in sums else value
        if gradient is not None and slope is not None:
            if width < s.shape[-1]:
                slope = F.pad(slope, (0, s.shape[-1] - width))
            gradient[tokens] = _backward_through_head(logits, slope.mul_(scale).to(logits.dtype), h, weight, product)
    sums["count"] = torch.tensor(float(rows.numel()), dtype=torch.float64)
    return sums, None if gradient is None else gradient.view_as(student)


def _token_losses(
    s: Tensor,
    teacher: Tensor | TopLogProbs | None,
    labels: Tensor,
    weights: ObjectiveWeights | None,
    compute_grad: bool,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Compute a chunk's losses in float64, and the gradient of the weighted ones at the student's logits s [n, V].

    Every pass over [n, V] numbers costs a good part of the head's own product, so there are few: two softmaxes, their
    maxima, row products, and one difference in place.
    """
    rows = TokenLogits(s, teacher, labels)
    metrics: dict[str, Tensor] = {}
    if isinstance(rows.teacher, TopLogProbs):
        metrics["agree"] = (rows.student[0] == rows.teacher.index[:, 0]).sum()
    elif rows.teacher is not None:
        metrics["agree"] = (rows.student[0] == rows.other[0]).sum()
        metrics["teacher_ce"] = (rows.other[1] - rows.t.gather(1, rows.labels)[:, 0]).sum()
        metrics["kl"] = rows.kl_divergence().sum()
        if not compute_grad:
            metrics["reverse_kl"] = rows.kl_divergence(reverse=True).sum()
    metrics["ce"] = OBJECTIVES["ce"](rows, ObjectiveWeights())[0]
    gradient = None
    if weights is not None:
        # last, because it overwrites the softmaxes
        values, gradient = combine_objectives(rows, weights, compute_grad)
        metrics = {**values, **metrics}  # metrics are at temperature 1
        zero = torch.zeros((), dtype=torch.float64, device=s.device)
        metrics["loss"] = sum((getattr(weights, n) * v.double() for n, v in values.items()), zero)
    return {name: value.double() for name, value in metrics.items()}, gradient


def _backward_through_head(
    logits: Tensor, slope: Tensor, h: Tensor, weight: nn.Parameter | None, product: Tensor | None
) -> Tensor:
    """Return the gradient at h [n, D] of a gradient at the logits [n, V]; adds that of the head's parameters.

    Autograd would make a tensor of the head's size for each chunk and add it; a plain product does both in place.
    """
    if weight is None or product is None:
        with torch.autocast(logits.device.type, enabled=False):
            logits.backward(slope)
        assert h.grad is not None
        return h.grad
    with torch.no_grad():
        if weight.requires_grad:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            if product.dtype == weight.dtype:
                weight.grad.addmm_(slope.T, h)
            else:
                weight.grad.add_(slope.T @ h.to(product.dtype))
        return (slope @ product).to(h.dtype)


def _plain_weight(head: Head) -> nn.Parameter | None:
    """Return W of a head that is h Wᵀ and nothing else, whose gradient can be added in place."""
    weight = getattr(head, "weight", None)
    if weight is None or getattr(head, "bias", None) is not None:
        return None
    return weight if weight.dtype in (torch.float32, torch.float64) else None


def _product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype of products with a weight, which autocast may change."""
    mixed = weight.dtype == torch.float32 and torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if mixed else weight.dtype


@functools.cache
def _compile(function: Callable) -> Callable:
    """Compile a function for any number of tokens."""
    return torch.compile(function, dynamic=True)


def choose_logit_chunk_size(model: nn.Module) -> int:
    """Return the number of tokens whose logits to compute at a time: few for a CPU's cache, many for a busy GPU."""
    table = model.get_output_embeddings().weight
    if table.device.type == "cpu":
        return CPU_CHUNK_TOKENS
    return max(128, GPU_CHUNK_BYTES // (4 * table.shape[0]) // 128 * 128)


def check_top_k_objectives(weights: ObjectiveWeights) -> None:
    """Check that these objectives need the teacher's most likely tokens only.

    Raises:
        LimbeckError: they do not.
    """
    others = [name for name in weights.active() if name not in ("ce", "top_kl")]
    if others or weights.temperature != 1:
        problem = f"weight on {', '.join(others)}" if others else f"temperature {weights.temperature}"
        raise LimbeckError(
            f"{problem}, but the teacher's cached logits contain only its most likely tokens",
            expected="top_kl and ce, at temperature 1",
            hint="top_kl instead of kl, or no cache_teacher",
        )
