"""What is nobody's business: local paths are published by their last part only.

strip_local_paths({"teacher": "/home/ann/models/llama"})        # {"teacher": "llama"}
"""

import re
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError

ABSOLUTE = re.compile(r"(/|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\)")
SEPARATORS = re.compile(r"[\\/]+")
MIXTURE_LABEL = re.compile(
    r"(?:(?<=\+ )|^)(?P<weight>\d[\d.e+-]*) (?P<place>(?:(?! \+ ).)+)"
)  # a label of `data.sources`


def strip_local_paths(value: Any) -> Any:
    """Plain values (dicts, lists, text, numbers) with local paths cut down to their last part."""
    if isinstance(value, dict):
        return {key: strip_local_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [strip_local_paths(part) for part in value]
    if not isinstance(value, str):
        return value
    return (
        get_basename(value)
        if is_local_path(value)
        else MIXTURE_LABEL.sub(_cut, value)
        if MIXTURE_LABEL.match(value)
        else value
    )


def _cut(match: re.Match) -> str:
    """One source of a mixture, as a recipe names several: "0.6 /data/a.jsonl + 0.4 embedded"."""
    place = match["place"]
    return f"{match['weight']} {get_basename(place) if is_local_path(place) else place}"


def find_local_folders(value: Any) -> list[Path]:
    """The folders of this machine that plain values name: local paths as they are written, and where they lie."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [place for part in parts for place in find_local_folders(part)]
    if not isinstance(value, str):
        return []
    texts = [value, *(match["place"] for match in MIXTURE_LABEL.finditer(value))]
    return [Path(text).expanduser().parent for text in texts if is_local_path(text)]


def find_local_paths(text: str) -> list[str]:
    """Local paths within running text: of several parts, and there on this machine."""
    words = re.findall(r"(?<![\w:/.])(?:~|/|[A-Za-z]:\\\\)[^\s\"'`<>|,;]+", text)
    return [word for word in words if len(SEPARATORS.split(word.rstrip(".)]"))) > 2 and _exists(word.rstrip(".)]"))]


def is_local_path(text: str) -> bool:
    """Does this text name a place on this machine?"""
    if not text or "\n" in text or len(text) > 4096:
        return False
    if ABSOLUTE.match(text):
        # "/" and "/s" may be tokens, and are no secret
        parts = [part for part in SEPARATORS.split(text) if part]
        return len(parts) > 1 or (len(parts) == 1 and _exists(text))
    return text.startswith(("./", "../", ".\\", "..\\")) or (bool(SEPARATORS.search(text)) and _exists(text))


def get_basename(path: str) -> str:
    """The name of a file or folder without what stands before it."""
    return next((part for part in reversed(SEPARATORS.split(path)) if part), path)


def check_no_local_paths(text: str, where: str, folders: list[Path]) -> None:
    """Raises LimbeckError where a text that is to be published names one of these folders of this machine."""
    for place in {str(p) for p in folders if len(p.parts) > 2 or p == Path.home()} - {"/"}:
        if re.search(re.escape(place) + r"(?![\w.-])", text):
            raise LimbeckError(
                f"{where} names the folder {place} of this machine, and would publish it",
                expected="text without local paths",
                hint=f"take it out of {where}" if where.endswith((".md", ".json")) else None,
            )


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
