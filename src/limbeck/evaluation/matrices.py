"""Mixing matrices of many mixers aligned to one layer of the teacher, on the same tokens (`limbeck matrices`).

    matrices = align_mixing_matrices(teacher, train_data, eval_data, layer=12, students=["retnet", "kda"], steps=60)
    matrices[0].name, matrices[0].matrix.shape, matrices[1].distance      # 'teacher', [H, T, T], [H]

One layer is enough to see what a mixer can express: the teacher runs once over some text, the calls of that layer's
attention are recorded, and each mixer is aligned to their matrices in turn. Head norms and output projections absorb
any factor, so matrices are compared up to one factor per head. The matrices of a trained student are the measure
`mixing`. Legend: H heads, T time.
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
    """A mixing matrix [H, T, T] and its distance [H] from the teacher's.

    distance: least ‖cM − A‖ / ‖A‖ over c, in the Frobenius norm; zeros for the teacher.
    """

    name: str
    matrix: Tensor
    distance: Tensor


@dataclass(frozen=True)
class _AttentionCall:
    """Arguments of a call of the teacher's attention, and the matrix [1, H, T, T] it computed."""

    args: tuple
    kwargs: dict
    matrix: Tensor


@flush_denormals()
def check_layer(layer: int, layers: int) -> None:
    """Raise a LimbeckError for the index of a layer that a teacher does not have."""
    if not 0 <= layer < layers:
        raise LimbeckError(f"layer is {layer}, the teacher has {layers}", expected=f"0 to {layers - 1}")


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
    """Align mixers to one layer of the teacher.

    Returns the teacher's matrices on the first sequence of `eval_data`, then those of each mixer.

    Args:
        train_data: text for the alignment; `steps` sequences, the first `sequences` of them repeatedly.
        layer: index of the layer.
        students: names of mixers.
        steps: gradient steps on the mean distance over heads; 0 shows the initial matrices.

    Raises:
        LimbeckError: unknown layer or mixer.
    """
    sites = find_attention_sites(teacher)
    check_layer(layer, len(sites))
    site = sites[layer]
    train_calls = _record_calls(teacher, site, train_data, min(sequences, steps)) if steps else []
    eval_call = _record_calls(teacher, site, eval_data, 1)[0]
    target = eval_call.matrix[0]
    matrices = [MixingMatrix("teacher", target, torch.zeros(len(target)))]
    with progress("mixing matrices", len(students) * max(steps, 1), "steps") as advance:
        for name in students:
            torch.manual_seed(0)
            student = convert(teacher, name, [layer], preset=preset, share_weights=True)
            module = student.get_submodule(site.module).requires_grad_(True)
            optimizer = torch.optim.AdamW(module.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
            for step in range(steps):
                call = train_calls[step % len(train_calls)]
                matrix = module(*call.args, **call.kwargs, output_matrix=True)[1]
                loss = scale_free_distance(matrix, call.matrix).mean()
                optimizer.zero_grad()
                if loss.requires_grad:  # a mixer may have no parameters
                    loss.backward()
                    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
                optimizer.step()
                advance(1, f"{name} {float(loss.detach()):.3f}")
            with torch.no_grad():
                matrix = module(*eval_call.args, **eval_call.kwargs, output_matrix=True)[1][0].float()
            matrices.append(MixingMatrix(name, matrix, scale_free_distance(matrix, target)))
    return matrices


def scale_free_distance(m: Tensor, a: Tensor) -> Tensor:
    """Compute the least ‖cM − A‖ / ‖A‖ over c of matrices [..., T, T]: the sine of their angle (Frobenius norm)."""
    m, a = (x.to(torch.promote_types(m.dtype, torch.float32)) for x in (m, a))
    cosine = (m * a).sum((-2, -1)) / (m.square().sum((-2, -1)) * a.square().sum((-2, -1))).clamp_min(1e-30).sqrt()
    # The gradient of the root is infinite at 0.
    return (1 - cosine.square()).clamp_min(1e-8).sqrt()


@torch.no_grad()
def _record_calls(teacher: PreTrainedModel, site: Site, data: SequenceDataset, count: int) -> list[_AttentionCall]:
    """Record the calls of one attention module on the first sequences, with their matrices."""
    calls: list[_AttentionCall] = []

    def visit(args: tuple, kwargs: dict, output: Tensor | tuple) -> None:
        calls.append(_AttentionCall(args, kwargs, output[1].float()))

    for index in range(min(count, data.n_sequences)):
        with hook_modules(teacher, {site.module: visit}, eager=True):
            run_backbone(teacher, data.batch(index, 1))
    return calls
