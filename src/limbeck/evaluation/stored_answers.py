"""Answers of a model to fixed questions, kept in the cache by content: a teacher is asked once for all its students.

    answers = load_or_ask(subject, "letters", prompts, lambda: ask(subject, prompts))

The key is what was asked, word for word, with the model's and tokenizer's fingerprint, so another question, a changed
model or another form of a prompt is another entry. Answers are plain JSON values.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from limbeck.core.console import console
from limbeck.core.digests import digest_facts
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import atomic_write_text, cache_root
from limbeck.core.version import __version__
from limbeck.evaluation.subject import Subject
from limbeck.models.fingerprint import find_model_folder


def load_or_ask(subject: Subject, name: str, asked: Any, ask: Callable[[], Any]) -> Any:
    """Load the answers of the same model to the same questions, or ask and store them.

    Args:
        name: first part of the file's name.
        asked: all that determines the answers besides the model, as JSON values.
        ask: computes the answers, as JSON values.
    """
    path = _answers_path(subject, name, asked)
    if path is not None and not subject.ignore_cache:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            pass  # not there, or not whole
    answers = ask()
    if path is not None:
        try:
            atomic_write_text(path, json.dumps(answers))
        except LimbeckError as error:  # the answers took long, and are right without a cache
            console.print(f"{error.found}: the answers of {subject.name} are not kept for the next time")
    return answers


def has_identity(subject: Subject) -> bool:
    """Whether the model is in a folder on this machine or was made from one, so that it can be known again."""
    return subject.content is not None or find_model_folder(subject.folder) is not None


def _answers_path(subject: Subject, name: str, asked: Any) -> Path | None:
    """Path of the answers; None for a model without an identity."""
    if not has_identity(subject):
        return None
    key = [subject.fingerprint, str(subject.model.dtype), asked, __version__]
    digest = digest_facts(key, 16)
    return cache_root() / "scores" / subject.fingerprint / f"{name}-{digest}.json"
