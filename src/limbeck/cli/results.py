"""Results for programs: `--json` prints one JSON document on standard output, and nothing else gets there.

    def students(..., as_json: Json = False) -> None:     # `limbeck.cli.verbs` calls it inside `reserve_stdout`
        ...
        if as_json:
            print_json({"mixers": ...})

docs/reference/json.md says what each verb's document holds.
"""

import contextlib
import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from limbeck.core.console import output

_documents: list[TextIO] = []  # where the document goes, while everything else goes to standard error


@contextlib.contextmanager
def reserve_stdout() -> Iterator[None]:
    """Send everything that is printed inside to standard error, but for `print_json`."""
    _documents[:] = [sys.stdout]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        _documents.clear()


def print_json(document: Any) -> None:
    """Print the one document of a verb. NaN and infinity, which JSON lacks, become null.

    Of several processes the first one prints it.
    """
    if output.quiet:
        return
    stream = _documents[0] if _documents else sys.stdout
    # letters beyond ASCII as \\u escapes: a pipe may have any encoding
    print(json.dumps(to_plain(document), indent=1, allow_nan=False), file=stream, flush=True)


def to_plain(value: Any) -> Any:
    """Turn a result into what JSON has: dataclasses and models into mappings, paths into text, NaN into None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_plain({one.name: getattr(value, one.name) for one in dataclasses.fields(value)})
    if hasattr(value, "model_dump"):
        return to_plain(value.model_dump(mode="json"))
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [to_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    return str(value) if isinstance(value, Path) else to_plain(value.item()) if hasattr(value, "item") else str(value)
