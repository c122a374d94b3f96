"""Rows of a teacher's attention matrix without the matrix: the attention function `limbeck_rows`; and of a student's.

    with output_attention_rows(teacher, ["model.layers.0.self_attn"], rows):       # [B, R] queries
        run_backbone(teacher, batch)                                     # these modules return rows [B, H, R, T] second
    matrix = compute_mixing_rows(student_module, args, kwargs, rows)             # the same of a module with a mixer

A layer's values come from SDPA, as in any other pass. Its rows come from the family's own eager function, given the
sampled queries alone: so windows, documents, sinks and soft caps are the family's, and nothing here knows of them.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from limbeck.core.errors import LimbeckError
from limbeck.models.attention import MatrixRowsComputed, softmax_attention_forward
from limbeck.models.packed import use_attn_implementation
from limbeck.ops.matrix_rows import gather_rows

NAME = "limbeck_rows"


def supports_row_output(model: PreTrainedModel, modules: list[str]) -> bool:
    """Can `output_attention_rows` be used on these attention modules? Else their matrices have to be made whole."""
    known = (sys.modules[type(model.get_submodule(name)).__module__] for name in modules)
    return all(hasattr(module, "eager_attention_forward") for module in known) and _agrees(model, modules[0])


@contextmanager
def output_attention_rows(model: PreTrainedModel, modules: list[str], rows: Tensor) -> Iterator[None]:
    """Let the named attention modules return rows [B, R] of their attention matrix as their second output."""
    chosen = [model.get_submodule(name) for name in modules]
    with use_attn_implementation(model, NAME):
        for module in chosen:
            module.limbeck_rows = threading.get_ident(), rows  # type: ignore[assignment]
        try:
            yield
        finally:
            for module in chosen:
                del module.limbeck_rows


def compute_mixing_rows(module: nn.Module, args: tuple, kwargs: dict, rows: Tensor) -> Tensor:
    """Rows [B, R] of the mixing matrix of an attention module with a mixer, called like that: [B, H, R, T].

    The module ends where they are known: no values are mixed, and the output projection does not run.
    """
    try:
        module(*args, **kwargs, output_matrix=rows)
    except MatrixRowsComputed as found:
        return found.rows
    raise LimbeckError(f"{type(module).__name__} gives no rows of a mixing matrix", expected="a module with a mixer")


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, Tensor | None]:
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
def _agrees(model: PreTrainedModel, name: str) -> bool:
    """Tried on a few tokens: are the rows those of the matrix that the eager implementation returns?"""
    found = []
    module = model.get_submodule(name)
    handle = module.register_forward_hook(lambda m, args, output: found.append(output[1]))
    device = next(model.parameters()).device
    ids, rows = torch.tensor([[3, 4, 5, 6]], device=device), torch.tensor([[1, 3]], device=device)
    try:
        with output_attention_rows(model, [name], rows):
            model.get_decoder()(input_ids=ids, use_cache=False)
        with use_attn_implementation(model, "eager"):
            model.get_decoder()(input_ids=ids, use_cache=False)
        return bool(torch.allclose(found[0], found[1][:, :, rows[0]], atol=1e-4))
    except (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError):
        return False
    finally:
        handle.remove()


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
