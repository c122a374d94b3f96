"""Timing of prefill and decoding, several models in turns, and sizes of their caches.

    timed_models = [TimedModel("teacher", teacher), TimedModel("student", student)]
    tokens = time_decoding(timed_models, length=4096, steps=16)           # a TokenTiming for each
    prefills = time_prefill(timed_models, length=4096)                    # a PrefillTiming for each
    find_break_even([512, 4096], [2.0, 9.0], [4.0, 4.1])                  # 1,551: from here on the first costs more
    measure_cache_sizes(teacher, student, length=512)["break_even_tokens"]

Models take turns, so that a disturbance of the machine affects all of them. Sizes are not computed from a formula: both
models fill a cache and its tensors are counted. Legend: B batch, T time.
"""

import inspect
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from limbeck.core.errors import LimbeckError
from limbeck.core.system import measure_peak_memory, synchronize_device
from limbeck.mixers import State
from limbeck.models import RecurrentLayer, build_cache_kwargs, cache_bytes

SEED_TOKENS = 1024  # tokens of context that are really read, see `prefill_cache`


@dataclass(frozen=True)
class TimedModel:
    """A model with a kind of cache.

    static: keys and values in tensors of their final size, instead of growing ones.
    """

    name: str
    model: PreTrainedModel
    static: bool = False


@dataclass(frozen=True)
class TokenTiming:
    """Time of the next token of each of `batch` sequences after `length` tokens of context.

    milliseconds: median over the steps.
    bytes: size of the cache.
    drift: median of the later half of the steps, relative to that of the earlier half.
    """

    name: str
    length: int
    milliseconds: float
    min_milliseconds: float
    max_milliseconds: float
    bytes: int
    batch: int = 1
    drift: float = 1.0


@torch.no_grad()
def time_decoding(
    timed_models: list[TimedModel], length: int, steps: int = 16, text: Tensor | None = None, batch: int = 1
) -> list[TokenTiming]:
    """Time decoding and count cache bytes of each model, one token each in turns.

    Args:
        length: tokens of context, any number.
        steps: tokens to time, after two untimed ones.
        text: [1, SEED_TOKENS or more] token ids to begin with; None for arbitrary ones.
        batch: sequences decoded together, all with the same context.
    """
    if length < 1 or steps < 1 or batch < 1:
        raise LimbeckError(f"length is {length}, steps {steps} and batch {batch}", expected="all at least 1")
    caches = [prefill_cache(m.model, length, steps + 2, m.static, text, batch) for m in timed_models]
    sizes = [cache_bytes(cache) for cache in caches]
    times: list[list[float]] = [[] for _ in timed_models]
    for step in range(steps + 2):
        for timed_model, cache, milliseconds in zip(timed_models, caches, times):
            model = timed_model.model
            ids = torch.full((batch, 1), 5, device=model.device)
            synchronize_device(model.device)
            start = time.perf_counter()
            model(input_ids=ids, **build_cache_kwargs(model, cache))
            synchronize_device(model.device)
            if step > 1:
                milliseconds.append(1000 * (time.perf_counter() - start))
    return [
        TokenTiming(m.name, length, statistics.median(ms), min(ms), max(ms), size, batch, compute_drift(ms))
        for m, ms, size in zip(timed_models, times, sizes)
    ]


@torch.no_grad()
def prefill_cache(
    model: PreTrainedModel,
    length: int,
    extra_length: int = 0,
    static: bool = False,
    text: Tensor | None = None,
    batch: int = 1,
) -> Cache:
    """Fill a cache with `length` tokens of each of `batch` sequences; a static one has room for `extra_length` more.

    Only the first SEED_TOKENS tokens are read. Beyond them keys and values are repeated, which changes neither shapes
    nor the work of decoding and avoids the quadratic prefill; a recurrent state has the same size at any length, so
    only its counter moves on. A cache with other kinds of layers (windows, states of the family's own) reads its whole
    context.
    """
    seed = min(length, SEED_TOKENS)
    if text is None:
        text = make_dummy_input_ids(model, seed)
    text = text[:, :seed].expand(batch, -1).to(model.device)
    cache: Cache
    if static:
        cache = StaticCache(config=model.config, max_cache_len=length + extra_length)
    else:
        cache = DynamicCache(config=model.config)
    backbone = model.get_decoder()
    if length == seed:
        backbone(input_ids=text, **build_cache_kwargs(backbone, cache))
        return cache
    # The last token is read alone: a state's tensors that are longer after it are those that grow.
    backbone(input_ids=text[:, :-1], **build_cache_kwargs(backbone, cache))
    states = [
        [state or {} for state in layer.states] if isinstance(layer, RecurrentLayer) else [] for layer in cache.layers
    ]
    backbone(input_ids=text[:, -1:], **build_cache_kwargs(backbone, cache))
    if all(is_extendable(layer) for layer in cache.layers):
        for layer, before in zip(cache.layers, states):
            _extend_layer(layer, before, seed, length)
        return cache
    for begin in range(seed, length, seed):
        backbone(input_ids=text[:, : length - begin], **build_cache_kwargs(backbone, cache))
    return cache


def make_dummy_input_ids(model: PreTrainedModel, length: int) -> Tensor:
    """Make token ids [1, length] that run through the vocabulary."""
    return torch.arange(length)[None] % model.config.get_text_config(decoder=True).vocab_size


def is_extendable(layer) -> bool:
    """Whether repeating a cache layer's keys and values gives the shapes of a longer context."""
    return isinstance(layer, RecurrentLayer) or type(layer) in (DynamicLayer, StaticLayer)


def _extend_layer(layer, before: list[State], seed: int, length: int) -> None:
    """Extend a cache layer from `seed` to `length` tokens; `before` are its states one token earlier."""
    if isinstance(layer, RecurrentLayer):
        for old, state in zip(before, layer.states):
            assert state is not None  # the last token has just written it
            for name in [name for name, z in state.items() if z.shape != old[name].shape]:
                state[name] = torch.cat([state[name]] * -(-length // seed), 1)[:, :length].contiguous()
        if isinstance(layer.length, Tensor):  # in a static cache
            layer.length.fill_(length)
        else:
            layer.length = length
    elif type(layer) is DynamicLayer:
        repeats = -(-length // seed)
        for name in ("keys", "values"):
            setattr(layer, name, getattr(layer, name).repeat(1, 1, repeats, 1)[:, :, :length].contiguous())
    elif type(layer) is StaticLayer:
        for tensor in (layer.keys, layer.values):
            assert tensor is not None
            for begin in range(seed, length, seed):
                end = min(begin + seed, length)
                tensor[:, :, begin:end] = tensor[:, :, : end - begin]
        layer.cumulative_length.fill_(length)


def compute_drift(times: list[float]) -> float:
    """Divide the median of the later half by that of the earlier half; 1 for fewer than four times."""
    half = len(times) // 2
    return statistics.median(times[-half:]) / statistics.median(times[:half]) if half > 1 else 1.0


def find_break_even(lengths: list[int], first: list[float], second: list[float]) -> float | None:
    """Find the length from which `first` costs more than `second`, interpolating linearly between measured lengths.

    None if it never does; the shortest measured length if it always does.
    """
    costs_more = [a > b for a, b in zip(first, second)]
    if not costs_more[-1]:
        return None
    last = max((i for i, more in enumerate(costs_more) if not more), default=-1)  # the last length where it does not
    if last < 0:
        return float(lengths[0])
    before, after = first[last] - second[last], first[last + 1] - second[last + 1]
    return lengths[last] + (lengths[last + 1] - lengths[last]) * before / (before - after)


@dataclass(frozen=True)
class PrefillTiming:
    """Time of `batch` prompts of `length` tokens, up to the first new token of each.

    milliseconds: median over the rounds.
    extra_bytes: peak memory in addition to the weights, cache included; None if it cannot be measured.
    """

    name: str
    length: int
    batch: int
    milliseconds: float
    min_milliseconds: float
    max_milliseconds: float
    extra_bytes: int | None

    @property
    def tokens_per_second(self) -> float:
        """Throughput of prompt tokens."""
        return 1000 * self.batch * self.length / self.milliseconds


@torch.no_grad()
def time_prefill(timed_models: list[TimedModel], length: int, rounds: int = 3, batch: int = 1) -> list[PrefillTiming]:
    """Time prefill and measure its peak memory, one prefill each in turns into a new growing cache.

    Args:
        length: tokens of a prompt.
        rounds: prefills to time, after an untimed one that measures the memory.
        batch: number of prompts.
    """
    prompts = [make_dummy_input_ids(m.model, length).expand(batch, -1).to(m.model.device) for m in timed_models]
    peaks = [
        measure_peak_memory(lambda m=m, ids=ids: generate_first_token(m.model, ids), m.model.device)  # type: ignore[misc]
        for m, ids in zip(timed_models, prompts)
    ]
    times: list[list[float]] = [[] for _ in timed_models]
    for _ in range(rounds):
        for timed_model, ids, milliseconds in zip(timed_models, prompts, times):
            synchronize_device(timed_model.model.device)
            start = time.perf_counter()
            generate_first_token(timed_model.model, ids)
            synchronize_device(timed_model.model.device)
            milliseconds.append(1000 * (time.perf_counter() - start))
    return [
        PrefillTiming(m.name, length, batch, statistics.median(ms), min(ms), max(ms), peak)
        for m, ms, peak in zip(timed_models, times, peaks)
    ]


def generate_first_token(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Generate the likeliest token [B] after prompts [B, T], computing only the last logits if the family can."""
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = DynamicCache(config=model.config)
    return model(input_ids=ids, **build_cache_kwargs(model, cache), **last_only).logits[:, -1].argmax(-1)


@dataclass(frozen=True)
class CacheGrowth:
    """The size of one sequence's cache as a linear function of the length.

    fixed_bytes, bytes_per_token: of the function; a fully converted student has 0 bytes a token.
    measured: bytes after the number of tokens that it was measured with, and after twice as many.
    """

    fixed_bytes: float
    bytes_per_token: float
    measured: list[int]

    @classmethod
    @torch.no_grad()
    def measure(cls, model: PreTrainedModel, length: int = 128) -> "CacheGrowth":
        """Fill a cache with `length` tokens, and with as many again, and count the bytes of its tensors."""
        cache, backbone, measured = DynamicCache(config=model.config), model.get_decoder(), []
        ids = torch.full((1, length), 5, device=model.device)
        for _ in range(2):
            backbone(input_ids=ids, **build_cache_kwargs(backbone, cache))
            measured.append(cache_bytes(cache))
        per_token = (measured[1] - measured[0]) / length
        return cls(measured[0] - per_token * length, per_token, measured)

    def at(self, length: int) -> float:
        """Return the bytes after `length` tokens."""
        return self.fixed_bytes + length * self.bytes_per_token


def measure_cache_sizes(teacher: PreTrainedModel, student: PreTrainedModel, length: int = 128) -> dict[str, Any]:
    """Measure the cache bytes of one sequence in both models, after `length` and after twice as many tokens.

    Returns:
        bytes at both lengths; bytes per token (0 for a fully converted student); the student's fixed bytes; and the
        number of tokens from which the student's cache is smaller, None for never.
    """
    growth = {name: CacheGrowth.measure(model, length) for name, model in (("teacher", teacher), ("student", student))}
    saved_per_token = growth["teacher"].bytes_per_token - growth["student"].bytes_per_token
    return {
        "length": length,
        "teacher_cache_bytes": growth["teacher"].measured,
        "student_cache_bytes": growth["student"].measured,
        "teacher_bytes_per_token": growth["teacher"].bytes_per_token,
        "student_bytes_per_token": growth["student"].bytes_per_token,
        "student_fixed_bytes": growth["student"].fixed_bytes,
        "break_even_tokens": growth["student"].fixed_bytes / saved_per_token if saved_per_token > 0 else None,
    }
