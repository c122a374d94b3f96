"""Student and teacher token by token: what each target costs both, and how far their likeliest tokens are the same.

    found = compare_tokens(Head(student), hidden_s, Head(teacher), hidden_t, targets)      # tensors [n]
    in_buckets(found, positions, [16, 64, 256])       # means by bucket: 0 to 15, 16 to 63, 64 to 255, 256 and more

Logits exist for a chunk of tokens at a time, so memory does not grow with length times vocabulary. Legend: B batch,
T time, D model width, n valid targets.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from limbeck.losses.logits import Head
from limbeck.losses.objectives import Rows


@torch.no_grad()
def compare_tokens(
    student_head: Head,
    student: Tensor,
    teacher_head: Head,
    teacher: Tensor,
    targets: Tensor,
    top: int = 5,
    chunk: int = 128,
) -> dict[str, Tensor]:
    """Both models on every valid target, in the order of the tokens.

    Args:
        student, teacher: hidden states [B, T, D] of either model; their widths may differ.
        targets: [B, T] next tokens, -100 where there is none.
        top: how many of the likeliest tokens are compared.
        chunk: tokens whose logits exist at a time.

    Returns:
        tensors [n] in float32: ce and teacher_ce (nats), kl = KL(teacher || student) and reverse_kl (nats), top1 (1
        where the likeliest token is the same), top (1 where the teacher's likeliest is among the student's `top`),
        overlap (share of the teacher's `top` that are among the student's).
    """
    rows = (targets.flatten() != -100).nonzero().squeeze(1)
    labels, flat_s, flat_t = targets.flatten(), student.flatten(0, 1), teacher.flatten(0, 1)
    parts: dict[str, list[Tensor]] = {}
    for part in rows.split(chunk):
        s, t = student_head(flat_s[part]).float(), teacher_head(flat_t[part]).float()
        width = min(s.shape[-1], t.shape[-1])  # a vocabulary may be padded on one side
        both = Rows(s[:, :width], t[:, :width], labels[part])
        best_s, best_t = both.s.topk(top).indices, both.t.topk(top).indices
        found = {
            "ce": both.student[1] - both.s.gather(1, both.labels)[:, 0],
            "teacher_ce": both.other[1] - both.t.gather(1, both.labels)[:, 0],
            "kl": both.divergence(),
            "reverse_kl": both.divergence(reverse=True),
            "top1": (best_s[:, 0] == best_t[:, 0]).float(),
            "top": (best_s == best_t[:, :1]).any(1).float(),
            "overlap": (best_s[:, :, None] == best_t[:, None, :]).any(1).float().mean(1),
        }
        for name, value in found.items():
            parts.setdefault(name, []).append(value.float().cpu())
    return {name: torch.cat(values) for name, values in parts.items()}


def in_buckets(numbers: dict[str, Tensor], place: Tensor, edges: Sequence[float]) -> list[dict[str, Any]]:
    """Means of each number by bucket of `place`.

    Args:
        numbers: tensors [n].
        place: [n], what the tokens are sorted by.
        edges: ascending; a bucket goes from an edge up to just before the next one, the first from anything below, the
            last to anything above.

    Returns:
        one dict a bucket that has tokens: `from` and `below` (None for an open end), targets, and the mean of each
        number.
    """
    which = torch.bucketize(place.double(), torch.tensor(edges, dtype=torch.float64), right=True)
    ends = [None, *edges, None]
    rows = []
    for bucket in range(len(edges) + 1):
        inside = which == bucket
        if inside.any():
            means = {name: float(value[inside].double().mean()) for name, value in numbers.items()}
            rows.append({"from": ends[bucket], "below": ends[bucket + 1], "targets": int(inside.sum()), **means})
    return rows


def error_over_sequences(number: Tensor, sequence: Tensor) -> float | None:
    """Standard error of a mean over tokens [n], sequences being what is independent; None for a single sequence.

    The linearised variance of a ratio of sums (Cochran 1977, section 6.3): sequences differ in their count of targets.
    """
    number = number.double()
    count = int(sequence.max()) + 1
    if count < 2:
        return None
    deviation = torch.zeros(count, dtype=torch.float64).index_add(0, sequence, number - number.mean())
    return math.sqrt(float(deviation.square().sum()) * count / (count - 1)) / len(number)
