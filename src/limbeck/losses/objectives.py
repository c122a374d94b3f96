"""The objectives of stage 3, one function each: what a chunk of tokens costs, and its slope at the student's logits.

    value, slope = OBJECTIVES["kl"](rows, weights)         # rows: logits of student and teacher for n tokens

Slopes are written by hand, in terms of the two softmaxes that are there anyway: an autograd graph over [n, V] would
hold several more such tensors. A new objective is a function and an entry of `OBJECTIVES`.

Legend: n tokens, V vocabulary, k entries that the teacher's signal holds; s and t logits, p and q softmaxes of student
and teacher.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from limbeck.ops.common import full_precision


@dataclass(frozen=True)
class Weights:
    """How the objectives are weighed, and what they are set to."""

    ce: float = 0.0  # cross-entropy on the labels
    kl: float = 1.0  # KL(teacher || student)
    reverse_kl: float = 0.0  # KL(student || teacher)
    jsd: float = 0.0  # generalised Jensen-Shannon divergence
    top_kl: float = 0.0  # KL over the teacher's most likely tokens and one entry for all others
    temperature: float = 1.0  # of the divergences, which are multiplied by its square
    beta: float = 0.5  # of jsd: the teacher's share of the mixture
    top_k: int = 32  # of top_kl

    def used(self) -> dict[str, float]:
        """The objectives that weigh something."""
        return {name: w for name in OBJECTIVES if (w := getattr(self, name))}


@dataclass(frozen=True)
class Top:
    """What a teacher thinks of its most likely tokens: index [n, k] and log probability [n, k]."""

    index: Tensor
    log_q: Tensor


@dataclass
class Slope:
    """Slope at the student's logits: student · p + teacher · q + scattered + dense."""

    student: float = 0.0
    teacher: float = 0.0
    index: Tensor | None = None  # [n, m]
    scattered: Tensor | None = None  # [n, m]
    dense: Tensor | None = None  # [n, V], may be overwritten


class Rows:
    """Logits of n tokens: the student's, the teacher's or the most likely of them or none, and the labels."""

    def __init__(self, s: Tensor, teacher: Tensor | Top | None, labels: Tensor):
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

    def divergence(self, reverse: bool = False) -> Tensor:
        """KL(teacher || student) of each token [n], or the other way round."""
        weight, sign = (self.p, -1) if reverse else (self.q, 1)
        return sign * (dot(weight, self.t) - dot(weight, self.s) - self.other[1] + self.student[1])

    def cooled(self, temperature: float) -> "Rows":
        """Both distributions softened."""
        return (
            self
            if temperature == 1 or self.teacher is None
            else Rows(self.s / temperature, self.t / temperature, self.labels[:, 0])
        )


def cross_entropy(rows: Rows, weights: Weights) -> tuple[Tensor, Slope]:
    value = (rows.student[1] - rows.s.gather(1, rows.labels)[:, 0]).sum()
    return value, Slope(student=1.0, index=rows.labels, scattered=torch.full_like(rows.s[:, :1], -1.0))


def forward_kl(rows: Rows, weights: Weights) -> tuple[Tensor, Slope]:
    return rows.divergence().sum(), Slope(student=1.0, teacher=-1.0)


def reverse_kl(rows: Rows, weights: Weights) -> tuple[Tensor, Slope]:
    gap = rows.s - rows.t
    gap -= dot(rows.p, gap)[:, None]
    return rows.divergence(reverse=True).sum(), Slope(dense=gap.mul_(rows.p))


def jensen_shannon(rows: Rows, weights: Weights) -> tuple[Tensor, Slope]:
    """β KL(q || m) + (1 − β) KL(p || m) with m = β q + (1 − β) p (arXiv 2306.13649, equation 2)."""
    beta, p, q = weights.beta, rows.p, rows.q
    log_m = torch.lerp(p, q, beta).clamp_min_(torch.finfo(p.dtype).tiny).log_()
    gap = rows.s - rows.student[1][:, None] - log_m  # log(p / m)
    from_student = dot(p, gap)
    from_teacher = dot(q, rows.t) - rows.other[1] - dot(q, log_m)
    value = (beta * from_teacher + (1 - beta) * from_student).sum()
    gap -= from_student[:, None]
    return value, Slope(dense=gap.mul_(p).mul_(1 - beta))


def top_kl(rows: Rows, weights: Weights) -> tuple[Tensor, Slope]:
    """Forward KL between distributions over the teacher's k most likely tokens and "any other"."""
    if isinstance(rows.teacher, Top):
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
    return value, Slope(dense=rows.p * (1 - ratio)[:, None], index=index, scattered=inside)


OBJECTIVES: dict[str, Callable[[Rows, Weights], tuple[Tensor, Slope]]] = {
    "ce": cross_entropy,
    "kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": jensen_shannon,
    "top_kl": top_kl,
}


def weighted(rows: Rows, weights: Weights, slope: bool = True) -> tuple[dict[str, Tensor], Tensor | None]:
    """Each objective's value, summed over the rows, and the slope of their weighted sum at the logits [n, V]."""
    tau = weights.temperature
    cool = rows.cooled(tau)
    values: dict[str, Tensor] = {}
    of: dict[int, list[tuple[float, Slope]]] = {}
    for name, weight in weights.used().items():
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


def _joined(parts: list[tuple[float, Slope]], rows: Rows) -> Tensor:
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
    with full_precision(a):
        return (a.unsqueeze(1) @ b.unsqueeze(2)).flatten()  # without a tensor between


def _top_and_logsumexp(logits: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Most likely index and log-sum-exp of each row [n], read off the softmax p where that is largest."""
    top = p.argmax(-1, keepdim=True)
    return top[:, 0], (logits.gather(1, top) - p.gather(1, top).log())[:, 0]
