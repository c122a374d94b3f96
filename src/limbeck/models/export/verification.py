"""The tokens on which an engine and a student are compared, the comparison, and losses from logits.

    ids = sample_tokens(student)                              # 64 tokens, the same for every engine
    reference = compute_logits(student, ids)                  # [T, vocabulary], float64
    result = compare(reference, prompt, steps, engine="llama.cpp", version="b1", bound=1e-3)
    loss = sum_losses(reference[:-1], ids[1:])                # nats

Shapes: T tokens.
"""

from typing import Any

import numpy as np
import torch

from limbeck.models.export import Verification

NUM_TOKENS = 64


def sample_tokens(student: Any, count: int = NUM_TOKENS) -> list[int]:
    """Return `count` token ids, spread over the whole vocabulary and the same on every call."""
    vocabulary = student.get_input_embeddings().num_embeddings
    return [int(i) for i in np.random.default_rng(0).integers(0, vocabulary, count)]


def compute_logits(student: Any, ids: list[int]) -> np.ndarray:
    """Return the student's logits [T, vocabulary] for a prompt."""
    with torch.no_grad():
        logits = student(torch.tensor([ids], device=student.device), use_cache=False).logits[0]
    return logits.double().cpu().numpy()


def compute_step_logits(model: Any, ids: list[int]) -> np.ndarray:
    """Return a model's logits [T, vocabulary] for tokens given one by one, with the cache carried over."""
    cache, rows = None, []
    with torch.no_grad():
        for token in ids:
            out = model(torch.tensor([[token]], device=model.device), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0])
    return torch.cat(rows).double().cpu().numpy()


def sum_losses(logits: np.ndarray, targets: list[int]) -> float:
    """Sum the cross-entropy in nats of logits [T, vocabulary] with the tokens [T] that follow."""
    wide = logits.astype(np.float64)
    top = wide.max(1, keepdims=True)
    normalizers = np.log(np.exp(wide - top).sum(1)) + top[:, 0]
    return float((normalizers - wide[np.arange(len(wide)), targets]).sum())


def sum_model_losses(model: Any, sequences: list[list[int]]) -> float:
    """Sum a model's loss in nats over all tokens but the first of each sequence, each read alone."""
    return sum(sum_losses(compute_logits(model, ids[:-1]), ids[1:]) for ids in sequences)


def compare(
    reference: np.ndarray,
    prompt: np.ndarray,
    steps: np.ndarray,
    *,
    engine: str,
    version: str,
    bound: float,
    rounded: bool = False,
    own_steps: np.ndarray | None = None,
    same_text_tokens: bool = True,
) -> Verification:
    """Compare an engine's logits with the student's.

    Args:
        reference: [T, vocabulary] of the student.
        prompt: the same of the engine, all tokens at once.
        steps: the same, one token at a time with the state carried over.
        bound: largest allowed difference, in standard deviations of `reference`; of the typical one if `rounded`.
        rounded: whether the engine's weights are the student's, rounded.
        own_steps: the student's own logits step by step (`compute_step_logits`).
        same_text_tokens: whether the engine's tokenizer splits a text as the student's does.
    """
    best = reference.argmax(1)
    typical = max(float(np.sqrt(np.square(found - reference).mean())) for found in (prompt, steps))
    return Verification(
        engine=engine,
        version=version,
        tokens=len(reference),
        prompt_difference=float(np.abs(prompt - reference).max()),
        step_difference=float(np.abs(steps - reference).max()),
        typical_difference=typical,
        logit_deviation=float(reference.std()),
        same_token=float(min((prompt.argmax(1) == best).mean(), (steps.argmax(1) == best).mean())),
        bound=bound,
        rounded=rounded,
        own_difference=0.0 if own_steps is None else float(np.abs(own_steps - reference).max()),
        same_text_tokens=same_text_tokens,
    )
