"""The attention function `limbeck`: the one thing in which a student differs from its teacher's class.

transformers calls the attention function that the config names with q, k, v as the family computes them. A module that
carries a `mixer` gets its mixed values, any other module the softmax attention that the teacher had. What the interface
does not pass (hidden states, cache) a forward pre-hook on the module adds to the call's keyword arguments, so nothing
is global and threads, nested models and gradient checkpointing need no care.

Padding and packed documents are read from the mask that the softmax layers use: a token that may not attend to itself
is padding, and one that may not attend to the valid token before it begins a document.
"""

import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from limbeck.errors import LimbeckError
from limbeck.mixers import Tokens
from limbeck.model.cache import RecurrentLayer, recurrent_layer

NAME = "limbeck"


@dataclass
class Call:
    """What the pre-hook hands to the attention function: the layer's input [B, T, D] and its cache layer."""

    x: Tensor
    layer: RecurrentLayer | None


def attach(module: nn.Module, mixer: nn.Module) -> None:
    """Make `mixer` the attention of `module` (a transformers self-attention module)."""
    module.mixer = mixer
    module.register_forward_pre_hook(_hand_over, with_kwargs=True)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    limbeck_call: Call | None = None,
    output_matrix: bool = False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers' interface.

    Args:
        query: [B, H, T, K]; key: [B, G, T, K]; value: [B, G, T, V], as the interface lays them out.
        attention_mask: [B, 1, T, keys] bool or additive, or None for plain causal attention.
        limbeck_call: set by the pre-hook on modules with a mixer.
        output_matrix: also return the mixing matrix [B, H, T, T] (stage 1 asks for it).

    Returns:
        [B, T, H, V] and the mixing matrix or None.
    """
    if not hasattr(module, "mixer"):
        return softmax_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    if limbeck_call is None:
        raise LimbeckError(f"{type(module).__name__} does not pass keyword arguments on to its attention function")
    tokens = tokens_of(attention_mask, query.shape[2])
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if output_matrix:
        return module.mixer.forward_matrix(q, k, v, limbeck_call.x, tokens=tokens)
    layer = limbeck_call.layer
    y, state = module.mixer(q, k, v, limbeck_call.x, tokens=tokens, state=layer.state if layer else None)
    if layer is not None:
        layer.state = state
    return y, None


def softmax_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of a layer that keeps it: SDPA, or the family's eager function where SDPA lacks a feature."""
    if kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    eager = sys.modules[type(module).__module__].eager_attention_forward
    if attention_mask is None:
        length, total = query.shape[2], key.shape[2]
        ones = torch.ones(length, total, dtype=torch.bool, device=query.device)
        attention_mask = ones.tril(total - length)[None, None]
    if attention_mask.dtype == torch.bool:
        closed = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, closed)
    return eager(module, query, key, value, attention_mask, **kwargs)


def tokens_of(mask: Tensor | None, length: int) -> Tokens:
    """Padding and documents of the last `length` tokens, read from an attention mask of any layout.

    Args:
        mask: None, [B, keys] (1 = valid), or [B, 1, T, keys] bool or additive.
    """
    if mask is None:
        return Tokens()
    known = getattr(mask, "_limbeck_tokens", None)  # one mask serves all layers of a pass
    if known is not None:
        return known
    if mask.dim() == 2:
        valid, starts = mask[:, -length:].bool(), None
    else:
        allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        offset = mask.shape[-1] - length
        valid = allowed.diagonal(offset=offset, dim1=-2, dim2=-1)
        joined = allowed[:, 1:] if offset == 0 else allowed
        joined = joined.diagonal(offset=max(offset - 1, 0), dim1=-2, dim2=-1)[:, -length:]
        starts = ~joined[:, -(length - 1) :] & valid[:, 1:] & valid[:, :-1] if length > 1 else None
    segments = None
    if starts is not None and bool(starts.any()):
        segments = torch.cat([torch.zeros_like(starts[:, :1]), starts], 1).cumsum(1)
    tokens = Tokens(None if bool(valid.all()) else valid, segments)
    mask._limbeck_tokens = tokens  # type: ignore[attr-defined]
    return tokens


def _hand_over(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if module.config._attn_implementation != NAME:
        raise LimbeckError(
            f"attention implementation '{module.config._attn_implementation}' would drop the student's mixers",
            expected=f"'{NAME}'",
            hint="load the student without attn_implementation=...",
        )
    x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
    cache = next((c for c in (*kwargs.values(), *args) if isinstance(c, Cache)), None)
    layer = None if cache is None else recurrent_layer(cache, module.layer_idx)  # type: ignore[arg-type]
    if not module.mixer.options.rope:
        kwargs = _without_rope(kwargs)
    return args, {**kwargs, "limbeck_call": Call(x, layer)}


def _without_rope(kwargs: dict) -> dict:
    """Rotate by nothing: cos = 1, sin = 0. Families with learned positions have nothing to switch off."""
    rotary = kwargs.get("position_embeddings")
    if rotary is None:
        return kwargs
    if not isinstance(rotary, tuple | list) or len(rotary) != 2:
        raise LimbeckError("this family's rotary embedding cannot be switched off", expected="a mixer option rope=true")
    cos, sin = rotary
    return {**kwargs, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
