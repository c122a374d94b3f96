"""Stages 1 and 2: distances between one layer of the student and the same layer of the teacher.

    distance = matrix_distance(student_matrix, teacher_matrix, valid)      # stage 1, summed over sequences
    distance = hidden_distance(y, target, valid, "relative")               # stage 2, summed over tokens

The caller divides by a count known beforehand.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


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
    """Distance of hidden states [B, T, D], summed over the valid tokens; `loss` is one of `HIDDEN`."""
    wide = torch.promote_types(student.dtype, torch.float32)  # squares of half precision would overflow
    each = HIDDEN[loss](student.to(wide), _once(teacher, f"as {wide}", lambda: teacher.to(wide)))
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
HIDDEN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "l2": _l2,  # the norm of the difference (MOHAWK, equation 2)
    "relative": _relative,  # its square over the target's square: normalised mean squared error, token by token
    "mse": _mse,  # the mean square over the width (LoLCATs, arXiv 2410.10254, equation 7)
    "cosine": _cosine,  # one minus the cosine
}
