"""Documents, whatever they are stored in.

    for text in documents("corpus.jsonl"):
        ...
    key = fingerprint("corpus.jsonl")          # changes when the content does

| source | documents |
| --- | --- |
| `notes.txt` | the whole file is one document |
| `x.jsonl`, `x.jsonl.gz` | one a line, in the field `text_field` |
| `x.parquet` | one a row, in the column `text_field` |
| a folder | all such files in it and below, by name |
| a folder of `datasets.save_to_disk` | one a row; `folder@split` where there are several splits |
| `owner/name`, `owner/name:config`, each with or without `@split` | one a row of the Hugging Face dataset |
| a folder with `index.json`, a `.npy` file | tokens made before (`limbeck.data.tokens`) |
| `embedded`, `embedded:TIER` (quick, pypi, held-out-wikipedia) | the embedded text (`limbeck.assets`) |

Documents that are empty or only white space are left out. With `chat` a document is a conversation: its messages as
JSON.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from limbeck.data.cache import sha256_of
from limbeck.data.hub import HUB_NAME, KNOWN, NEEDS_DATA, Rows, ValueOf, no_field, open_hub, open_saved, rows_of
from limbeck.errors import LimbeckError

KINDS = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
MESSAGES = "messages"  # the field of conversations


def documents(source: str | Rows, *, text_field: str = "text", chat: bool = False, part: bool = False) -> Iterator[str]:
    """The documents of `source`, in stored order.

    Args:
        source: see the table of this module.
        text_field: the field or column of the text.
        chat: the field holds conversations, lists of {"role": ..., "content": ...}; each comes as JSON.
        part: the source is a part of one, and may be empty.

    Raises:
        LimbeckError: the source is missing, unreadable or empty, or has no such field.
    """
    found = part
    for text in _texts(source, text_field, _messages_of if chat else _text_of):
        if text and not text.isspace():
            found = True
            yield text
    if not found:
        raise LimbeckError(f"no text in '{source}'", expected="at least one document that is not empty")


def holds_messages(source: str | Rows, text_field: str) -> bool:
    """Does the first record have the field `messages`, and not `text_field`?"""
    fields = _fields(source)
    return MESSAGES in fields and text_field not in fields


def fingerprint(source: str) -> str:
    """A hex key of the content of `source`: of all its bytes, or of the dataset's name and version.

    Raises:
        LimbeckError: as `documents`, where the source is missing or cannot be read.
    """
    from limbeck.data import tokens

    if tokens.is_tokens(source):
        parts = [f"{shard.path.name} {shard.dtype} {sha256_of(shard.path)}\n" for shard in _present(source)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()
    root, split = _local(source)
    if root is None:
        dataset = open_hub(source)
        return hashlib.sha256(f"{source} {dataset._fingerprint}".encode()).hexdigest()
    digest = hashlib.sha256((split or "").encode())
    for path in _files(root, source):
        with _readable(path):
            digest.update(f"{_kind(path)} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


def is_part_of(source: str, whole: str, content: str | None = None) -> bool:
    """Has `source` nothing but files that `whole` has too, by content? Of what are no files the fingerprints decide.

    Args:
        content: the fingerprint that `whole` had, for where it cannot be read any more.
    """
    with suppress(OSError):
        if source == whole or Path(source).expanduser().samefile(Path(whole).expanduser()):
            return True
    try:
        return (mine := _contents(source)) <= _contents(whole) and bool(mine)
    except LimbeckError:
        try:
            return content is not None and fingerprint(source) == content
        except LimbeckError:  # whoever opens it says what is wrong with it
            return False


def _contents(source: str) -> set[str]:
    """Hashes of the text files of a source; its fingerprint where it is a dataset, a part of one, or ready tokens."""
    from limbeck.data import tokens

    root, split = (None, None) if tokens.is_tokens(source) else _local(source)
    if root is None or split is not None or _is_saved_dataset(root):
        return {fingerprint(source)}
    found = set()
    for path in _files(root, source):
        with _readable(path):
            found.add(sha256_of(path))
    return found


def stored_bytes(source: str) -> int:
    """Bytes on disk of a local source (compressed as stored); 0 for a hub dataset."""
    from limbeck.data import tokens

    if tokens.is_tokens(source):
        return sum(shard.path.stat().st_size for shard in _present(source))
    root, _ = _local(source)
    if root is None:
        return 0
    return sum(path.stat().st_size for path in _files(root, source))


def _present(source: str) -> list[Any]:
    """The shards of ready tokens; LimbeckError naming one that is missing or of the wrong size."""
    from limbeck.data import tokens

    shards = tokens.token_shards(source)
    for shard in shards:
        shard.ids()
    return shards


def _local(source: str) -> tuple[Path | None, str | None]:
    """(path, split) of a source on this machine, (None, None) for a hub name; raises where it is neither."""
    if source == "embedded" or source.startswith("embedded:"):
        from limbeck.assets import corpus_file

        return corpus_file(source.partition(":")[2] or "quick", verify=True), None
    path = Path(source).expanduser()
    try:
        if path.exists():
            return path, None
        folder, at, split = source.rpartition("@")
        if at and Path(folder).expanduser().is_dir():
            return Path(folder).expanduser(), split
    except PermissionError as error:
        raise _not_permitted(path) from error
    if HUB_NAME.fullmatch(source) and not source.startswith(".") and not source.lower().endswith(KINDS):
        return None, None
    raise LimbeckError(f"there is no file or folder '{source}'", expected=KNOWN)


def _texts(source: str | Rows, text_field: str, value_of: ValueOf) -> Iterator[str | None]:
    if isinstance(source, Rows):
        yield from rows_of(source.dataset, text_field, value_of, source.place)
        return
    root, split = _local(source)
    if root is None:
        yield from rows_of(open_hub(source), text_field, value_of, source)
    elif _is_saved_dataset(root):
        yield from rows_of(open_saved(root, split), text_field, value_of, source)
    else:
        for path in _files(root, source):
            with _readable(path):
                yield from READERS[_kind(path)](path, text_field, value_of)


def _fields(source: str | Rows) -> list[str]:
    """The fields of the first record; none where the records have no fields or cannot be read."""
    if isinstance(source, Rows):
        return list(source.dataset.column_names or next(iter(source.dataset), {}))
    root, split = _local(source)
    if root is None:
        return list(open_hub(source).column_names)
    if _is_saved_dataset(root):
        return list(open_saved(root, split).column_names)
    path = _files(root, source)[0]
    try:
        if _kind(path) == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.ParquetFile(path).schema_arrow.names)
        if _kind(path) in (".jsonl", ".jsonl.gz"):
            with _lines(path) as lines:
                row = json.loads(next((line for line in lines if not line.isspace()), "{}"))
                return list(row) if isinstance(row, dict) else []
    except Exception:  # whoever reads the source next says what is wrong with it
        return []
    return []


def _kind(path: Path) -> str:
    name = path.name.lower()
    return ".jsonl.gz" if name.endswith(".jsonl.gz") else path.suffix.lower()


def _files(root: Path, source: str) -> list[Path]:
    if root.is_file():
        if _kind(root) not in READERS:
            raise LimbeckError(f"'{root}' is a {_kind(root) or 'nameless'} file", expected=KNOWN)
        return [root]
    with _readable(root):
        next(root.iterdir(), None)  # rglob passes over a folder that it may not read
        inside = sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
    if _is_saved_dataset(root):
        return inside
    files = [path for path in inside if _kind(path) in READERS]
    if not files:
        seen = ", ".join(sorted({_kind(path) or path.name for path in inside})[:8]) or "nothing"
        raise LimbeckError(f"no text files in the folder '{source}', only: {seen}", expected=KNOWN)
    return files


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what can go wrong while a file is read into a LimbeckError that names the file."""
    try:
        yield
    except PermissionError as error:
        raise _not_permitted(path) from error
    except UnicodeDecodeError as error:
        raise LimbeckError(
            f"'{path}' is not UTF-8 text (byte {error.start})", hint=f"convert it: iconv -t utf-8 '{path}'"
        ) from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise LimbeckError(f"'{path}' is not a whole gzip file: {error}") from error
    except OSError as error:
        raise LimbeckError(f"cannot read '{path}': {error.strerror or error}") from error


def _not_permitted(path: Path) -> LimbeckError:
    return LimbeckError(f"no permission to read '{path}'", hint=f"chmod u+rX '{path}'")


def _read_txt(path: Path, text_field: str, value_of: ValueOf) -> Iterator[str]:
    if value_of is not _text_of:
        raise LimbeckError(f"'{path}' holds no conversations", expected="records with messages, one JSON object a line")
    yield path.read_text(encoding="utf-8-sig")


def _lines(path: Path) -> Any:
    opener: Callable[..., Any] = gzip.open if _kind(path) == ".jsonl.gz" else open
    return opener(path, "rt", encoding="utf-8-sig")


def _read_jsonl(path: Path, text_field: str, value_of: ValueOf) -> Iterator[str | None]:
    with _lines(path) as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            place = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise LimbeckError(f"{place}: not JSON: {error}", expected="one JSON object a line") from error
            if not isinstance(row, dict):
                raise LimbeckError(f"{place}: a JSON {type(row).__name__}", expected="one JSON object a line")
            if text_field not in row:
                raise no_field(text_field, row, place)
            yield value_of(row[text_field], text_field, place)


def _read_parquet(path: Path, text_field: str, value_of: ValueOf) -> Iterator[str | None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise LimbeckError("reading .parquet needs pyarrow", hint=NEEDS_DATA) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            raise no_field(text_field, file.schema_arrow.names, str(path))
        for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
            for value in batch.column(0).to_pylist():
                yield value_of(value, text_field, str(path))
    except pyarrow.ArrowException as error:
        raise LimbeckError(f"'{path}' is not a whole parquet file: {error}") from error


READERS: dict[str, Callable[[Path, str, ValueOf], Iterator[str | None]]] = {
    ".txt": _read_txt,
    ".jsonl": _read_jsonl,
    ".jsonl.gz": _read_jsonl,
    ".parquet": _read_parquet,
}


def _text_of(value: Any, text_field: str, place: str) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise LimbeckError(f"{place}: the field '{text_field}' holds a {type(value).__name__}", expected="a string")


def _messages_of(value: Any, field: str, place: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(one, dict) and "role" in one for one in value):
        raise LimbeckError(
            f"{place}: the field '{field}' holds no conversation",
            expected='a list of {"role": "user" or "assistant", "content": "..."}',
        )
    # parquet gives every message all keys, with None for those that it does not have
    return json.dumps([{k: v for k, v in one.items() if v is not None} for one in value]) if value else None


def _is_saved_dataset(root: Path) -> bool:
    with _readable(root):
        return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()
