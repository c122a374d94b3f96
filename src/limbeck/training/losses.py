"""The distances between student and teacher.

Each returns a sum and the caller divides by a count known beforehand, so no loss depends on how a batch was split, on
padding or on the length.

The objectives of stage 3, one function each: what a chunk of tokens costs, and its slope at the student's logits.

    value, slope = OBJECTIVES["kl"](rows, weights)         # rows: logits of student and teacher for n tokens

Slopes are written by hand, in terms of the two softmaxes that are there anyway: an autograd graph over [n, V] would
hold several more such tensors. A new objective is a function and an entry of `OBJECTIVES`.

Legend: n tokens, V vocabulary, k entries that the teacher's signal holds; s and t logits, p and q softmaxes of student
and teacher.

Stages 1 and 2: distances between one layer of the student and the same layer of the teacher.

    distance = matrix_distance(student_matrix, teacher_matrix, valid)      # stage 1, summed over sequences
    distance = hidden_distance(y, target, valid, "relative")               # stage 2, summed over tokens

The caller divides by a count known beforehand.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from limbeck.ops.common import disable_autocast


@dataclass(frozen=True)
class ObjectiveWeights:
    """How the objectives are weighed, and what they are set to."""

    ce: float = 0.0  # cross-entropy on the labels
    kl: float = 1.0  # KL(teacher || student)
    reverse_kl: float = 0.0  # KL(student || teacher)
    jsd: float = 0.0  # generalised Jensen-Shannon divergence
    top_kl: float = 0.0  # KL over the teacher's most likely tokens and one entry for all others
    temperature: float = 1.0  # of the divergences, which are multiplied by its square
    beta: float = 0.5  # of jsd: the teacher's share of the mixture
    top_k: int = 32  # of top_kl

    def active(self) -> dict[str, float]:
        """The objectives that weigh something."""
        return {name: w for name in OBJECTIVES if (w := getattr(self, name))}


@dataclass(frozen=True)
class TopLogProbs:
    """What a teacher thinks of its most likely tokens: index [n, k] and log probability [n, k]."""

    index: Tensor
    log_q: Tensor


@dataclass
class LogitGradient:
    """Slope at the student's logits: student · p + teacher · q + scattered + dense."""

    student: float = 0.0
    teacher: float = 0.0
    index: Tensor | None = None  # [n, m]
    scattered: Tensor | None = None  # [n, m]
    dense: Tensor | None = None  # [n, V], may be overwritten


class TokenLogits:
    """Logits of n tokens: the student's, the teacher's or the most likely of them or none, and the labels."""

    def __init__(self, s: Tensor, teacher: Tensor | TopLogProbs | None, labels: Tensor):
        self.s, self.teacher, self.labels = s, teacher, labels[:, None]

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
        return _top_and_logsumexp(self.s, self.p)

    @cached_property
    def other(self) -> tuple[Tensor, Tensor]:
        return _top_and_logsumexp(self.t, self.q)

    def kl_divergence(self, reverse: bool = False) -> Tensor:
        """KL(teacher || student) of each token [n], or the other way round."""
        weight, sign = (self.p, -1) if reverse else (self.q, 1)
        return sign * (dot(weight, self.t) - dot(weight, self.s) - self.other[1] + self.student[1])

    def with_temperature(self, temperature: float) -> "TokenLogits":
        """Both distributions softened."""
        return (
            self
            if temperature == 1 or self.teacher is None
            else TokenLogits(self.s / temperature, self.t / temperature, self.labels[:, 0])
        )


def cross_entropy(rows: TokenLogits, weights: ObjectiveWeights) -> tuple[Tensor, LogitGradient]:
    value = (rows.student[1] - rows.s.gather(1, rows.labels)[:, 0]).sum()
    return value, LogitGradient(student=1.0, index=rows.labels, scattered=torch.full_like(rows.s[:, :1], -1.0))


def forward_kl(rows: TokenLogits, weights: ObjectiveWeights) -> tuple[Tensor, LogitGradient]:
    return rows.kl_divergence().sum(), LogitGradient(student=1.0, teacher=-1.0)


def reverse_kl(rows: TokenLogits, weights: ObjectiveWeights) -> tuple[Tensor, LogitGradient]:
    gap = rows.s - rows.t
    gap -= dot(rows.p, gap)[:, None]
    return rows.kl_divergence(reverse=True).sum(), LogitGradient(dense=gap.mul_(rows.p))


def jensen_shannon(rows: TokenLogits, weights: ObjectiveWeights) -> tuple[Tensor, LogitGradient]:
    """β KL(q || m) + (1 − β) KL(p || m) with m = β q + (1 − β) p (arXiv 2306.13649, equation 2)."""
    beta, p, q = weights.beta, rows.p, rows.q
    log_m = torch.lerp(p, q, beta).clamp_min_(torch.finfo(p.dtype).tiny).log_()
    gap = rows.s - rows.student[1][:, None] - log_m  # log(p / m)
    from_student = dot(p, gap)
    from_teacher = dot(q, rows.t) - rows.other[1] - dot(q, log_m)
    value = (beta * from_teacher + (1 - beta) * from_student).sum()
    gap -= from_student[:, None]
    return value, LogitGradient(dense=gap.mul_(p).mul_(1 - beta))


def top_kl(rows: TokenLogits, weights: ObjectiveWeights) -> tuple[Tensor, LogitGradient]:
    """Forward KL between distributions over the teacher's k most likely tokens and "any other"."""
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
    # the tail's slope is p · (1 − rest / left) outside the top, p inside: one factor a row, mended where it is wrong
    ratio = rest / left
    inside = p * ratio[:, None] - q
    return value, LogitGradient(dense=rows.p * (1 - ratio)[:, None], index=index, scattered=inside)


OBJECTIVES: dict[str, Callable[[TokenLogits, ObjectiveWeights], tuple[Tensor, LogitGradient]]] = {
    "ce": cross_entropy,
    "kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jensen_shannon,
    "top_kl": top_kl,
}


def combine_objectives(
    rows: TokenLogits, weights: ObjectiveWeights, slope: bool = True
) -> tuple[dict[str, Tensor], Tensor | None]:
    """Each objective's value, summed over the rows, and the slope of their weighted sum at the logits [n, V]."""
    tau = weights.temperature
    cool = rows.with_temperature(tau)
    values: dict[str, Tensor] = {}
    of: dict[int, list[tuple[float, LogitGradient]]] = {}
    for name, weight in weights.active().items():
        seen, factor = (rows, 1.0) if name == "ce" else (cool, tau)
        value, part = OBJECTIVES[name](seen, weights)
        values[name] = value * factor**2
        of.setdefault(id(seen), []).append((weight * factor, part))  # one τ of the square goes into d(s/τ)/ds
    if not slope:
        return values, None
    total = None
    for seen in {id(r): r for r in (rows, cool)}.values():
        mine = _joined(of[id(seen)], seen) if id(seen) in of else None
        total = mine if total is None else total if mine is None else total.add_(mine)
    return values, total


def _joined(parts: list[tuple[float, LogitGradient]], rows: TokenLogits) -> Tensor:
    """The weighted sum of slopes, in as few passes over [n, V] as there are different tensors; uses up p and q."""
    dense = [part.dense.mul_(weight) if weight != 1 else part.dense for weight, part in parts if part.dense is not None]
    student = sum(weight * part.student for weight, part in parts)
    teacher = sum(weight * part.teacher for weight, part in parts)
    total = dense.pop() if dense else None
    for other in dense:
        total.add_(other)  # type: ignore[union-attr]
    if student and student == -teacher:
        both = rows.p.sub_(rows.q)
        both = both if student == 1 else both.mul_(student)
        total = both if total is None else total.add_(both)
        student = teacher = 0.0
    for factor, tensor in ((student, rows.p if student else None), (teacher, rows.q if teacher else None)):
        if tensor is not None:
            total = (
                (tensor.mul_(factor) if factor != 1 else tensor) if total is None else total.add_(tensor, alpha=factor)
            )
    assert total is not None
    for weight, part in parts:
        if part.index is not None and part.scattered is not None:
            total.scatter_add_(1, part.index, part.scattered * weight)
    return total


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row by row products [n, V], [n, V] -> [n], in full precision: divergences are small differences of large ones."""
    if a.is_cuda and torch.get_float32_matmul_precision() != "highest":  # TF32 has ten bits
        return (a * b).sum(-1)
    with disable_autocast(a):
        return (a.unsqueeze(1) @ b.unsqueeze(2)).flatten()  # without a tensor between


def _top_and_logsumexp(logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Most likely index and log-sum-exp of each row [n], read off the softmax p where that is largest."""
    top = p.argmax(-1, keepdim=True)
    return top[:, 0], (logits.gather(1, top) - p.gather(1, top).log())[:, 0]


def matrix_distance(student: Tensor, teacher: Tensor, valid: Tensor | None = None) -> Tensor:
    """Frobenius norm of the difference per head and sequence, over the root of its rows; mean over heads, sum over B.

    MOHAWK (arXiv 2408.10189, equation 1) up to the root of the number of rows, which makes it independent of length.

    Args:
        student, teacher: [B, H, T, T], or [B, H, rows, T] where only some queries are compared.
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


def hidden_distance(student: Tensor, teacher: Tensor, valid: Tensor | None = None, loss: str = "relative") -> Tensor:
    """Distance of hidden states [B, T, D], summed over the valid tokens; `loss` is one of `HIDDEN_LOSSES`."""
    wide = torch.promote_types(student.dtype, torch.float32)  # squares of half precision would overflow
    each = HIDDEN_LOSSES[loss](student.to(wide), _once(teacher, f"as {wide}", lambda: teacher.to(wide)))
    return (each if valid is None else each * valid).sum()


def _once(teacher: Tensor, name: str, make: Callable[[], Tensor]) -> Tensor:
    """What is made of a teacher's tensor alone, kept on it: several students learn from the same one."""
    if teacher.requires_grad or teacher.is_inference():
        return make()
    known = teacher.__dict__.setdefault("_limbeck_known", {})
    if name not in known:
        made = make()
        if made is teacher:  # kept on itself it would never go
            return teacher
        known[name] = teacher._version, made
    version, made = known[name]
    return made if version == teacher._version else make()


def _l2(student: Tensor, teacher: Tensor) -> Tensor:
    squares = (student - teacher).square().sum(-1)
    return torch.where(squares > 0, squares.clamp_min(1e-24).sqrt(), squares)


def _relative(student: Tensor, teacher: Tensor) -> Tensor:
    size = _once(teacher, "size", lambda: teacher.square().sum(-1).clamp_min(1e-8))
    return (student - teacher).square().sum(-1) / size


def _mse(student: Tensor, teacher: Tensor) -> Tensor:
    return (student - teacher).square().mean(-1)


def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(student, teacher, dim=-1)


# By name, each [B, T, D], [B, T, D] -> [B, T].
HIDDEN_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": _l2,  # the norm of the difference (MOHAWK, equation 2)
    "relative": _relative,  # its square over the target's square: normalised mean squared error, token by token
    "mse": _mse,  # the mean square over the width (LoLCATs, arXiv 2410.10254, equation 7)
    "cosine": _cosine,  # one minus the cosine
}
