"""Pictures of mixing matrices: one panel a student, beside the teacher's.

    draw(views, head=3, path="matrices.png", title="layer 12, head 3")

Colour is the share of a row: entries over the sum of the row's sizes, red where positive and blue where negative, the
root of it so that faint entries show. Rows are queries, columns keys.
"""

import math
from pathlib import Path

import torch
from torch import Tensor

from limbeck.errors import LimbeckError
from limbeck.evaluate.matrices import View
from limbeck.report.figure import check_format, look, new_figure, save


def draw(views: list[View], head: int, path: Path, title: str, columns: int = 6) -> None:
    """Write the picture; its format is that of the file's ending (png, svg, pdf).

    Raises:
        LimbeckError: matplotlib is not installed, no such head, or a format that it does not know.
    """
    heads = len(views[0].matrix)
    if not 0 <= head < heads:
        raise LimbeckError(f"head is {head}, the teacher has {heads}", expected=f"0 to {heads - 1}")
    rows = math.ceil(len(views) / columns)
    check_format(path)
    with look():
        figure = new_figure(1.9 * columns, 2.15 * rows + 0.4)
        for index, view in enumerate(views):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.imshow(_shade(view.matrix[head]).numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest")
            distance = "" if index == 0 else f"\n{float(view.distance[head]):.2f}"
            axes.set_title(view.name + distance, fontsize=8)
            axes.grid(False)
            axes.spines[:].set_visible(True)
            axes.set_xticks([])
            axes.set_yticks([])
        figure.suptitle(title, fontsize=9)
        save(figure, path)


def _shade(matrix: Tensor) -> Tensor:
    share = matrix / matrix.abs().sum(-1, keepdim=True).clamp_min(1e-12)
    return torch.sign(share) * share.abs().sqrt()
