"""Packed documents without a mask: the attention implementation `limbeck_packed`, for passes on an accelerator.

    with packed_attention(model, batch):                  # `batch.metadata` has the documents' boundaries
        model.get_decoder()(input_ids=..., position_ids=batch.position_ids)

transformers separates packed documents by a mask [B, 1, T, T], and synchronizes with the device to see whether it needs
one. Here the boundaries, which the CPU has (`limbeck.data.packing`), travel with the position ids: mixers get document
numbers, softmax layers run inside each document (`limbeck.models.varlen`), and nothing is read back from the device.

Whether a model supports this is found by trying it once; families with windows, chunks, soft caps or sinks never do.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from limbeck.core.errors import LimbeckError
from limbeck.data.packing import Batch
from limbeck.models.attention import (
    LIMBECK_ATTENTION,
    LIMBECK_PACKED,
    limbeck_attention_forward,
    register_attention,
)
from limbeck.models.temporary import use_attn_implementation
from limbeck.models.varlen import get_packed_documents, probe_flash_varlen


@contextmanager
def packed_attention(model: PreTrainedModel, batch: Batch) -> Iterator[None]:
    """Run passes over `batch` with its document boundaries instead of a mask, if `supports_packed_attention`."""
    attach_documents(batch)
    with use_attn_implementation(model, LIMBECK_PACKED):
        yield


def attach_documents(batch: Batch) -> None:
    """Attach the document boundaries to the batch's position ids, where mixers look for them."""
    assert batch.metadata is not None
    position_ids: Any = batch.position_ids
    position_ids.limbeck_documents = batch.metadata.documents


def supports_packed_attention(model: PreTrainedModel) -> bool:
    """Return whether `packed_attention` works on this model; found by trying, once per model."""
    if model.config._attn_implementation not in ("sdpa", LIMBECK_ATTENTION):
        return False
    supported: bool | None = getattr(model, "_limbeck_packed", None)
    if supported is None:
        supported = has_full_attention(model.config.get_text_config()) and _matches_masked_pass(model)
        force_attention_masks(model, not supported)
    return supported


def force_attention_masks(model: PreTrainedModel, masks: bool = True) -> None:
    """Record that a model has to run with transformers' own masks (True), or that it need not (False)."""
    model._limbeck_packed = not masks  # type: ignore[assignment]


def has_full_attention(config: Any) -> bool:
    """Return whether every layer attends to all earlier tokens, which a trial on a few tokens cannot show."""
    window = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    return not window and layer_types == {"full_attention"} and not getattr(config, "attention_chunk_size", None)


@torch.no_grad()
def _matches_masked_pass(model: PreTrainedModel) -> bool:
    """Return whether a few packed tokens give the same hidden states with boundaries as with transformers' mask."""
    device = next(model.parameters()).device
    probe_flash_varlen(device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 0]])
    ids = torch.arange(3, 3 + positions.numel()).view_as(positions)
    batch = Batch(ids, positions, ids)
    batch = Batch(ids.to(device), positions.to(device), ids.to(device), metadata=batch.get_metadata().to(device))
    backbone = model.get_decoder()
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    # the clone carries no boundaries
    masked = backbone(**inputs, position_ids=batch.position_ids.clone()).last_hidden_state
    try:
        with packed_attention(model, batch):
            packed = backbone(**inputs, position_ids=batch.position_ids).last_hidden_state
    except (LimbeckError, RuntimeError, TypeError, ValueError, AttributeError, KeyError):
        return False
    return bool(torch.allclose(masked, packed, rtol=1e-3, atol=1e-3))


def limbeck_packed_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers' interface; see `limbeck.models.attention.limbeck_attention_forward`."""
    has_extras = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    if not hasattr(module, "mixer") and (has_extras or get_packed_documents(kwargs.get("position_ids")) is None):
        raise LimbeckError(f"{type(module).__name__} needs soft caps or sinks, or passes no position ids on")
    return limbeck_attention_forward(module, query, key, value, None, **kwargs)


register_attention(LIMBECK_PACKED, limbeck_packed_forward)
