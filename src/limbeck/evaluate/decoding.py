"""What the next token costs after so much context, in time and in bytes, of several models in turns.

    fields = [Contestant("teacher", teacher), Contestant("student", student)]
    points = measure(fields, length=4096, steps=16)
    break_even([512, 4096], [2.0, 9.0], [4.0, 4.1])            # 1,620: the length where the first becomes the dearer

The context is real text up to `SEED` tokens; beyond them keys and values are repeats of theirs, which changes neither
shapes nor work, and spares the quadratic prefill of the teacher. A recurrent state is the same size at any length, so
for it only the counter moves on. A cache with layers of other kinds (windows, states of the family's own) reads all of
its context, in pieces.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from limbeck.errors import LimbeckError
from limbeck.machine import wait
from limbeck.model import RecurrentLayer, cache_bytes, with_cache

SEED = 1024


@dataclass(frozen=True)
class Contestant:
    """A model and the kind of cache that it decodes with."""

    name: str
    model: PreTrainedModel
    static: bool = False  # keys and values in tensors of their final size, instead of growing ones


@dataclass(frozen=True)
class Point:
    """The next token of each of `batch` sequences after `length` tokens of context."""

    name: str
    length: int
    milliseconds: float  # median over the steps
    least: float
    most: float
    bytes: int  # of the cache
    batch: int = 1
    drift: float = 1.0  # median of the later half of the steps over that of the earlier one


@torch.no_grad()
def measure(
    contestants: list[Contestant], length: int, steps: int = 16, text: Tensor | None = None, batch: int = 1
) -> list[Point]:
    """Time and memory of a token for each contestant, one token each in turns.

    Args:
        length: tokens of context, any number.
        steps: tokens that are timed, after two that are not.
        text: [1, SEED or more] token ids to begin with; None takes arbitrary ones.
        batch: sequences that go on together, all with the same context.
    """
    if length < 1 or steps < 1 or batch < 1:
        raise LimbeckError(f"length is {length}, steps {steps} and batch {batch}", expected="all at least 1")
    caches = [filled(c.model, length, steps + 2, c.static, text, batch) for c in contestants]
    sizes = [cache_bytes(cache) for cache in caches]
    times: list[list[float]] = [[] for _ in contestants]
    for step in range(steps + 2):
        for contestant, cache, spent in zip(contestants, caches, times):
            ids = torch.full((batch, 1), 5, device=contestant.model.device)
            wait(contestant.model.device)
            began = time.perf_counter()
            contestant.model(input_ids=ids, **with_cache(contestant.model, cache))
            wait(contestant.model.device)
            if step > 1:
                spent.append(1000 * (time.perf_counter() - began))
    return [
        Point(c.name, length, statistics.median(spent), min(spent), max(spent), size, batch, drift(spent))
        for c, spent, size in zip(contestants, times, sizes)
    ]


@torch.no_grad()
def filled(
    model: PreTrainedModel,
    length: int,
    room: int = 0,
    static: bool = False,
    text: Tensor | None = None,
    batch: int = 1,
) -> Cache:
    """A cache with `length` tokens of each of `batch` sequences in it, and room for more where its size is fixed."""
    seed = min(length, SEED)
    if text is None:
        text = arbitrary_text(model, seed)
    text = text[:, :seed].expand(batch, -1).to(model.device)
    cache: Cache = DynamicCache(config=model.config)
    if static:
        cache = StaticCache(config=model.config, max_cache_len=length + room)
    body = model.get_decoder()
    body(input_ids=text, **with_cache(body, cache))
    if all(can_lengthen(layer) for layer in cache.layers):
        for layer in cache.layers:
            _lengthen(layer, seed, length)
        return cache
    for begin in range(seed, length, seed):
        body(input_ids=text[:, : length - begin], **with_cache(body, cache))
    return cache


def arbitrary_text(model: PreTrainedModel, length: int) -> Tensor:
    """Token ids [1, length]: all there are, in turn."""
    return torch.arange(length)[None] % model.config.get_text_config(decoder=True).vocab_size


def drift(times: list[float]) -> float:
    """Median of the later half over that of the earlier one; 1 for fewer than four."""
    half = len(times) // 2
    return statistics.median(times[-half:]) / statistics.median(times[:half]) if half > 1 else 1.0


def break_even(lengths: list[int], first: list[float], second: list[float]) -> float | None:
    """The length from which `first` costs more than `second`, between measured lengths by straight lines.

    None where it never does; the shortest measured length where it always does.
    """
    more = [a > b for a, b in zip(first, second)]
    if not more[-1]:
        return None
    last = max((i for i, dearer in enumerate(more) if not dearer), default=-1)
    if last < 0:
        return float(lengths[0])
    before, after = first[last] - second[last], first[last + 1] - second[last + 1]
    return lengths[last] + (lengths[last + 1] - lengths[last]) * before / (before - after)


def can_lengthen(layer) -> bool:
    """Whether repeats of a cache layer's keys and values are what a longer context leaves there."""
    return isinstance(layer, RecurrentLayer) or type(layer) in (DynamicLayer, StaticLayer)


def _lengthen(layer, seed: int, length: int) -> None:
    """Make a cache layer of `seed` tokens one of `length` tokens."""
    if isinstance(layer, RecurrentLayer):
        if isinstance(layer.length, Tensor):  # beside static layers
            layer.length.fill_(length)
        else:
            layer.length = length
    elif type(layer) is DynamicLayer:
        times = -(-length // seed)
        for name in ("keys", "values"):
            setattr(layer, name, getattr(layer, name).repeat(1, 1, times, 1)[:, :, :length].contiguous())
    elif type(layer) is StaticLayer:
        for held in (layer.keys, layer.values):
            assert held is not None
            for begin in range(seed, length, seed):
                end = min(begin + seed, length)
                held[:, :, begin:end] = held[:, :, : end - begin]
        layer.cumulative_length.fill_(length)
