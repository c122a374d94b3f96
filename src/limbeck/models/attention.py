"""The attention function `limbeck`: the one thing in which a student differs from its teacher's class.

    attach_mixer(module, mixer)         # from now on `module` mixes with `mixer`, under any name of the table below

transformers calls the attention function that the config names with q, k, v as the family computes them. A module that
has a `mixer` returns its mixed values, any other module the softmax attention that the teacher had. What the interface
does not pass (hidden states, cache) a forward pre-hook on the module adds to the call's keyword arguments. Nothing is
global, so threads, nested models and gradient checkpointing need no special care.

Padding and packed documents are read from the mask that the softmax layers use: a token that may not attend to itself
is padding, and one that may not attend to the valid token before it begins a document.

Shapes: B batch, T time, H query heads, G key/value heads, K key width, V value width, D model width, R sampled queries.
"""

import copy
import functools
import inspect
import sys
from collections.abc import Callable
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
from limbeck.mixers import Tokens
from limbeck.models.cache import RecurrentLayer, StepCache, get_recurrent_layer
from limbeck.models.varlen import get_packed_documents, varlen_softmax_attention_forward

# All attention implementations that Limbeck registers with transformers, and what each is for:
LIMBECK_ATTENTION = "limbeck"  # students; their softmax layers use SDPA
LIMBECK_EAGER = "limbeck_eager"  # students whose softmax layers use the family's eager function (no SDPA, or by choice)
LIMBECK_PACKED = "limbeck_packed"  # packed documents by their boundaries, without a mask (limbeck.models.packed)
LIMBECK_ROWS = "limbeck_rows"  # teachers: rows of the attention matrix (limbeck.models.attention_rows)
LIMBECK_EXPORT = "limbeck_export"  # a step with its states as arguments (limbeck.models.export.onnx_step)
LIMBECK_PROBE = "limbeck_probe"  # records shapes while a family is examined (limbeck.models.probe)
# those under which a module with a mixer runs that
MIXER_IMPLEMENTATIONS = (LIMBECK_ATTENTION, LIMBECK_EAGER, LIMBECK_PACKED, LIMBECK_EXPORT)
# the student's implementation by the transformers implementation that its softmax layers use
STUDENT_IMPLEMENTATIONS = {"sdpa": LIMBECK_ATTENTION, "eager": LIMBECK_EAGER}

ALL_ROWS = "all rows"  # `output_matrix` of a call that ends when the mixing matrix is there

# Whether the running pass returns attention weights. Every pass sets it first, as some families do not pass it on.
output_attentions_requested: ContextVar[bool] = ContextVar("output_attentions_requested", default=False)


@dataclass
class AttentionCall:
    """Arguments that the pre-hook passes to the attention function, beyond transformers' interface."""

    x: Tensor  # the layer's input [B, T, D]
    module: nn.Module
    cache: Cache | None = None
    layer: RecurrentLayer | None = None  # set when the module updates the cache, under whatever index
    mask: Tensor | None = None
    module_takes_mask: bool = False
    positions: Tensor | None = None
    count: int = 0  # calls of the attention function so far in this pass of the module


class MatrixRowsComputed(Exception):
    """Carries rows of a mixing matrix [B, H, R, T] out of an attention module, past its output projection."""

    def __init__(self, rows: Tensor):
        super().__init__(
            "rows of a mixing matrix are returned through limbeck.models.attention_rows.compute_mixing_rows only"
        )
        self.rows = rows


def default_attn_implementation(model: type | nn.Module) -> str:
    """Return the name of the attention implementation for students of a model class."""
    return LIMBECK_ATTENTION if getattr(model, "_supports_sdpa", True) else LIMBECK_EAGER


def resolve_attn_implementation(model: type | nn.Module, name: str) -> str:
    """Return the attention implementation of a student whose softmax layers are to run as `name` says.

    Args:
        model: the student or its class.
        name: "eager", "sdpa", or the student implementation itself.

    Raises:
        LimbeckError: another name, or "sdpa" for a family without SDPA.
    """
    choices = dict(STUDENT_IMPLEMENTATIONS)
    if default_attn_implementation(model) == LIMBECK_EAGER:
        del choices["sdpa"]
    if name in choices.values():
        return name
    if name not in choices:
        raise LimbeckError(
            f"attention implementation '{name}' would drop the student's mixers",
            expected=" or ".join(f"'{choice}'" for choice in choices) + ", for the layers with softmax",
            hint="leave out attn_implementation",
        )
    return choices[name]


def attach_mixer(module: nn.Module, mixer: nn.Module) -> None:
    """Make `mixer` the attention of `module` (a transformers self-attention module)."""
    if not any(p.kind is p.VAR_KEYWORD for p in _parameters(module).values()):
        raise LimbeckError(f"{type(module).__name__} accepts no **kwargs, so its mixer cannot get the hidden states")
    module.mixer = mixer
    # inspected once and stored, because a compiled module cannot inspect signatures
    module.limbeck_argument_names = _argument_names(module)  # type: ignore[assignment]
    # index of its layer in the cache, known from the first update on; -1 if there are several
    module.limbeck_layer_idx = None  # type: ignore[assignment]
    module.register_forward_pre_hook(_pass_call, with_kwargs=True)
    if not mixer.options.qk_norm:  # type: ignore[union-attr]
        for norm in find_qk_norms(module):
            norm.register_forward_hook(_return_input)


def find_qk_norms(module: nn.Module) -> list[nn.Module]:
    """Return the norms of an attention module between its projections and its attention function, without the mixer."""
    return [child for child in module.children() if "norm" in type(child).__name__.lower()]


def _return_input(norm: nn.Module, args: tuple, output: Tensor) -> Tensor:
    """Forward hook of a q/k norm whose mixer takes q and k as they were projected."""
    return args[0]


def bind_arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """Return the arguments of a call of `module` by name."""
    return {**dict(zip(getattr(module, "limbeck_argument_names", None) or _argument_names(module), args)), **kwargs}


def get_hidden_states(arguments: dict[str, Any]) -> Tensor:
    """Return the hidden states among an attention module's arguments: under their usual name, else the first one."""
    return arguments["hidden_states"] if "hidden_states" in arguments else next(iter(arguments.values()))


def limbeck_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    limbeck_call: AttentionCall | None = None,
    output_matrix: bool | str | Tensor = False,
    **kwargs,
) -> tuple[Tensor, Tensor | None]:
    """Attention function for transformers' interface.

    Args:
        query: [B, H, T, K]; key: [B, G, T, K]; value: [B, G, T, V], as the interface lays them out.
        attention_mask: [B, 1, T, keys] bool or additive, or None for plain causal attention.
        limbeck_call: set by the pre-hook on modules with a mixer.
        output_matrix: also return the mixing matrix [B, H, T, T]. With a tensor of rows [B, R] only those are computed,
            with ALL_ROWS all, and the rest of the module does not run (for stage 1); see
            `limbeck.models.attention_rows.compute_mixing_rows`.

    Returns:
        [B, T, H, V] and the mixing matrix or None.

    Raises:
        MatrixRowsComputed: carries the rows, if `output_matrix` is a tensor or ALL_ROWS.
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
        # This layer reads the keys and values of another one and never updates the cache itself.
        call.layer = get_recurrent_layer(call.cache, module.layer_idx, module)  # type: ignore[arg-type]
        call.layer.advance(query, query)
        call.layer.mask_offset = None  # the mask is the other layer's; its last columns belong to this call
        key, value = key[:, :, -length:], value[:, :, -length:]
    layer = call.layer
    documents = get_packed_documents(call.positions)
    if documents is not None:
        tokens = Tokens(None, documents.segments)
    else:
        tokens = token_mask_from_attention_mask(
            call.mask if call.module_takes_mask else attention_mask,
            length,
            mask_offset=layer.mask_offset if layer else None,
            positions=call.positions,
            chunk=getattr(module.config, "attention_chunk_size", None),
        )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if isinstance(output_matrix, Tensor | str):
        rows = None if isinstance(output_matrix, str) else output_matrix
        raise MatrixRowsComputed(module.mixer.forward_rows(q, k, v, call.x, rows, tokens=tokens))
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
    """Compute the attention of a softmax layer: SDPA, or the family's eager function where SDPA lacks a feature.

    SDPA lacks soft caps, sinks and the output of attention weights.
    """
    config: Any = module.config
    weights_requested = kwargs.get("output_attentions") or (
        not torch.compiler.is_compiling() and output_attentions_requested.get()
    )
    eager = weights_requested or config._attn_implementation == LIMBECK_EAGER
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
) -> Tokens:
    """Read padding and document boundaries of `length` tokens from an attention mask of any layout.

    Args:
        mask: None, [B, keys] (1 = valid), or [B, 1, T, keys] bool or additive.
        mask_offset: the mask's column of the first token, for a call with a cache (a tensor [] if a static cache counts
            in one); None without a cache: the tokens have the last columns.
        positions: [B, T] position ids, if available.
        chunk: tokens in a chunk of chunked attention, in whose mask chunk ends look like document ends. Such an end
            counts as a document's only if the positions restart there; with a cache there is one document.
    """
    if mask is None:
        return Tokens()
    cached = mask_offset is not None
    mask_offset = mask.shape[-1] - length if mask_offset is None else mask_offset
    # Reading values would break a compiled graph and stall an accelerator in every decoding step: there the mask is
    # returned even where it turns out to be trivial.
    may_read = not torch.compiler.is_compiling() and (length > 1 or mask.device.type == "cpu")
    # One mask serves all layers of a pass, so the result is cached on it until the mask is written to. Inference mode
    # keeps no version counter that would show that.
    sources = [mask, positions] if chunk and positions is not None else [mask]
    may_cache = may_read and not any(x.is_inference() for x in sources)
    key = (length, int(mask_offset), chunk, *((id(x), x._version) for x in sources)) if may_cache else None
    cached_tokens = getattr(mask, "_limbeck_tokens", None) if may_cache else None
    if cached_tokens is not None and cached_tokens[0] == key:
        return cached_tokens[1]
    if mask.dim() == 2:
        valid, starts = _columns(mask, mask_offset, length).bool(), None
    else:
        allowed = mask[:, 0] if mask.dtype == torch.bool else mask[:, 0] == 0
        valid, starts = _diagonal(allowed, mask_offset, length), None
        if length > 1:
            joined = _diagonal(allowed[:, 1:], mask_offset, length - 1)
            if chunk:
                joined = joined | (True if cached else _cannot_begin_document(valid, positions, chunk))
            starts = ~joined & valid[:, 1:] & valid[:, :-1]
    segments = None
    if starts is not None and not (may_read and not bool(starts.any())):
        if may_read and bool((allowed[:, 1:].expand(len(starts), -1, -1)[starts].sum(-1) > 1).any()):
            raise LimbeckError(
                "the attention mask describes texts that branch from a shared beginning",
                expected="padding, or documents one after another: a recurrent state follows a single sequence",
            )
        segments = torch.cat([torch.zeros_like(starts[:, :1]), starts], 1).cumsum(1)
    tokens = Tokens(None if may_read and bool(valid.all()) else valid, segments)
    if may_cache:
        # the positions are stored only to keep them alive, so that their id in the key stays unique
        mask._limbeck_tokens = (key, tokens, positions)  # type: ignore[attr-defined]
    return tokens


def _columns(mask: Tensor, begin: int | Tensor, length: int) -> Tensor:
    """Return `length` columns of mask [B, keys] from column `begin` on."""
    if isinstance(begin, Tensor):
        return mask.index_select(1, begin + torch.arange(length, device=mask.device))
    return mask[:, begin : begin + length]


def _diagonal(allowed: Tensor, begin: int | Tensor, length: int) -> Tensor:
    """Return whether queries 0, 1, ... of allowed [B, T, keys] may see keys `begin`, `begin` + 1, ...: [B, length]."""
    if isinstance(begin, Tensor):
        query = torch.arange(length, device=allowed.device)
        return allowed[:, query, begin + query]
    return allowed.diagonal(offset=begin, dim1=-2, dim2=-1)[:, :length]


def _cannot_begin_document(valid: Tensor, positions: Tensor | None, chunk: int) -> Tensor:
    """Return whether tokens 1 to T - 1 cannot begin a document, in chunked attention: bool [B, T - 1]."""
    if positions is not None:
        return positions[:, 1:] == positions[:, :-1] + 1
    padding = (valid.cumsum(1) == 0).sum(1, keepdim=True)  # chunks are counted from the first valid token
    index = torch.arange(1, valid.shape[1], device=valid.device)
    return (index - padding) % chunk == 0


def _pass_call(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Forward pre-hook: add an `AttentionCall` to the arguments of an attention module with a mixer."""
    if module.config._attn_implementation not in MIXER_IMPLEMENTATIONS:
        raise LimbeckError(
            f"attention implementation '{module.config._attn_implementation}' would drop the student's mixers",
            expected=f"'{LIMBECK_ATTENTION}'",
            hint="load the student without attn_implementation=...",
        )
    arguments = bind_arguments(module, args, kwargs)
    call = AttentionCall(get_hidden_states(arguments), module)
    mask = arguments.get("attention_mask")
    if "attention_mask" in module.limbeck_argument_names and (mask is None or isinstance(mask, Tensor)):
        # the module's mask, not the one that its attention function gets: an indexer masks further keys in that one
        call.mask, call.module_takes_mask = mask, True
    if isinstance(arguments.get("position_ids"), Tensor) and arguments["position_ids"].dim() == 2:
        call.positions = arguments["position_ids"]
    arguments = {
        name: wrap_cache(value, call) if isinstance(value, Cache) else value for name, value in arguments.items()
    }
    if not module.mixer.options.rope:
        arguments = _without_rope(arguments)
    return (), {**arguments, "limbeck_call": call}


def wrap_cache(cache: Cache, call: AttentionCall) -> Cache:
    """Return the cache as the module sees it: it shares the contents, and `update` inserts a recurrent layer.

    In a compiled step the recurrent layers are in the cache already, and it is passed to the module as it is.
    """
    if isinstance(cache, StepCache):
        call.cache, call.layer = cache, cache.layer
        return cache
    index = call.module.limbeck_layer_idx
    if torch.compiler.is_compiling() and isinstance(index, int) and 0 <= index < len(cache.layers):
        layer = cache.layers[index]
        if isinstance(layer, RecurrentLayer):
            call.cache, call.layer = cache, layer
            return cache
    if isinstance(cache, EncoderDecoderCache):
        pair: Any = copy.copy(cache)
        pair.self_attention_cache = wrap_cache(cache.self_attention_cache, call)
        return pair
    cls: Any = type(cache)
    wrapper = object.__new__(_wrapped_class(cls))
    wrapper.__dict__ = cache.__dict__
    wrapper.call = call
    call.cache = cache
    return wrapper


class _WrappedCache:
    """Mixed into a cache class by `wrap_cache`: `update` advances the recurrent layer of the calling module."""

    __slots__ = ("call",)
    call: AttentionCall

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args, **kwargs):
        module = self.call.module
        if module.limbeck_layer_idx != layer_idx:
            module.limbeck_layer_idx = layer_idx if module.limbeck_layer_idx is None else -1  # type: ignore[assignment]
        self.call.layer = get_recurrent_layer(self, layer_idx, module)  # type: ignore[arg-type]
        return self.call.layer.advance(key_states, value_states)


@functools.cache
def _wrapped_class(cls: Any) -> Any:
    return type(f"Wrapped{cls.__name__}", (_WrappedCache, cls), {})


def _argument_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the arguments of a module's forward pass, in order."""
    return tuple(n for n, p in _parameters(module).items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def _parameters(module: nn.Module) -> dict[str, inspect.Parameter]:
    cls: Any = type(module)
    return _forward_parameters(cls)


@functools.cache
def _forward_parameters(cls: Any) -> dict[str, inspect.Parameter]:
    return dict(list(inspect.signature(cls.forward).parameters.items())[1:])  # without self


def _without_rope(arguments: dict[str, Any]) -> dict[str, Any]:
    """Replace the rotary embedding by the identity (cos = 1, sin = 0); learned positions cannot be switched off."""
    rotary = arguments.get("position_embeddings")
    if rotary is None:
        return arguments
    if isinstance(rotary, Tensor) and rotary.is_complex():
        return {**arguments, "position_embeddings": torch.ones_like(rotary)}
    if not isinstance(rotary, tuple | list) or len(rotary) != 2:
        raise LimbeckError("this family's rotary embedding cannot be switched off", expected="a mixer option rope=true")
    cos, sin = rotary
    if torch.compiler.is_compiling():
        return {**arguments, "position_embeddings": (torch.ones_like(cos), torch.zeros_like(sin))}
    # All layers of a pass are given the same tensor, so the identity is made once and kept on it.
    identity = getattr(cos, "_limbeck_identity", None)
    if identity is None:
        identity = cos._limbeck_identity = torch.ones_like(cos), torch.zeros_like(sin)
    return {**arguments, "position_embeddings": identity}


def register_attention(name: str, function: Callable, mask_function: Callable | None = None) -> None:
    """Register an attention implementation with transformers; without a mask function no mask is made for it."""
    AttentionInterface.register(name, function)
    if mask_function is not None:
        AttentionMaskInterface.register(name, mask_function)


register_attention(LIMBECK_ATTENTION, limbeck_attention_forward, sdpa_mask)
register_attention(LIMBECK_EAGER, limbeck_attention_forward, eager_mask)
