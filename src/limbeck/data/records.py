"""Files of text: their formats, and the text or conversation in each of their records.

    for text in read_file(Path("corpus.jsonl"), "text", extract_text):
        ...

Text is UTF-8, with or without a byte-order mark. Every error names the file, and the line or record where there is one.
"""

import csv
import gzip
import json
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError, format_python_command

INSTALL_DATA_HINT = "pip install 'limbeck[data]'"
MAX_CELL_CHARACTERS = 2**31 - 1  # the module csv stops at 131,072 otherwise
CSV_QUOTING = "quoted cells, with the quotes inside them doubled"
JSON_RECORDS = "a list of records, or one JSON object per line"
LIKELY_TEXT_FIELDS = ("text", "content", "body", "document", "article", "output", "response", "completion")
MESSAGES_FIELD = "messages"  # the field of conversations
TEMPLATE_FIELDS = ("tools", "chat_template_kwargs")  # fields beside the messages that a chat template is given

# value, field, place (for messages), record -> the document; None where the record has none
FieldReader = Callable[[Any, str, str, dict[str, Any]], str | None]
Record = tuple[str, dict[str, Any]]  # place (for messages), fields


def read_file(path: Path, text_field: str, extract: FieldReader) -> Iterator[str | None]:
    """Yield the document of each record of a file; None where the field is empty.

    Args:
        extract: `extract_text` or `extract_messages`.

    Raises:
        LimbeckError: the file cannot be read, is not in its format, or a record has no field `text_field`.
    """
    with convert_read_errors(path):
        yield from READERS[get_format(path)](path, text_field, extract)


def extract_text(value: Any, text_field: str, place: str, record: dict[str, Any] | None = None) -> str | None:
    """Return the text of a field; LimbeckError where it is not a string."""
    if value is None or isinstance(value, str):
        return value
    raise LimbeckError(f"{place}: the field '{text_field}' holds a {type(value).__name__}", expected="a string")


def extract_messages(value: Any, field: str, place: str, record: dict[str, Any] | None = None) -> str | None:
    """Return the messages of a conversation as JSON, or an object of both where the record has `TEMPLATE_FIELDS`."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(message, dict) and "role" in message for message in value):
        raise LimbeckError(
            f"{place}: the field '{field}' holds no conversation",
            expected='a list of {"role": "user" or "assistant", "content": "..."}',
        )
    if not value:
        return None
    # Parquet gives every message the keys of all others, with None for those that it does not have.
    messages = [{k: v for k, v in message.items() if v is not None} for message in value]
    extra = {name: record[name] for name in TEMPLATE_FIELDS if name != field and record and record.get(name)}
    return json.dumps({MESSAGES_FIELD: messages, **extra} if extra else messages, default=_serialize)


def _serialize(value: Any) -> str:
    """JSON has no dates and no pictures, which datasets do have."""
    return str(value.isoformat()) if hasattr(value, "isoformat") else f"<{type(value).__name__}>"


def get_extension(path: Path) -> str:
    """Return the end of a file's name that says what is inside: `.jsonl`, `.jsonl.gz`."""
    name = path.name.lower().removesuffix(".gz")
    return Path(name).suffix + path.name.lower()[len(name) :]


def get_format(path: Path) -> str:
    """Return the key of `READERS` for a file: its extension without `.gz`. No reader takes `.parquet.gz`."""
    extension = get_extension(path)
    return extension if extension == ".parquet.gz" else extension.removesuffix(".gz")


def get_field_names(path: Path) -> list[str]:
    """Return the fields of a file's first record; none where it has no fields or cannot be read."""
    file_format = get_format(path)
    try:
        if file_format == ".parquet":
            import pyarrow.parquet  # optional dependency

            return list(pyarrow.parquet.ParquetFile(path).schema_arrow.names)
        if file_format in RECORD_READERS:
            with _open(path) as file:
                return list(next(RECORD_READERS[file_format](path, file), ("", {}))[1])
    except Exception:  # reading the source for real says what is wrong with it
        return []
    return []


def contains_records(path: Path) -> bool:
    """Return whether a .json file begins like a list of objects, or like one object per line. Others are metadata."""
    with _open(path) as file:
        begin = file.read(65536).lstrip()
    if begin.startswith("["):
        return begin[1:].lstrip().startswith("{")
    first, _, rest = begin.partition("\n")
    try:
        return isinstance(json.loads(first), dict) and rest.lstrip().startswith("{")
    except (ValueError, RecursionError):
        return False


def find_column(text_field: str, columns: Sequence[str]) -> str | None:
    """Return the column that has a field: its own, or `a` for the field `a.b` of its records; None for none."""
    outer = text_field.partition(".")[0]
    return next((name for name in (text_field, outer) if name in columns), None)


def iter_field(record: dict[str, Any], text_field: str, place: str) -> Iterator[Any]:
    """Yield what a record has in a field: one value, or for `a.b` the field b in a, or in each item of a list a.

    Raises:
        LimbeckError: there is no such field.
    """
    try:
        yield from _find_values(record, text_field)
    except KeyError:
        raise missing_field_error(text_field, record, place) from None


def _find_values(value: Any, path: str) -> Iterator[Any]:
    if value is None or not path:  # a field that is null has no fields, and no text either
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _find_values(item, path)
    elif isinstance(value, dict):
        name, _, rest = (path, "", "") if path in value else path.partition(".")
        yield from _find_values(value[name], rest)
    else:
        raise KeyError(path)


def list_text_fields(schema: Any) -> list[str]:
    """Return the fields of an Arrow schema or struct that hold strings, those in others as `a.b`."""
    import pyarrow  # optional dependency

    found = []
    for field in schema:
        if pyarrow.types.is_struct(field.type):
            found += [f"{field.name}.{name}" for name in list_text_fields(field.type)]
        elif pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type):
            found.append(field.name)
    return found


def missing_field_error(
    text_field: str, fields: Iterable[str], place: str, texts: Sequence[str] | None = None
) -> LimbeckError:
    """Return the error for a record without the field, with the likeliest of its `fields` as a hint.

    Args:
        texts: those that hold strings, the likeliest first, where they are known; by default found in a record.
    """
    if texts is None:
        texts = _find_texts(fields) if isinstance(fields, dict) else list(fields)
    by_name = [name for likely in LIKELY_TEXT_FIELDS for name in texts if name.rpartition(".")[2] == likely]
    chosen = next(iter([*(["text"] if MESSAGES_FIELD in fields else []), *by_name, *texts]), None)
    return LimbeckError(
        f"{place}: no field '{text_field}', only: {', '.join(map(str, fields)) or 'none'}",
        expected="the name of the field that holds the text; of a field in another: outer.inner",
        hint=None if chosen is None else f"--set {shlex.quote(f'data.text_field={chosen}')}",
    )


def _find_texts(record: dict[str, Any]) -> list[str]:
    """Return the fields of a record that hold strings, those in others as `a.b`, the longest string first."""
    found: dict[str, int] = {}
    for name, value in record.items():
        inner = value[0] if isinstance(value, list) and value else value
        if isinstance(value, str):
            found[name] = len(value)
        elif isinstance(inner, dict):
            found |= {f"{name}.{text}": len(next(_find_values(inner, text))) for text in _find_texts(inner)}
    return sorted(found, key=lambda name: -found[name])


@contextmanager
def convert_read_errors(path: Path) -> Iterator[None]:
    """Turn what can go wrong while a file is read into a LimbeckError that names the file."""
    try:
        yield
    except PermissionError as error:
        raise permission_error(path) from error
    except UnicodeDecodeError as error:
        raise _encoding_error(path, f"byte {error.start}") from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise LimbeckError(f"'{path}' is not a whole gzip file: {error}") from error
    except OSError as error:
        raise LimbeckError(f"cannot read '{path}': {error.strerror or error}") from error


def permission_error(path: Path) -> LimbeckError:
    """Return the error for a file that this user must not read."""
    return LimbeckError(f"no permission to read '{path}'", hint=f"chmod u+rX '{path}'")


def _encoding_error(path: Path, where: str) -> LimbeckError:
    """The hint converts from the encoding that a byte-order mark names, else from Windows' own, the likeliest one."""
    with _open(path, "rb") as file:
        begin = file.read(4)
    marks = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
    marked = next((name for mark, name in marks.items() if begin.startswith(mark)), None)
    guessed = "utf-16le" if begin[1:2] == b"\0" else "utf-16be" if begin[:1] == b"\0" else "cp1252"
    name, converted = shlex.quote(str(path)), shlex.quote(f"{path}.utf8")
    convert = f"iconv -f {marked or guessed} -t utf-8"
    zipped = path.name.lower().endswith(".gz")
    command = f"gzip -dc {name} | {convert} | gzip > {converted}" if zipped else f"{convert} {name} > {converted}"
    problem = f"'{path}' is not UTF-8 text ({where})" + (f", it begins as {marked.upper()}" if marked else "")
    return LimbeckError(problem, expected="text in UTF-8", hint=f"{command} && mv {converted} {name}")


def _open(path: Path, mode: str = "rt") -> Any:
    opener: Callable[..., Any] = gzip.open if path.name.lower().endswith(".gz") else open
    return opener(path, mode, encoding="utf-8-sig" if mode == "rt" else None)


def _read_plain_text(path: Path, text_field: str, extract: FieldReader) -> Iterator[str]:
    """The whole file is one document."""
    if extract is not extract_text:
        raise LimbeckError(f"'{path}' holds no conversations", expected="records with messages, one JSON object a line")
    with _open(path) as file:
        text = file.read()
    if "\0" in text:  # UTF-16 of English decodes as UTF-8 with a zero behind every letter
        raise _encoding_error(path, f"a zero byte behind {text.index(chr(0)):,} characters")
    yield text


def _read_records(path: Path, text_field: str, extract: FieldReader) -> Iterator[str | None]:
    with _open(path) as file:
        for place, record in RECORD_READERS[get_format(path)](path, file):
            for value in iter_field(record, text_field, place):
                yield extract(value, text_field, place, record)


def _read_parquet(path: Path, text_field: str, extract: FieldReader) -> Iterator[str | None]:
    try:
        import pyarrow  # optional dependency
        import pyarrow.parquet
    except ImportError as error:
        raise LimbeckError("reading .parquet needs pyarrow", hint=INSTALL_DATA_HINT) from error
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        if (column := find_column(text_field, names)) is None:
            raise missing_field_error(text_field, names, str(path), list_text_fields(file.schema_arrow))
        columns = [name for name in (column, *TEMPLATE_FIELDS) if name in names]
        for batch in file.iter_batches(batch_size=1024, columns=columns):
            for record in batch.to_pylist():
                for value in iter_field(record, text_field, str(path)):
                    yield extract(value, text_field, str(path), record)
    except pyarrow.ArrowException as error:
        raise LimbeckError(f"'{path}' is not a whole parquet file: {error}") from error


def _parse_json_lines(path: Path, lines: Iterator[str]) -> Iterator[Record]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        place = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # brackets a thousand deep are a RecursionError
            raise LimbeckError(f"{place}: not JSON: {error}", expected="one JSON object a line") from error
        yield place, _as_record(record, place, "one JSON object a line")


def _parse_json(path: Path, file: Any) -> Iterator[Record]:
    """A .json file holds a list of records, a single one, or one a line."""
    text = file.read()
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if getattr(error, "msg", "") == "Extra data":  # behind the first object
            yield from _parse_json_lines(path, iter(text.split("\n")))
            return
        raise LimbeckError(f"{path}: not JSON: {error}", expected=JSON_RECORDS) from error
    for number, record in enumerate(value if isinstance(value, list) else [value], 1):
        place = f"{path}, record {number}"
        yield place, _as_record(record, place, JSON_RECORDS)


def _as_record(value: Any, place: str, expected: str) -> dict[str, Any]:
    """Return what a JSON file has for a record: an object, or a string, which is a record of the field `text` alone."""
    if isinstance(value, str):
        return {"text": value}
    if not isinstance(value, dict):
        raise LimbeckError(f"{place}: a JSON {type(value).__name__}", expected=expected)
    return value


def _parse_table(path: Path, file: Any) -> Iterator[Record]:
    """A .csv or .tsv file under a header: commas, tabs, or semicolons where the header has no comma."""
    header = next((line for line in file if line.strip()), "")
    delimiter = "\t" if get_format(path) == ".tsv" else ";" if ";" in header and "," not in header else ","
    previous_limit = csv.field_size_limit(MAX_CELL_CHARACTERS)
    try:
        names = next(csv.reader([header], delimiter=delimiter), [])
        reader = csv.DictReader(file, names, delimiter=delimiter, strict=True)
        for record in reader:
            place = f"{path}, line {reader.line_num + 1}"
            if None in record:
                cells = len(names) + len(record[None])
                raise LimbeckError(f"{place}: {cells} cells", expected=f"{len(names)}, as the header has")
            yield place, record
    except csv.Error as error:
        raise LimbeckError(
            f"{path}, line {reader.line_num + 2}: not a valid table: {error}",
            expected=CSV_QUOTING,
            hint=_convert_unquoted(path) if delimiter == "\t" else None,
        ) from error
    finally:
        csv.field_size_limit(previous_limit)


def _convert_unquoted(path: Path) -> str:
    """Return a command that converts a table of tabs in which quotes are letters as any other."""
    opened = f"{'gzip' if path.suffix == '.gz' else 'io'}.open({str(path)!r}, 'rt', encoding='utf-8-sig')"
    rows = f"csv.DictReader({opened}, delimiter='\\t', quoting=csv.QUOTE_NONE)"
    code = f"import csv, gzip, io, json; [print(json.dumps(row)) for row in {rows}]"
    return f"{format_python_command(code)} > {shlex.quote(f'{path}.jsonl')}"


RECORD_READERS: dict[str, Callable[[Path, Any], Iterator[Record]]] = {
    ".jsonl": _parse_json_lines,
    ".ndjson": _parse_json_lines,
    ".json": _parse_json,
    ".csv": _parse_table,
    ".tsv": _parse_table,
}
READERS: dict[str, Callable[[Path, str, FieldReader], Iterator[str | None]]] = {
    ".txt": _read_plain_text,
    ".md": _read_plain_text,
    ".parquet": _read_parquet,
    **dict.fromkeys(RECORD_READERS, _read_records),
}
SUPPORTED_EXTENSIONS = (*READERS, *(f"{name}.gz" for name in READERS if name != ".parquet"))
