"""A model in a race: with its name in the tables, the caches that it can decode with, and what it is likely to need.

entry = Candidate.from_subject(subject)
entry.probe()                                   # reads a few tokens: sizes, and a first idea of speed
entry.estimate_cache_bytes(4096, batch=1), entry.estimate_prefill_seconds(4096, batch=1)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from limbeck.core.system import synchronize_device
from limbeck.evaluation.subject import Subject
from limbeck.evaluation.timing import SEED_TOKENS, TimedModel, generate_first_token, is_extendable, make_dummy_input_ids
from limbeck.models import RecurrentLayer, build_cache_kwargs, cache_bytes
from limbeck.models.quantization import count_unquantized_parameters, quantize_int8

PROBE_TOKENS = 256  # tokens that each entry reads before the race: warm-up, and what estimates stand on
BANDWIDTH = 8e9  # bytes a second that a cache is read or copied with, for estimates alone
WIDTHS = 8  # numbers of a layer's width that a token of a prompt has alive at one time, for estimates alone


@dataclass
class Candidate:
    """One model in the race.

    name: what the tables call it.
    output_dir: where its measurement is kept.
    weight_format: of its weights.
    """

    name: str
    output_dir: Path
    model: PreTrainedModel
    subject: Subject
    weight_format: str = "float32"
    bytes_per_token: float = 0.0
    fixed_bytes: float = 0.0
    num_softmax_layers: int = 0  # layers that keep keys and values
    supports_static_cache: bool = (
        False  # whether it can decode with a static cache, and that is another thing than a growing one
    )
    probe_seconds: float = 0.0  # for the first token after PROBE_TOKENS ones
    step_seconds: float = 0.0  # for a token after them

    @classmethod
    def from_subject(cls, subject: Subject) -> "Candidate":
        """A model as it is."""
        return cls(subject.name, subject.output_dir, subject.model, subject, str(subject.model.dtype).split(".")[-1])

    def to_int8(self, activations: bool) -> "Candidate":
        """The same model with int8 weights, in a home of its own; see `limbeck.models.quantization.quantize_int8`."""
        weight_format = "int8, activations too" if activations else "int8"
        output_dir = self.output_dir.with_name(self.output_dir.name + ("-int8-dynamic" if activations else "-int8"))
        return replace(
            self,
            name=f"{self.name}, {weight_format}",
            output_dir=output_dir,
            model=quantize_int8(self.model, quantize_activations=activations),
            weight_format=weight_format,
        )

    @property
    def is_baseline(self) -> bool:
        """Whether students are compared with it."""
        return not self.subject.is_student

    @property
    def max_positions(self) -> int | None:
        """The most tokens that it can read, where its positions are learnt; None where they are computed."""
        most = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if most is None:
            return None
        words = self.model.get_input_embeddings()
        tables = (m for m in self.model.modules() if isinstance(m, nn.Embedding) and m is not words)
        return most if any(most <= table.num_embeddings <= most + 2 for table in tables) else None

    def estimate_cache_bytes(self, length: int, batch: int) -> float:
        """Of a growing cache."""
        return batch * (self.fixed_bytes + length * self.bytes_per_token)

    def estimate_prefill_seconds(self, length: int, batch: int) -> float:
        """Estimated from the probe: products with weights grow with the length, attention with its square."""
        width = self.model.config.get_text_config(decoder=True).hidden_size
        # multiplications with one token of context, over those with weights
        attention = width * self.num_softmax_layers / count_unquantized_parameters(self.model)
        return (
            batch
            * self.probe_seconds
            * length
            / PROBE_TOKENS
            * (1 + attention * length)
            / (1 + attention * PROBE_TOKENS)
        )

    def estimate_decoding_seconds(self, length: int, batch: int, steps: int) -> float:
        """Estimated for filling the caches and so many steps, with each kind of cache."""
        step = self.step_seconds * (0.9 + 0.1 * batch) + 3 * self.estimate_cache_bytes(length, batch) / BANDWIDTH
        return (1 + self.supports_static_cache) * (
            self.estimate_prefill_seconds(min(length, SEED_TOKENS), batch) + steps * step
        )

    def estimate_prefill_bytes(self, length: int, batch: int) -> float:
        """Estimated for a prompt: its cache, and what its tokens have alive in one layer."""
        config = self.model.config.get_text_config(decoder=True)
        widest = max(config.hidden_size, getattr(config, "intermediate_size", None) or 0)
        alive = WIDTHS * config.hidden_size + 3 * widest
        return self.estimate_cache_bytes(length, batch) + 4 * batch * length * alive

    def estimate_decoding_bytes(self, length: int, batch: int) -> float:
        """Of its caches together, with the copy of a layer that a growing one makes at a step."""
        cache = self.estimate_cache_bytes(length, batch)
        return (1 + self.supports_static_cache) * cache + 2 * cache / max(self.num_softmax_layers, 1)

    def timed_models(self, growing_only: bool = False) -> list[TimedModel]:
        """Itself with each kind of cache."""
        both = [TimedModel(f"{self.name} / growing", self.model)]
        if self.supports_static_cache and not growing_only:
            both.append(TimedModel(f"{self.name} / static", self.model, static=True))
        return both

    @torch.no_grad()
    def probe(self) -> None:
        """Find out sizes and a first idea of speed; this is its warm-up too."""
        device = self.model.device
        ids = make_dummy_input_ids(self.model, PROBE_TOKENS).to(device)
        caches = [DynamicCache(config=self.model.config) for _ in range(2)]
        body = self.model.get_decoder()
        for cache, length in zip(caches, (PROBE_TOKENS // 2, PROBE_TOKENS)):
            body(input_ids=ids[:, :length], **build_cache_kwargs(body, cache))
        early, late = (cache_bytes(cache) for cache in caches)
        layers = caches[1].layers
        self.bytes_per_token = 2 * (late - early) / PROBE_TOKENS
        self.fixed_bytes = late - PROBE_TOKENS * self.bytes_per_token
        self.num_softmax_layers = sum(not isinstance(layer, RecurrentLayer) for layer in layers)
        self.supports_static_cache = self.num_softmax_layers > 0 and all(is_extendable(layer) for layer in layers)
        self.probe_seconds = _seconds(lambda: generate_first_token(self.model, ids), device)
        steps = [
            _seconds(lambda: self.model(input_ids=ids[:, :1], **build_cache_kwargs(self.model, caches[1])), device)
            for _ in range(4)
        ]
        self.step_seconds = min(steps)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    synchronize_device(device)
    began = time.perf_counter()
    work()
    synchronize_device(device)
    return time.perf_counter() - began
