"""Softmax attention inside packed documents of varying length, whose boundaries are known on the CPU.

    documents = get_packed_documents(position_ids)              # attached by `limbeck.models.packed`
    y, _ = varlen_softmax_attention_forward(module, query, key, value, documents, scaling=scale)

On a GPU in half precision this is PyTorch's FlashAttention over sequences of varying length, whose memory does not grow
with the square of the length. Elsewhere a mask is made, once per pass.

Shapes: B batch, T time, H query heads, G key/value heads, K key width, V value width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from limbeck.data.packing import DocumentBoundaries

FLASH_CAPABILITY = (8, 0)  # lowest compute capability on which FlashAttention runs
FLASH_MAX_HEAD_DIM = 256
# By device index, filled by `probe_flash_varlen`: a compiled block can look a result up, but not try the kernel.
_flash_works: dict[int, bool] = {}


def get_packed_documents(positions: Tensor | None) -> DocumentBoundaries | None:
    """Return the document boundaries attached to position ids, or None."""
    return getattr(positions, "limbeck_documents", None)


def varlen_softmax_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, documents: DocumentBoundaries, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers' interface: causal softmax attention inside each document, [B, T, H, V]."""
    if documents.cu_seqlens is not None and supports_flash_varlen(query, value):
        return varlen_attention(query, key, value, documents.cu_seqlens, kwargs.get("scaling")), None
    mask = None if documents.segments is None else _block_diagonal_mask(documents.segments)
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **kwargs)


def varlen_attention(query: Tensor, key: Tensor, value: Tensor, offsets: Tensor, scale: float | None) -> Tensor:
    """Compute causal softmax attention inside each document with FlashAttention.

    Args:
        query: [B, H, T, K]; key, value: [B, G, T, K].
        offsets: int32 [n + 1], where the n documents begin and end in the B·T tokens.

    Returns:
        [B, T, H, K], in half precision.
    """
    # optional: older versions of PyTorch do not have it, and `probe_flash_varlen` finds that out
    from torch.nn.attention.varlen import varlen_attn

    dtype, length = _compute_dtype(query), query.shape[2]
    q, k, v = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))
    # The row length as an upper bound: the longest document's own length would be another number in each batch, and a
    # compiled block would be compiled again for each.
    o = varlen_attn(q, k, v, offsets, offsets, length, length, scale=scale, window_size=(-1, 0), enable_gqa=True)
    return o.unflatten(0, (query.shape[0], length))  # type: ignore[union-attr]


def supports_flash_varlen(query: Tensor, value: Tensor) -> bool:
    """Return whether FlashAttention over documents of varying length takes these tensors on their device."""
    if query.device.type != "cuda" or _compute_dtype(query) not in (torch.float16, torch.bfloat16):
        return False
    return query.shape[-1] == value.shape[-1] <= FLASH_MAX_HEAD_DIM and _flash_works.get(query.device.index, False)


def probe_flash_varlen(device: torch.device) -> None:
    """Test, once per device, whether the kernel exists and computes correctly; until then it is not used."""
    if device.type == "cuda" and device.index not in _flash_works:
        capable = torch.cuda.get_device_capability(device) >= FLASH_CAPABILITY
        _flash_works[device.index] = capable and _matches_sdpa(device)


def _matches_sdpa(device: torch.device) -> bool:
    """Compare forward and backward pass on two packed documents with SDPA on each of them."""
    with torch.enable_grad():
        shape: dict[str, Any] = {"device": device, "dtype": torch.bfloat16, "requires_grad": True}
        q, k, v = (torch.randn(1, h, 24, 64, **shape) for h in (4, 2, 2))
        offsets = torch.tensor([0, 10, 24, 24], dtype=torch.int32, device=device)
        try:
            y = varlen_attention(q, k, v, offsets, None).transpose(1, 2)
            actual = [y, *torch.autograd.grad(y.sum(), [q, k, v])]
        except (ImportError, TypeError, RuntimeError):
            return False
        separate = [
            F.scaled_dot_product_attention(
                q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], is_causal=True, enable_gqa=True
            )
            for tokens in (slice(10), slice(10, 24))
        ]
        joined = torch.cat(separate, 2)
        expected = [joined, *torch.autograd.grad(joined.sum(), [q, k, v])]
    return all(torch.allclose(a, b, rtol=5e-2, atol=5e-2) for a, b in zip(actual, expected))


def _compute_dtype(query: Tensor) -> torch.dtype:
    """Return the dtype in which attention runs: that of autocast if it is on."""
    device = query.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype


def _block_diagonal_mask(segments: Any) -> Tensor:
    """Return the causal mask inside documents, bool [B, 1, T, T], from the number of each token's document [B, T]."""
    mask: Tensor | None = getattr(segments, "limbeck_mask", None)  # one mask serves all layers of a pass
    if mask is None:
        mask = (segments[:, None, :, None] == segments[:, None, None, :]).tril()
        segments.limbeck_mask = mask
    return mask
