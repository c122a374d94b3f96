"""A candidate of the speed benchmark: a model with its name, output folder, cache kinds and estimated cost.

    candidate = Candidate.from_subject(subject)
    candidate.probe()                                   # runs a few tokens: sizes, and a first estimate of speed
    candidate.estimate_cache_bytes(4096, batch=1), candidate.estimate_prefill_seconds(4096, batch=1)

Estimates only serve to announce how long a benchmark takes and to refuse what does not fit into memory.
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

PROBE_TOKENS = 256  # tokens of the probe: the warm-up, and the basis of all estimates
CACHE_BANDWIDTH = 8e9  # assumed bytes per second at which a cache is read or copied
ACTIVATION_WIDTHS = 8  # assumed tensors of the model's width that a layer's prefill holds at a time


@dataclass
class Candidate:
    """A model in the benchmark.

    name: name in tables.
    output_dir: folder of its measurement.
    weight_format: data type of its weights.

    The other fields are set by `probe`.

    bytes_per_token, fixed_bytes: cache size as a linear function of the length.
    num_softmax_layers: layers that store keys and values.
    supports_static_cache: whether it can decode with a static cache, and that differs from a growing one.
    probe_seconds: time to the first token after PROBE_TOKENS tokens.
    step_seconds: time of a token after them.
    """

    name: str
    output_dir: Path
    model: PreTrainedModel
    subject: Subject
    weight_format: str = "float32"
    bytes_per_token: float = 0.0
    fixed_bytes: float = 0.0
    num_softmax_layers: int = 0
    supports_static_cache: bool = False
    probe_seconds: float = 0.0
    step_seconds: float = 0.0

    @classmethod
    def from_subject(cls, subject: Subject) -> "Candidate":
        """Create a candidate from a model as it is."""
        return cls(subject.name, subject.output_dir, subject.model, subject, str(subject.model.dtype).split(".")[-1])

    def to_int8(self) -> "Candidate":
        """Copy in int8 with its own output folder; see `limbeck.models.quantization.quantize_int8`."""
        weight_format = "int8, activations too"
        return replace(
            self,
            name=f"{self.name}, {weight_format}",
            output_dir=self.output_dir.with_name(self.output_dir.name + "-int8-dynamic"),
            model=quantize_int8(self.model),
            weight_format=weight_format,
        )

    @property
    def is_baseline(self) -> bool:
        """Whether students are compared with it."""
        return not self.subject.is_student

    @property
    def max_positions(self) -> int | None:
        """Maximum length of a model with learned position embeddings; None if positions are computed."""
        length = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if length is None:
            return None
        token_embeddings = self.model.get_input_embeddings()
        tables = (m for m in self.model.modules() if isinstance(m, nn.Embedding) and m is not token_embeddings)
        # Some families add up to two rows for padding.
        return length if any(length <= table.num_embeddings <= length + 2 for table in tables) else None

    def timed_models(self, growing_only: bool = False) -> list[TimedModel]:
        """List the model with each kind of cache it supports."""
        timed_models = [TimedModel(f"{self.name} / growing", self.model)]
        if self.supports_static_cache and not growing_only:
            timed_models.append(TimedModel(f"{self.name} / static", self.model, static=True))
        return timed_models

    @torch.no_grad()
    def probe(self) -> None:
        """Measure sizes and a first estimate of speed; also warms the model up."""
        device = self.model.device
        ids = make_dummy_input_ids(self.model, PROBE_TOKENS).to(device)
        caches = [DynamicCache(config=self.model.config) for _ in range(2)]
        backbone = self.model.get_decoder()
        for cache, length in zip(caches, (PROBE_TOKENS // 2, PROBE_TOKENS)):
            backbone(input_ids=ids[:, :length], **build_cache_kwargs(backbone, cache))
        half_bytes, full_bytes = (cache_bytes(cache) for cache in caches)
        layers = caches[1].layers
        self.bytes_per_token = 2 * (full_bytes - half_bytes) / PROBE_TOKENS
        self.fixed_bytes = full_bytes - PROBE_TOKENS * self.bytes_per_token
        self.num_softmax_layers = sum(not isinstance(layer, RecurrentLayer) for layer in layers)
        self.supports_static_cache = self.num_softmax_layers > 0 and all(is_extendable(layer) for layer in layers)
        self.probe_seconds = _time_call(lambda: generate_first_token(self.model, ids), device)

        def decode() -> None:
            self.model(input_ids=ids[:, :1], **build_cache_kwargs(self.model, caches[1]))

        self.step_seconds = min(_time_call(decode, device) for _ in range(4))

    def estimate_cache_bytes(self, length: int, batch: int) -> float:
        """Estimate the size of a growing cache."""
        return batch * (self.fixed_bytes + length * self.bytes_per_token)

    def estimate_prefill_seconds(self, length: int, batch: int) -> float:
        """Extrapolate the probe: products with weights grow linearly in the length, attention quadratically."""
        width = self.model.config.get_text_config(decoder=True).hidden_size
        # Multiplications of attention per token of context, relative to those with weights.
        attention = width * self.num_softmax_layers / count_unquantized_parameters(self.model)
        relative_cost = (1 + attention * length) / (1 + attention * PROBE_TOKENS)
        return batch * self.probe_seconds * length / PROBE_TOKENS * relative_cost

    def estimate_decoding_seconds(self, length: int, batch: int, steps: int) -> float:
        """Estimate the time to fill the caches and decode `steps` tokens, with each kind of cache."""
        cache_seconds = 3 * self.estimate_cache_bytes(length, batch) / CACHE_BANDWIDTH
        step_seconds = self.step_seconds * (0.9 + 0.1 * batch) + cache_seconds
        prefill_seconds = self.estimate_prefill_seconds(min(length, SEED_TOKENS), batch)
        return (1 + self.supports_static_cache) * (prefill_seconds + steps * step_seconds)

    def estimate_prefill_bytes(self, length: int, batch: int) -> float:
        """Estimate the memory of a prefill: its cache, and the activations of one layer."""
        config = self.model.config.get_text_config(decoder=True)
        widest = max(config.hidden_size, getattr(config, "intermediate_size", None) or 0)
        activations = ACTIVATION_WIDTHS * config.hidden_size + 3 * widest
        return self.estimate_cache_bytes(length, batch) + 4 * batch * length * activations

    def estimate_decoding_bytes(self, length: int, batch: int) -> float:
        """Estimate the memory of all caches, with the copy of a layer that a growing cache makes at each step."""
        cache = self.estimate_cache_bytes(length, batch)
        return (1 + self.supports_static_cache) * cache + 2 * cache / max(self.num_softmax_layers, 1)


def _time_call(call: Callable[[], Any], device: torch.device) -> float:
    """Time a call in seconds."""
    synchronize_device(device)
    start = time.perf_counter()
    call()
    synchronize_device(device)
    return time.perf_counter() - start
