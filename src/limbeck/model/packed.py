"""Packed documents without a mask: the attention implementation `limbeck_packed`, for passes on an accelerator.

    with documents_apart(model, batch):                  # the batch knows where its documents end
        model.get_decoder()(input_ids=..., position_ids=batch.position_ids)

transformers keeps packed documents apart by a mask [B, 1, T, T], and asks the device whether it needs one. Here the
documents' ends, which the host knows (`limbeck.data.known`), travel with the position ids: mixers get their document
numbers, softmax layers run inside each document (`limbeck.model.documents`). Nothing is asked of the device. A model is
tried before it is run so, and families with windows, chunks, soft caps or sinks never are.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from limbeck.data.packing import Batch
from limbeck.errors import LimbeckError
from limbeck.model.attention import NAME, PACKED, attention
from limbeck.model.documents import documents_of, try_flash
from limbeck.model.switching import implemented_by


@contextmanager
def documents_apart(model: PreTrainedModel, batch: Batch) -> Iterator[None]:
    """A pass over `batch`, whose documents are kept apart by what the host knows of them; check `fits` before."""
    mark(batch)
    with implemented_by(model, PACKED):
        yield


def mark(batch: Batch) -> None:
    """Let the position ids carry what the host knows of the documents: mixers look there, on any route."""
    assert batch.known is not None
    position_ids: Any = batch.position_ids
    position_ids.limbeck_documents = batch.known.documents


def fits(model: PreTrainedModel) -> bool:
    """Can `documents_apart` be used on this model, as it stands? Found by trying, once per model."""
    if model.config._attn_implementation not in ("sdpa", NAME):
        return False
    known: bool | None = getattr(model, "_limbeck_packed", None)
    if known is None:
        known = _plain(model.config.get_text_config()) and _agrees(model)
        use_masks(model, not known)
    return known


def use_masks(model: PreTrainedModel, masks: bool = True) -> None:
    """Settle that a model is run with transformers' own masks, or that it need not be."""
    model._limbeck_packed = not masks  # type: ignore[assignment]


def _plain(config: Any) -> bool:
    """Does every layer see all tokens before it? What a few tokens cannot show."""
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    return not window and kinds == {"full_attention"} and not getattr(config, "attention_chunk_size", None)


@torch.no_grad()
def _agrees(model: PreTrainedModel) -> bool:
    device = next(model.parameters()).device
    try_flash(device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 0]])
    ids = torch.arange(3, 3 + positions.numel()).view_as(positions)
    batch = Batch(ids, positions, ids)
    batch = Batch(ids.to(device), positions.to(device), ids.to(device), known=batch.facts().to(device))
    body = model.get_decoder()
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    usual = body(**inputs, position_ids=batch.position_ids.clone()).last_hidden_state
    try:
        with documents_apart(model, batch):
            found = body(**inputs, position_ids=batch.position_ids).last_hidden_state
    except (LimbeckError, RuntimeError, TypeError, ValueError, AttributeError, KeyError):
        return False
    return bool(torch.allclose(usual, found, rtol=1e-3, atol=1e-3))


def _packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers' interface; see `limbeck.model.attention.attention`."""
    more = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    if not hasattr(module, "mixer") and (more or documents_of(kwargs.get("position_ids")) is None):
        raise LimbeckError(f"{type(module).__name__} asks for more than the ends of documents")
    return attention(module, query, key, value, None, **kwargs)


AttentionInterface.register(PACKED, _packed)  # and no mask of that name, so none is made
