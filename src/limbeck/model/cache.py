"""The cache layer of a converted attention module: a fixed number of floats, whatever the length.

transformers keeps one cache object per sequence batch with one layer each for the model's attention modules. The
mixer's layer stands among them, so softmax layers beside it keep their own keys and values.

    layer = recurrent_layer(cache, layer_idx)      # put in place on first use
    layer.state                                    # what the mixer returned last, None at the start
"""

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from limbeck.errors import LimbeckError
from limbeck.mixers import State


class RecurrentLayer(CacheLayerMixin):
    """Counts tokens and holds the mixer's state; hands keys and values back untouched."""

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def reset(self) -> None:
        self.state, self.length = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = {name: tensor.repeat_interleave(repeats, dim=0) for name, tensor in self.state.items()}

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
        return sum(t.numel() * t.element_size() for t in (self.state or {}).values())

    def _select(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = {name: t.index_select(0, indices.to(t.device)) for name, t in self.state.items()}


def recurrent_layer(cache: Cache, index: int) -> RecurrentLayer:
    """The recurrent layer at `index`, put in the place of the empty one that the cache came with.

    Raises:
        LimbeckError: the cache already holds keys and values of a softmax layer there.
    """
    while len(cache.layers) <= index:
        if cache.layer_class_to_replicate is None:
            raise LimbeckError(f"the cache has {len(cache.layers)} layers, the model asks for layer {index}")
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[index]
    if not isinstance(layer, RecurrentLayer):
        if layer.is_initialized and layer.get_seq_length() > 0:
            raise LimbeckError(
                f"cache layer {index} already holds the keys and values of {int(layer.get_seq_length())} tokens",
                expected="a new cache, or one that this student filled",
            )
        layer = RecurrentLayer()
        cache.layers[index] = layer
    return layer


def cache_bytes(cache: Cache) -> int:
    """Bytes held by a cache: states, keys and values of all layers."""
    total = 0
    for layer in cache.layers:
        if isinstance(layer, RecurrentLayer):
            total += layer.nbytes()
        else:
            tensors = (getattr(layer, "keys", None), getattr(layer, "values", None))
            total += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
    return total
