"""The cache folder, and folders that are either whole or not there.

    folder = cache_root() / "tokens" / key
    manifest = publish(folder, fill, what="tokens of corpus.jsonl")      # fill(tmp) writes the files
    sound(folder, verify=True)                                           # the manifest, or None if damaged

The root is `$LIMBECK_CACHE` if that is set, else `~/.cache/limbeck`. Everything in it can be deleted at any time; it is
made again when needed. A published folder holds `manifest.json` with the size and sha256 of each of its files. It is
filled under a temporary name, flushed to disk and renamed, so a process that is killed leaves at most a temporary
folder, which the next one to publish there removes. Of several processes that want the same folder one fills it and the
rest wait as long as it makes headway; the kernel drops the lock with its holder. On systems without file locks each
process fills its own copy and the first rename wins.
"""

import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from limbeck.console import console
from limbeck.errors import LimbeckError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
PATIENCE_S = 600.0  # how long the holder of a lock may write nothing before a waiting process gives up
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def cache_root() -> Path:
    """The folder of everything that can be made again: `$LIMBECK_CACHE`, else `~/.cache/limbeck`."""
    named = os.environ.get("LIMBECK_CACHE")
    return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "limbeck"


def sha256_of(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sound(folder: Path, *, verify: bool = False) -> dict[str, Any] | None:
    """The manifest of a published folder, or None where it is missing or damaged.

    Args:
        folder: a folder that `publish` made.
        verify: compare the sha256 of each file as well as its size (reads everything).
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        for name, entry in manifest["files"].items():
            path = folder / name
            if path.stat().st_size != entry["bytes"] or (verify and sha256_of(path) != entry["sha256"]):
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest


_looking: ContextVar[list[str] | None] = ContextVar("looking", default=None)


class NotMade(Exception):
    """Under `looking`: something is not in the cache, and would have to be made first."""


@contextmanager
def looking() -> Iterator[list[str]]:
    """For plans: within, nothing is brought to the cache; what would be is an exception (`NotMade`).

    Yields:
        Sentences, of whoever catches one and goes on without: what would be made first.
    """
    told: list[str] = []
    before = _looking.set(told)
    try:
        yield told
    finally:
        _looking.reset(before)


def planning() -> list[str] | None:
    """The sentences of the `looking` that this is within, None outside of one."""
    return _looking.get()


def would_make(what: str, need_bytes: int = 0) -> None:
    """Raise `NotMade` within `looking`: the next step makes something that may take long."""
    if _looking.get() is not None:
        raise NotMade(f"{what}, {need_bytes / 1e6:,.0f} MB" if need_bytes else what)


def publish(
    folder: Path,
    fill: Callable[[Path], dict[str, Any]],
    *,
    what: str,
    need_bytes: int = 0,
    verify: bool = False,
) -> dict[str, Any]:
    """The manifest of `folder`, filled first if it is missing or damaged.

    Args:
        folder: where the files will be.
        fill: writes the files into the temporary folder that it is given; returns what else the manifest shall record.
        what: for messages, "tokens of corpus.jsonl".
        need_bytes: how much room filling takes; checked beforehand.
        verify: see `sound`.

    Raises:
        LimbeckError: no room or no permission, or another process holds the lock and stands still.
    """
    if manifest := sound(folder, verify=verify):
        return manifest
    would_make(f"the {what}", need_bytes)
    with no_room_is_an_error(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, what) as alone:
            if manifest := sound(folder, verify=verify):
                return manifest
            if alone:
                for stale in _temporary(folder):
                    shutil.rmtree(stale, ignore_errors=True)
            check_room(folder.parent, need_bytes, what)
            return _fill_and_rename(folder, fill, verify)


def check_room(folder: Path, need_bytes: int, what: str) -> None:
    """Raises LimbeckError where the disk of `folder` has less than `need_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < need_bytes:
        raise LimbeckError(
            f"no room for {what}: {free / 1e6:,.0f} MB free in {folder}",
            expected=f"at least {need_bytes / 1e6:,.0f} MB",
            hint="free some room, or use another disk (LIMBECK_CACHE for the cache, --out for a run)",
        )


@contextmanager
def no_room_is_an_error(folder: Path) -> Iterator[None]:
    """Turns "disk full" and "permission denied" from the system into a LimbeckError that names the folder."""
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise LimbeckError(
                f"the disk of {folder} is full",
                hint="free some room, or use another disk (LIMBECK_CACHE, --out); nothing half-made was left behind",
            ) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise LimbeckError(
                f"cannot write to {error.filename or folder}: {error.strerror}",
                expected="a cache folder that this user may write to",
                hint="set LIMBECK_CACHE to another folder",
            ) from error
        raise


def _fill_and_rename(folder: Path, fill: Callable[[Path], dict[str, Any]], verify: bool) -> dict[str, Any]:
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
    temporary.mkdir()
    try:
        manifest = {"made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), **fill(temporary)}
        files = sorted(path for path in temporary.rglob("*") if path.is_file())
        manifest["files"] = {
            path.relative_to(temporary).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in files
        }
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        mode = (temporary / MANIFEST).stat().st_mode  # as the umask says; some writers leave files for their owner only
        for path in files:
            path.chmod(mode)
        for path in (*files, temporary / MANIFEST):
            _flush(path)
        _flush(temporary)
        if folder.exists() and not sound(folder, verify=verify):
            # A damaged folder is moved away in one step, so that nobody reads it half deleted.
            damaged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
            folder.rename(damaged)
            shutil.rmtree(damaged, ignore_errors=True)
        try:
            temporary.rename(folder)
        except OSError:
            winner = sound(folder)  # without file locks another process may have been first
            if winner is None:
                raise
            return winner
        _flush(folder.parent)
        return manifest
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _temporary(folder: Path) -> list[Path]:
    return list(folder.parent.glob(f".{folder.name}.*.tmp"))


def _headway(folder: Path) -> float:
    """Newest modification time of anything in the temporary folders beside `folder`."""
    newest = 0.0
    for temporary in _temporary(folder):
        for path in (temporary, *temporary.rglob("*")):
            try:
                newest = max(newest, path.stat().st_mtime)
            except FileNotFoundError:  # renamed or removed by its owner meanwhile
                continue
    return newest


@contextmanager
def _lock(folder: Path, what: str) -> Iterator[bool]:
    """Holds the lock of `folder`; yields False where the file system has no locks."""
    with open(folder.with_name(f".{folder.name}.lock"), "w", encoding="utf-8") as file:
        seen, since, told = 0.0, time.monotonic(), False
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                yield True
                return
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    break
                raise
            if not told:
                console.print(f"waiting for another process that is making the {what}", markup=False)
                told = True
            if (newest := _headway(folder)) != seen:
                seen, since = newest, time.monotonic()
            if time.monotonic() - since > PATIENCE_S:
                raise LimbeckError(
                    f"another process holds the lock of the {what} and has written nothing for {PATIENCE_S:.0f} s",
                    hint=f"end that process (the lock is {file.name}) and run the same command again",
                )
            time.sleep(0.2)
        yield False
