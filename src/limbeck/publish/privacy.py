"""What is nobody's business: local paths are published by their last part only.

without_paths({"teacher": "/home/ann/models/llama"})        # {"teacher": "llama"}
"""

import re
from pathlib import Path
from typing import Any

from limbeck.errors import LimbeckError

ABSOLUTE = re.compile(r"(/|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\)")
SEPARATORS = re.compile(r"[\\/]+")


def without_paths(value: Any) -> Any:
    """Plain values (dicts, lists, text, numbers) with local paths cut down to their last part."""
    if isinstance(value, dict):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [without_paths(part) for part in value]
    return last_part(value) if isinstance(value, str) and is_local(value) else value


def is_local(text: str) -> bool:
    """Does this text name a place on this machine?"""
    if not text or "\n" in text or len(text) > 4096:
        return False
    if ABSOLUTE.match(text):
        # "/" and "/s" may be tokens, and are no secret
        parts = [part for part in SEPARATORS.split(text) if part]
        return len(parts) > 1 or (len(parts) == 1 and _exists(text))
    return text.startswith(("./", "../", ".\\", "..\\")) or (bool(SEPARATORS.search(text)) and _exists(text))


def last_part(path: str) -> str:
    """The name of a file or folder without what stands before it."""
    return next((part for part in reversed(SEPARATORS.split(path)) if part), path)


def check_private(text: str, where: str, places: list[Path]) -> None:
    """Raises LimbeckError where a text that is to be published names one of these folders of this machine."""
    for place in {str(p) for p in places if len(p.parts) > 2 or p == Path.home()} - {"/"}:
        if re.search(re.escape(place) + r"(?![\w.-])", text):
            raise LimbeckError(
                f"{where} names the folder {place} of this machine, and would publish it",
                expected="text without local paths",
                hint=f"take it out of {where}, or out of the recipe's prompt where it came from",
            )


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
