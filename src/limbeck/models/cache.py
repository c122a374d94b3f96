"""The cache layer of a converted attention module: a recurrent state of fixed size, whatever the length.

    layer = get_recurrent_layer(cache, index, module)   # inserted into the cache on first use
    layer.read_state(0)                                 # the state that the mixer returned last, None at the start

transformers has one cache object per batch of sequences, with one layer for each attention module. The mixer's layer is
one of them, so the softmax layers beside it have their own keys and values as usual.

A recurrent layer keeps the layer that it replaces (`original_layer`), for the sizes of masks, which softmax layers of
the same kind share, and for what a module stores there beside keys and values (convolution states, an indexer's keys).
In a static cache it is static too: states and token count stay in the same tensors, where a compiled step finds them.
"""

import functools
import inspect
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from limbeck.core.errors import LimbeckError
from limbeck.mixers import State

_EXPORT_ERROR = "an exported step cannot create the states of its cache: run a first pass that fills the cache"


class RecurrentLayer(CacheLayerMixin):
    """Counts tokens and holds the mixer's state; returns keys and values as they are."""

    is_croppable = False

    def __init__(self, original: Any = None) -> None:
        CacheLayerMixin.__init__(self)
        self.original_layer = original  # set first, because `__getattr__` looks there
        self.states: list[State | None] = []  # one for each call of the attention function in a forward pass
        self.static = bool(getattr(original, "is_compileable", False))
        self.length: Any = 0  # an int, or a tensor [] beside static layers that count in one
        self.mask_offset: Any = None  # the mask's column of the running call's first token; int or tensor likewise
        self.owner: weakref.ref | None = None  # the attention module that fills it; not pickled
        self.mixer = ""  # name and options of its mixer

    def __getattr__(self, name: str) -> Any:
        original = self.__dict__.get("original_layer")
        if original is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(original, name)

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        # transformers treats a whole cache as static or not by its layers, and masks the softmax layers accordingly
        return self.static

    @property
    def is_sliding(self) -> bool:  # type: ignore[override]
        return getattr(self.original_layer, "is_sliding", False)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # Some families check for keys. The empty batch shows when somebody copies them into another cache.
        self.keys = self.values = key_states.new_empty(0, 0, 0, 0)
        if self._counts_in_tensor():
            self.length = _mark_static(torch.zeros((), dtype=torch.long, device=self.device))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Refuse the call of a softmax layer; converted ones call this in a compiled step only."""
        if not torch.compiler.is_compiling():
            raise LimbeckError(
                "the cache holds a mixer's state where this model's softmax attention looks for keys and values",
                expected="a new cache, or one that this model filled",
            )
        return self.advance(key_states, value_states)

    def advance(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Count the tokens of a call; return keys [B, G, T, K] and values [B, G, T, V] as they are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        if isinstance(self.length, Tensor):
            self.mask_offset = self.length.clone()  # the mask of such a layer begins with the first token of all
            self.length.add_(new)
        else:
            self.mask_offset = self.length - self.get_mask_sizes(new)[1]
            self.length += new
        return key_states, value_states

    def read_state(self, call: int) -> State | None:
        """Return the state from which call number `call` of the attention function in a forward pass continues."""
        return self.states[call] if call < len(self.states) else None

    def write_state(self, call: int, state: State) -> None:
        """Store the state with which this call ended."""
        if not self.static:
            self.states[call : call + 1] = [{name: _copy_view(tensor) for name, tensor in state.items()}]
            return
        old = self.read_state(call) or {}
        new = {name: _write_static(old.get(name), tensor.detach()) for name, tensor in state.items()}
        if call < len(self.states):
            self.states[call] = new
        else:
            self.states.append(new)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "owner": None}

    def claim_for(self, module: nn.Module) -> None:
        """Record that this layer belongs to an attention module.

        Raises:
            LimbeckError: it holds the state of another student, or of another layer.
        """
        before = self.owner() if self.owner else None
        if before is module:
            return
        mixer = f"{module.mixer.name}: {module.mixer.options}"  # type: ignore[union-attr]
        if self.states and (self.mixer != mixer or (before is not None and not _same_weights(before, module))):
            raise LimbeckError(
                "the cache was filled by another student, or by this one with other weights",
                expected="a new cache, or one that this model filled",
            )
        self.owner, self.mixer = weakref.ref(module), mixer

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        counters = [n for n in ("cumulative_length", "cumulative_length_int") if hasattr(self.original_layer, n)]
        if not counters:
            return self.length + query_length, 0
        # Windowed and static layers compute sizes of their own from a count. The original layer counts nothing, as
        # it is never updated, so it gets this layer's count for the call.
        before = {name: getattr(self.original_layer, name) for name in counters}
        try:
            for name in counters:
                setattr(self.original_layer, name, self.length)
            return self.original_layer.get_mask_sizes(query_length)
        finally:
            for name, count in before.items():
                setattr(self.original_layer, name, count)

    def get_max_length(self) -> int:
        return self.original_layer.get_max_length() if self.static else -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.states, self.mask_offset = [], None
        if isinstance(self.length, Tensor):
            self.length.zero_()
        else:
            self.length = 0
        self._call_original("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)
        self._call_original("reorder_cache", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)
        self._call_original("batch_select_indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = [s and {n: t.repeat_interleave(repeats, dim=0) for n, t in s.items()} for s in self.states]
        self._call_original("batch_repeat_interleave", repeats)

    def crop(self, *args, **kwargs) -> None:
        raise LimbeckError(
            "a recurrent state cannot be cropped: it keeps no earlier states",
            expected="generation that only goes forward (greedy, sampling, beam search)",
            hint="leave out assisted or speculative decoding and contrastive search",
        )

    def offload(self) -> None:
        """Do nothing: the state is small."""

    def prefetch(self) -> None:
        """Do nothing: see `offload`."""

    def nbytes(self) -> int:
        """Return the bytes of the states."""
        return sum(t.numel() * t.element_size() for s in self.states for t in (s or {}).values())

    def _counts_in_tensor(self) -> bool:
        """Return whether to count in a tensor, as static softmax layers without a window do."""
        count = getattr(self.original_layer, "cumulative_length", None)
        return self.static and isinstance(count, Tensor) and not hasattr(self.original_layer, "cumulative_length_int")

    def _select(self, indices: Tensor) -> None:
        self.states = [s and {n: t.index_select(0, indices.to(t.device)) for n, t in s.items()} for s in self.states]

    def _call_original(self, method: str, *args: Any) -> None:
        if hasattr(self.original_layer, method):
            getattr(self.original_layer, method)(*args)


class RecurrentAndLinearLayer(RecurrentLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, override]
    """A recurrent layer of a family that stores further states in the same cache layer: the original layer has them."""

    def lazy_initialization(self, *args, **kwargs) -> None:
        if args:
            return RecurrentLayer.lazy_initialization(self, *args)
        return self.original_layer.lazy_initialization(**kwargs)

    def update_conv_state(self, *args, **kwargs) -> Tensor:
        return self.original_layer.update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs) -> Tensor:
        return self.original_layer.update_recurrent_state(*args, **kwargs)


class StepCache(Cache):
    """The states of one layer for one step, given and read again: what a compiled block has in the place of its cache.

    It counts nothing: whoever calls the block does that for the cache from which the states are.
    """

    def __init__(self) -> None:
        self.layer = RecurrentLayer()
        self.layers = [self.layer]

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Return keys and values as they are."""
        return key_states, value_states


def get_recurrent_layer(cache: Cache, index: int, module: nn.Module) -> RecurrentLayer:
    """Return the recurrent layer at `index`; on first use it replaces the empty layer that the cache came with.

    Args:
        module: the attention module whose state it holds.

    Raises:
        LimbeckError: the cache already holds keys and values of a softmax layer there, or another student's state.
    """
    while len(cache.layers) <= index:
        if cache.layer_class_to_replicate is None:
            raise LimbeckError(f"the cache has {len(cache.layers)} layers, but the model uses layer {index}")
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if not isinstance(layer, RecurrentLayer):
        if torch.compiler.is_exporting():
            # Where export traces with dynamo no error can be raised, but a graph break takes a reason; elsewhere this
            # call does nothing and the error below is raised.
            torch._dynamo.graph_break(msg=f"{_EXPORT_ERROR}; see docs/guides/generation.md, Export")
            raise LimbeckError(
                _EXPORT_ERROR,
                expected="a cache that the student has read a prompt into, its tensors buffers of the exported module",
                hint="the step in docs/guides/generation.md, under Export",
            )
        check_layer_is_empty(layer, index)
        if getattr(layer, "is_compileable", False) and getattr(layer, "is_initialized", False) is True:
            layer.keys = layer.values = None  # memory that a static layer allocated early and will not need
            layer.is_initialized = False
        linear = isinstance(layer, LinearAttentionCacheLayerMixin)
        layer = RecurrentAndLinearLayer(layer) if linear else RecurrentLayer(layer)
        cache.layers[index] = layer
    if not torch.compiler.is_compiling():
        layer.claim_for(module)
    return layer


def check_layer_is_empty(layer: Any, index: int) -> None:
    """Raise LimbeckError if the cache layer that a converted layer would replace holds keys and values already."""
    keys = getattr(layer, "keys", None)
    if keys is None:
        return
    if keys.dim() == 4 and not keys.shape[0]:  # the empty keys of a recurrent layer
        raise LimbeckError(
            f"cache layer {index} was made from the keys and values of a student's cache, and those hold no state",
            expected="the cache itself, or copy.deepcopy(cache)",
        )
    if layer.get_seq_length() > 0:
        raise LimbeckError(
            f"cache layer {index} already holds the keys and values of {int(layer.get_seq_length())} tokens",
            expected="a new cache, or one that this student filled",
        )


def build_cache_kwargs(model: nn.Module, cache: Cache | None) -> dict[str, Any]:
    """Return the keyword arguments that pass a cache to a model, or to a part of one.

    The argument's name was `past_key_values` before transformers 5.23 and is `cache` since then.
    """
    # the class of a compiled model has no `forward`
    cls: Any = type(model) if hasattr(type(model), "forward") else type(model.forward.__self__)  # type: ignore[attr-defined]
    return {_cache_name(cls): cache, "use_cache": True}


def get_output_cache(output: Any) -> Cache | None:
    """Return the cache in a model's output, under either name."""
    return output["cache"] if "cache" in output else getattr(output, "past_key_values", None)


@functools.cache
def _cache_name(cls: Any) -> str:
    return "cache" if "cache" in inspect.signature(cls.forward).parameters else "past_key_values"


def cache_bytes(cache: Cache) -> int:
    """Return the bytes held by a cache: states, keys and values of all layers, and memory that views keep alive."""
    if isinstance(cache, EncoderDecoderCache):
        return cache_bytes(cache.self_attention_cache) + cache_bytes(cache.cross_attention_cache)
    storages = (t.untyped_storage() for layer in cache.layers for t in _tensors(vars(layer)))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _copy_view(tensor: Tensor) -> Tensor:
    """Return the tensor, copied if it is a view that would keep a larger one alive."""
    if torch.compiler.is_compiling():
        return tensor
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size() else tensor


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Return whether two modules have equal weights, as copies of a model have; meta and quantized ones are skipped."""
    theirs = dict(other.named_parameters())
    pairs = [(p, theirs[name]) for name, p in one.named_parameters() if name in theirs]
    plain = [(a, b) for a, b in pairs if type(a) is type(b) is nn.Parameter and not (a.is_meta or b.is_meta)]
    return all(a.shape == b.shape and torch.equal(a.detach(), b.detach().to(a)) for a, b in plain)


def _write_static(old: Tensor | None, new: Tensor) -> Tensor:
    """Write new contents into a static cache's tensor, or create it."""
    if old is None or old.shape != new.shape or old.dtype != new.dtype:
        return _mark_static(new.clone())
    return old.copy_(new)


def _mark_static(tensor: Tensor) -> Tensor:
    """Tell the compiler that the tensor's address does not change, and return it."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.dim():  # without counters
            yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)
    elif isinstance(value, CacheLayerMixin | LinearAttentionCacheLayerMixin):
        yield from _tensors(vars(value))
