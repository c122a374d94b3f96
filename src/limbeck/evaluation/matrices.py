"""Mixing matrices of many mixers beside the teacher's attention, on the same tokens.

    views = align_mixing_matrices(teacher, train_data, eval_data, layer=12, students=["retnet", "kda"], steps=60)
    views[0].name, views[0].matrix.shape, views[1].distance      # 'teacher', [H, T, T], 0.31

One layer is enough for that: the teacher runs once over some text, the calls of that layer's attention are kept, and
each mixer is aligned to its matrices in turn. As a head norm or the output projection takes up any factor, matrices are
compared up to one factor per head. Shapes: B batch, T time, H heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError
from limbeck.core.system import flush_denormals
from limbeck.data.packing import SequenceDataset
from limbeck.models import Site, convert, find_attention_sites
from limbeck.models.backbone import run_backbone
from limbeck.models.hooks import hook_modules


@dataclass(frozen=True)
class MixingMatrix:
    """One panel: whose matrix, the matrix [H, T, T], and its distance from the teacher's, per head.

    distance: least ‖cM − A‖ / ‖A‖ over c, in the Frobenius norm, [H]; zeros for the teacher.
    """

    name: str
    matrix: Tensor
    distance: Tensor


@dataclass(frozen=True)
class _Call:
    args: tuple
    kwargs: dict
    matrix: Tensor


@flush_denormals()
def align_mixing_matrices(
    teacher: PreTrainedModel,
    train_data: SequenceDataset,
    eval_data: SequenceDataset,
    layer: int,
    students: list[str],
    steps: int,
    preset: str = "default",
    sequences: int = 32,
    lr: float = 2e-3,
) -> list[MixingMatrix]:
    """The teacher's attention matrices of one layer on the first sequence of `eval_data`, then each student's.

    Args:
        train_data: text that the students are aligned on, `steps` sequences (the first `sequences` again and again).
        steps: gradient steps on the mean distance over heads; 0 shows where a mixer starts.

    Raises:
        LimbeckError: no such layer or mixer.
    """
    sites = find_attention_sites(teacher)
    if not 0 <= layer < len(sites):
        raise LimbeckError(f"layer is {layer}, the teacher has {len(sites)}", expected=f"0 to {len(sites) - 1}")
    site = sites[layer]
    lessons = _calls(teacher, site, train_data, min(sequences, steps)) if steps else []
    exam = _calls(teacher, site, eval_data, 1)[0]
    target = exam.matrix[0]
    views = [MixingMatrix("teacher", target, torch.zeros(len(target)))]
    with progress("mixing matrices", len(students) * max(steps, 1), "steps") as advance:
        for name in students:
            torch.manual_seed(0)
            student = convert(teacher, name, [layer], preset=preset, share_weights=True)
            module = student.get_submodule(site.module).requires_grad_(True)
            optimiser = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
            for step in range(steps):
                lesson = lessons[step % len(lessons)]
                loss = scale_free_distance(
                    module(*lesson.args, **lesson.kwargs, output_matrix=True)[1], lesson.matrix
                ).mean()
                optimiser.zero_grad()
                if loss.requires_grad:
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimiser.step()
                advance(1, f"{name} {float(loss.detach()):.3f}")
            with torch.no_grad():
                matrix = module(*exam.args, **exam.kwargs, output_matrix=True)[1][0].float()
            views.append(MixingMatrix(name, matrix, scale_free_distance(matrix, target)))
    return views


def scale_free_distance(m: Tensor, a: Tensor) -> Tensor:
    """The least ‖cM − A‖ / ‖A‖ over c, of matrices [..., T, T] in the Frobenius norm: the sine of their angle."""
    m, a = (x.to(torch.promote_types(m.dtype, torch.float32)) for x in (m, a))
    cosine = (m * a).sum((-2, -1)) / (m.square().sum((-2, -1)) * a.square().sum((-2, -1))).clamp_min(1e-30).sqrt()
    return (1 - cosine.square()).clamp_min(1e-8).sqrt()


def _calls(teacher: PreTrainedModel, site: Site, data: SequenceDataset, count: int) -> list[_Call]:
    """The calls of one attention module over the first sequences, with the matrices that came out."""
    calls: list[_Call] = []

    def visit(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        calls.append(_Call(args, kwargs, output[1].float()))

    with torch.no_grad():
        for index in range(min(count, data.n_sequences)):
            batch = data.batch(index, 1)
            with hook_modules(teacher, {site.module: visit}, eager=True):
                run_backbone(teacher, batch)
    return calls
