"""Softmax attention inside each of several packed documents, whose ends the host knows.

    documents = get_packed_documents(position_ids)              # what `limbeck.models.packed` left there
    y, _ = varlen_softmax_attention_forward(module, query, key, value, documents, scaling=scale)

On a GPU in half precision PyTorch's FlashAttention runs over documents of varying length, and nothing grows with the
square of the length. Elsewhere a mask is made, once a pass.

Legend: B batch, T time, H query heads, G key/value heads, K key width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from limbeck.data.packing import DocumentBoundaries

FLASH = (8, 0)  # compute capability from which FlashAttention runs
WIDEST = 256  # heads that it takes
_right: dict[
    int, bool
] = {}  # by device, see `probe_flash_varlen`; a compiled block may look here, and try nothing itself


def get_packed_documents(positions: Tensor | None) -> DocumentBoundaries | None:
    """Where the documents of a pass lie, if the host knows: that travels with the position ids."""
    return getattr(positions, "limbeck_documents", None)


def varlen_softmax_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, documents: DocumentBoundaries, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Causal softmax attention for transformers' interface, [B, T, H, V], each token seeing its own document."""
    if documents.cu_seqlens is not None and supports_flash_varlen(query, value):
        return varlen_attention(query, key, value, documents.cu_seqlens, kwargs.get("scaling")), None
    mask = None if documents.segments is None else _mask(documents.segments)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, scale: float | None) -> Tensor:
    """Causal softmax attention inside each document.

    Args:
        query: [B, H, T, K]; key, value: [B, G, T, K].
        offsets: int32 [n + 1], ends of the documents in the B·T tokens.

    Returns:
        [B, T, H, K], in half precision.
    """
    from torch.nn.attention.varlen import varlen_attn

    dtype, length = _working(query), query.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))
    # no document is longer than a row; its true length would have to be a number that changes with each batch
    o = varlen_attn(q, k, v, offsets, offsets, length, length, scale=scale, window_size=(-1, 0), enable_gqa=True)
    return o.unflatten(0, (query.shape[0], length))  # type: ignore[union-attr]


def supports_flash_varlen(query: Tensor, value: Tensor) -> bool:
    """Does FlashAttention over documents of varying length take these?"""
    if query.device.type != "cuda" or _working(query) not in (torch.float16, torch.bfloat16):
        return False
    return query.shape[-1] == value.shape[-1] <= WIDEST and _right.get(query.device.index, False)


def probe_flash_varlen(device: torch.device) -> None:
    """Find out, once per device, whether that kernel is there and right; until then it is not used."""
    if device.type == "cuda" and device.index not in _right:
        _right[device.index] = torch.cuda.get_device_capability(device) >= FLASH and _is_right(device)


def _is_right(device: torch.device) -> bool:
    """Forward and backward on two documents, against each of them alone."""
    with torch.enable_grad():
        shape: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
        q, k, v = (torch.randn(1, h, 24, 64, **shape) for h in (4, 2, 2))
        cut = torch.tensor([0, 10, 24, 24], dtype=torch.int32, device=device)
        try:
            y = varlen_attention(q, k, v, cut, None).transpose(1, 2)
            found = [y, *torch.autograd.grad(y.sum(), [q, k, v])]
        except (ImportError, TypeError, RuntimeError):
            return False
        want = torch.cat([_alone(q[:, :, own], k[:, :, own], v[:, :, own]) for own in (slice(10), slice(10, 24))], 2)
        right = [want, *torch.autograd.grad(want.sum(), [q, k, v])]
    return all(torch.allclose(a, b, rtol=5e-2, atol=5e-2) for a, b in zip(found, right))


def _alone(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _working(query: Tensor) -> torch.dtype:
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _mask(segments: Any) -> Tensor:
    """Which tokens see which, bool [B, 1, T, T], from the number of each token's document [B, T]."""
    known: Tensor | None = getattr(segments, "limbeck_mask", None)  # one mask serves all layers of a pass
    if known is None:
        known = (segments[:, None, :, None] == segments[:, None, None, :]).tril()
        segments.limbeck_mask = known
    return known
