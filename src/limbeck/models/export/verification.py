"""The tokens on which an engine and a student are compared, and the comparison.

    ids = sample_tokens(student)                              # 64 tokens, the same for every engine
    reference = compute_logits(student, ids)                  # [T, vocabulary], float64
    result = compare(reference, prompt, steps, engine="llama.cpp", version="b1", bound=1e-3)

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


def compare(
    reference: np.ndarray,
    prompt: np.ndarray,
    steps: np.ndarray,
    *,
    engine: str,
    version: str,
    bound: float,
    same_text_tokens: bool = True,
) -> Verification:
    """Compare an engine's logits with the student's.

    Args:
        reference: [T, vocabulary] of the student.
        prompt: the same of the engine, all tokens at once.
        steps: the same, one token at a time with the state carried over.
        bound: largest allowed difference, in standard deviations of `reference`.
        same_text_tokens: whether the engine's tokenizer splits a text as the student's does.
    """
    best = reference.argmax(1)
    return Verification(
        engine=engine,
        version=version,
        tokens=len(reference),
        prompt_difference=float(np.abs(prompt - reference).max()),
        step_difference=float(np.abs(steps - reference).max()),
        logit_deviation=float(reference.std()),
        same_token=float(min((prompt.argmax(1) == best).mean(), (steps.argmax(1) == best).mean())),
        bound=bound,
        same_text_tokens=same_text_tokens,
    )
