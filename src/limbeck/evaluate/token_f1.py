"""Token F1 of an answer against references, as LongBench scores question answering (Bai et al. 2024, arXiv 2308.14508).

    token_f1("The Eiffel Tower in Paris", "Eiffel tower")      # precision 2 of 4, recall 2 of 2: 0.667
    best_f1("Paris", ["in Paris, France", "Paris"])            # 1.0

Normalisation is SQuAD's (Rajpurkar et al. 2016): lower case, no ASCII punctuation, no articles, single spaces. Tokens
are what spaces then separate, counted with their multiplicity; of several references the one that fits best counts.
`score_answers` is what task definitions of lm-evaluation-harness name in `process_results`.
"""

import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

ARTICLES = re.compile(r"\b(a|an|the)\b")
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str) -> list[str]:
    """The tokens of an answer. Punctuation goes before the articles, so "a." is an article and "a-b" a word."""
    return ARTICLES.sub(" ", text.lower().translate(NO_PUNCTUATION)).split()


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over tokens, in [0, 1]; 0 where they share none, empty ones included."""
    said, meant = Counter(normalised(answer)), Counter(normalised(reference))
    shared = (said & meant).total()
    # 2 p r / (p + r) with p = shared / said and r = shared / meant.
    return 2 * shared / (said.total() + meant.total()) if shared else 0.0


def best_f1(answer: str, references: Sequence[str]) -> float:
    """`token_f1` against the reference that fits best."""
    return max((token_f1(answer, reference) for reference in references), default=0.0)


def score_answers(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """The harness' `process_results` for a row with a list `answers`; the metric has the name that it has there."""
    return {"qa_f1_score": best_f1(results[0], doc["answers"])}
