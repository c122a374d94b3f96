"""What reading a prompt costs: time to the first token, tokens a second, and the most memory that it takes.

    prefills = measure_prefill([Contestant("teacher", teacher), Contestant("student", student)], length=4096)

All contestants read the same tokens in turns, each into a new growing cache that is dropped after its first token.
"""

import inspect
import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from limbeck.evaluate.decoding import Contestant, arbitrary_text
from limbeck.machine import extra_peak, wait
from limbeck.model import with_cache


@dataclass(frozen=True)
class Prefill:
    """Prompts of `length` tokens, `batch` at once, up to the first new token of each."""

    name: str
    length: int
    batch: int
    milliseconds: float  # median over the rounds
    least: float
    most: float
    extra_bytes: int | None  # at most, on top of the weights; the cache included

    @property
    def tokens_per_second(self) -> float:
        """Of the prompts."""
        return 1000 * self.batch * self.length / self.milliseconds


@torch.no_grad()
def measure_prefill(contestants: list[Contestant], length: int, rounds: int = 3, batch: int = 1) -> list[Prefill]:
    """Time and memory of prompts, one prefill each in turns.

    Args:
        length: tokens of a prompt.
        rounds: times that are taken, after one that is not: that one shows the memory.
        batch: prompts at once.
    """
    prompts = [arbitrary_text(c.model, length).expand(batch, -1).to(c.model.device) for c in contestants]
    peaks = [
        extra_peak(lambda c=c, ids=ids: first_token(c.model, ids), c.model.device)  # type: ignore[misc]
        for c, ids in zip(contestants, prompts)
    ]
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds):
        for contestant, ids, spent in zip(contestants, prompts, times):
            wait(contestant.model.device)
            began = time.perf_counter()
            first_token(contestant.model, ids)
            wait(contestant.model.device)
            spent.append(1000 * (time.perf_counter() - began))
    return [
        Prefill(c.name, length, batch, statistics.median(spent), min(spent), max(spent), peak)
        for c, spent, peak in zip(contestants, times, peaks)
    ]


def first_token(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The most likely token [B] after prompts [B, T]; the head reads the last token alone, where the family can."""
    last = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    cache = DynamicCache(config=model.config)
    return model(input_ids=ids, **with_cache(model, cache), **last).logits[:, -1].argmax(-1)
