"""Stage 3's loss without the logits: heads run on a chunk of tokens at a time and their gradient is formed there.

    teacher = TeacherLogitsFromHidden(teacher_head, hidden_t)                       # or TeacherLogitsFromCache(index, log_q): cached signals
    sums, gradient = logit_losses(student_head, hidden_s, teacher, targets, ObjectiveWeights(ce=0.5, kl=0.5))

No tensor of all logits exists, of neither model. What is returned is summed over tokens; the caller divides by a count
known beforehand.
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
AT_ONCE = 2**29  # bytes of float32 logits on a GPU; a chunk takes about six times as much


class TeacherLogits(Protocol):
    """What the teacher says about the tokens of a batch."""

    def for_tokens(self, part: Tensor) -> Tensor | TopLogProbs:
        """Logits [n, V] of these tokens (numbers in [B · T]), or the most likely of them."""


@dataclass(frozen=True)
class TeacherLogitsFromHidden:
    """The teacher's logits from its hidden states [B, T, D], formed when they are asked for."""

    head: Head
    hidden: Tensor

    @cached_property
    def product(self) -> Tensor | None:
        """The head's weight in the dtype of autocast, cast once and not once a chunk."""
        weight = _plain_weight(self.head)
        if weight is None or _dtype_of_products(weight) == weight.dtype:
            return None
        return weight.detach().to(_dtype_of_products(weight))

    def for_tokens(self, part: Tensor) -> Tensor:
        h = self.hidden.detach().flatten(0, 1)[part]
        return (self.head(h) if self.product is None else F.linear(h.to(self.product.dtype), self.product)).float()


@dataclass(frozen=True)
class TeacherLogitsFromCache:
    """The teacher's k most likely tokens, kept from an earlier pass: index [B, T, k] and log probability [B, T, k]."""

    index: Tensor
    log_q: Tensor

    def for_tokens(self, part: Tensor) -> TopLogProbs:
        return TopLogProbs(self.index.flatten(0, 1)[part].long(), self.log_q.flatten(0, 1)[part].float())


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
    """The weighted objectives and what else is watched over the valid targets, a chunk of tokens at a time.

    With `weights` and `compute_grad`, the gradient of the weighted sum is formed on the way: that of the head's parameters is
    added to their `.grad`, that of the hidden states is returned for the caller's backward pass.

    Args:
        student: [B, T, D] hidden states.
        teacher: None where no objective asks it: then nothing is said of it either.
        targets: [B, T] next tokens, -100 where there is none.
        weights: None measures only.
        scale: factor on the gradient (one over the global count of valid targets).
        rows: numbers in [B · T] of the tokens with a target, where they are known: then a GPU is not asked for them.
        compiled: fuse the passes over the logits by torch.compile.

    Returns:
        sums over valid targets: count, ce and, with a teacher, agree (same most likely token); with all of its logits
        teacher_ce and kl, and reverse_kl where nothing is learnt; each weighed objective by name, and `loss`, their
        weighted sum. And the gradient with respect to `student` [B, T, D], None where nothing is learnt.

    Raises:
        LimbeckError: an objective that needs all of the teacher's logits where there are only the most likely ones.
    """
    compute_grad = compute_grad and weights is not None
    if weights is not None and isinstance(teacher, TeacherLogitsFromCache):
        check_top_k_objectives(weights)
    rows = (targets.flatten() != -100).nonzero().squeeze(1) if rows is None else rows
    flat, labels = student.detach().flatten(0, 1), targets.flatten()
    gradient = torch.zeros_like(flat) if compute_grad else None
    weight = _plain_weight(student_head) if compute_grad else None
    product = None if weight is None else weight.detach().to(_dtype_of_products(weight))  # cast once, not once a chunk
    token_losses = _fused(_token_losses) if compiled else _token_losses
    sums: dict[str, Tensor] = {}
    for part in rows.split(chunk_size):
        with torch.no_grad():
            signal = None if teacher is None else teacher.for_tokens(part)
        h = flat[part].requires_grad_(compute_grad and weight is None)
        with torch.set_grad_enabled(compute_grad and weight is None):
            logits = student_head(h) if product is None else F.linear(h.to(product.dtype), product)
        with torch.no_grad():
            s = logits.float()
            width = s.shape[-1]
            if isinstance(signal, Tensor):
                width = min(width, signal.shape[-1])  # a vocabulary padded on one side
                signal = signal[:, :width]
            seen, slope = token_losses(s[:, :width], signal, labels[part], weights, compute_grad)
            for name, value in seen.items():
                sums[name] = sums[name] + value if name in sums else value
        if gradient is not None and slope is not None:
            if width < s.shape[-1]:
                slope = F.pad(slope, (0, s.shape[-1] - width))
            gradient[part] = _through_head(logits, slope.mul_(scale).to(logits.dtype), h, weight, product)
    sums["count"] = torch.tensor(float(rows.numel()), dtype=torch.float64)
    return sums, None if gradient is None else gradient.view_as(student)


def _plain_weight(head: Head) -> nn.Parameter | None:
    """W of a head that is h Wᵀ: what follows can then be added up in place."""
    weight = getattr(head, "weight", None)
    if weight is None or getattr(head, "bias", None) is not None:
        return None
    return weight if weight.dtype in (torch.float32, torch.float64) else None


def _dtype_of_products(weight: Tensor) -> torch.dtype:
    """In which dtype products with a weight are taken, under autocast or without."""
    mixed = weight.dtype == torch.float32 and torch.is_autocast_enabled(weight.device.type)
    return torch.get_autocast_dtype(weight.device.type) if mixed else weight.dtype


def choose_logit_chunk_size(model: nn.Module) -> int:
    """How many tokens' logits to have at a time: what stays in a CPU's cache, what keeps a GPU busy."""
    table = model.get_output_embeddings().weight
    if table.device.type == "cpu":
        return 128
    return max(128, AT_ONCE // (4 * table.shape[0]) // 128 * 128)


@functools.cache
def _fused(function: Callable) -> Callable:
    """The function through torch.compile, for any number of tokens."""
    return torch.compile(function, dynamic=True)


def _through_head(
    logits: Tensor, slope: Tensor, h: Tensor, weight: nn.Parameter | None, product: Tensor | None
) -> Tensor:
    """Gradient at h [n, D] of a slope at the logits [n, V], that of the head's parameters added to theirs.

    Autograd makes a tensor of the head's size a chunk and adds it up; for a plain product one call does both in place.
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


def check_top_k_objectives(weights: ObjectiveWeights) -> None:
    """Raises LimbeckError unless the teacher's most likely tokens are enough for these objectives."""
    more = [name for name in weights.active() if name not in ("ce", "top_kl")]
    if more or weights.temperature != 1:
        found = f"weight on {', '.join(more)}" if more else f"temperature {weights.temperature}"
        raise LimbeckError(
            f"{found}, and a cached signal holds only the teacher's most likely tokens",
            expected="top_kl and ce, at temperature 1",
            hint="top_kl in place of kl, or no cached signal",
        )


def _token_losses(
    s: Tensor,
    teacher: Tensor | TopLogProbs | None,
    labels: Tensor,
    weights: ObjectiveWeights | None,
    compute_grad: bool,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """A chunk's losses in float64, and the slope of the weighted ones with respect to the student's logits s [n, V].

    Every pass over [n, V] numbers costs as much as a good part of the head's own product, so there are few: two
    softmaxes, their tops, row products, and one difference in place.
    """
    rows = TokenLogits(s, teacher, labels)
    seen: dict[str, Tensor] = {}
    if isinstance(rows.teacher, TopLogProbs):
        seen["agree"] = (rows.student[0] == rows.teacher.index[:, 0]).sum()
    elif rows.teacher is not None:
        seen["agree"] = (rows.student[0] == rows.other[0]).sum()
        seen["teacher_ce"] = (rows.other[1] - rows.t.gather(1, rows.labels)[:, 0]).sum()
        seen["kl"] = rows.kl_divergence().sum()
        if not compute_grad:
            seen["reverse_kl"] = rows.kl_divergence(reverse=True).sum()
    seen["ce"] = OBJECTIVES["ce"](rows, ObjectiveWeights())[0]
    slope = None
    if weights is not None:
        values, slope = combine_objectives(rows, weights, compute_grad)
        seen = {**values, **seen}  # what is watched is taken at temperature 1
        nothing = torch.zeros((), dtype=torch.float64, device=s.device)
        seen["loss"] = sum((getattr(weights, n) * v.double() for n, v in values.items()), nothing)
    return {name: value.double() for name, value in seen.items()}, slope
