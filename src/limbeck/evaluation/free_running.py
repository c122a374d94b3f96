"""Both models left to themselves: how long a student writes what its teacher writes, and what the teacher makes of it.

    starts = extract_prefixes(sequences, count=16, length=64)                 # [16, 64], each out of one document
    compare_free_running(teacher, student, starts, new_tokens=64)["equal_tokens"]    # 7.4: tokens until the texts part

Greedy decoding on the models' own caches. An end of text is a token like any other, so all texts have the same length.
Legend: N prefixes, P their length, S new tokens.
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError
from limbeck.data.packing import SequenceDataset
from limbeck.models import build_cache_kwargs
from limbeck.models.backbone import LMHead


def extract_prefixes(data: SequenceDataset, count: int, length: int) -> Tensor:
    """The first `count` stretches of `length` tokens that lie within one document, side by side: [N, P].

    Fewer where the text has no more; LimbeckError where it has none.
    """
    found: list[Tensor] = []
    for at in range(data.n_sequences):
        batch = data.batch(at, 1)
        ids, position = batch.input_ids[0], batch.position_ids[0]
        for begin in range(0, len(ids) - length + 1, length):
            if int(position[begin + length - 1] - position[begin]) == length - 1:
                found.append(ids[begin : begin + length])
            if len(found) == count:
                return torch.stack(found)
    if not found:
        raise LimbeckError(
            f"no document of {length} tokens in the text",
            expected="longer documents or shorter prefixes",
            hint="--set agreement.prefix=16, or --set agreement.prefixes=0 for none",
        )
    return torch.stack(found)


@torch.no_grad()
def compare_free_running(
    teacher: PreTrainedModel, student: PreTrainedModel, starts: Tensor, new_tokens: int
) -> dict[str, Any]:
    """Greedy continuations of the same prefixes [N, P] by both models, `new_tokens` tokens each.

    Returns:
        equal_tokens: mean number of tokens before the first that differs, `new_tokens` where none does;
        equal_tokens_error: its standard error over prefixes, None for one prefix;
        equal_share: by step, the share of prefixes with the same token at that place, whatever came before;
        together: by step, the share of prefixes whose texts have not parted yet;
        text_perplexity: the teacher's perplexity of the student's text, teacher_text_perplexity: of its own;
        distinct_bigrams: share of different pairs among the student's pairs of neighbours, and the teacher's. A text
        that repeats itself has a low perplexity and few of them.
    """
    starts = starts.to(student.device)
    with progress("free running", 2 * new_tokens, "tokens") as advance:
        theirs, ours = (
            greedy_decode(teacher, starts, new_tokens, advance),
            greedy_decode(student, starts, new_tokens, advance),
        )
    equal = theirs == ours
    apart = equal.long().cumprod(1).sum(1).double()
    several = len(starts) > 1
    return {
        "equal_tokens": float(apart.mean()),
        "equal_tokens_error": float(apart.std() / math.sqrt(len(starts))) if several else None,
        "equal_share": equal.double().mean(0).tolist(),
        "together": equal.long().cumprod(1).double().mean(0).tolist(),
        "text_perplexity": compute_perplexity(teacher, starts, ours),
        "teacher_text_perplexity": compute_perplexity(teacher, starts, theirs),
        "distinct_bigrams": _distinct_bigrams(ours),
        "teacher_distinct_bigrams": _distinct_bigrams(theirs),
    }


@torch.no_grad()
def greedy_decode(model: PreTrainedModel, starts: Tensor, new_tokens: int, advance=lambda amount: None) -> Tensor:
    """The likeliest next token, `new_tokens` times: [N, S]. Only the last token's logits are formed."""
    head, body = LMHead(model), model.get_decoder()
    cache, ids, out = DynamicCache(config=model.config), starts, []
    for _ in range(new_tokens):
        hidden = body(input_ids=ids, **build_cache_kwargs(body, cache)).last_hidden_state
        ids = head(hidden[:, -1]).argmax(-1, keepdim=True)
        out.append(ids)
        advance(1)
    return torch.cat(out, 1)


@torch.no_grad()
def compute_perplexity(model: PreTrainedModel, starts: Tensor, text: Tensor) -> float:
    """Perplexity of the texts [N, S] after the prefixes [N, P], one text's logits at a time."""
    head, total = LMHead(model), 0.0
    for start, continued in zip(starts, text):
        hidden = model.get_decoder()(input_ids=torch.cat([start, continued])[None], use_cache=False).last_hidden_state
        logits = head(hidden[0, len(start) - 1 : -1]).float()
        total += float(F.cross_entropy(logits, continued, reduction="sum"))
    return math.exp(min(total / text.numel(), 700))


def _distinct_bigrams(text: Tensor) -> float:
    """Mean over texts [N, S] of the share of different pairs among all pairs of neighbours."""
    shares = [len(set(itertools.pairwise(row))) / max(len(row) - 1, 1) for row in text.tolist()]
    return sum(shares) / len(shares)
