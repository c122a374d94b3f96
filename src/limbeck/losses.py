"""The distances between student and teacher.

Each returns a sum and the caller divides by a count known beforehand, so no loss depends on how a batch was split, on
padding or on the length.

    distance = matrix_distance(student_matrix, teacher_matrix, valid)      # stage 1, summed over sequences
    distance = hidden_distance(y, target, valid, "relative")               # stage 2, summed over tokens
    sums, gradient = logit_losses(head_s, head_t, h_s, h_t, targets, ...)  # stage 3, summed over tokens, chunked
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def matrix_distance(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Frobenius norm of the difference per head and sequence, over the root of its rows; mean over heads, sum over B.

    MOHAWK (arXiv 2408.10189, equation 1) up to the root of the number of rows, which makes it independent of length.

    Args:
        student, teacher: [B, H, T, T].
        valid: [B, T] bool, rows and columns that count; None for all.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    difference = student.to(wide) - teacher.to(wide)
    rows = torch.full((student.shape[0],), float(student.shape[2]), device=student.device)
    if valid is not None:
        difference = difference * valid[:, None, :, None] * valid[:, None, None, :]
        rows = valid.sum(1).clamp_min(1).to(rows.dtype)
    norm = torch.linalg.vector_norm(difference, dim=(-2, -1))  # [B, H], its slope at zero is zero
    return (norm.mean(1) / rows.sqrt()).sum()


def hidden_distance(
    student: Tensor, teacher: Tensor, valid: Tensor | None = None, loss: Literal["l2", "relative"] = "relative"
) -> Tensor:
    """Distance of hidden states [B, T, D], summed over the valid tokens.

    "l2": the L2 norm of the difference (MOHAWK, equation 2). "relative": its square over the target's square.
    """
    teacher = teacher.to(student.dtype)
    squares = (student - teacher).square().sum(-1)
    if loss == "relative":
        each = squares / teacher.square().sum(-1).clamp_min(1e-8)
    else:
        each = torch.where(squares > 0, squares.clamp_min(1e-24).sqrt(), squares)
    return (each if valid is None else each * valid).sum()


@dataclass(frozen=True)
class LogitWeights:
    """Stage 3: how cross-entropy and divergence are weighed, and the divergence's temperature and direction."""

    ce: float = 0.0
    kl: float = 1.0
    temperature: float = 1.0
    direction: Literal["forward", "reverse"] = "forward"


def logit_losses(
    student_head: Callable[[Tensor], Tensor],
    teacher_head: Callable[[Tensor], Tensor],
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    weights: LogitWeights | None,
    scale: float = 1.0,
    chunk: int = 128,
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Cross-entropy, divergence and agreement over the valid targets, a chunk of tokens at a time.

    No tensor of all logits exists. With `weights`, the gradient of the weighted loss is formed on the way: that of the
    head's parameters is added to their `.grad`, that of the hidden states is returned for the caller's backward pass.

    Args:
        student_head, teacher_head: [N, D] -> [N, vocabulary].
        student, teacher: [B, T, D] hidden states.
        targets: [B, T] next tokens, -100 where there is none.
        weights: None measures only.
        scale: factor on the gradient (one over the global count of valid targets).

    Returns:
        sums over valid targets (ce of student and teacher, both divergences, top-1 agreement, count), and the gradient
        of the loss with respect to `student` [B, T, D], None without weights.
    """
    rows = (targets.flatten() != -100).nonzero().squeeze(1)
    flat_s, flat_t, labels = student.detach().flatten(0, 1), teacher.detach().flatten(0, 1), targets.flatten()
    gradient = torch.zeros_like(flat_s) if weights else None
    names = ("ce", "kl", "reverse_kl", "teacher_ce", "agree")
    sums = {name: torch.zeros((), dtype=torch.float64, device=student.device) for name in names}
    for part in rows.split(chunk):
        with torch.no_grad():
            t = teacher_head(flat_t[part]).float()
        h = flat_s[part].requires_grad_(weights is not None)
        with torch.set_grad_enabled(weights is not None):
            logits = student_head(h)
        with torch.no_grad():
            s = logits.float()
            width = min(s.shape[-1], t.shape[-1])  # a vocabulary padded on one side
            slope = _token_losses(s[:, :width], t[:, :width], labels[part], weights, sums)
        if weights is not None and slope is not None:
            if width < s.shape[-1]:
                slope = F.pad(slope, (0, s.shape[-1] - width))
            with torch.autocast(logits.device.type, enabled=False):
                logits.backward((slope * scale).to(logits.dtype))
            gradient[part] = h.grad  # type: ignore[index, assignment]
    sums["count"] = torch.tensor(float(rows.numel()), dtype=torch.float64)
    return sums, None if gradient is None else gradient.view_as(student)


def _token_losses(
    s: Tensor, t: Tensor, labels: Tensor, weights: LogitWeights | None, sums: dict[str, Tensor]
) -> Tensor | None:
    """Add a chunk's losses to `sums`; the slope of the weighted loss with respect to the student's logits s [n, V].

    Every pass over [n, V] numbers costs as much as a good part of the head's own product, so there are few: two
    softmaxes, their tops, row products, and one difference in place.
    """
    pick = labels[:, None]
    p_s, p_t = s.softmax(-1), t.softmax(-1)
    (top_s, lse_s), (top_t, lse_t) = _top_and_logsumexp(s, p_s), _top_and_logsumexp(t, p_t)
    sums["ce"] += (lse_s - s.gather(1, pick)[:, 0]).sum()
    sums["teacher_ce"] += (lse_t - t.gather(1, pick)[:, 0]).sum()
    sums["kl"] += (_dot(p_t, t) - _dot(p_t, s) - lse_t + lse_s).sum()
    sums["agree"] += (top_s == top_t).sum()
    if weights is None or weights.direction == "reverse":
        sums["reverse_kl"] += (_dot(p_s, s) - _dot(p_s, t) - lse_s + lse_t).sum()
    if weights is None:
        return None
    tau, reverse = weights.temperature, weights.direction == "reverse"
    slope = weights.ce * p_s if weights.ce else None
    if slope is not None:
        slope.scatter_add_(1, pick, torch.full_like(s[:, :1], -weights.ce))
    if weights.kl:
        if tau != 1:
            s, t = s / tau, t / tau
            p_s, p_t = s.softmax(-1), t.softmax(-1)
        # tau² KL(softmax(t/tau) || softmax(s/tau)): one tau of the square cancels against d(s/tau)/ds
        if reverse:
            gap = s - t
            gap -= _dot(p_s, gap)[:, None]
            part = gap.mul_(p_s)
        else:
            part = p_s.sub_(p_t)
        part = part if weights.kl * tau == 1 else part.mul_(weights.kl * tau)
        slope = part if slope is None else slope.add_(part)
    return slope


def _top_and_logsumexp(logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Most likely index and log-sum-exp of each row [n], read off the softmax p where that is largest."""
    top = p.argmax(-1, keepdim=True)
    return top[:, 0], (logits.gather(1, top) - p.gather(1, top).log())[:, 0]


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row products [n, V], [n, V] -> [n], without a tensor between."""
    return (a.unsqueeze(1) @ b.unsqueeze(2)).flatten()
