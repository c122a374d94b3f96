"""A model in a race: with its name in the tables, the caches that it can decode with, and what it is likely to need.

entry = Entry.of(subject)
entry.probe()                                   # reads a few tokens: sizes, and a first idea of speed
entry.cache_bytes(4096, batch=1), entry.prefill_seconds(4096, batch=1)
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from limbeck.evaluate.decoding import SEED, Contestant, arbitrary_text, can_lengthen
from limbeck.evaluate.prefill import first_token
from limbeck.evaluate.subject import Subject
from limbeck.machine import wait
from limbeck.model import RecurrentLayer, cache_bytes, with_cache
from limbeck.quantise import int8, numel

PROBE = 256  # tokens that each entry reads before the race: warm-up, and what estimates stand on
BANDWIDTH = 8e9  # bytes a second that a cache is read or copied with, for estimates alone
WIDTHS = 8  # numbers of a layer's width that a token of a prompt has alive at one time, for estimates alone


@dataclass
class Entry:
    """One model in the race.

    name: what the tables call it.
    home: where its measurement is kept.
    kind: of its weights.
    """

    name: str
    home: Path
    model: PreTrainedModel
    subject: Subject
    kind: str = "float32"
    bytes_per_token: float = 0.0
    fixed_bytes: float = 0.0
    softmax: int = 0  # layers that keep keys and values
    static: bool = False  # whether it can decode with a static cache, and that is another thing than a growing one
    probe_seconds: float = 0.0  # for the first token after PROBE ones
    step_seconds: float = 0.0  # for a token after them

    @classmethod
    def of(cls, subject: Subject) -> "Entry":
        """A model as it is."""
        return cls(subject.name, subject.home, subject.model, subject, str(subject.model.dtype).split(".")[-1])

    def in_int8(self, activations: bool) -> "Entry":
        """The same model with int8 weights, in a home of its own; see `limbeck.quantise.int8`."""
        kind = "int8, activations too" if activations else "int8"
        home = self.home.with_name(self.home.name + ("-int8-dynamic" if activations else "-int8"))
        return replace(
            self, name=f"{self.name}, {kind}", home=home, model=int8(self.model, activations=activations), kind=kind
        )

    @property
    def reference(self) -> bool:
        """Whether students are compared with it."""
        return not self.subject.student

    @property
    def limit(self) -> int | None:
        """The most tokens that it can read, where its positions are learnt; None where they are computed."""
        most = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if most is None:
            return None
        words = self.model.get_input_embeddings()
        tables = (m for m in self.model.modules() if isinstance(m, nn.Embedding) and m is not words)
        return most if any(most <= table.num_embeddings <= most + 2 for table in tables) else None

    def cache_bytes(self, length: int, batch: int) -> float:
        """Of a growing cache."""
        return batch * (self.fixed_bytes + length * self.bytes_per_token)

    def prefill_seconds(self, length: int, batch: int) -> float:
        """Estimated from the probe: products with weights grow with the length, attention with its square."""
        width = self.model.config.get_text_config(decoder=True).hidden_size
        # multiplications with one token of context, over those with weights
        attention = width * self.softmax / numel(self.model)
        return batch * self.probe_seconds * length / PROBE * (1 + attention * length) / (1 + attention * PROBE)

    def decoding_seconds(self, length: int, batch: int, steps: int) -> float:
        """Estimated for filling the caches and so many steps, with each kind of cache."""
        step = self.step_seconds * (0.9 + 0.1 * batch) + 3 * self.cache_bytes(length, batch) / BANDWIDTH
        return (1 + self.static) * (self.prefill_seconds(min(length, SEED), batch) + steps * step)

    def prefill_bytes(self, length: int, batch: int) -> float:
        """Estimated for a prompt: its cache, and what its tokens have alive in one layer."""
        config = self.model.config.get_text_config(decoder=True)
        widest = max(config.hidden_size, getattr(config, "intermediate_size", None) or 0)
        alive = WIDTHS * config.hidden_size + 3 * widest
        return self.cache_bytes(length, batch) + 4 * batch * length * alive

    def decoding_bytes(self, length: int, batch: int) -> float:
        """Of its caches together, with the copy of a layer that a growing one makes at a step."""
        cache = self.cache_bytes(length, batch)
        return (1 + self.static) * cache + 2 * cache / max(self.softmax, 1)

    def contestants(self, growing_only: bool = False) -> list[Contestant]:
        """Itself with each kind of cache."""
        both = [Contestant(f"{self.name} / growing", self.model)]
        if self.static and not growing_only:
            both.append(Contestant(f"{self.name} / static", self.model, static=True))
        return both

    @torch.no_grad()
    def probe(self) -> None:
        """Find out sizes and a first idea of speed; this is its warm-up too."""
        device = self.model.device
        ids = arbitrary_text(self.model, PROBE).to(device)
        caches = [DynamicCache(config=self.model.config) for _ in range(2)]
        body = self.model.get_decoder()
        for cache, length in zip(caches, (PROBE // 2, PROBE)):
            body(input_ids=ids[:, :length], **with_cache(body, cache))
        early, late = (cache_bytes(cache) for cache in caches)
        layers = caches[1].layers
        self.bytes_per_token = 2 * (late - early) / PROBE
        self.fixed_bytes = late - PROBE * self.bytes_per_token
        self.softmax = sum(not isinstance(layer, RecurrentLayer) for layer in layers)
        self.static = self.softmax > 0 and all(can_lengthen(layer) for layer in layers)
        self.probe_seconds = _seconds(lambda: first_token(self.model, ids), device)
        steps = [
            _seconds(lambda: self.model(input_ids=ids[:, :1], **with_cache(self.model, caches[1])), device)
            for _ in range(4)
        ]
        self.step_seconds = min(steps)


def _seconds(work: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - began
