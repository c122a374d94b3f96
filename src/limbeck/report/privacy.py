"""Strip local paths before publishing: of a path on this machine only the last part is shown.

strip_local_paths({"teacher": "/home/ann/models/llama"})        # {"teacher": "llama"}
"""

import re
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError
from limbeck.core.repeated_text import REPEATED_TEXT_PREFIX

ABSOLUTE = re.compile(r"(/|~[\w.-]*/|[A-Za-z]:[\\/]|\\\\)")
SEPARATORS = re.compile(r"[\\/]+")
# the label of a mixture in `data.sources`: "0.6 /data/a.jsonl + 0.4 embedded"
MIXTURE_LABEL = re.compile(r"(?:(?<=\+ )|^)(?P<weight>\d[\d.e+-]*) (?P<source>(?:(?! \+ ).)+)")


def strip_local_paths(value: Any) -> Any:
    """Cut local paths in plain values (dicts, lists, text, numbers) down to their last part."""
    if isinstance(value, dict):
        return {key: strip_local_paths(part) for key, part in value.items()}
    if isinstance(value, list):
        return [strip_local_paths(part) for part in value]
    if not isinstance(value, str):
        return value
    if is_local_path(value.removeprefix(REPEATED_TEXT_PREFIX)):
        return _strip_path(value)
    return MIXTURE_LABEL.sub(_strip_source, value) if MIXTURE_LABEL.match(value) else value


def _strip_source(match: re.Match) -> str:
    source = match["source"]
    is_local = is_local_path(source.removeprefix(REPEATED_TEXT_PREFIX))
    return f"{match['weight']} {_strip_path(source) if is_local else source}"


def _strip_path(path: str) -> str:
    """Cut a path down to its last part; repeated text stays named as such."""
    prefix = REPEATED_TEXT_PREFIX if path.startswith(REPEATED_TEXT_PREFIX) else ""
    return f"{prefix}{get_basename(path.removeprefix(prefix))}"


def find_local_folders(value: Any) -> list[Path]:
    """List the folders on this machine that hold the local paths in plain values."""
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [folder for part in parts for folder in find_local_folders(part)]
    if not isinstance(value, str):
        return []
    texts = [value, *(match["source"] for match in MIXTURE_LABEL.finditer(value))]
    names = [text.removeprefix(REPEATED_TEXT_PREFIX) for text in texts]
    return [Path(name).expanduser().parent for name in names if is_local_path(name)]


def find_local_paths(text: str) -> list[str]:
    """Find local paths within running text: those of at least two parts that exist on this machine."""
    words = re.findall(r"(?<![\w:/.])(?:~|/|[A-Za-z]:\\\\)[^\s\"'`<>|,;]+", text)
    return [word for word in words if len(SEPARATORS.split(word.rstrip(".)]"))) > 2 and _exists(word.rstrip(".)]"))]


def is_local_path(text: str) -> bool:
    """Whether a text as a whole is a path on this machine."""
    if not text or "\n" in text or len(text) > 4096:
        return False
    if ABSOLUTE.match(text):
        # "/" and "/s" may be tokens of a vocabulary, and reveal nothing
        parts = [part for part in SEPARATORS.split(text) if part]
        return len(parts) > 1 or (len(parts) == 1 and _exists(text))
    return text.startswith(("./", "../", ".\\", "..\\")) or (bool(SEPARATORS.search(text)) and _exists(text))


def get_basename(path: str) -> str:
    """Get the last part of a path, in the notation of any system."""
    return next((part for part in reversed(SEPARATORS.split(path)) if part), path)


def check_no_local_paths(text: str, where: str, folders: list[Path]) -> None:
    """Raise LimbeckError if a text to be published names one of these folders of this machine."""
    for folder in {str(p) for p in folders if len(p.parts) > 2 or p == Path.home()} - {"/"}:
        if re.search(re.escape(folder) + r"(?![\w.-])", text):
            raise LimbeckError(
                f"{where} names the local folder {folder}, which would be published",
                expected="text without local paths",
                hint=f"remove it from {where}" if where.endswith((".md", ".json")) else None,
            )


def _exists(text: str) -> bool:
    try:
        return Path(text).expanduser().exists()
    except (OSError, RuntimeError, ValueError):
        return False
