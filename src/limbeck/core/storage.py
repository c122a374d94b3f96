"""Write to disk safely: files and folders appear whole or not at all, and a refused write says what to do.

    atomic_write_text(path, text)                        # aside, flushed to disk, renamed
    with atomic_folder(final) as folder:                 # the same for a folder
        model.save_pretrained(folder)
    with convert_write_errors(folder):                   # "No space left on device" becomes a LimbeckError with a hint
        numpy.save(folder / "tokens.npy", tokens)
    with lock_folder(run):                               # against other processes

Temporary names start with a dot and end in `.tmp`. A killed process leaves at most such a file or folder, and the next
writer removes it. Folders that can be recreated at any time are in `limbeck.core.cache`.
"""

import errno
import glob
import json
import os
import re
import shlex
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from limbeck.core.errors import LimbeckError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

STALE_SECONDS = 3600.0  # a temporary file not written to for so long belongs to a killed process


# ------------------------------------------------------------------ files


def atomic_write_text(path: Path, text: str) -> None:
    """Write a small file, whole or not at all.

    Raises:
        LimbeckError: no space or no permission.
    """
    temporary = get_unique_sibling(path)
    with convert_write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        for stale in find_temporary_siblings(path):
            with suppress(OSError):  # another process may have removed it meanwhile
                if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                    stale.unlink()
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
            flush_to_disk(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """Read a JSON object that Limbeck wrote.

    Args:
        hint: what to do when it cannot be read.

    Raises:
        LimbeckError: the file was truncated or edited and is no JSON object any more.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}")
    except ValueError as error:
        raise LimbeckError(
            f"{path} is damaged: {error}", expected="a JSON object, as it was written", hint=hint
        ) from error
    return content


def read_manifest(path: Path) -> dict[str, Any]:
    """Read manifest.json of the run directory `path`; an empty dict before there is one.

    Raises:
        LimbeckError: it is damaged.
    """
    file = path / "manifest.json"
    if not file.exists():
        return {}
    hint = f"rm {shlex.quote(str(file))}   (the run then resumes without checking that teacher and data are unchanged)"
    return read_json(file, hint)


# ------------------------------------------------------------------ folders


def cache_root() -> Path:
    """Return the folder of everything that can be recreated: `$LIMBECK_CACHE`, else `~/.cache/limbeck`.

    Raises:
        LimbeckError: neither is known, as in a container that runs under a user id without a name.
    """
    try:
        from_environment = os.environ.get("LIMBECK_CACHE")
        if from_environment:
            return Path(from_environment).expanduser().absolute()
        return Path.home() / ".cache" / "limbeck"
    except RuntimeError as error:
        raise LimbeckError(
            "this user has no home directory, so there is no location for the cache",
            expected="LIMBECK_CACHE or HOME in the environment",
            hint="export LIMBECK_CACHE=/tmp/limbeck",
        ) from error


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder to fill, which then replaces `final`: whole, or nothing has changed.

    If `final` is a link to a folder, on another disk for example, it stays one and that folder is replaced.

    Raises:
        LimbeckError: no space, no permission, or a broken link.
    """
    check_link(final)
    temporary = get_staging_folder(final)
    target = final.resolve()
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with convert_write_errors(target.parent):
            temporary.mkdir(parents=True)
            yield temporary
            flush_folder(temporary)
            _replace_folder(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def get_staging_folder(final: Path) -> Path:
    """Return where `atomic_folder` prepares `final`; a folder left there was left by a killed process."""
    target = final.resolve()
    return target.with_name(f".{target.name}.tmp")


def _replace_folder(temporary: Path, target: Path) -> None:
    """Rename a folder over another. The old one is moved away in one step, so that nobody reads it half deleted."""
    old = get_unique_sibling(target)
    if target.exists():
        target.rename(old)
    try:
        temporary.rename(target)
    except OSError:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
    flush_to_disk(target.parent)
    for stale in find_temporary_siblings(target):  # the old one, and what a killed process left of another
        shutil.rmtree(stale, ignore_errors=True)


def check_link(path: Path) -> None:
    """Raise LimbeckError if `path` is a broken link."""
    if path.is_symlink() and not path.exists():
        raise LimbeckError(
            f"{path} is a link to {os.readlink(path)}, which does not exist",
            expected="a folder, or a link to one",
            hint=f"mount its disk, or remove the link: rm {shlex.quote(str(path))}",
        )


def flush_folder(folder: Path) -> None:
    """Flush a folder's files to disk and give them the permissions of the umask."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    # Some libraries write files that their owner alone can read; a fresh file shows what the umask allows.
    sample = folder / f".{uuid.uuid4().hex}.tmp"
    sample.touch()
    mode = sample.stat().st_mode
    sample.unlink()
    for path in files:
        path.chmod(mode)
        flush_to_disk(path)
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder):
        flush_to_disk(path)


def flush_to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on disk."""
    if path.is_dir() and os.name == "nt":  # Windows cannot flush folders
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def get_unique_sibling(path: Path) -> Path:
    """Return a temporary name beside `path` that nobody else uses."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")


def find_temporary_siblings(path: Path) -> list[Path]:
    """List the temporary files or folders of `path`, by any process."""
    return list(path.parent.glob(f".{glob.escape(path.name)}.*.tmp"))


# ------------------------------------------------------------------ locks


def try_lock(file: IO[str]) -> bool | None:
    """Lock an open file until it is closed; the kernel releases it when its holder dies.

    Returns:
        False if another process holds the lock, None if the system or the disk has no file locks.
    """
    if fcntl is None:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
            return None
        raise
    return True


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Reserve a folder for this process, on systems with file locks.

    Raises:
        LimbeckError: another process holds it.
    """
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        if try_lock(file) is False:
            raise LimbeckError(
                f"another process is working on {folder}", hint="wait for it to finish, or give another --out"
            )
        yield


# ------------------------------------------------------------------ space and permissions

# What libraries that are written in Rust say instead of an errno, and what torch says of a truncated file.
ERRNO_IN_MESSAGE = re.compile(r"(?:os error|errno) (\d+)", re.IGNORECASE)
TRUNCATED_MESSAGE = re.compile(r"\d+ requested and \d+ written|PytorchStreamWriter|inline_container.*unexpected pos")
RERUN = "then rerun the same command to continue"
WRITE_ERRORS = {  # errno -> message and hint
    errno.ENOSPC: ("the disk of {path} is full", f"free some space, {RERUN}, or use another disk ({{option}})"),
    errno.EDQUOT: (
        "the disk quota for {path} is exhausted",
        f"free some of it, {RERUN}, or use another disk ({{option}})",
    ),
    errno.EFBIG: (
        "a file in {path} would exceed the file size limit",
        f"ulimit -f unlimited   ({RERUN}), or use another disk ({{option}})",
    ),
    errno.EIO: ("the disk of {path} fails: input/output error", "use another disk ({option})"),
    errno.ESTALE: (
        "the disk of {path} is gone: {reason}",
        f"mount it again, {RERUN}, or use another disk ({{option}})",
    ),
    errno.EMFILE: ("too many open files, at {path}", f"ulimit -n 4096   ({RERUN})"),
    errno.ENAMETOOLONG: ("the name {path} is too long for its disk", "use a shorter name ({option})"),
    errno.ENOTDIR: ("a part of the path {path} is a file", "{option}"),
    errno.ELOOP: ("the links on the path {path} form a loop", "{option}"),
    **dict.fromkeys(
        (errno.EACCES, errno.EPERM, errno.EROFS),
        ("cannot write to {path}: {reason}", "use a folder that this user may write to ({option})"),
    ),
}


@contextmanager
def convert_write_errors(folder: Path) -> Iterator[None]:
    """Turn "disk full", "permission denied" and the like into a LimbeckError that names the folder.

    Remove half-written files outside of this block, not inside: when a library does not say why a file was truncated,
    the reason is found by writing to the disk again, while it is still full.
    """
    try:
        yield
    except Exception as error:
        explained = explain_write_error(error, folder)
        if explained is None:
            raise
        raise explained from error


def explain_write_error(error: BaseException, folder: Path | None = None) -> LimbeckError | None:
    """Return the LimbeckError for a refused write, or None if `error` is of another kind.

    Args:
        error: an OSError, or what safetensors, tokenizers, torch and numpy raise in its place.
        folder: where something was being written, if that is known.
    """
    if isinstance(error, LimbeckError):
        return None
    filename = getattr(error, "filename", None)
    path = Path(os.fsdecode(filename)) if isinstance(filename, str | bytes) else folder
    code, message = error.errno if isinstance(error, OSError) else None, str(error)
    if code is None and (match := ERRNO_IN_MESSAGE.search(message)):
        code = int(match[1])
    truncated = code is None and TRUNCATED_MESSAGE.search(message) is not None
    if truncated:
        code = _probe_write(folder) if folder is not None else errno.ENOSPC
    if code not in WRITE_ERRORS and not truncated:
        return None
    words = {
        "path": path if path is not None else "the output",
        "reason": os.strerror(code or 0).lower(),
        "option": "LIMBECK_CACHE=FOLDER" if path is not None and _is_in_cache(path) else "--out FOLDER",
    }
    if code not in WRITE_ERRORS:
        return LimbeckError(
            f"a file in {words['path']} was truncated while it was written: {message.strip()}",
            hint=f"check quotas and limits, {RERUN}",
        )
    template, hint = WRITE_ERRORS[code]
    return LimbeckError(template.format(**words), hint=hint.format(**words))


def _probe_write(folder: Path) -> int | None:
    """Write a megabyte to a folder; the errno of the failure, or None if it succeeds."""
    folder = next((parent for parent in (folder, *folder.parents) if parent.is_dir()), folder)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error.errno
    return None


def _is_in_cache(path: Path) -> bool:
    try:
        path, root = path.absolute(), cache_root()
        return path.is_relative_to(root) or root.is_relative_to(path)  # or a parent in which the cache would be created
    except (LimbeckError, OSError):
        return False


def check_writable(folder: Path) -> None:
    """Raise LimbeckError if `folder`, existing or yet to be created, cannot be written to."""
    if error := find_write_error(folder):
        raise error


def find_write_error(folder: Path) -> LimbeckError | None:
    """Try to write to `folder`, existing or yet to be created; return the reason why that fails, or None."""
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        tempfile.TemporaryFile(dir=existing).close()
    except OSError as error:
        if explained := explain_write_error(OSError(error.errno, error.strerror), folder):
            return explained
        # a file system that holds no files of ours, such as /proc
        reason = os.strerror(error.errno or 0).lower()
        return LimbeckError(f"cannot write to {folder}: {reason}", hint="use another folder (--out FOLDER)")
    return None


def check_disk_space(folder: Path, required_bytes: int, what: str) -> None:
    """Raise LimbeckError if the disk of `folder` has less than `required_bytes` free."""
    free = shutil.disk_usage(folder).free
    if free < required_bytes:
        raise LimbeckError(
            f"not enough disk space for {what}: {free / 1e6:,.0f} MB free in {folder}",
            expected=f"at least {required_bytes / 1e6:,.0f} MB",
            hint="free some space, or use another disk (LIMBECK_CACHE for the cache, --out for a run)",
        )
