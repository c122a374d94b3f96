"""The measure `sampled`: how far apart two models are on text that they write themselves.

    result = run_measure(get_measure("sampled"), subject, {"samples": 32, "new_tokens": 64})
    result.values["student_text_kl"], result.errors["student_text_kl"]     # nats a token, KL(student || teacher)
    result.values["teacher_text_kl"]                                       # KL(teacher || student)

`agreement` compares next tokens on text that people wrote, where every mistake is undone by the next true word. A model
that writes goes on from its own words. Here both models continue the same prefixes, sampling from their whole
distribution, and the divergence of the two distributions over continuations is estimated both ways, a token:

    KL(p || q) = E over texts y of p of the sum over t of KL(p(. | y before t) || q(. | y before t)) / S

The expectation is over samples, the divergence at each token is summed over the whole vocabulary, which has the same
mean as log p(y) − log q(y) and a smaller variance, and is never negative (Amini, Vieira and Cotterell 2025,
arXiv 2504.10637). The plain estimate is among the values as a check. Standard errors are over samples. End of text is a
token like any other, so all texts have the same length. Legend: N samples, P prefix length, S new tokens, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from transformers import PreTrainedModel

from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError
from limbeck.evaluation.free_running import (
    compute_distinct_bigrams,
    count_common_tokens,
    decode,
    extract_prefixes,
    read_texts,
)
from limbeck.evaluation.measure import Measure, MeasureResult, MeasureSettings
from limbeck.evaluation.subject import Subject
from limbeck.models.backbone import LMHead
from limbeck.models.generation import check_finite


class SampledSettings(MeasureSettings):
    """Settings of the measure `sampled`.

    samples: continuations by each model, each of another prefix.
    prefix: tokens of a prefix.
    new_tokens: tokens of a continuation.
    tokens: size of the held-out text that the prefixes are from; enough for `samples` of them.
    length: tokens of its sequences; None for the run's.
    """

    samples: Annotated[int, Field(ge=2)] = 32
    prefix: Annotated[int, Field(ge=1)] = 32
    new_tokens: Annotated[int, Field(ge=1)] = 64
    tokens: Annotated[int, Field(ge=1)] = 8192
    length: Annotated[int, Field(ge=16)] | None = None


@dataclass(frozen=True)
class Divergence:
    """Of texts that p wrote, token by token [N, S], in nats.

    kl: KL(p || q) of the next token.
    log_ratio: log p − log q of the token that p chose.
    entropy: of p's next token.
    """

    kl: Tensor
    log_ratio: Tensor
    entropy: Tensor


def measure_sampled(subject: Subject, settings: SampledSettings) -> MeasureResult:
    """Let both models continue the same prefixes, and compare their distributions on both sets of texts."""
    teacher = subject.teacher
    length = settings.length or (subject.data.seq_len if subject.data else 512)
    if length < settings.prefix:
        raise LimbeckError(
            f"a prefix has {settings.prefix} tokens, a sequence {length}",
            hint=f"--set sampled.length={settings.prefix}",
        )
    text, data = subject.load_held_out(length, settings.tokens)
    hint = f"a shorter one: --set sampled.prefix={max(settings.prefix // 2, 1)}"
    prefixes = extract_prefixes(text, settings.samples, settings.prefix, hint)
    width = count_common_tokens(teacher.model, subject.model)
    if len(prefixes) < 2:
        raise LimbeckError("the text has one prefix only", expected="two or more", hint="a shorter sampled.prefix")
    values: dict[str, float] = {}
    errors: dict[str, float] = {}
    curves, texts = {}, {}
    with progress(f"sampled, {subject.name}", 2 * settings.new_tokens + 2 * len(prefixes), "steps") as advance:
        for name, writer, reader in (("student", subject, teacher), ("teacher", teacher, subject)):
            prompt = prefixes.to(writer.device)
            draw = sampler(subject.seed, writer.device)
            written = decode(writer.model, prompt, settings.new_tokens, advance, draw, width)
            found = compare_on_text(writer.model, reader.model, prompt, written, advance)
            for key, tokens in (("kl", found.kl), ("kl_plain", found.log_ratio), ("entropy", found.entropy)):
                per_text = tokens.mean(1)
                values[f"{name}_text_{key}"] = float(per_text.mean())
                errors[f"{name}_text_{key}"] = float(per_text.std() / math.sqrt(len(per_text)))
            values[f"{name}_text_distinct_bigrams_share"] = compute_distinct_bigrams(written)
            curves[name] = found.kl.mean(0).tolist()
            texts[name] = subject.tokenizer.batch_decode(written[:4])
    return MeasureResult(
        values,
        errors,
        data={**data, "samples": len(prefixes), "targets": prefixes.shape[0] * settings.new_tokens},
        details={"kl_by_token": curves, "first_texts": texts},
    )


def sampler(seed: int, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Build a function that draws a token [N] from each row of logits [N, V], from the whole distribution."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(logits: Tensor) -> Tensor:
        return torch.multinomial(check_finite(logits.float().softmax(-1)), 1, generator=generator)[:, 0]

    return draw


@torch.no_grad()
def compare_on_text(
    writer: PreTrainedModel,
    reader: PreTrainedModel,
    prefixes: Tensor,
    written: Tensor,
    advance: Callable[[float], None] = lambda amount: None,
) -> Divergence:
    """Compare two models' next tokens along texts [N, S] that the writer wrote behind prefixes [N, P]."""
    columns: dict[str, list[Tensor]] = {"kl": [], "log_ratio": [], "entropy": []}
    width = count_common_tokens(writer, reader)
    ids = torch.cat([prefixes, written], 1)
    for text, states_p, states_q in zip(written, read_texts(writer, ids), read_texts(reader, ids)):
        # the logits of one text at a time
        log_p, log_q = (
            _log_probs(model, states, len(text), width) for model, states in ((writer, states_p), (reader, states_q))
        )
        p = log_p.exp()
        chosen = text.to(log_p.device)[:, None]
        columns["kl"].append((p * (log_p - log_q)).sum(-1))
        columns["entropy"].append(-(p * log_p).sum(-1))
        columns["log_ratio"].append((log_p - log_q).gather(1, chosen)[:, 0])
        advance(1)
    return Divergence(**{name: torch.stack(rows).cpu() for name, rows in columns.items()})


def _log_probs(model: PreTrainedModel, states: Tensor, count: int, width: int) -> Tensor:
    """Compute the log-probabilities [S, width] of the last `count` tokens' places from states [T, D], in float64."""
    return LMHead(model)(states[-count - 1 : -1])[:, :width].double().log_softmax(-1)


MEASURE = Measure(
    "sampled",
    "divergence from the teacher on sampled text, by each model's own continuations",
    SampledSettings,
    measure_sampled,
)
