"""Packed documents without a mask: the attention implementation `limbeck_packed`, for passes on an accelerator.

    with packed_attention(model, batch):                  # the batch knows where its documents end
        model.get_decoder()(input_ids=..., position_ids=batch.position_ids)

transformers keeps packed documents apart by a mask [B, 1, T, T], and asks the device whether it needs one. Here the
documents' ends, which the host knows (`limbeck.data.packing`), travel with the position ids: mixers get their document
numbers, softmax layers run inside each document (`limbeck.models.varlen`). Nothing is asked of the device. A model is
tried before it is run so, and families with windows, chunks, soft caps or sinks never are.

What is changed on somebody's model for the time of a pass, and put back as it was: attention function, eval mode.

    with use_attn_implementation(model, "eager"):
        model.get_decoder()(...)

A model may be shared by threads. Passes that need it in different states wait for each other.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from limbeck.core.errors import LimbeckError
from limbeck.data.packing import Batch
from limbeck.models.attention import LIMBECK_ATTENTION, LIMBECK_PACKED, limbeck_attention_forward
from limbeck.models.varlen import get_packed_documents, probe_flash_varlen

_locks: "weakref.WeakKeyDictionary[nn.Module, Any]" = weakref.WeakKeyDictionary()  # a lock on the model is no copy's
_first = threading.Lock()


@contextmanager
def exclusive_access(module: nn.Module) -> Iterator[None]:
    """No other thread inside, for the same module; the same thread may come again."""
    with _first:
        lock = _locks.setdefault(module, threading.RLock())
    with lock:
        yield


@contextmanager
def use_attn_implementation(module: nn.Module, name: str) -> Iterator[None]:
    """That attention implementation in the module's config and those inside it; afterwards each as it was."""
    config: Any = module.config
    with exclusive_access(module):
        before = [(one, one._attn_implementation) for one in _configs(config)]
        try:
            config._attn_implementation = name
            yield
        finally:
            for one, was in before:
                one._attn_implementation_internal = was


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode; afterwards every module in the mode that it was in."""
    before = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in before:
            module.training = training


def _configs(config: PreTrainedConfig) -> Iterator[Any]:
    """A config and the configs inside it."""
    yield config
    for name in config.sub_configs:
        inner = getattr(config, name, None)
        if isinstance(inner, PreTrainedConfig):
            yield from _configs(inner)


@contextmanager
def packed_attention(model: PreTrainedModel, batch: Batch) -> Iterator[None]:
    """A pass over `batch`, whose documents are kept apart by what the host knows of them; check `supports_packed_attention` before."""
    attach_documents(batch)
    with use_attn_implementation(model, LIMBECK_PACKED):
        yield


def attach_documents(batch: Batch) -> None:
    """Let the position ids carry what the host knows of the documents: mixers look there, on any route."""
    assert batch.metadata is not None
    position_ids: Any = batch.position_ids
    position_ids.limbeck_documents = batch.metadata.documents


def supports_packed_attention(model: PreTrainedModel) -> bool:
    """Can `packed_attention` be used on this model, as it stands? Found by trying, once per model."""
    if model.config._attn_implementation not in ("sdpa", LIMBECK_ATTENTION):
        return False
    known: bool | None = getattr(model, "_limbeck_packed", None)
    if known is None:
        known = _plain(model.config.get_text_config()) and _agrees(model)
        force_attention_masks(model, not known)
    return known


def force_attention_masks(model: PreTrainedModel, masks: bool = True) -> None:
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
    probe_flash_varlen(device)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 0, 1, 0]])
    ids = torch.arange(3, 3 + positions.numel()).view_as(positions)
    batch = Batch(ids, positions, ids)
    batch = Batch(ids.to(device), positions.to(device), ids.to(device), metadata=batch.get_metadata().to(device))
    body = model.get_decoder()
    inputs = {"input_ids": batch.input_ids, "use_cache": False}
    usual = body(**inputs, position_ids=batch.position_ids.clone()).last_hidden_state
    try:
        with packed_attention(model, batch):
            found = body(**inputs, position_ids=batch.position_ids).last_hidden_state
    except (LimbeckError, RuntimeError, TypeError, ValueError, AttributeError, KeyError):
        return False
    return bool(torch.allclose(usual, found, rtol=1e-3, atol=1e-3))


def _packed(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers' interface; see `limbeck.models.attention.limbeck_attention_forward`."""
    more = kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    if not hasattr(module, "mixer") and (more or get_packed_documents(kwargs.get("position_ids")) is None):
        raise LimbeckError(f"{type(module).__name__} asks for more than the ends of documents")
    return limbeck_attention_forward(module, query, key, value, None, **kwargs)


AttentionInterface.register(LIMBECK_PACKED, _packed)  # and no mask of that name, so none is made
