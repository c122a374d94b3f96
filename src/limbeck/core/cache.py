"""Folders that are filled once, verified by checksums, and shared by all processes that need them.

    folder = cache_root() / "tokens" / key
    manifest = ensure_cached_folder(folder, fill, what="tokens of corpus.jsonl")      # fill(temporary) writes the files
    load_valid_manifest(folder, verify=True)                                # the manifest, or None if damaged

Everything below `cache_root()` can be deleted at any time and is recreated when needed; checkpoints of a run are
written the same way. `manifest.json` in such a folder has the size and sha256 of each file. A folder is filled under a
temporary name, flushed to disk and renamed. When several processes need the same folder, one fills it and the others
wait as long as it makes progress; without file locks each fills its own copy and the first rename wins.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from limbeck.core.console import console
from limbeck.core.digests import compute_sha256
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import (
    check_disk_space,
    convert_write_errors,
    find_temporary_siblings,
    flush_folder,
    flush_to_disk,
    get_unique_sibling,
    try_lock,
)

MANIFEST = "manifest.json"
LOCK_TIMEOUT_SECONDS = 600.0  # how long the holder of a lock may write nothing before a waiting process gives up


def ensure_cached_folder(
    folder: Path,
    fill: Callable[[Path], dict[str, Any]],
    *,
    what: str,
    required_bytes: int = 0,
    verify: bool = False,
) -> dict[str, Any]:
    """Return the manifest of `folder`, which is filled first if it is missing or damaged.

    Args:
        folder: where the files will be.
        fill: writes the files into the temporary folder that it is given; returns additional fields of the manifest.
        what: name for messages, "tokens of corpus.jsonl".
        required_bytes: disk space that filling needs; checked beforehand.
        verify: see `load_valid_manifest`.

    Raises:
        LimbeckError: no space, no permission, or another process holds the lock without making progress.
    """
    if manifest := load_valid_manifest(folder, verify=verify):
        return manifest
    raise_if_dry_run(f"the {what}", required_bytes)
    with convert_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, what) as is_locked:
            if manifest := load_valid_manifest(folder, verify=verify):  # the process that we waited for filled it
                return manifest
            if is_locked:
                for stale in find_temporary_siblings(folder):
                    shutil.rmtree(stale, ignore_errors=True)
            if folder.exists():
                console.print(f"{what}: damaged, recreating it ({folder})", markup=False)
            check_disk_space(folder.parent, required_bytes, what)
            return _fill_and_rename(folder, fill, verify)


def load_valid_manifest(folder: Path, *, verify: bool = False) -> dict[str, Any] | None:
    """Return the manifest of a folder by `ensure_cached_folder`, or None if the folder is missing or damaged.

    Args:
        verify: compare the sha256 of each file as well as its size (reads everything).
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != entry["bytes"] or (verify and compute_sha256(path) != entry["sha256"]):
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest


def _fill_and_rename(folder: Path, fill: Callable[[Path], dict[str, Any]], verify: bool) -> dict[str, Any]:
    temporary = get_unique_sibling(folder)
    temporary.mkdir()
    try:
        with convert_write_errors(folder):
            manifest = {"made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **fill(temporary)}
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            manifest["files"] = {
                path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": compute_sha256(path)}
                for path in files
            }
            text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
            (temporary / MANIFEST).write_text(text, encoding="utf-8")
            flush_folder(temporary)
            if folder.exists() and not load_valid_manifest(folder, verify=verify):
                # A damaged folder is moved away in one step, so that nobody reads it half deleted.
                damaged = get_unique_sibling(folder)
                folder.rename(damaged)
                shutil.rmtree(damaged, ignore_errors=True)
            try:
                temporary.rename(folder)
            except OSError:
                winner = load_valid_manifest(folder)  # without file locks another process may have been first
                if winner is None:
                    raise
                return winner
            flush_to_disk(folder.parent)
            return manifest
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _lock(folder: Path, what: str) -> Iterator[bool]:
    """Hold the lock of `folder`, waiting while its holder makes progress; yields False without file locks."""
    path = folder.with_name(f".{folder.name}.lock")
    last_progress, since, announced = 0.0, time.monotonic(), False
    while True:
        with open(path, "w", encoding="utf-8") as file:
            locked = try_lock(file)
            # The last holder may have deleted the file between `open` and the lock: such a lock excludes nobody.
            if locked and _is_same_file(path, file.fileno()):
                try:
                    yield True
                finally:
                    path.unlink(missing_ok=True)
                return
        if locked is None:
            path.unlink(missing_ok=True)
            yield False
            return
        if locked:
            continue
        if not announced:
            console.print(f"waiting for another process that is creating the {what}", markup=False)
            announced = True
        if (progress := _last_progress(folder)) != last_progress:
            last_progress, since = progress, time.monotonic()
        if time.monotonic() - since > LOCK_TIMEOUT_SECONDS:
            raise LimbeckError(
                f"another process holds the lock of the {what} and wrote nothing for {LOCK_TIMEOUT_SECONDS:.0f} s",
                hint=f"stop that process (the lock is {path}) and rerun the same command",
            )
        time.sleep(0.2)


def _is_same_file(path: Path, handle: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False


def _last_progress(folder: Path) -> float:
    """Return the newest modification time in the temporary folders of `folder`."""
    newest = 0.0
    for temporary in find_temporary_siblings(folder):
        for path in (temporary, *temporary.rglob("*")):
            try:
                newest = max(newest, path.stat().st_mtime)
            except FileNotFoundError:  # renamed or removed by its owner meanwhile
                continue
    return newest


# ------------------------------------------------------------------ dry runs

_notes: ContextVar[list[str] | None] = ContextVar("notes", default=None)


class NotCachedError(Exception):
    """Raised within `cache_dry_run`: something is not in the cache and would have to be created first."""


@contextmanager
def cache_dry_run() -> Iterator[list[str]]:
    """Create nothing in the cache inside this block; what would be created raises `NotCachedError` (for `--plan`).

    Yields:
        Notes of the callers that caught one and went on without: what would be created first.
    """
    notes: list[str] = []
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def get_dry_run_notes() -> list[str] | None:
    """Return the notes of the enclosing `cache_dry_run`, or None outside of one."""
    return _notes.get()


def raise_if_dry_run(what: str, required_bytes: int = 0) -> None:
    """Raise `NotCachedError` within `cache_dry_run`, before a step that creates something that may take long."""
    if _notes.get() is not None:
        raise NotCachedError(f"{what}, {required_bytes / 1e6:,.0f} MB" if required_bytes else what)
