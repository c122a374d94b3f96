"""The attention function `limbeck`: the one thing in which a student differs from its teacher's class.

transformers calls the attention function that the config names with q, k, v as the family computes them. A module that
carries a `mixer` gets its mixed values, any other module the softmax attention that the teacher had. What the interface
does not pass (hidden states, cache) a forward pre-hook on the module adds to the call's keyword arguments, so nothing
is global and threads, nested models and gradient checkpointing need no care.

Padding and packed documents are read from the mask that the softmax layers use: a token that may not attend to itself
is padding, and one that may not attend to the valid token before it begins a document.
"""

import copy
import functools
import inspect
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, EncoderDecoderCache
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from limbeck.core.errors import LimbeckError
from limbeck.mixers import TokenMask
from limbeck.models.cache import RecurrentLayer, get_recurrent_layer
from limbeck.models.varlen import get_packed_documents, varlen_softmax_attention_forward

LIMBECK_ATTENTION = "limbeck"
LIMBECK_EAGER = "limbeck_eager"  # the same for families whose softmax layers have no SDPA
LIMBECK_PACKED = (
    "limbeck_packed"  # the same where the ends of documents are known without a mask (limbeck.models.packed)
)

# whether the pass that runs gives attention weights back; each begins by setting it, as not all families hand it on
output_attentions_requested: ContextVar[bool] = ContextVar("output_attentions_requested", default=False)


@dataclass
class AttentionCall:
    """What the pre-hook hands to the attention function: the layer's input [B, T, D], its cache and its masks."""

    x: Tensor
    module: nn.Module
    cache: Cache | None = None
    layer: RecurrentLayer | None = None  # found when the module updates the cache, under whatever index
    mask: Tensor | None = None
    knows_mask: bool = False  # the module takes the mask as an argument
    positions: Tensor | None = None
    count: int = 0  # calls of the attention function so far


class MatrixRowsComputed(Exception):
    """Carries rows of a mixing matrix [B, H, R, T] out of an attention module, past its output projection."""

    def __init__(self, rows: Tensor):
        super().__init__(
            "rows of a mixing matrix were asked for by another way than limbeck.models.attention_rows.compute_mixing_rows"
        )
        self.rows = rows


def default_attn_implementation(model: type | nn.Module) -> str:
    """Name of the attention implementation for students of that model class."""
    return LIMBECK_ATTENTION if getattr(model, "_supports_sdpa", True) else LIMBECK_EAGER


def resolve_attn_implementation(model: type | nn.Module, name: str) -> str:
    """The attention implementation of a student whose softmax layers are to run as `name` says.

    Args:
        model: the student or its class.
        name: "eager", "sdpa", or one of this module's own names.

    Raises:
        LimbeckError: another name.
    """
    own = default_attn_implementation(model)
    choices = (
        {
            "sdpa": LIMBECK_ATTENTION,
            LIMBECK_ATTENTION: LIMBECK_ATTENTION,
            "eager": LIMBECK_EAGER,
            LIMBECK_EAGER: LIMBECK_EAGER,
        }
        if own == LIMBECK_ATTENTION
        else {"eager": LIMBECK_EAGER, LIMBECK_EAGER: LIMBECK_EAGER}
    )
    if name not in choices:
        raise LimbeckError(
            f"attention implementation '{name}' would drop the student's mixers",
            expected=" or ".join(f"'{n}'" for n in choices if n not in (LIMBECK_ATTENTION, LIMBECK_EAGER))
            + ", for the layers with softmax",
            hint="leave out attn_implementation",
        )
    return choices[name]


def attach_mixer(module: nn.Module, mixer: nn.Module) -> None:
    """Make `mixer` the attention of `module` (a transformers self-attention module)."""
    if not any(p.kind is p.VAR_KEYWORD for p in _parameters(module).values()):
        raise LimbeckError(f"{type(module).__name__} takes no further keyword arguments, so nothing can be handed over")
    module.mixer = mixer
    module.limbeck_argument_names = _names(module)  # type: ignore[assignment]  # looked up once: a compiler cannot
    # index of its layer in the cache, once it was seen to update one; -1 if several
    module.limbeck_layer_idx = None  # type: ignore[assignment]
    module.register_forward_pre_hook(_hand_over, with_kwargs=True)


def bind_arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """A call's arguments by name."""
    return {**dict(zip(getattr(module, "limbeck_argument_names", None) or _names(module), args)), **kwargs}


def get_hidden_states(given: dict[str, Any]) -> Tensor:
    """The hidden states among an attention module's arguments: under their usual name, or the first there is."""
    return given["hidden_states"] if "hidden_states" in given else next(iter(given.values()))


def limbeck_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    limbeck_call: AttentionCall | None = None,
    output_matrix: bool | Tensor = False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers' interface.

    Args:
        query: [B, H, T, K]; key: [B, G, T, K]; value: [B, G, T, V], as the interface lays them out.
        attention_mask: [B, 1, T, keys] bool or additive, or None for plain causal attention.
        limbeck_call: set by the pre-hook on modules with a mixer.
        output_matrix: also return the mixing matrix [B, H, T, T] (stage 1 asks for it). Given rows [B, R] of it, those
            alone are found, and nothing of the module runs behind them; see `limbeck.models.attention_rows.compute_mixing_rows`.

    Returns:
        [B, T, H, V] and the mixing matrix or None.

    Raises:
        MatrixRowsComputed: with the rows that `output_matrix` asks for.
    """
    if not hasattr(module, "mixer"):
        documents = get_packed_documents(kwargs.get("position_ids"))
        if attention_mask is None and documents is not None and documents.cu_seqlens is not None:
            return varlen_softmax_attention_forward(
                module, query, key, value, documents, scaling=scaling, dropout=dropout, **kwargs
            )
        return softmax_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs
        )
    if limbeck_call is None:
        raise LimbeckError(f"{type(module).__name__} does not pass keyword arguments on to its attention function")
    call, length = limbeck_call, query.shape[2]
    if call.cache is not None and call.layer is None:
        # a layer that reads the keys and values of another stores none of its own
        call.layer = get_recurrent_layer(call.cache, module.layer_idx, module)  # type: ignore[arg-type]
        call.layer.advance(query, query)
        call.layer.mask_offset = None  # its mask is that of the other layer, whose last columns are this call's
        key, value = key[:, :, -length:], value[:, :, -length:]
    layer = call.layer
    documents = get_packed_documents(call.positions)
    if documents is not None:
        tokens = TokenMask(None, documents.segments)
    else:
        tokens = token_mask_from_attention_mask(
            call.mask if call.knows_mask else attention_mask,
            length,
            mask_offset=layer.mask_offset if layer else None,
            positions=call.positions,
            chunk=getattr(module.config, "attention_chunk_size", None),
        )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if isinstance(output_matrix, Tensor):
        raise MatrixRowsComputed(module.mixer.forward_rows(q, k, v, call.x, output_matrix, tokens=tokens))
    if output_matrix:
        return module.mixer.forward_matrix(q, k, v, call.x, tokens=tokens)
    y, state = module.mixer(q, k, v, call.x, tokens=tokens, state=layer.read_state(call.count) if layer else None)
    if layer is not None:
        layer.write_state(call.count, state)
    call.count += 1
    return y, None


def softmax_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention of a layer that keeps it: SDPA, or the family's eager function where SDPA lacks a feature.

    The weights are among what SDPA lacks.
    """
    config: Any = module.config
    asked = kwargs.get("output_attentions") or (not torch.compiler.is_compiling() and output_attentions_requested.get())
    eager = asked or config._attn_implementation == LIMBECK_EAGER
    if not eager and kwargs.get("softcap") is None and kwargs.get("s_aux") is None:
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
    function = sys.modules[type(module).__module__].eager_attention_forward
    if attention_mask is None:
        length, total = query.shape[2], key.shape[2]
        ones = torch.ones(length, total, dtype=torch.bool, device=query.device)
        attention_mask = ones.tril(total - length)[None, None]
    if attention_mask.dtype == torch.bool:
        closed = torch.finfo(query.dtype).min
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill(~attention_mask, closed)
    return function(module, query, key, value, attention_mask, **kwargs)


def token_mask_from_attention_mask(
    mask: Tensor | None,
    length: int,
    mask_offset: int | Tensor | None = None,
    positions: Tensor | None = None,
    chunk: int | None = None,
) -> TokenMask:
    """Padding and documents of `length` tokens, read from an attention mask of any layout.

    Args:
        mask: None, [B, keys] (1 = valid), or [B, 1, T, keys] bool or additive.
        mask_offset: the column of the first token, for a call with a cache; None without: the tokens have the last columns.
            A tensor [] where a static cache counts.
        positions: [B, T] position ids, where known.
        chunk: the mask may be one of chunked attention, whose chunks of so many tokens end as documents do. What ends
            there is a document only if the positions say so; with a cache there is one document.
    """
    if mask is None:
        return TokenMask()
    cached = mask_offset is not None
    mask_offset = mask.shape[-1] - length if mask_offset is None else mask_offset
    # neither a compiled step nor one on an accelerator stops to look at values; it gets what may be trivial
    looks = not torch.compiler.is_compiling() and (length > 1 or mask.device.type == "cpu")
    # One mask serves all layers of a pass, until it is written to, which inference mode does not count.
    read = [mask, positions] if chunk and positions is not None else [mask]
    keeps = looks and not any(x.is_inference() for x in read)
    call = (length, int(mask_offset), chunk, *((id(x), x._version) for x in read)) if keeps else None
    known = getattr(mask, "_limbeck_tokens", None) if keeps else None
    if known is not None and known[0] == call:
        return known[1]
    if mask.dim() == 2:
        valid, starts = _columns(mask, mask_offset, length).bool(), None
    else:
        allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        valid, starts = _diagonal(allowed, mask_offset, length), None
        if length > 1:
            joined = _diagonal(allowed[:, 1:], mask_offset, length - 1)
            if chunk:
                joined = joined | (True if cached else _goes_on(valid, positions, chunk))
            starts = ~joined & valid[:, 1:] & valid[:, :-1]
    segments = None
    if starts is not None and not (looks and not bool(starts.any())):
        if looks and bool((allowed[:, 1:].expand(len(starts), -1, -1)[starts].sum(-1) > 1).any()):
            raise LimbeckError(
                "the attention mask holds texts that branch from one beginning",
                expected="padding, or documents one after another: a recurrent state follows one line of tokens",
            )
        segments = torch.cat([torch.zeros_like(starts[:, :1]), starts], 1).cumsum(1)
    tokens = TokenMask(None if looks and bool(valid.all()) else valid, segments)
    if keeps:
        mask._limbeck_tokens = (call, tokens, positions)  # type: ignore[attr-defined]  # whose id stays its own
    return tokens


def _columns(mask: Tensor, begin: int | Tensor, length: int) -> Tensor:
    """`length` columns of mask [B, keys] from column `begin` on."""
    if isinstance(begin, Tensor):
        return mask.index_select(1, begin + torch.arange(length, device=mask.device))
    return mask[:, begin : begin + length]


def _diagonal(allowed: Tensor, begin: int | Tensor, length: int) -> Tensor:
    """Whether the first `length` queries of allowed [B, T, keys] may see key `begin`, `begin` + 1, ...: [B, length]."""
    if isinstance(begin, Tensor):
        query = torch.arange(length, device=allowed.device)
        return allowed[:, query, begin + query]
    return allowed.diagonal(offset=begin, dim1=-2, dim2=-1)[:, :length]


def _goes_on(valid: Tensor, positions: Tensor | None, chunk: int) -> Tensor:
    """Where no document can begin, for tokens 1 to T - 1: [B, T - 1]."""
    if positions is not None:
        return positions[:, 1:] == positions[:, :-1] + 1
    padding = (valid.cumsum(1) == 0).sum(1, keepdim=True)  # chunks are counted from the first valid token
    index = torch.arange(1, valid.shape[1], device=valid.device)
    return (index - padding) % chunk == 0


def _hand_over(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    if module.config._attn_implementation not in (LIMBECK_ATTENTION, LIMBECK_EAGER, LIMBECK_PACKED):
        raise LimbeckError(
            f"attention implementation '{module.config._attn_implementation}' would drop the student's mixers",
            expected=f"'{LIMBECK_ATTENTION}'",
            hint="load the student without attn_implementation=...",
        )
    given = bind_arguments(module, args, kwargs)
    call = AttentionCall(get_hidden_states(given), module)
    mask = given.get("attention_mask")
    if "attention_mask" in module.limbeck_argument_names and (mask is None or isinstance(mask, Tensor)):
        # not the attention function's: some modules close further keys there
        call.mask, call.knows_mask = mask, True
    if isinstance(given.get("position_ids"), Tensor) and given["position_ids"].dim() == 2:
        call.positions = given["position_ids"]
    given = {name: wrap_cache(value, call) if isinstance(value, Cache) else value for name, value in given.items()}
    if not module.mixer.options.rope:
        given = _without_rope(given)
    return (), {**given, "limbeck_call": call}


def wrap_cache(cache: Cache, call: AttentionCall) -> Cache:
    """The cache as the module sees it: the same object's contents, and `update` puts a recurrent layer in its place.

    In a compiled step the recurrent layers stand there already, and the cache goes to the module as it is.
    """
    place = call.module.limbeck_layer_idx
    if torch.compiler.is_compiling() and isinstance(place, int) and 0 <= place < len(cache.layers):
        layer = cache.layers[place]
        if isinstance(layer, RecurrentLayer):
            call.cache, call.layer = cache, layer
            return cache
    if isinstance(cache, EncoderDecoderCache):
        both: Any = copy.copy(cache)
        both.self_attention_cache = wrap_cache(cache.self_attention_cache, call)
        return both
    cls: Any = type(cache)
    seen = object.__new__(_handed_class(cls))
    seen.__dict__ = cache.__dict__
    seen.call = call
    call.cache = cache
    return seen


class _Handed:
    """What `wrap_cache` adds to a class of caches."""

    __slots__ = ("call",)
    call: AttentionCall

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        module = self.call.module
        if module.limbeck_layer_idx != layer_idx:
            module.limbeck_layer_idx = layer_idx if module.limbeck_layer_idx is None else -1  # type: ignore[assignment]
        self.call.layer = get_recurrent_layer(self, layer_idx, module)  # type: ignore[arg-type]
        return self.call.layer.advance(key_states, value_states)


@functools.cache
def _handed_class(cls: Any) -> Any:
    return type(f"Handed{cls.__name__}", (_Handed, cls), {})


def _names(module: nn.Module) -> tuple[str, ...]:
    """What a module's forward pass takes by name, in order."""
    return tuple(n for n, p in _parameters(module).items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    cls: Any = type(module)
    return _signature(cls)


@functools.cache
def _signature(cls: Any) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(cls.forward).parameters.items())[1:])


def _without_rope(given: dict[str, Any]) -> dict[str, Any]:
    """Rotate by nothing: cos = 1, sin = 0. Families with learned positions have nothing to switch off."""
    rotary = given.get("position_embeddings")
    if rotary is None:
        return given
    if isinstance(rotary, Tensor) and rotary.is_complex():
        return {**given, "position_embeddings": torch.ones_like(rotary)}
    if not isinstance(rotary, tuple | list) or len(rotary) != 2:
        raise LimbeckError("this family's rotary embedding cannot be switched off", expected="a mixer option rope=true")
    cos, sin = rotary
    return {**given, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}


for _name, _mask in ((LIMBECK_ATTENTION, sdpa_mask), (LIMBECK_EAGER, eager_mask)):
    AttentionInterface.register(_name, limbeck_attention_forward)
    AttentionMaskInterface.register(_name, _mask)
