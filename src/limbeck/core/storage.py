"""The cache folder, and folders that are either whole or not there.

    folder = cache_root() / "tokens" / key
    manifest = ensure_cached_folder(folder, fill, what="tokens of corpus.jsonl")      # fill(tmp) writes the files
    load_valid_manifest(folder, verify=True)                                           # the manifest, or None if damaged

The root is `$LIMBECK_CACHE` if that is set, else `~/.cache/limbeck`. Everything in it can be deleted at any time; it is
made again when needed. A published folder holds `manifest.json` with the size and sha256 of each of its files. It is
filled under a temporary name, flushed to disk and renamed, so a process that is killed leaves at most a temporary
folder, which the next one to publish there removes. Of several processes that want the same folder one fills it and the
rest wait as long as it makes headway; the kernel drops the lock with its holder. On systems without file locks each
process fills its own copy and the first rename wins.
"""

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

MANIFEST = "manifest.json"
STALE_SECONDS = 3600.0  # a temporary file that was not written to for so long is a killed process's
LOCK_TIMEOUT_SECONDS = 600.0  # how long the holder of a lock may write nothing before a waiting process gives up
CODE = re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE)  # what safetensors and tokenizers say it in
CUT_SHORT = re.compile(r"\d+ requested and \d+ written|PytorchStreamWriter|inline_container.*unexpected pos")
REFUSALS = {
    errno.ENOSPC: ("the disk of {place} is full", "free some room ({again}), or use another disk ({elsewhere})"),
    errno.EDQUOT: (
        "the quota on the disk of {place} is used up",
        "free some of it ({again}), or use another disk ({elsewhere})",
    ),
    errno.EFBIG: (
        "a file in {place} would become larger than is allowed here",
        "ulimit -f unlimited   ({again}), or use another disk ({elsewhere})",
    ),
    errno.EIO: ("the disk of {place} fails: input/output error", "use another disk ({elsewhere})"),
    errno.ESTALE: ("the disk of {place} is gone: {reason}", "mount it again ({again}), or use another ({elsewhere})"),
    errno.EMFILE: ("too many open files, at {place}", "ulimit -n 4096   ({again})"),
    errno.ENAMETOOLONG: ("the name {place} is too long for its disk", "a shorter one ({elsewhere})"),
    errno.ENOTDIR: ("a part of the path {place} is a file", "{elsewhere}"),
    errno.ELOOP: ("the links on the path {place} lead in a circle", "{elsewhere}"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        ("cannot write to {place}: {reason}", "use a folder that this user may write to ({elsewhere})"),
    ),
}
SETTLED_SECONDS = 2.0  # after so long without a change a file's times tell whether it changes again
_digests: dict[tuple[Path, Callable[[Path], str]], tuple[tuple[int, ...], str]] = {}


def cache_root() -> Path:
    """The folder of everything that can be made again: `$LIMBECK_CACHE`, else `~/.cache/limbeck`.

    Raises:
        LimbeckError: neither is known; so it is in a container that runs under a number without a name.
    """
    try:
        named = os.environ.get("LIMBECK_CACHE")
        return Path(named).expanduser().absolute() if named else Path.home() / ".cache" / "limbeck"
    except RuntimeError as error:
        raise LimbeckError(
            "this user has no home directory, so there is no place for the cache",
            expected="a folder of the cache, or HOME",
            hint="export LIMBECK_CACHE=/tmp/limbeck",
        ) from error


def compute_sha256(path: Path) -> str:
    """Hex sha256 of a file's bytes; read once in a process, as long as the file stays as it is."""
    return digest_once(path, _sha256)


def digest_once(path: Path, digest: Callable[[Path], str]) -> str:
    """`digest(path)`, from before where the file has the size, inode and times that it had then."""
    found = path.stat()
    stamp = found.st_size, found.st_ino, found.st_mtime_ns, found.st_ctime_ns
    key = path.absolute(), digest
    known = _digests.get(key)
    if known is None or known[0] != stamp:
        known = stamp, digest(path)
        # clocks of file systems tick in milliseconds: a file that has just been written may change unseen
        if time.time() - max(found.st_mtime, found.st_ctime) > SETTLED_SECONDS:
            _digests[key] = known
    return known[1]


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_valid_manifest(folder: Path, *, verify: bool = False) -> dict[str, Any] | None:
    """The manifest of a published folder, or None where it is missing or damaged.

    Args:
        folder: a folder that `ensure_cached_folder` made.
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


def atomic_write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all: under a name of its own, flushed to disk, then renamed.

    Raises:
        LimbeckError: no room or no permission.
    """
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    with convert_write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        for old in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
            with suppress(OSError):  # another process may have taken it away
                if time.time() - old.stat().st_mtime > STALE_SECONDS:
                    old.unlink()
        try:
            with open(aside, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
            _flush(path.parent)
        finally:
            aside.unlink(missing_ok=True)


def read_json(path: Path, hint: str) -> Any:
    """What a JSON file of ours holds.

    Args:
        hint: what to do where it cannot be read.

    Raises:
        LimbeckError: it was cut short or changed by hand, so that it is no JSON object any more.
    """
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(known, dict):
            raise ValueError(f"it holds a {type(known).__name__}")
    except ValueError as error:
        raise LimbeckError(
            f"{path} is damaged: {error}", expected="a JSON object, as it was written", hint=hint
        ) from error
    return known


_looking: ContextVar[list[str] | None] = ContextVar("looking", default=None)


class NotCachedError(Exception):
    """Under `cache_dry_run`: something is not in the cache, and would have to be made first."""


@contextmanager
def cache_dry_run() -> Iterator[list[str]]:
    """For plans: within, nothing is brought to the cache; what would be is an exception (`NotCachedError`).

    Yields:
        Sentences, of whoever catches one and goes on without: what would be made first.
    """
    told: list[str] = []
    before = _looking.set(told)
    try:
        yield told
    finally:
        _looking.reset(before)


def get_dry_run_notes() -> list[str] | None:
    """The sentences of the `cache_dry_run` that this is within, None outside of one."""
    return _looking.get()


def raise_if_dry_run(what: str, required_bytes: int = 0) -> None:
    """Raise `NotCachedError` within `cache_dry_run`: the next step makes something that may take long."""
    if _looking.get() is not None:
        raise NotCachedError(f"{what}, {required_bytes / 1e6:,.0f} MB" if required_bytes else what)


def ensure_cached_folder(
    folder: Path,
    fill: Callable[[Path], dict[str, Any]],
    *,
    what: str,
    required_bytes: int = 0,
    verify: bool = False,
) -> dict[str, Any]:
    """The manifest of `folder`, filled first if it is missing or damaged.

    Args:
        folder: where the files will be.
        fill: writes the files into the temporary folder that it is given; returns what else the manifest shall record.
        what: for messages, "tokens of corpus.jsonl".
        required_bytes: how much room filling takes; checked beforehand.
        verify: see `load_valid_manifest`.

    Raises:
        LimbeckError: no room or no permission, or another process holds the lock and stands still.
    """
    if manifest := load_valid_manifest(folder, verify=verify):
        return manifest
    raise_if_dry_run(f"the {what}", required_bytes)
    with convert_write_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder, what) as alone:
            if manifest := load_valid_manifest(folder, verify=verify):
                return manifest
            if alone:
                for stale in _temporary(folder):
                    shutil.rmtree(stale, ignore_errors=True)
            if folder.exists():
                console.print(f"{what}: damaged, made again ({folder})", markup=False)
            check_disk_space(folder.parent, required_bytes, what)
            return _fill_and_rename(folder, fill, verify)


def check_disk_space(folder: Path, required_bytes: int, what: str) -> None:
    """Raises LimbeckError where the disk of `folder` has less than `required_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < required_bytes:
        raise LimbeckError(
            f"no room for {what}: {free / 1e6:,.0f} MB free in {folder}",
            expected=f"at least {required_bytes / 1e6:,.0f} MB",
            hint="free some room, or use another disk (LIMBECK_CACHE for the cache, --out for a run)",
        )


@contextmanager
def convert_write_errors(folder: Path) -> Iterator[None]:
    """Turns "disk full", "permission denied" and the like into a LimbeckError that names the folder.

    Whoever removes half-made files has to do so outside of it: a library that does not say why a file was cut short
    is found out by asking the disk.
    """
    try:
        yield
    except Exception as error:
        told = explain_write_error(error, folder)
        if told is None:
            raise
        raise told from error


def explain_write_error(error: BaseException, folder: Path | None = None) -> LimbeckError | None:
    """The LimbeckError for what the system refused to write, or None where `error` is of another kind.

    Args:
        error: an OSError, or what safetensors, tokenizers, torch and numpy raise in its place.
        folder: where something was being written, if that is known.
    """
    if isinstance(error, LimbeckError):
        return None
    named = getattr(error, "filename", None)
    place = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else folder
    code, said = error.errno if isinstance(error, OSError) else None, str(error)
    if code is None and (match := CODE.search(said)):
        code = int(match[1])
    cut_short = code is None and CUT_SHORT.search(said) is not None
    if cut_short:
        code = _asked(folder) if folder is not None else errno.ENOSPC
    if code not in REFUSALS and not cut_short:
        return None
    elsewhere = "LIMBECK_CACHE=FOLDER" if place is not None and _in_cache(place) else "--out FOLDER"
    words = {
        "place": place if place is not None else "what is written",
        "reason": os.strerror(code or 0).lower(),
        "again": "the same command then goes on",
        "elsewhere": elsewhere,
    }
    other = ("a file in {place} could not be written whole: " + said.strip(), "quotas and limits, then the same again")
    found, hint = REFUSALS.get(code or 0, other)
    return LimbeckError(found.format(**words), hint=hint.format(**words))


def _asked(folder: Path) -> int | None:
    """What the system says to a megabyte more in a folder: the number of its error, None where it takes it."""
    folder = next((place for place in (folder, *folder.parents) if place.is_dir()), folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


def _in_cache(place: Path) -> bool:
    try:
        place, root = place.absolute(), cache_root()
        return place.is_relative_to(root) or root.is_relative_to(place)  # it, or a folder that it would be made in
    except (LimbeckError, OSError):
        return False


def check_writable(folder: Path) -> None:
    """Raises LimbeckError where nothing can be written to a folder that is there or would be made."""
    if refused := find_write_error(folder):
        raise refused


def find_write_error(folder: Path) -> LimbeckError | None:
    """Why nothing can be written to a folder that is there or would be made, found by trying; None where it can."""
    try:
        place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        if refused := explain_write_error(OSError(error.errno, error.strerror), folder):
            return refused
        raise
    return None


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yields an empty folder beside `final` to be filled, which then takes its place: whole, or nothing has changed.

    Where `final` is a link to a folder, on another disk for example, it stays one and that folder is replaced.

    Raises:
        LimbeckError: no room, no permission, or a link that leads nowhere.
    """
    check_link(final)
    temporary = get_staging_folder(final)
    place = final.resolve()
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with convert_write_errors(place.parent):
            temporary.mkdir(parents=True)
            yield temporary
            flush_folder(temporary)
            _put_in_place(temporary, place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def get_staging_folder(final: Path) -> Path:
    """Where `atomic_folder` fills the folder; what is there while nobody is at it was left by a killed process."""
    place = final.resolve()
    return place.with_name(f".{place.name}.tmp")


def check_link(path: Path) -> None:
    """Raises LimbeckError where `path` is a link to something that is not there."""
    if path.is_symlink() and not path.exists():
        raise LimbeckError(
            f"{path} is a link to {os.readlink(path)}, which is not there",
            expected="a folder, or a link to one",
            hint=f"mount its disk, or remove the link: rm {path}",
        )


def flush_folder(folder: Path) -> None:
    """Flush a folder's files to disk, readable as the umask says: some writers leave them for their owner only."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    sample = folder / f".{uuid.uuid4().hex}.tmp"
    sample.touch()
    mode = sample.stat().st_mode
    sample.unlink()
    for path in files:
        path.chmod(mode)
        _flush(path)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        _flush(path)


def _put_in_place(temporary: Path, place: Path) -> None:
    """Rename a folder over another. The old one is moved away in one step, so that nobody reads it half deleted."""
    old = place.with_name(f".{place.name}.{uuid.uuid4().hex[:12]}.tmp")
    if place.exists():
        place.rename(old)
    try:
        temporary.rename(place)
    except OSError:
        if old.exists() and not place.exists():
            old.rename(place)
        raise
    _flush(place.parent)
    for stale in _temporary(place):  # the old one, and what a killed process left of another
        shutil.rmtree(stale, ignore_errors=True)


def _fill_and_rename(folder: Path, fill: Callable[[Path], dict[str, Any]], verify: bool) -> dict[str, Any]:
    temporary = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
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
                damaged = folder.with_name(f".{folder.name}.{uuid.uuid4().hex[:12]}.tmp")
                folder.rename(damaged)
                shutil.rmtree(damaged, ignore_errors=True)
            try:
                temporary.rename(folder)
            except OSError:
                winner = load_valid_manifest(folder)  # without file locks another process may have been first
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
    return list(folder.parent.glob(f".{glob.escape(folder.name)}.*.tmp"))


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
    """Holds the lock of `folder`, a file that is gone afterwards; yields False where the file system has no locks."""
    path = folder.with_name(f".{folder.name}.lock")
    seen, since, told = 0.0, time.monotonic(), False
    while fcntl is not None:
        with open(path, "w", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                held = False
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                    break
                raise
            # its last holder may have deleted the file between `open` and `flock`: such a lock holds nobody off
            if held and _is_at(path, file.fileno()):
                try:
                    yield True
                finally:
                    path.unlink(missing_ok=True)
                return
        if held:
            continue
        if not told:
            console.print(f"waiting for another process that is making the {what}", markup=False)
            told = True
        if (newest := _headway(folder)) != seen:
            seen, since = newest, time.monotonic()
        if time.monotonic() - since > LOCK_TIMEOUT_SECONDS:
            raise LimbeckError(
                f"another process holds the lock of the {what} and has written nothing for {LOCK_TIMEOUT_SECONDS:.0f} s",
                hint=f"end that process (the lock is {path}) and run the same command again",
            )
        time.sleep(0.2)
    yield False


def _is_at(path: Path, handle: int) -> bool:
    """Is the open file still the one of that name?"""
    try:
        return os.path.samestat(path.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
