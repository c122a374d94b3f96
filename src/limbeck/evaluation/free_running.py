"""Free-running comparison: how long a student writes the same text as its teacher, and how likely that text is.

    prefixes = extract_prefixes(sequences, count=16, length=64)                      # [16, 64], each from one document
    compare_free_running(teacher, student, prefixes, new_tokens=64)["equal_tokens"]  # 7.4 tokens until they differ

Greedy decoding on the models' own caches. End of text is a token like any other, so all texts have the same length.
Legend: N prefixes, P prefix length, S new tokens.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError
from limbeck.data.packing import SequenceDataset
from limbeck.models import build_cache_kwargs
from limbeck.models.backbone import LMHead

PASS_TOKENS = 1024  # of short texts in a forward pass
SHORTER_HINT = "--set agreement.prefix=16, or --set agreement.prefixes=0 for none"


def extract_prefixes(data: SequenceDataset, count: int, length: int, hint: str = SHORTER_HINT) -> Tensor:
    """Extract the first `count` non-overlapping spans of `length` tokens within one document: [N, P].

    Fewer if the text has no more; raises LimbeckError with this hint if it has none.
    """
    prefixes: list[Tensor] = []
    for index in range(data.n_sequences):
        batch = data.batch(index, 1)
        ids, position = batch.input_ids[0], batch.position_ids[0]
        for begin in range(0, len(ids) - length + 1, length):
            if int(position[begin + length - 1] - position[begin]) == length - 1:
                prefixes.append(ids[begin : begin + length])
            if len(prefixes) == count:
                return torch.stack(prefixes)
    if not prefixes:
        raise LimbeckError(
            f"no document of {length} tokens in the text",
            expected="longer documents or shorter prefixes",
            hint=hint,
        )
    return torch.stack(prefixes)


class Continuations(NamedTuple):
    """Tokens [N, S] that a model wrote after prefixes, and its perplexity of them."""

    tokens: Tensor
    perplexity: float


@torch.no_grad()
def write_continuations(
    model: PreTrainedModel, prefixes: Tensor, new_tokens: int, width: int | None = None
) -> Continuations:
    """Continue prefixes [N, P] greedily; arguments as of `decode`."""
    prefixes = prefixes.to(model.device)
    with progress("free running", new_tokens, "tokens") as advance:
        text = decode(model, prefixes, new_tokens, advance, width=width)
    return Continuations(text, compute_perplexity(model, prefixes, text, width))


@torch.no_grad()
def compare_free_running(
    teacher: PreTrainedModel,
    student: PreTrainedModel,
    prefixes: Tensor,
    new_tokens: int,
    written: Continuations | None = None,
) -> dict[str, Any]:
    """Compare greedy continuations, `new_tokens` tokens each, of the same prefixes [N, P] by both models.

    Args:
        written: the teacher's; None: they are written now.

    Returns:
        equal_tokens: mean number of tokens before the first that differs, `new_tokens` where none does;
        equal_tokens_error: its standard error over prefixes, None for one prefix;
        equal_share: by step, share of prefixes with the same token at that step, whatever came before;
        together: by step, share of prefixes whose texts are still the same;
        text_perplexity: the teacher's perplexity of the student's text; teacher_text_perplexity: of its own;
        distinct_bigrams: share of different pairs among the adjacent pairs of the student's text;
        teacher_distinct_bigrams: of the teacher's. Repetitive text has a low perplexity, but few distinct bigrams.
    """
    prefixes, width = prefixes.to(student.device), count_common_tokens(teacher, student)
    theirs = write_continuations(teacher, prefixes, new_tokens, width) if written is None else written
    if student is teacher:
        student_text, text_perplexity = theirs
    else:
        with progress("free running", new_tokens, "tokens") as advance:
            student_text = decode(student, prefixes, new_tokens, advance, width=width)
        text_perplexity = compute_perplexity(teacher, prefixes, student_text, width)
    equal = theirs.tokens == student_text
    still_equal = equal.long().cumprod(1)
    equal_tokens = still_equal.sum(1).double()
    stderr = float(equal_tokens.std() / math.sqrt(len(prefixes))) if len(prefixes) > 1 else None
    return {
        "equal_tokens": float(equal_tokens.mean()),
        "equal_tokens_error": stderr,
        "equal_share": equal.double().mean(0).tolist(),
        "together": still_equal.double().mean(0).tolist(),
        "text_perplexity": text_perplexity,
        "teacher_text_perplexity": theirs.perplexity,
        "distinct_bigrams": compute_distinct_bigrams(student_text),
        "teacher_distinct_bigrams": compute_distinct_bigrams(theirs.tokens),
    }


def count_common_tokens(first: PreTrainedModel, second: PreTrainedModel) -> int:
    """Count the tokens that both models know: the vocabulary of one may be padded with some that have no text."""
    return min(len(model.get_output_embeddings().weight) for model in (first, second))


def choose_likeliest(logits: Tensor) -> Tensor:
    """Choose the likeliest token of each row of logits [N, V]: [N]."""
    return logits.argmax(-1)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    prefixes: Tensor,
    new_tokens: int,
    advance: Callable[[float], None] = lambda amount: None,
    choose: Callable[[Tensor], Tensor] = choose_likeliest,
    width: int | None = None,
) -> Tensor:
    """Continue prefixes [N, P] by `new_tokens` tokens: [N, S]. Only the last token's logits are computed.

    Args:
        choose: picks tokens [N] by their logits [N, V].
        width: of the vocabulary that is written from; None for all of it.
    """
    head, backbone = LMHead(model), model.get_decoder()
    cache, ids, tokens = DynamicCache(config=model.config), prefixes, []
    for _ in range(new_tokens):
        hidden = backbone(input_ids=ids, **build_cache_kwargs(backbone, cache)).last_hidden_state
        ids = choose(head(hidden[:, -1])[:, :width])[:, None]
        tokens.append(ids)
        advance(1)
    return torch.cat(tokens, 1)


@torch.no_grad()
def compute_perplexity(model: PreTrainedModel, prefixes: Tensor, text: Tensor, width: int | None = None) -> float:
    """Compute the perplexity of texts [N, S] after prefixes [N, P], holding the logits of one text at a time.

    Args:
        width: as of `decode`.
    """
    head, total = LMHead(model), 0.0
    for states, continuation in zip(read_texts(model, torch.cat([prefixes, text], 1)), text):
        logits = head(states[prefixes.shape[1] - 1 : -1])[:, :width].float()
        total += float(F.cross_entropy(logits, continuation, reduction="sum"))
    return math.exp(min(total / text.numel(), 700))


@torch.no_grad()
def read_texts(model: PreTrainedModel, ids: Tensor) -> Iterator[Tensor]:
    """Compute the hidden states [T, D] of one text after the other of texts [N, T], several in a forward pass."""
    rows = max(1, PASS_TOKENS // ids.shape[1])
    for texts in ids.to(model.device).split(rows):
        yield from model.get_decoder()(input_ids=texts, use_cache=False).last_hidden_state


def compute_distinct_bigrams(text: Tensor) -> float:
    """Average over texts [N, S] the share of different pairs among all adjacent pairs."""
    shares = [len(set(itertools.pairwise(row))) / max(len(row) - 1, 1) for row in text.tolist()]
    return sum(shares) / len(shares)
