"""Text that is in memory: kept in the cache, where it is a source like any other.

    source = store_text(["One document.", "Another one."])     # "memory:5f0c1d2e3a4b"
    source = store_text(dataset)                               # a datasets.Dataset, or a list of records
    path = find_stored_text(source)                            # its file of JSON lines

The name is a hash of the content, so the same text has the same name in every session, and a run that was interrupted
finds it again. Unlike the rest of the cache it cannot be made anew by itself: pass the text once more, or keep it in a
file and give that.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from limbeck.core.cache import ensure_cached_folder
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import cache_root

MEMORY_PREFIX = "memory:"  # before the key of a text
KEY_DIGITS = 16
EXPECTED = 'a list of strings, a list of records such as {"text": "..."}, a datasets.Dataset, or the name of a source'


def name_text(text: Any) -> str | None:
    """Return the name of a text: of a source or a path its own, of one in memory that under which it is now kept.

    None stays None. Raises LimbeckError as `store_text` does.
    """
    if isinstance(text, str) and "\n" in text:
        raise LimbeckError("a text in the place of its name", expected=EXPECTED, hint="data=[text]")
    if text is None or isinstance(text, str):
        return text
    return str(text) if isinstance(text, Path) else store_text(text)


def store_text(text: Any) -> str:
    """Keep a text in the cache and return its name, `memory:KEY`.

    Args:
        text: a list of strings, one a document; a list of records (dicts), whose fields are kept as they are; or a
            `datasets.Dataset`, whose rows are its records.

    Raises:
        LimbeckError: something else, or no document at all.
    """
    _check_kind(text)
    digest, size = hashlib.sha256(), 0
    for line in _iter_lines(text):
        digest.update(line)
        size += len(line)
    if not size:
        raise LimbeckError("the text holds no documents", expected="at least one")
    key = digest.hexdigest()[:KEY_DIGITS]

    def fill(folder: Path) -> dict[str, Any]:
        with open(folder / "documents.jsonl", "wb") as file:
            file.writelines(_iter_lines(text))
        return {"source": f"{MEMORY_PREFIX}{key}"}

    ensure_cached_folder(_get_folder(key), fill, what="text in memory", required_bytes=size)
    return f"{MEMORY_PREFIX}{key}"


def find_stored_text(source: str) -> Path:
    """Return the file of a text by its name; raises LimbeckError where this cache does not have it."""
    path = _get_folder(source.removeprefix(MEMORY_PREFIX)) / "documents.jsonl"
    if not path.is_file():
        raise LimbeckError(
            f"'{source}' was given in memory, and the cache {cache_root()} does not have it",
            expected="the same text again, or the cache in which it was kept",
            hint="pass the text again: limbeck.distill(..., data=documents)",
        )
    return path


def _get_folder(key: str) -> Path:
    return cache_root() / "texts" / key


def _check_kind(text: Any) -> None:
    """Raise LimbeckError for anything that is neither a list nor a dataset with a length."""
    if isinstance(text, dict) and all(_is_dataset(part) for part in text.values()) and text:
        name = "train" if "train" in text else next(iter(text))
        raise LimbeckError(
            f"several splits: {', '.join(map(str, text))}", expected="one of them", hint=f"data=dataset[{name!r}]"
        )
    if _is_dataset(text) and not hasattr(text, "__len__"):
        raise LimbeckError(
            "a streamed dataset has no length",
            expected=EXPECTED,
            hint='data="owner/name", overrides={"data.streaming": True}',
        )
    if not _is_dataset(text) and (not isinstance(text, Sequence) or isinstance(text, str | bytes)):
        raise LimbeckError(f"the text is a {type(text).__name__}", expected=EXPECTED)


def _is_dataset(text: Any) -> bool:
    """Whether it is a dataset of the package `datasets`, which need not be installed."""
    return hasattr(text, "column_names") and hasattr(text, "select_columns")


def _iter_lines(text: Any) -> Iterator[bytes]:
    """Yield each document as a line of JSON."""
    for number, document in enumerate(text, 1):
        if not isinstance(document, str | dict):
            raise LimbeckError(f"document {number} of the text is a {type(document).__name__}", expected=EXPECTED)
        record = {"text": document} if isinstance(document, str) else document
        try:
            # dates and the like, which JSON does not have, are in fields that nobody reads as text
            yield json.dumps(record, ensure_ascii=False, default=str).encode() + b"\n"
        except (TypeError, ValueError) as error:  # a key that is no name, a circle, half of a surrogate pair
            raise LimbeckError(
                f"document {number} of the text cannot be kept: {error}",
                expected="text that UTF-8 can hold, in records whose keys are names",
            ) from error
