"""Many prompts with one beginning: read it once, then ask about all of them in batches, on the model's own cache.

    shared = SharedPrefix(model, rows)                          # rows: token ids of whole prompts
    batch = shared.start(rows[:8])
    batch.logits                                                # [8, V], after the last token of each prompt
    batch.generate(16, lambda tokens: newline in tokens)        # greedy, a list of tokens for each prompt
    shared.log_likelihoods(rows[0], [[5, 6], [7]])              # of answers to one prompt

Worked examples and instructions are the same in all prompts of a task, so they are what is shared. Prompts of different
lengths are padded between the shared beginning and their own part; a masked token is a no-op for every mixer, and
positions do not count it. A student's cache is its state of constant size. Legend: N prompts, T time, V vocabulary.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from limbeck.evaluation.long_text import PrefilledPrompt, iter_chunks, run_chunk
from limbeck.models import build_cache_kwargs
from limbeck.models.backbone import LMHead
from limbeck.models.packed import has_full_attention

CHUNK_SIZE = 1024  # tokens of a prompt in a forward pass


def count_shared_tokens(rows: Sequence[Sequence[int]]) -> int:
    """Count the tokens with which all rows begin, leaving at least one token of each for itself."""
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows)))
    return min(shared, min(map(len, rows)) - 1)


def is_in_reach(model: PreTrainedModel, length: int) -> bool:
    """Return whether each softmax layer attends to all of so many tokens.

    Where one has a window, padding between the shared beginning and a prompt's own part would push the beginning out
    of it, so such prompts share nothing: padding is to the left of everything then, where no window comes.
    """
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size")]
    return has_full_attention(config) or min(filter(None, windows), default=0) >= length


class SharedPrefix:
    """The tokens with which all prompts begin, and the cache that has read them.

    Args:
        rows: token ids of each prompt, one token at least.
    """

    def __init__(self, model: PreTrainedModel, rows: Sequence[Sequence[int]]):
        self.model = model
        longest = max(map(len, rows))
        self.ids = list(rows[0][: count_shared_tokens(rows)]) if is_in_reach(model, 2 * longest) else []
        self._cache = DynamicCache(config=model.config)
        self._read(self.ids, self._cache)

    @torch.no_grad()
    def start(self, rows: Sequence[Sequence[int]]) -> "PromptBatch":
        """Read what is left of each prompt, in one batch."""
        own = [list(row[len(self.ids) :]) for row in rows]
        width = max(map(len, own))
        real = torch.tensor([[False] * (width - len(ids)) + [True] * len(ids) for ids in own])
        inputs = torch.tensor([[0] * (width - len(ids)) + ids for ids in own])
        cache = copy.deepcopy(self._cache)
        if self.ids:
            cache.batch_repeat_interleave(len(rows))
        mask = torch.cat([torch.ones(len(rows), len(self.ids), dtype=torch.long), real.long()], 1)
        positions = len(self.ids) + (real.long().cumsum(1) - 1).clamp(min=0)
        batch = PromptBatch(self.model, cache, mask, positions[:, -1])
        for begin, end in iter_chunks(width, CHUNK_SIZE):
            batch.logits = batch.step(inputs[:, begin:end], mask[:, : len(self.ids) + end], positions[:, begin:end])
        return batch

    @torch.no_grad()
    def log_likelihoods(self, row: Sequence[int], answers: list[list[int]]) -> Tensor:
        """Compute the log-probability [N] in nats of each answer's tokens after one prompt."""
        cache = copy.deepcopy(self._cache)
        hidden = self._read(row[len(self.ids) :], cache)
        return PrefilledPrompt(self.model, cache, LMHead(self.model)(hidden[-1:])[0]).log_likelihoods(answers)

    @torch.no_grad()
    def _read(self, ids: Sequence[int], cache: Cache) -> Any:
        hidden = None
        for begin, end in iter_chunks(len(ids), CHUNK_SIZE):
            hidden = run_chunk(self.model, torch.tensor(ids[begin:end]), cache)
        return hidden


@dataclass
class PromptBatch:
    """Prompts that were read, ready to be continued once.

    mask: [N, T] 1 for the tokens so far, 0 for padding.
    positions: [N] of each prompt's last token.
    logits: [N, V] after it.
    """

    model: PreTrainedModel
    cache: Cache
    mask: Tensor
    positions: Tensor
    logits: Tensor = field(default_factory=lambda: torch.empty(0))

    def step(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        """Read tokens [N, t] into the cache; returns the logits [N, V] after the last."""
        backbone, device = self.model.get_decoder(), self.model.device
        hidden = backbone(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=positions.to(device),
            **build_cache_kwargs(backbone, self.cache),
        ).last_hidden_state
        return LMHead(self.model)(hidden[:, -1]).float().cpu()

    @torch.no_grad()
    def generate(self, new_tokens: int, is_done: Callable[[list[int]], bool]) -> list[list[int]]:
        """Decode greedily, at most `new_tokens` tokens of each prompt, without an end-of-text token.

        A prompt is done with an end-of-text token or as soon as `is_done` of its new tokens is true.
        """
        stops = self.model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        tokens: list[list[int]] = [[] for _ in self.positions]
        done = [False] * len(tokens)
        for count in range(1, new_tokens + 1):
            chosen = self.logits.argmax(-1)
            for index, token in enumerate(chosen.tolist()):
                if not done[index] and token not in stops:
                    tokens[index].append(token)
                done[index] = done[index] or token in stops or is_done(tokens[index])
            if all(done) or count == new_tokens:
                break
            self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
            self.positions = self.positions + 1
            self.logits = self.step(chosen[:, None], self.mask, self.positions[:, None])
        return tokens
