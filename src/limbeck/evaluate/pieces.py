"""A long text through a model in pieces on one cache: losses, what follows a prompt, and how likely an answer is.

    losses = token_losses(model, ids, piece=1024)          # [T - 1] nats, no T x vocabulary tensor
    prompt = Read.of(model, ids, piece=1024)               # a cache and the logits behind the last token
    prompt.greedy(16), prompt.log_likelihoods([[5, 6], [7]])

Of a student the cache is a state of constant size, so a piece takes the same memory and time wherever it stands in the
text; of a softmax model it is the keys and values of all tokens before.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache, DynamicCache, PreTrainedModel

from limbeck.console import progress
from limbeck.errors import LimbeckError
from limbeck.model import cache_bytes, with_cache
from limbeck.model.body import Head

HEAD_ROWS = 256  # tokens whose logits exist at a time
MASK_BYTES = 2**24  # of the mask that transformers builds for a piece: its tokens times all tokens so far
COPIES_BYTES = 2**30  # how much the copies of a cache may take that score answers side by side


@torch.no_grad()
def token_losses(model: PreTrainedModel, ids: Tensor, piece: int = 1024) -> Tensor:
    """Negative log-likelihood [T - 1] in nats of each token but the first, given all before it.

    Args:
        ids: [T] token ids, at least two.
        piece: tokens in a forward pass, fewer far into a text (`MASK_BYTES`).
    """
    head, cache, losses = Head(model), DynamicCache(config=model.config), []
    with progress("stream", len(ids) - 1, "tokens") as advance:
        for begin, end in _pieces(len(ids) - 1, piece):
            inputs = ids[begin:end]
            hidden = _body(model, inputs, cache)
            for row in range(0, len(inputs), HEAD_ROWS):
                rows = hidden[row : row + HEAD_ROWS]
                targets = ids[begin + row + 1 : begin + row + 1 + len(rows)].to(model.device)
                losses.append(F.cross_entropy(head(rows).float(), targets, reduction="none").cpu())
            advance(len(inputs))
    return torch.cat(losses)


@dataclass
class Read:
    """A model that has read a prompt. What is asked of it leaves the cache as it was.

    logits: [vocabulary] behind the prompt's last token.
    """

    model: PreTrainedModel
    cache: Cache
    logits: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, ids: Tensor, piece: int = 1024) -> "Read":
        """Read the prompt `ids` [T] in pieces of `piece` tokens."""
        cache = DynamicCache(config=model.config)
        for begin, end in _pieces(len(ids), piece):
            hidden = _body(model, ids[begin:end], cache)
        return cls(model, cache, Head(model)(hidden[-1:])[0])

    @torch.no_grad()
    def greedy(self, new_tokens: int, done: Callable[[list[int]], bool] = lambda tokens: False) -> list[int]:
        """The most likely token again and again, at most `new_tokens`; stops behind an end of text or when `done`."""
        stops = self.model.generation_config.eos_token_id
        stops = stops if isinstance(stops, list) else [stops]
        cache, logits, made = copy.deepcopy(self.cache), self.logits, []
        while True:
            made.append(int(logits.argmax()))
            if len(made) == new_tokens or made[-1] in stops or done(made):
                return made
            hidden = _body(self.model, torch.tensor(made[-1:]), cache)
            logits = Head(self.model)(hidden[-1:])[0]

    @torch.no_grad()
    def log_likelihoods(self, answers: list[list[int]]) -> Tensor:
        """Log-probability [N] in nats of each answer's tokens behind the prompt, all given those before."""
        first = self.logits.float().log_softmax(-1)
        sums = [float(first[answer[0]]) for answer in answers]
        longer = [i for i, answer in enumerate(answers) if len(answer) > 1]
        side_by_side = max(1, COPIES_BYTES // max(1, cache_bytes(self.cache)))
        for begin in range(0, len(longer), side_by_side):
            rows = longer[begin : begin + side_by_side]
            width = max(len(answers[row]) for row in rows) - 1
            # what an answer is padded with on the right comes behind its last token, so it changes nothing
            inputs = torch.tensor([[*answers[row][:-1], *[0] * (width - len(answers[row]) + 1)] for row in rows])
            cache = copy.deepcopy(self.cache)
            cache.batch_repeat_interleave(len(rows))
            inputs = inputs.to(self.model.device)
            body = self.model.get_decoder()
            hidden = body(input_ids=inputs, **with_cache(body, cache)).last_hidden_state
            for row, states in zip(rows, hidden):
                rest = torch.tensor(answers[row][1:], device=states.device)
                logits = Head(self.model)(states[: len(rest)]).float()
                sums[row] -= float(F.cross_entropy(logits, rest, reduction="sum"))
        return torch.tensor(sums)


def context_of(model: PreTrainedModel) -> int | None:
    """Tokens of context that the family was made for; None where its config does not say."""
    return getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)


def check_room(what: str, prompt: int, answer: int, length: int) -> None:
    """Raises LimbeckError where prompt and answer take more than `length` tokens."""
    if prompt + answer > length:
        raise LimbeckError(
            f"{what}: {prompt} tokens of prompt and {answer} of answer do not fit in {length}",
            expected=f"a length of {prompt + answer} or more",
        )


def _pieces(n: int, piece: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each piece of `n` tokens, shorter and shorter so that no mask outgrows `MASK_BYTES`."""
    begin = 0
    while begin < n:
        end = min(n, begin + min(piece, max(16, MASK_BYTES // (begin + piece))))
        yield begin, end
        begin = end


def _body(model: PreTrainedModel, ids: Tensor, cache: Cache) -> Tensor:
    """Hidden states [T, D] of one sequence's next tokens [T]; the cache goes on."""
    inputs = ids[None].to(model.device)
    body = model.get_decoder()
    return body(input_ids=inputs, **with_cache(body, cache)).last_hidden_state[0]
