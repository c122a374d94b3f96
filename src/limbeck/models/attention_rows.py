"""Sampled rows of attention and mixing matrices, without computing the whole matrix.

    with output_attention_rows(teacher, ["model.layers.0.self_attn"], rows):    # rows: [B, R] query indices
        run_backbone(teacher, batch)                      # these modules return rows [B, H, R, T] as second output
    matrix = compute_mixing_rows(student_module, args, kwargs, rows)            # the same for a module with a mixer

A layer's output comes from SDPA, as in any other pass. Its rows come from the family's own eager function, called with
the sampled queries only, so windows, documents, sinks and soft caps are those of the family.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import sdpa_mask

from limbeck.core.errors import LimbeckError
from limbeck.models.attention import (
    ALL_ROWS,
    LIMBECK_ROWS,
    MatrixRowsComputed,
    register_attention,
    softmax_attention_forward,
)
from limbeck.models.temporary import instance_attribute, use_attn_implementation
from limbeck.ops.matrix_rows import gather_rows


def supports_row_output(model: PreTrainedModel, modules: list[str]) -> bool:
    """Return whether `output_attention_rows` works on these attention modules; else the whole matrix is needed."""
    sources = (sys.modules[type(model.get_submodule(name)).__module__] for name in modules)
    has_eager = all(hasattr(source, "eager_attention_forward") for source in sources)
    return has_eager and _matches_eager_matrix(model, modules[0])


@contextmanager
def output_attention_rows(model: PreTrainedModel, modules: list[str], rows: Tensor) -> Iterator[None]:
    """Let the named attention modules return rows [B, R] of their attention matrix as their second output."""
    with use_attn_implementation(model, LIMBECK_ROWS), ExitStack() as stack:
        for name in modules:
            # only passes of this thread return rows; the model may be shared
            value = threading.get_ident(), rows
            stack.enter_context(instance_attribute(model.get_submodule(name), "limbeck_rows", value))
        yield


def compute_mixing_rows(module: nn.Module, args: tuple, kwargs: dict, rows: Tensor | None) -> Tensor:
    """Compute rows [B, R] of the mixing matrix of an attention module with a mixer: [B, H, R, T].

    The module stops as soon as they are computed: no values are mixed and the output projection does not run.

    Args:
        args, kwargs: of a call of the module.
        rows: None for all of them.
    """
    try:
        module(*args, **kwargs, output_matrix=ALL_ROWS if rows is None else rows)
    except MatrixRowsComputed as result:
        return result.rows
    raise LimbeckError(f"{type(module).__name__} has no mixing matrix", expected="a module with a mixer")


def limbeck_rows_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers' interface: SDPA output [B, T, H, V], and rows [B, H, R, T] or None."""
    y, _ = softmax_attention_forward(module, query, key, value, attention_mask, **kwargs)
    thread, rows = getattr(module, "limbeck_rows", (None, None))
    if rows is None or thread != threading.get_ident():
        return y, None
    if attention_mask is None:
        allowed = rows[:, None, :, None] >= torch.arange(key.shape[2], device=key.device)
    else:
        mask = gather_rows(attention_mask, rows, 2)
        allowed = mask if mask.dtype == torch.bool else mask == 0
    closed = torch.zeros_like(allowed, dtype=query.dtype).masked_fill(~allowed, torch.finfo(query.dtype).min)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    _, matrix = eager(module, gather_rows(query, rows, 2), key, value, closed, **kwargs)
    return y, matrix


@torch.no_grad()
def _matches_eager_matrix(model: PreTrainedModel, name: str) -> bool:
    """Return whether, on a few tokens, the rows are those of the matrix that the eager implementation returns."""
    outputs = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, output: outputs.append(output[1]))
    device = next(model.parameters()).device
    ids, rows = torch.tensor([[3, 4, 5, 6]], device=device), torch.tensor([[1, 3]], device=device)
    try:
        with output_attention_rows(model, [name], rows):
            model.get_decoder()(input_ids=ids, use_cache=False)
        with use_attn_implementation(model, "eager"):
            model.get_decoder()(input_ids=ids, use_cache=False)
        return bool(torch.allclose(outputs[0], outputs[1][:, :, rows[0]], atol=1e-4))
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return False
    finally:
        handle.remove()


register_attention(LIMBECK_ROWS, limbeck_rows_forward, sdpa_mask)
