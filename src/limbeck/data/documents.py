"""Documents, whatever they are stored in.

    for text in iter_documents("corpus.jsonl"):
        ...
    key = fingerprint_source("corpus.jsonl")          # changes when the content does

| source | documents |
| --- | --- |
| `notes.txt`, `notes.md` | the whole file is one document |
| `x.jsonl`, `x.ndjson` | one a line, in the field `text_field` |
| `x.json` | a list of records, or one a line |
| `x.csv`, `x.tsv` | one a row under a header, in the column `text_field` |
| `x.parquet` | one a row, in the column `text_field` |
| any of these but parquet with `.gz` behind it | what is inside |
| a folder | all such files in it and below, by name; see `_survey` for what is left out |
| a folder of `datasets.save_to_disk` | one a row; `folder@split` where there are several splits |
| `owner/name`, `owner/name:config`, each with or without `@split` | one a row of the Hugging Face dataset |
| a folder with `index.json`, a `.npy` file | tokens made before (`limbeck.data.pretokenized`) |
| `embedded`, `embedded:TIER` (quick, pypi, held-out-wikipedia) | the embedded text (`limbeck.data.offline.embedded`) |

Text is UTF-8. Documents that are empty or only white space are left out and counted. With `chat` a document is a
conversation: its messages as JSON, with the row's tools where it has any.
"""

import csv
import gzip
import hashlib
import json
import shlex
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import compute_sha256
from limbeck.data.hub import (
    HUB_NAME_PATTERN,
    INSTALL_DATA_HINT,
    SUPPORTED_SOURCES,
    TEMPLATE_FIELDS,
    FieldReader,
    LoadedDataset,
    iter_dataset_texts,
    load_hub_dataset,
    load_saved_dataset,
    missing_field_error,
)

PLAIN = (".txt", ".md", ".jsonl", ".ndjson", ".json", ".csv", ".tsv")
SUPPORTED_EXTENSIONS = (*PLAIN, *(f"{kind}.gz" for kind in PLAIN), ".parquet")
ABOUT = ("readme", "license", "licence", "changelog", "contributing", "code_of_conduct")  # .md that is no text
LONGEST_CELL = 2**31 - 1  # characters; the module csv stops at 131,072 otherwise
CELLS = "cells with quotes around them, and quotes inside them twice"
A_LIST = "a list of records, or one JSON object a line"
MESSAGES_FIELD = "messages"  # the field of conversations


def iter_documents(
    source: str | LoadedDataset, *, text_field: str = "text", chat: bool = False, allow_empty: bool = False
) -> Iterator[str]:
    """The documents of `source`, in stored order.

    Args:
        source: see the table of this module.
        text_field: the field or column of the text.
        chat: the field holds conversations, lists of {"role": ..., "content": ...}; each comes as JSON.
        allow_empty: the source is a part of one, and may be empty.

    Raises:
        LimbeckError: the source is missing, unreadable or empty, or has no such field.
    """
    place = source.label if isinstance(source, LoadedDataset) else source
    found = empty = 0
    for text in _texts(source, text_field, _messages_of if chat else _text_of):
        if text and not text.isspace():
            found += 1
            yield text
        else:
            empty += 1
    if not found and not allow_empty:
        raise LimbeckError(f"no text in '{place}'", expected="at least one document that is not empty")
    if empty:
        console.print(f"'{place}': {empty:,} of {found + empty:,} documents are empty and left out", markup=False)


def has_messages(source: str | LoadedDataset, text_field: str) -> bool:
    """Does the first record have the field `messages`, and not `text_field`?"""
    fields = _fields(source)
    return MESSAGES_FIELD in fields and text_field not in fields


def fingerprint_source(source: str) -> str:
    """A hex key of the content of `source`: of all its bytes, or of the dataset's name and version.

    Raises:
        LimbeckError: as `iter_documents`, where the source is missing or cannot be read.
    """
    from limbeck.data import pretokenized

    if pretokenized.is_token_source(source):
        parts = [f"{shard.path.name} {shard.dtype} {compute_sha256(shard.path)}\n" for shard in _present(source)]
        return hashlib.sha256("".join(parts).encode()).hexdigest()
    root, split = resolve_source(source)
    if root is None:
        dataset = load_hub_dataset(source)
        return hashlib.sha256(f"{source} {dataset._fingerprint}".encode()).hexdigest()
    digest = hashlib.sha256((split or "").encode())
    report_skipped_files(source)
    for path in list_source_files(root, source):
        with _readable(path):
            digest.update(f"{_kind(path)} {compute_sha256(path)}\n".encode())
    return digest.hexdigest()


def is_subset_of(source: str, whole: str, content: str | None = None) -> bool:
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
            return content is not None and fingerprint_source(source) == content
        except LimbeckError:  # whoever opens it says what is wrong with it
            return False


def _contents(source: str) -> set[str]:
    """Hashes of the text files of a source; its fingerprint where it is a dataset, a part of one, or ready tokens."""
    from limbeck.data import pretokenized

    root, split = (None, None) if pretokenized.is_token_source(source) else resolve_source(source)
    if root is None or split is not None or is_saved_dataset(root):
        return {fingerprint_source(source)}
    found = set()
    for path in list_source_files(root, source):
        with _readable(path):
            found.add(compute_sha256(path))
    return found


def count_stored_bytes(source: str) -> int:
    """Bytes on disk of a local source (compressed as stored); 0 for a hub dataset."""
    from limbeck.data import pretokenized

    if pretokenized.is_token_source(source):
        return sum(shard.path.stat().st_size for shard in _present(source))
    root, _ = resolve_source(source)
    if root is None:
        return 0
    return sum(path.stat().st_size for path in list_source_files(root, source))


def get_file_sizes(source: str) -> dict[str, int]:
    """The files of a local source with their sizes in bytes, and under "left out" what its folder has besides, by kind.

    Nothing for a dataset on the hub.
    """
    from limbeck.data import pretokenized

    if pretokenized.is_token_source(source):
        return {shard.path.name: shard.path.stat().st_size for shard in pretokenized.list_token_shards(source)}
    root, _ = resolve_source(source)
    if root is None:
        return {}
    files, left_out = _survey(root, source)
    named = {path.relative_to(root).as_posix() if path != root else path.name: path.stat().st_size for path in files}
    return named | {f"left out: {kind}": count for kind, count in left_out.items()}


def report_skipped_files(source: str) -> None:
    """Say in one line what is read of a folder where it holds anything else too."""
    root, _ = resolve_source(source)
    if root is None or is_saved_dataset(root):
        return
    files, left_out = _survey(root, source)
    if left_out:
        read = ", ".join(f"{count:,} {kind}" for kind, count in sorted(Counter(map(_kind, files)).items()))
        rest = ", ".join(f"{count:,} {kind}" for kind, count in left_out.items())
        console.print(f"'{source}': read: {read}; left out: {rest}", markup=False)


def _present(source: str) -> list[Any]:
    """The shards of ready tokens; LimbeckError naming one that is missing or of the wrong size."""
    from limbeck.data import pretokenized

    shards = pretokenized.list_token_shards(source)
    for shard in shards:
        shard.load_ids()
    return shards


def resolve_source(source: str) -> tuple[Path | None, str | None]:
    """(path, split) of a source on this machine, (None, None) for a hub name; raises where it is neither."""
    if source == "embedded" or source.startswith("embedded:"):
        from limbeck.data.offline.embedded import ensure_embedded_corpus

        return ensure_embedded_corpus(source.partition(":")[2] or "quick", verify=True), None
    path = Path(source).expanduser()
    try:
        if path.exists():
            return path, None
        folder, at, split = source.rpartition("@")
        if at and Path(folder).expanduser().is_dir():
            return Path(folder).expanduser(), split
    except PermissionError as error:
        raise _not_permitted(path) from error
    if (
        HUB_NAME_PATTERN.fullmatch(source)
        and not source.startswith(".")
        and not source.lower().endswith(SUPPORTED_EXTENSIONS)
    ):
        return None, None
    raise LimbeckError(f"there is no file or folder '{source}'", expected=SUPPORTED_SOURCES)


def _texts(source: str | LoadedDataset, text_field: str, value_of: FieldReader) -> Iterator[str | None]:
    if isinstance(source, LoadedDataset):
        yield from iter_dataset_texts(source.dataset, text_field, value_of, source.label)
        return
    root, split = resolve_source(source)
    if root is None:
        yield from iter_dataset_texts(load_hub_dataset(source), text_field, value_of, source)
    elif is_saved_dataset(root):
        yield from iter_dataset_texts(load_saved_dataset(root, split), text_field, value_of, source)
    else:
        blank = []
        for path in list_source_files(root, source):
            some = False
            with _readable(path):
                for text in READERS[_format(path)](path, text_field, value_of):
                    some = True
                    yield text
            if not some and path != root:
                blank.append(path.name)
        if blank:
            names = ", ".join(blank[:4]) + (" ..." if len(blank) > 4 else "")
            console.print(f"'{source}': {len(blank):,} files hold no document: {names}", markup=False)


def _fields(source: str | LoadedDataset) -> list[str]:
    """The fields of the first record; none where the records have no fields or cannot be read."""
    if isinstance(source, LoadedDataset):
        return list(source.dataset.column_names or next(iter(source.dataset), {}))
    root, split = resolve_source(source)
    if root is None:
        return list(load_hub_dataset(source).column_names)
    if is_saved_dataset(root):
        return list(load_saved_dataset(root, split).column_names)
    path = list_source_files(root, source)[0]
    try:
        if _format(path) == ".parquet":
            import pyarrow.parquet

            return list(pyarrow.parquet.ParquetFile(path).schema_arrow.names)
        if _format(path) in RECORDS:
            with _opened(path) as file:
                return list(next(RECORDS[_format(path)](path, file), ("", {}))[1])
    except Exception:  # whoever reads the source next says what is wrong with it
        return []
    return []


def _kind(path: Path) -> str:
    """The end of a file's name that says what is inside: `.jsonl`, `.jsonl.gz`."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix + path.name.lower()[len(name) :]


def _format(path: Path) -> str:
    """The same without `.gz`, but for a parquet file, which nobody compresses."""
    kind = _kind(path)
    return kind if kind == ".parquet.gz" else kind.removesuffix(".gz")


def list_source_files(root: Path, source: str) -> list[Path]:
    """The files that are read; LimbeckError where there are none."""
    if root.is_file():
        if _format(root) not in READERS:
            raise LimbeckError(f"'{root}' is a {_kind(root) or 'nameless'} file", expected=SUPPORTED_SOURCES)
        return [root]
    files, left_out = _survey(root, source)
    if not files:
        seen = ", ".join(list(left_out)[:8]) or "nothing"
        raise LimbeckError(f"no text files in the folder '{source}', only: {seen}", expected=SUPPORTED_SOURCES)
    return files


def _survey(root: Path, source: str) -> tuple[list[Path], dict[str, int]]:
    """The files of a folder that are read, by name, and how many others there are of which kind.

    Links are followed, and what several names lead to is read once. Left out are hidden files and folders, empty
    files, kinds that cannot be read, `.json` that holds no records, and `.md` that is about the folder (README).

    Raises:
        LimbeckError: a link leads nowhere, or a folder must not be read.
    """
    if root.is_file():
        return [root], {}
    left_out: Counter[str] = Counter()
    found = sorted(_walk(root, {root.resolve()}, left_out))
    if is_saved_dataset(root):
        return found, {}
    files = [path for path in found if _format(path) in READERS]
    left_out.update(_kind(path) or path.name for path in found if _format(path) not in READERS)
    chosen = []
    for path in files:
        with _readable(path):
            about = _format(path) == ".md" and path.stem.lower() in ABOUT and len(files) > 1
            if path.stat().st_size == 0:
                left_out[f"empty {_kind(path)}"] += 1
            elif about or (_format(path) == ".json" and not _holds_records(path)):
                left_out[_kind(path)] += 1
            else:
                chosen.append(path)
    return chosen, dict(sorted(left_out.items()))


def _walk(folder: Path, seen: set[Path], left_out: Counter[str]) -> Iterator[Path]:
    """All files in a folder and below, each real one once."""
    with _readable(folder):
        inside = sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path.name))
    for path in inside:
        if path.name.startswith("."):
            left_out["hidden"] += 1
            continue
        with _readable(path):
            there, real = path.exists(), path.resolve() if path.exists() else path
        if not there:
            raise LimbeckError(
                f"the link '{path}' leads nowhere: {path.readlink()}",
                expected="files that are there (mount the disk, or fetch what is kept elsewhere)",
                hint=f"rm {shlex.quote(str(path))}   (to go on without it)",
            )
        if real in seen:
            left_out["linked twice"] += 1
            continue
        seen.add(real)
        if path.is_dir():
            yield from _walk(path, seen, left_out)
        elif path.is_file():
            yield path


def _holds_records(path: Path) -> bool:
    """Does a .json file begin like a list of objects, or like an object a line? Others say something of the text."""
    with _opened(path) as file:
        begin = file.read(65536).lstrip()
    if begin.startswith("["):
        return begin[1:].lstrip().startswith("{")
    first, _, rest = begin.partition("\n")
    try:
        return isinstance(json.loads(first), dict) and rest.lstrip().startswith("{")
    except (ValueError, RecursionError):
        return False


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what can go wrong while a file is read into a LimbeckError that names the file."""
    try:
        yield
    except PermissionError as error:
        raise _not_permitted(path) from error
    except UnicodeDecodeError as error:
        raise _not_utf8(path, f"byte {error.start}") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise LimbeckError(f"'{path}' is not a whole gzip file: {error}") from error
    except OSError as error:
        raise LimbeckError(f"cannot read '{path}': {error.strerror or error}") from error


def _not_permitted(path: Path) -> LimbeckError:
    return LimbeckError(f"no permission to read '{path}'", hint=f"chmod u+rX '{path}'")


def _not_utf8(path: Path, where: str) -> LimbeckError:
    """Names the encoding where the file begins with a mark of it; Windows' own is the likeliest otherwise."""
    with _opened(path, "rb") as file:
        begin = file.read(4)
    marks = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    marked = next((name for mark, name in marks.items() if begin.startswith(mark)), None)
    even = "utf-16le" if begin[1:2] == b"\0" else "utf-16be" if begin[:1] == b"\0" else "cp1252"
    name, aside = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
    convert = f"iconv -f {marked or even} -t utf-8"
    zipped = path.name.lower().endswith(".gz")
    command = f"gzip -dc {name} | {convert} | gzip > {aside}" if zipped else f"{convert} {name} > {aside}"
    found = f"'{path}' is not UTF-8 text ({where})" + (f", it begins as {marked.upper()}" if marked else "")
    return LimbeckError(found, expected="text in UTF-8", hint=f"{command} && mv {aside} {name}")


def _read_txt(path: Path, text_field: str, value_of: FieldReader) -> Iterator[str]:
    if value_of is not _text_of:
        raise LimbeckError(f"'{path}' holds no conversations", expected="records with messages, one JSON object a line")
    with _opened(path) as file:
        text = file.read()
    if "\0" in text:
        raise _not_utf8(path, f"a zero byte behind {text.index(chr(0)):,} characters")
    yield text


def _opened(path: Path, mode: str = "rt") -> Any:
    opener: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, mode, encoding="utf-8-sig" if mode == "rt" else None)


def _lines(path: Path, file: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """An object a line, with its place for messages."""
    for number, line in enumerate(file, 1):
        if line.strip():
            yield _object(line, f"{path}, line {number}")


def _json(path: Path, file: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The records of a list, a single one, or an object a line."""
    text = file.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # behind the first object
            yield from _lines(path, iter(text.split("\n")))
            return
        raise LimbeckError(f"{path}: not JSON: {error}", expected=A_LIST) from error
    for number, row in enumerate(value if isinstance(value, list) else [value], 1):
        if not isinstance(row, dict):
            raise LimbeckError(f"{path}, record {number}: a JSON {type(row).__name__}", expected=A_LIST)
        yield f"{path}, record {number}", row


def _object(line: str, place: str) -> tuple[str, dict[str, Any]]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # brackets a thousand deep are a RecursionError
        raise LimbeckError(f"{place}: not JSON: {error}", expected="one JSON object a line") from error
    if not isinstance(row, dict):
        raise LimbeckError(f"{place}: a JSON {type(row).__name__}", expected="one JSON object a line")
    return place, row


def _table(path: Path, file: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a .csv or .tsv file by its header; commas, tabs, or semicolons where the header has no comma."""
    header = next((line for line in file if line.strip()), "")
    delimiter = "\t" if _format(path) == ".tsv" else ";" if ";" in header and "," not in header else ","
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        names = next(csv.reader([header], delimiter=delimiter), [])
        reader = csv.DictReader(file, names, delimiter=delimiter, strict=True)
        for row in reader:
            place = f"{path}, line {reader.line_num + 1}"
            if None in row:
                raise LimbeckError(
                    f"{place}: {len(names) + len(row[None])} cells", expected=f"{len(names)}, as the header has"
                )
            yield place, row
    except csv.Error as error:
        raise LimbeckError(f"{path}, line {reader.line_num + 2}: no table: {error}", expected=CELLS) from error
    finally:
        csv.field_size_limit(before)


def _read_records(path: Path, text_field: str, value_of: FieldReader) -> Iterator[str | None]:
    with _opened(path) as file:
        for place, row in RECORDS[_format(path)](path, file):
            if text_field not in row:
                raise missing_field_error(text_field, row, place)
            yield value_of(row[text_field], text_field, place, row)


def _read_parquet(path: Path, text_field: str, value_of: FieldReader) -> Iterator[str | None]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise LimbeckError("reading .parquet needs pyarrow", hint=INSTALL_DATA_HINT) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if text_field not in file.schema_arrow.names:
            raise missing_field_error(text_field, file.schema_arrow.names, str(path))
        columns = [name for name in (text_field, *TEMPLATE_FIELDS) if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for row in batch.to_pylist():
                yield value_of(row[text_field], text_field, str(path), row)
    except pyarrow.ArrowException as error:
        raise LimbeckError(f"'{path}' is not a whole parquet file: {error}") from error


RECORDS: dict[str, Callable[[Path, Any], Iterator[tuple[str, dict[str, Any]]]]] = {
    ".jsonl": _lines,
    ".ndjson": _lines,
    ".json": _json,
    ".csv": _table,
    ".tsv": _table,
}
READERS: dict[str, Callable[[Path, str, FieldReader], Iterator[str | None]]] = {
    ".txt": _read_txt,
    ".md": _read_txt,
    ".parquet": _read_parquet,
    **dict.fromkeys(RECORDS, _read_records),
}


def _text_of(value: Any, text_field: str, place: str, row: dict[str, Any] | None = None) -> str | None:
    if value is None or isinstance(value, str):
        return value
    raise LimbeckError(f"{place}: the field '{text_field}' holds a {type(value).__name__}", expected="a string")


def _messages_of(value: Any, field: str, place: str, row: dict[str, Any] | None = None) -> str | None:
    """The messages as JSON, or, where the row has more for the chat template, an object of both."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(one, dict) and "role" in one for one in value):
        raise LimbeckError(
            f"{place}: the field '{field}' holds no conversation",
            expected='a list of {"role": "user" or "assistant", "content": "..."}',
        )
    if not value:
        return None
    # parquet gives every message all keys, with None for those that it does not have
    messages = [{k: v for k, v in one.items() if v is not None} for one in value]
    beside = {name: row[name] for name in TEMPLATE_FIELDS if name != field and row and row.get(name)}
    return json.dumps({MESSAGES_FIELD: messages, **beside} if beside else messages, default=_named)


def _named(value: Any) -> str:
    """What stands in JSON for a date or a picture out of a dataset."""
    return str(value.isoformat()) if hasattr(value, "isoformat") else f"<{type(value).__name__}>"


def is_saved_dataset(root: Path) -> bool:
    with _readable(root):
        return (root / "dataset_dict.json").is_file() or (root / "state.json").is_file()
