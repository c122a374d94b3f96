"""The losses of stages 1 to 3: distances between student and teacher, and cross-entropy on the labels.

    matrix_distance(student_matrix, teacher_matrix)                # stage 1, summed over sequences
    hidden_distance(hidden, target, loss="relative")               # stage 2, summed over tokens
    value, gradient = OBJECTIVES["kl"](token_logits, weights)      # stage 3, summed over n tokens

Each returns a sum and the caller divides by a count known beforehand, so no loss depends on how a batch was split, on
padding or on the length.

The objectives of stage 3 return their gradient at the student's logits too, written by hand in terms of the two
softmaxes that are there anyway: an autograd graph over [n, V] would hold several more such tensors. A new objective is
a function and an entry of `OBJECTIVES`.

Legend: n tokens, V vocabulary, k most likely tokens of the teacher; s and t logits, p and q softmaxes of student and
teacher.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.ops.common import disable_autocast


def matrix_distance(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Compute the Frobenius norm of the difference, over the root of the number of rows; mean over H, sum over B.

    MOHAWK (arXiv 2408.10189, equation 1), but for the root, which makes it independent of the length.

    Args:
        student, teacher: [B, H, T, T], or [B, H, rows, T] if only some queries are compared.
        valid: [B, T] bool, rows and columns that count; None for all.

    Returns:
        A scalar, in float32 or wider.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    difference = student.to(dtype) - teacher.to(dtype)
    rows = torch.full((student.shape[0],), float(student.shape[2]), device=student.device)
    if valid is not None:
        difference = difference * valid[:, None, :, None] * valid[:, None, None, :]
        rows = valid.sum(1).clamp_min(1).to(rows.dtype)
    norm = torch.linalg.vector_norm(difference, dim=(-2, -1))  # [B, H], its gradient at zero is zero
    return (norm.mean(1) / rows.sqrt()).sum()


def hidden_distance(student: Tensor, teacher: Tensor, valid: Tensor | None = None, loss: str = "relative") -> Tensor:
    """Sum the distances of hidden states [B, T, D] over the valid tokens.

    Args:
        valid: [B, T] bool; None for all.
        loss: one of `HIDDEN_LOSSES`.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)  # squares in half precision would overflow
    target = _cached_on(teacher, f"as {dtype}", lambda: teacher.to(dtype))
    distances = HIDDEN_LOSSES[loss](student.to(dtype), target)  # [B, T]
    return (distances if valid is None else distances * valid).sum()


def _cached_on(teacher: Tensor, name: str, compute: Callable[[], Tensor]) -> Tensor:
    """Return what depends on a teacher's tensor alone, cached on the tensor: several students learn from the same."""
    if teacher.requires_grad or teacher.is_inference():
        return compute()
    cache = teacher.__dict__.setdefault("_limbeck_cache", {})
    if name not in cache:
        value = compute()
        if value is teacher:  # a reference to itself would keep it alive
            return teacher
        cache[name] = teacher._version, value
    version, value = cache[name]
    return value if version == teacher._version else compute()


def _l2(student: Tensor, teacher: Tensor) -> Tensor:
    squares = (student - teacher).square().sum(-1)
    # the root has no finite gradient at zero
    return torch.where(squares > 0, squares.clamp_min(1e-24).sqrt(), squares)


def _relative(student: Tensor, teacher: Tensor) -> Tensor:
    target_squares = _cached_on(teacher, "squares", lambda: teacher.square().sum(-1).clamp_min(1e-8))
    return (student - teacher).square().sum(-1) / target_squares


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean(-1)


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


# by name, each [B, T, D], [B, T, D] -> [B, T]
HIDDEN_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": _l2,  # norm of the difference (MOHAWK, equation 2)
    "relative": _relative,  # its square over the target's: normalized mean squared error, token by token
    "mse": _mse,  # mean square over the width (LoLCATs, arXiv 2410.10254, equation 7)
    "cosine": _cosine,  # one minus the cosine similarity
}


@dataclass(frozen=True)
class ObjectiveWeights:
    """Weights of the objectives of stage 3, and their settings."""

    ce: float = 0.0  # cross-entropy on the labels
    kl: float = 1.0  # KL(teacher || student)
    reverse_kl: float = 0.0  # KL(student || teacher)
    jsd: float = 0.0  # generalized Jensen-Shannon divergence
    top_kl: float = 0.0  # KL over the teacher's most likely tokens and one entry for all others
    enhanced: float = 0.0  # cross-entropy on the teacher's distribution with the label's part enhanced
    temperature: float = 1.0  # of the divergences, which are multiplied by its square
    beta: float = 0.5  # of jsd: the teacher's share of the mixture
    top_k: int = 32  # of top_kl
    gamma: float = 1.0  # exponent of enhanced

    def active(self) -> dict[str, float]:
        """Return the objectives with a nonzero weight."""
        return {name: w for name in OBJECTIVES if (w := getattr(self, name))}


@dataclass(frozen=True)
class TopLogProbs:
    """The teacher's most likely tokens: index [n, k] and log probability [n, k]."""

    index: Tensor
    log_q: Tensor


@dataclass
class LogitGradient:
    """Gradient at the student's logits: student · p + teacher · q + dense, and `scattered` added at `index`."""

    student: float = 0.0
    teacher: float = 0.0
    index: Tensor | None = None  # [n, m]
    scattered: Tensor | None = None  # [n, m]
    dense: Tensor | None = None  # [n, V], may be overwritten


class TokenLogits:
    """Logits of n tokens with what the objectives share, computed on first use.

    Args:
        s: the student's logits [n, V].
        teacher: the teacher's logits [n, V], its most likely tokens, or None.
        labels: [n].
    """

    def __init__(self, s: Tensor, teacher: Tensor | TopLogProbs | None, labels: Tensor):
        self.s, self.teacher, self.labels = s, teacher, labels[:, None]
        self._divergences: dict[bool, Tensor] = {}

    @property
    def t(self) -> Tensor:
        assert isinstance(self.teacher, Tensor), "this objective needs all of the teacher's logits"
        return self.teacher

    @cached_property
    def p(self) -> Tensor:
        return self.s.softmax(-1)

    @cached_property
    def q(self) -> Tensor:
        return self.t.softmax(-1)

    @cached_property
    def student(self) -> tuple[Tensor, Tensor]:
        """Most likely token and log-sum-exp of the student's logits, each [n]."""
        return _top_and_logsumexp(self.s, self.p)

    @cached_property
    def other(self) -> tuple[Tensor, Tensor]:
        """Most likely token and log-sum-exp of the teacher's logits, each [n]."""
        return _top_and_logsumexp(self.t, self.q)

    def kl_divergence(self, reverse: bool = False) -> Tensor:
        """Compute KL(teacher || student) of each token [n], with `reverse` KL(student || teacher)."""
        if reverse not in self._divergences:  # it is both an objective and a metric
            weight, sign = (self.p, -1) if reverse else (self.q, 1)
            products = dot(weight, self.t) - dot(weight, self.s)
            self._divergences[reverse] = sign * (products - self.other[1] + self.student[1])
        return self._divergences[reverse]

    def with_temperature(self, temperature: float) -> "TokenLogits":
        """Return both logits divided by the temperature."""
        if temperature == 1 or self.teacher is None:
            return self
        return TokenLogits(self.s / temperature, self.t / temperature, self.labels[:, 0])


def cross_entropy(rows: TokenLogits, weights: ObjectiveWeights) -> tuple[Tensor, LogitGradient]:
    """Compute the cross-entropy on the labels."""
    value = (rows.student[1] - rows.s.gather(1, rows.labels)[:, 0]).sum()
    return value, LogitGradient(student=1.0, index=rows.labels, scattered=torch.full_like(rows.s[:, :1], -1.0))


def forward_kl(rows: TokenLogits, weights: ObjectiveWeights) -> tuple[Tensor, LogitGradient]:
    """Compute KL(teacher || student)."""
    return rows.kl_divergence().sum(), LogitGradient(student=1.0, teacher=-1.0)


def reverse_kl(rows: TokenLogits, weights: ObjectiveWeights) -> tuple[Tensor, LogitGradient]:
    """Compute KL(student || teacher)."""
    gap = rows.s - rows.t
    gap -= dot(rows.p, gap)[:, None]
    return rows.kl_divergence(reverse=True).sum(), LogitGradient(dense=gap.mul_(rows.p))


def jensen_shannon(rows: TokenLogits, weights: ObjectiveWeights) -> tuple[Tensor, LogitGradient]:
    """Compute β KL(q || m) + (1 − β) KL(p || m) with m = β q + (1 − β) p (arXiv 2306.13649, equation 1)."""
    beta, p, q = weights.beta, rows.p, rows.q
    log_m = torch.lerp(p, q, beta).clamp_min_(torch.finfo(p.dtype).tiny).log_()
    gap = rows.s - rows.student[1][:, None] - log_m  # log(p / m)
    from_student = dot(p, gap)
    from_teacher = dot(q, rows.t) - rows.other[1] - dot(q, log_m)
    value = (beta * from_teacher + (1 - beta) * from_student).sum()
    gap -= from_student[:, None]
    return value, LogitGradient(dense=gap.mul_(p).mul_(1 - beta))


def top_kl(rows: TokenLogits, weights: ObjectiveWeights) -> tuple[Tensor, LogitGradient]:
    """Compute the forward KL between distributions over the teacher's k most likely tokens and "any other"."""
    if isinstance(rows.teacher, TopLogProbs):
        index, log_q = rows.teacher.index, rows.teacher.log_q
    else:
        top = rows.t.topk(min(weights.top_k, rows.t.shape[-1]), dim=-1)
        index, log_q = top.indices, top.values - rows.other[1][:, None]
    q = log_q.exp()
    tiny = torch.finfo(q.dtype).eps
    rest = (1 - q.sum(-1)).clamp_min(0)
    p = rows.p.gather(1, index)
    log_p = rows.s.gather(1, index) - rows.student[1][:, None]
    left = (1 - p.sum(-1)).clamp_min(tiny)
    value = (q * (log_q - log_p)).sum() + (torch.xlogy(rest, rest) - rest * left.log()).sum()
    # the gradient is p · (1 − rest / left) outside the top and p − q inside: the first everywhere, corrected at the top
    ratio = rest / left
    correction = p * ratio[:, None] - q
    return value, LogitGradient(dense=rows.p * (1 - ratio)[:, None], index=index, scattered=correction)


def enhanced_cross_entropy(rows: TokenLogits, weights: ObjectiveWeights) -> tuple[Tensor, LogitGradient]:
    """Compute −(1 + q_y)^γ log p_y − Σ_{c ≠ y} q_c log p_c, y the label (OFA-KD, arXiv 2310.19444, section 3).

    With γ = 1 it is the cross-entropy on the label plus KL(q || p), up to the teacher's entropy.
    """
    q_label = rows.q.gather(1, rows.labels)
    extra = (1 + q_label) ** weights.gamma - q_label  # [n, 1], what the label has beyond its part in the teacher
    label_loss = rows.student[1] - rows.s.gather(1, rows.labels)[:, 0]
    value = (rows.student[1] - dot(rows.q, rows.s) + extra[:, 0] * label_loss).sum()
    gradient = LogitGradient(student=1.0, teacher=-1.0, dense=rows.p * extra, index=rows.labels, scattered=-extra)
    return value, gradient


OBJECTIVES: dict[str, Callable[[TokenLogits, ObjectiveWeights], tuple[Tensor, LogitGradient]]] = {
    "ce": cross_entropy,
    "kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jensen_shannon,
    "top_kl": top_kl,
    "enhanced": enhanced_cross_entropy,
}


def combine_objectives(
    rows: TokenLogits, weights: ObjectiveWeights, compute_grad: bool = True
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Compute each active objective, summed over tokens, and the gradient of their weighted sum.

    Returns:
        The values by name, and the gradient at the student's logits [n, V], None without `compute_grad`.
    """
    tau = weights.temperature
    softened = rows.with_temperature(tau)
    values: dict[str, Tensor] = {}
    gradients: dict[int, list[tuple[float, LogitGradient]]] = {}  # by id of the logits that they belong to
    for name, weight in weights.active().items():
        logits, factor = (rows, 1.0) if name == "ce" else (softened, tau)
        value, gradient = OBJECTIVES[name](logits, weights)
        values[name] = value * factor**2
        # of the factor τ² one τ cancels with d(s/τ)/ds
        gradients.setdefault(id(logits), []).append((weight * factor, gradient))
    if not compute_grad:
        return values, None
    total = None
    for logits in {id(r): r for r in (rows, softened)}.values():
        if id(logits) in gradients:
            combined = _sum_gradients(gradients[id(logits)], logits)
            total = combined if total is None else total.add_(combined)
    return values, total


def _sum_gradients(parts: list[tuple[float, LogitGradient]], rows: TokenLogits) -> Tensor:
    """Compute the weighted sum of gradients [n, V] in as few passes over it as possible; overwrites `rows`' p and q."""
    dense = [part.dense.mul_(weight) if weight != 1 else part.dense for weight, part in parts if part.dense is not None]
    student = sum(weight * part.student for weight, part in parts)
    teacher = sum(weight * part.teacher for weight, part in parts)
    total = dense.pop() if dense else None
    for other in dense:
        total.add_(other)  # type: ignore[union-attr]
    if student and student == -teacher:
        difference = rows.p.sub_(rows.q)
        difference = difference if student == 1 else difference.mul_(student)
        total = difference if total is None else total.add_(difference)
        student = teacher = 0.0
    for factor, tensor in ((student, rows.p if student else None), (teacher, rows.q if teacher else None)):
        if tensor is None:
            continue
        if total is None:
            total = tensor.mul_(factor) if factor != 1 else tensor
        else:
            total.add_(tensor, alpha=factor)
    assert total is not None
    for weight, part in parts:
        if part.index is not None and part.scattered is not None:
            total.scatter_add_(1, part.index, part.scattered * weight)
    return total


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Compute row-wise products [n, V], [n, V] -> [n] in full precision.

    Divergences are small differences of them, so ten bits of TF32 would not do.
    """
    if a.is_cuda and torch.get_float32_matmul_precision() != "highest":
        return (a * b).sum(-1)
    with disable_autocast(a):
        return (a.unsqueeze(1) @ b.unsqueeze(2)).flatten()  # a matrix product needs no tensor of the size of a


def _top_and_logsumexp(logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Return most likely token and log-sum-exp of each row [n], both from the largest entry of the softmax p."""
    top = p.argmax(-1, keepdim=True)
    return top[:, 0], (logits.gather(1, top) - p.gather(1, top).log())[:, 0]
