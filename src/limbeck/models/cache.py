"""The cache layer of a converted attention module: a fixed number of floats, whatever the length.

transformers keeps one cache object per sequence batch with one layer each for the model's attention modules. The
mixer's layer stands among them, so softmax layers beside it keep their own keys and values.

    layer = get_recurrent_layer(cache, index, module)   # put in place on first use
    layer.read_state(0)                                   # what the mixer returned last, None at the start

It keeps the layer in whose place it stands (its twin): for the sizes of masks, which softmax layers of the same kind
share, and for what a module stores there beside keys and values (convolution states, an indexer's keys). In a static
cache it is static too: states and the count of tokens keep their tensors, so that a compiled step finds them again.
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

FIRST_USE = "an exported step cannot make the states of its cache: a first pass puts them in their places"


class RecurrentLayer(CacheLayerMixin):
    """Counts tokens and holds the mixer's state; hands keys and values back untouched."""

    is_croppable = False

    def __init__(self, twin: Any = None) -> None:
        CacheLayerMixin.__init__(self)
        self.original_layer = twin  # first: what is not found here is looked up there
        self.states: list[State | None] = []  # one for each call of the attention function in a forward pass
        self.static = bool(getattr(twin, "is_compileable", False))
        self.length: Any = 0  # a number, or a tensor [] beside static layers that count in one
        self.mask_offset: Any = None  # column of the mask that belongs to the first token of the running call, likewise
        self.owner: weakref.ref | None = None  # the attention module that fills it; lost in a pickle
        self.mixer = ""  # name and options of its mixer

    def __getattr__(self, name: str) -> Any:
        twin = self.__dict__.get("original_layer")
        if twin is None or name.startswith("__"):
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(twin, name)

    @property
    def is_compileable(self) -> bool:  # type: ignore[override]
        # transformers takes a whole cache for one kind or the other, and masks softmax layers accordingly
        return self.static

    @property
    def is_sliding(self) -> bool:  # type: ignore[override]
        return getattr(self.original_layer, "is_sliding", False)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        # some families look whether there are any; whoever puts them into another cache is known by a batch of none
        self.keys = self.values = key_states.new_empty(0, 0, 0, 0)
        if self._counts_in_tensor():
            self.length = _fixed(torch.zeros((), dtype=torch.long, device=self.device))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """What a softmax layer calls, and a converted one only in a compiled step."""
        if not torch.compiler.is_compiling():
            raise LimbeckError(
                "the cache holds a mixer's state where this model's softmax attention looks for keys and values",
                expected="a new cache, or one that this very model filled",
            )
        return self.advance(key_states, value_states)

    def advance(self, key_states: Tensor, value_states: Tensor) -> tuple[Tensor, Tensor]:
        """Count the tokens of a call; keys and values go back as they are."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = key_states.shape[-2]
        if isinstance(self.length, Tensor):
            self.mask_offset = self.length.clone()  # such a layer's mask begins with the first token
            self.length.add_(new)
        else:
            self.mask_offset = self.length - self.get_mask_sizes(new)[1]
            self.length += new
        return key_states, value_states

    def read_state(self, call: int) -> State | None:
        """State that the attention function's call of this number in a forward pass goes on from."""
        return self.states[call] if call < len(self.states) else None

    def write_state(self, call: int, state: State) -> None:
        """Keep the state that this call ended with."""
        if not self.static:
            self.states[call : call + 1] = [{name: _alone(tensor) for name, tensor in state.items()}]
            return
        old = self.read_state(call) or {}
        kept = {name: _kept(old.get(name), tensor.detach()) for name, tensor in state.items()}
        if call < len(self.states):
            self.states[call] = kept
        else:
            self.states.append(kept)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "owner": None}

    def claim_for(self, module: nn.Module) -> None:
        """Note whose state this is.

        Raises:
            LimbeckError: it is that of another student, or of another layer.
        """
        before = self.owner() if self.owner else None
        if before is module:
            return
        mixer = f"{module.mixer.name}: {module.mixer.options}"  # type: ignore[union-attr]
        if self.states and (self.mixer != mixer or (before is not None and not _same_weights(before, module))):
            raise LimbeckError(
                "the cache was filled by another student, or by this one with other weights",
                expected="a new cache, or one that this very model filled",
            )
        self.owner, self.mixer = weakref.ref(module), mixer

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        counters = [n for n in ("cumulative_length", "cumulative_length_int") if hasattr(self.original_layer, n)]
        if not counters:
            return self.length + query_length, 0
        # windows and static layers have sizes of their own; the twin's count is lent to it, as it stores nothing
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
        self._pass_on("reset")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)
        self._pass_on("reorder_cache", beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)
        self._pass_on("batch_select_indices", indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = [s and {n: t.repeat_interleave(repeats, dim=0) for n, t in s.items()} for s in self.states]
        self._pass_on("batch_repeat_interleave", repeats)

    def crop(self, *args, **kwargs) -> None:
        raise LimbeckError(
            "a recurrent state cannot be cropped: it has no memory of its earlier self",
            expected="generation that only goes forward (greedy, sampling, beam search)",
            hint="leave out assisted or speculative decoding and contrastive search",
        )

    def offload(self) -> None:
        """Nothing to gain: the state is small."""

    def prefetch(self) -> None:
        """See `offload`."""

    def nbytes(self) -> int:
        """Bytes that the state takes."""
        return sum(t.numel() * t.element_size() for s in self.states for t in (s or {}).values())

    def _counts_in_tensor(self) -> bool:
        """Do the softmax layers beside it? Static ones do, but for those with a window."""
        count = getattr(self.original_layer, "cumulative_length", None)
        return self.static and isinstance(count, Tensor) and not hasattr(self.original_layer, "cumulative_length_int")

    def _select(self, indices: Tensor) -> None:
        self.states = [s and {n: t.index_select(0, indices.to(t.device)) for n, t in s.items()} for s in self.states]

    def _pass_on(self, method: str, *args: Any) -> None:
        if hasattr(self.original_layer, method):
            getattr(self.original_layer, method)(*args)


class RecurrentAndLinearLayer(RecurrentLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, override]
    """The same where the family stores convolution or recurrent states of its own in that layer: its twin does."""

    def lazy_initialization(self, *args, **kwargs) -> None:
        if args:
            return RecurrentLayer.lazy_initialization(self, *args)
        return self.original_layer.lazy_initialization(**kwargs)

    def update_conv_state(self, *args, **kwargs) -> Tensor:
        return self.original_layer.update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs) -> Tensor:
        return self.original_layer.update_recurrent_state(*args, **kwargs)


def get_recurrent_layer(cache: Cache, index: int, module: nn.Module) -> RecurrentLayer:
    """The recurrent layer at `index`, put in the place of the empty one that the cache came with.

    Args:
        module: the attention module whose state it holds.

    Raises:
        LimbeckError: the cache already holds keys and values of a softmax layer there, or another student's state.
    """
    while len(cache.layers) <= index:
        if cache.layer_class_to_replicate is None:
            raise LimbeckError(f"the cache has {len(cache.layers)} layers, the model asks for layer {index}")
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if not isinstance(layer, RecurrentLayer):
        if torch.compiler.is_exporting():
            # where export compiles, no error can be raised, but a reason given for the stop; elsewhere it does nothing
            torch._dynamo.graph_break(msg=f"{FIRST_USE}; see docs/generation.md, Export")
            raise LimbeckError(
                FIRST_USE,
                expected="a cache that the student has read a prompt into, its tensors buffers of the exported module",
                hint="the step in docs/generation.md, under Export",
            )
        check_layer_is_empty(layer, index)
        if getattr(layer, "is_compileable", False) and getattr(layer, "is_initialized", False) is True:
            layer.keys = layer.values = None  # a static layer made ready beforehand: nothing will be kept there
            layer.is_initialized = False
        linear = isinstance(layer, LinearAttentionCacheLayerMixin)
        layer = RecurrentAndLinearLayer(layer) if linear else RecurrentLayer(layer)
        cache.layers[index] = layer
    if not torch.compiler.is_compiling():
        layer.claim_for(module)
    return layer


def check_layer_is_empty(layer: Any, index: int) -> None:
    """Raises LimbeckError where a converted layer would take a softmax layer's place in the cache that is not empty."""
    keys = getattr(layer, "keys", None)
    if keys is None:
        return
    if keys.dim() == 4 and not keys.shape[0]:  # what a mixer's layer shows for keys
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
    """The keyword arguments that hand a cache to a model, or to a part of one, under the name that it takes it by.

    Until transformers 5.23 that is `past_key_values`, since then `cache`.
    """
    # what stands in a model's place (a compiled one) has no `forward` of its own class
    cls: Any = type(model) if hasattr(type(model), "forward") else type(model.forward.__self__)  # type: ignore[attr-defined]
    return {_cache_name(cls): cache, "use_cache": True}


def get_output_cache(output: Any) -> Cache | None:
    """The cache that a model's output carries, under either name."""
    return output["cache"] if "cache" in output else getattr(output, "past_key_values", None)


@functools.cache
def _cache_name(cls: Any) -> str:
    return "cache" if "cache" in inspect.signature(cls.forward).parameters else "past_key_values"


def cache_bytes(cache: Cache) -> int:
    """Bytes held by a cache: states, keys and values of all layers, and whatever memory views among them keep alive."""
    if isinstance(cache, EncoderDecoderCache):
        return cache_bytes(cache.self_attention_cache) + cache_bytes(cache.cross_attention_cache)
    storages = (t.untyped_storage() for layer in cache.layers for t in _tensors(vars(layer)))
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, copied where it is a view that would keep a larger one alive."""
    if torch.compiler.is_compiling():
        return tensor
    return tensor.clone() if tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size() else tensor


def _same_weights(one: nn.Module, other: nn.Module) -> bool:
    """Are both modules the same layer, as copies of a model are? What lies elsewhere or in few bits is not compared."""
    theirs = dict(other.named_parameters())
    pairs = [(p, theirs[name]) for name, p in one.named_parameters() if name in theirs]
    plain = [(a, b) for a, b in pairs if type(a) is type(b) is nn.Parameter and not (a.is_meta or b.is_meta)]
    return all(a.shape == b.shape and torch.equal(a.detach(), b.detach().to(a)) for a, b in plain)


def _kept(old: Tensor | None, new: Tensor) -> Tensor:
    """A static cache's tensor after a step: the old one with the new contents, or a first one."""
    if old is None or old.shape != new.shape or old.dtype != new.dtype:
        return _fixed(new.clone())
    return old.copy_(new)


def _fixed(tensor: Tensor) -> Tensor:
    """The same tensor, told to the compiler as one that stays where it is."""
    if not torch.compiler.is_compiling():
        torch._dynamo.mark_static_address(tensor)
    return tensor


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.dim():  # counters are no memory
            yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _tensors(inner)
    elif isinstance(value, CacheLayerMixin | LinearAttentionCacheLayerMixin):
        yield from _tensors(vars(value))
