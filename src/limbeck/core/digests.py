"""Digests by which contents are known again: of files, and of facts as JSON.

    compute_sha256(Path("model.safetensors"))                # hexadecimal; an unchanged file is read once per process
    digest_facts({"model": "0e8b", "tokens": 8192}, 16)      # of JSON values, in whatever order their keys stand

Names in the cache, identities of runs and fingerprints of models are made of these two.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTLED_SECONDS = 2.0  # after so long without a change, a file's time stamps reveal every later change


def canonical_json(value: Any) -> bytes:
    """Write a value as JSON with sorted keys; what JSON has no form for as its string."""
    return json.dumps(value, sort_keys=True, default=str).encode()


def digest_facts(facts: Any, length: int = 64) -> str:
    """Compute the first `length` hexadecimal digits of the sha256 of a value as canonical JSON."""
    return hashlib.sha256(canonical_json(facts)).hexdigest()[:length]


def compute_sha256(path: Path) -> str:
    """Compute the hex sha256 of a file's bytes; an unchanged file is read once per process."""
    return digest_once(path, _sha256)


_digests: dict[tuple[Path, Callable[[Path], str]], tuple[tuple[int, ...], str]] = {}


def digest_once(path: Path, digest: Callable[[Path], str]) -> str:
    """Return `digest(path)`, cached as long as the file's size, inode and times stay the same."""
    stat = path.stat()
    stamp = stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns
    key = path.absolute(), digest
    cached = _digests.get(key)
    if cached is None or cached[0] != stamp:
        cached = stamp, digest(path)
        # File systems count time in milliseconds: a file written just now may change again without a new time stamp.
        if time.time() - max(stat.st_mtime, stat.st_ctime) > SETTLED_SECONDS:
            _digests[key] = cached
    return cached[1]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
