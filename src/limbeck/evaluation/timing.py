"""What the next token costs after so much context, in time and in bytes, of several models in turns.

    fields = [TimedModel("teacher", teacher), TimedModel("student", student)]
    points = time_decoding(fields, length=4096, steps=16)
    find_break_even([512, 4096], [2.0, 9.0], [4.0, 4.1])            # 1,620: the length where the first becomes the dearer

The context is real text up to `SEED_TOKENS` tokens; beyond them keys and values are repeats of theirs, which changes
neither shapes nor work, and spares the quadratic prefill of the teacher. A recurrent state is the same size at any
length, so for it only the counter moves on. A cache with layers of other kinds (windows, states of the family's own)
reads all of its context, in pieces.

What reading a prompt costs: time to the first token, tokens a second, and the most memory that it takes.

    prefills = time_prefill([TimedModel("teacher", teacher), TimedModel("student", student)], length=4096)

All contestants read the same tokens in turns, each into a new growing cache that is dropped after its first token.

What decoding costs in memory: bytes of state against bytes of keys and values, measured on real caches.

    memory = measure_cache_sizes(teacher, student, length=512)
    memory["break_even_tokens"]

Nothing is computed from a formula: both models fill a cache and its tensors are counted.
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
from limbeck.models import RecurrentLayer, build_cache_kwargs, cache_bytes

SEED_TOKENS = 1024


@dataclass(frozen=True)
class TimedModel:
    """A model and the kind of cache that it decodes with."""

    name: str
    model: PreTrainedModel
    static: bool = False  # keys and values in tensors of their final size, instead of growing ones


@dataclass(frozen=True)
class TokenTiming:
    """The next token of each of `batch` sequences after `length` tokens of context."""

    name: str
    length: int
    milliseconds: float  # median over the steps
    min_milliseconds: float
    max_milliseconds: float
    bytes: int  # of the cache
    batch: int = 1
    drift: float = 1.0  # median of the later half of the steps over that of the earlier one


@torch.no_grad()
def time_decoding(
    timed_models: list[TimedModel], length: int, steps: int = 16, text: Tensor | None = None, batch: int = 1
) -> list[TokenTiming]:
    """Time and memory of a token for each contestant, one token each in turns.

    Args:
        length: tokens of context, any number.
        steps: tokens that are timed, after two that are not.
        text: [1, SEED_TOKENS or more] token ids to begin with; None takes arbitrary ones.
        batch: sequences that go on together, all with the same context.
    """
    if length < 1 or steps < 1 or batch < 1:
        raise LimbeckError(f"length is {length}, steps {steps} and batch {batch}", expected="all at least 1")
    caches = [prefill_cache(c.model, length, steps + 2, c.static, text, batch) for c in timed_models]
    sizes = [cache_bytes(cache) for cache in caches]
    times: list[list[float]] = [[] for _ in timed_models]
    for step in range(steps + 2):
        for timed_model, cache, spent in zip(timed_models, caches, times):
            ids = torch.full((batch, 1), 5, device=timed_model.model.device)
            synchronize_device(timed_model.model.device)
            began = time.perf_counter()
            timed_model.model(input_ids=ids, **build_cache_kwargs(timed_model.model, cache))
            synchronize_device(timed_model.model.device)
            if step > 1:
                spent.append(1000 * (time.perf_counter() - began))
    return [
        TokenTiming(c.name, length, statistics.median(spent), min(spent), max(spent), size, batch, compute_drift(spent))
        for c, spent, size in zip(timed_models, times, sizes)
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
    """A cache with `length` tokens of each of `batch` sequences in it, and room for more where its size is fixed."""
    seed = min(length, SEED_TOKENS)
    if text is None:
        text = make_dummy_input_ids(model, seed)
    text = text[:, :seed].expand(batch, -1).to(model.device)
    cache: Cache = DynamicCache(config=model.config)
    if static:
        cache = StaticCache(config=model.config, max_cache_len=length + extra_length)
    body = model.get_decoder()
    body(input_ids=text, **build_cache_kwargs(body, cache))
    if all(is_extendable(layer) for layer in cache.layers):
        for layer in cache.layers:
            _lengthen(layer, seed, length)
        return cache
    for begin in range(seed, length, seed):
        body(input_ids=text[:, : length - begin], **build_cache_kwargs(body, cache))
    return cache


def make_dummy_input_ids(model: PreTrainedModel, length: int) -> Tensor:
    """Token ids [1, length]: all there are, in turn."""
    return torch.arange(length)[None] % model.config.get_text_config(decoder=True).vocab_size


def compute_drift(times: list[float]) -> float:
    """Median of the later half over that of the earlier one; 1 for fewer than four."""
    half = len(times) // 2
    return statistics.median(times[-half:]) / statistics.median(times[:half]) if half > 1 else 1.0


def find_break_even(lengths: list[int], first: list[float], second: list[float]) -> float | None:
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


def is_extendable(layer) -> bool:
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


@dataclass(frozen=True)
class PrefillTiming:
    """Prompts of `length` tokens, `batch` at once, up to the first new token of each."""

    name: str
    length: int
    batch: int
    milliseconds: float  # median over the rounds
    min_milliseconds: float
    max_milliseconds: float
    extra_bytes: int | None  # at most, on top of the weights; the cache included

    @property
    def tokens_per_second(self) -> float:
        """Of the prompts."""
        return 1000 * self.batch * self.length / self.milliseconds


@torch.no_grad()
def time_prefill(timed_models: list[TimedModel], length: int, rounds: int = 3, batch: int = 1) -> list[PrefillTiming]:
    """Time and memory of prompts, one prefill each in turns.

    Args:
        length: tokens of a prompt.
        rounds: times that are taken, after one that is not: that one shows the memory.
        batch: prompts at once.
    """
    prompts = [make_dummy_input_ids(c.model, length).expand(batch, -1).to(c.model.device) for c in timed_models]
    peaks = [
        measure_peak_memory(lambda c=c, ids=ids: generate_first_token(c.model, ids), c.model.device)  # type: ignore[misc]
        for c, ids in zip(timed_models, prompts)
    ]
    times: list[list[float]] = [[] for _ in timed_models]
    for _ in range(rounds):
        for timed_model, ids, spent in zip(timed_models, prompts, times):
            synchronize_device(timed_model.model.device)
            began = time.perf_counter()
            generate_first_token(timed_model.model, ids)
            synchronize_device(timed_model.model.device)
            spent.append(1000 * (time.perf_counter() - began))
    return [
        PrefillTiming(c.name, length, batch, statistics.median(spent), min(spent), max(spent), peak)
        for c, spent, peak in zip(timed_models, times, peaks)
    ]


def generate_first_token(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The most likely token [B] after prompts [B, T]; the head reads the last token alone, where the family can."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = DynamicCache(config=model.config)
    return model(input_ids=ids, **build_cache_kwargs(model, cache), **last).logits[:, -1].argmax(-1)


@torch.no_grad()
def measure_cache_sizes(teacher: PreTrainedModel, student: PreTrainedModel, length: int = 128) -> dict[str, Any]:
    """Cache bytes of one sequence in both models, after `length` and after twice as many tokens.

    Returns:
        bytes at both lengths, the student's growth per token (0 when every layer is converted), and the number of
        tokens from which the student needs less memory.
    """
    sizes: dict[str, list[int]] = {}
    for name, model in (("teacher", teacher), ("student", student)):
        cache, body = DynamicCache(config=model.config), model.get_decoder()
        ids = torch.full((1, length), 5, device=model.device)
        for _ in range(2):
            body(input_ids=ids, **build_cache_kwargs(body, cache))
            sizes.setdefault(name, []).append(cache_bytes(cache))
    per_token = {name: (late - early) / length for name, (early, late) in sizes.items()}
    fixed = sizes["student"][0] - per_token["student"] * length
    saved = per_token["teacher"] - per_token["student"]
    return {
        "length": length,
        "teacher_cache_bytes": sizes["teacher"],
        "student_cache_bytes": sizes["student"],
        "teacher_bytes_per_token": per_token["teacher"],
        "student_bytes_per_token": per_token["student"],
        "student_fixed_bytes": fixed,
        "break_even_tokens": fixed / saved if saved > 0 else None,
    }
