"""Documents of a source, whatever it is stored in.

    for text in iter_documents("corpus.jsonl"):
        ...
    key = fingerprint_source("corpus.jsonl")          # changes when the content does
    shards, _ = list_source_shards("big/")            # parts that can be read independently (docs/guides/data.md)

| source | documents |
| --- | --- |
| `notes.txt`, `notes.md` | the whole file is one document |
| `x.jsonl`, `x.ndjson` | one a line, in the field `text_field`; `a.b`: in b of a, or of each item of a list a |
| `x.json` | a list of records, or one a line; a string is a record of one field, `text` |
| `x.csv`, `x.tsv` | one a row under a header, in the column `text_field` |
| `x.parquet` | one a row, in the column `text_field` |
| any of these but parquet with `.gz` behind it | what is inside |
| a folder | all such files in it and below, by name; see `_survey` for what is skipped |
| a folder of `datasets.save_to_disk` | one a row; `folder@split` where there are several splits |
| `owner/name`, `owner/name:config`, each with or without `@split` | one a row of the Hugging Face dataset |
| a folder with `index.json`, a `.npy` file | token ids (`limbeck.data.pretokenized`) |
| `embedded`, `embedded:TIER` (quick, pypi, held-out-wikipedia) | the embedded text (`limbeck.data.offline.embedded`) |
| `memory:KEY` | a text that was given in Python (`limbeck.data.in_memory`) |

Documents that are empty or only white space are skipped and counted. With `chat` a document is a conversation: its
messages as JSON, with the row's tools where it has any.
"""

import glob
import hashlib
import json
import shlex
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from limbeck.core.console import console, print_once
from limbeck.core.digests import compute_sha256
from limbeck.core.errors import LimbeckError, suggest_hub_name
from limbeck.data.hub import (
    HUB_NAME_PATTERN,
    SUPPORTED_SOURCES,
    LoadedDataset,
    get_hub_shard_name,
    is_saved_dataset,
    iter_dataset_texts,
    load_hub_dataset,
    load_saved_dataset,
)
from limbeck.data.in_memory import MEMORY_PREFIX, find_stored_text
from limbeck.data.offline import embedded
from limbeck.data.pretokenized import TokenShard, is_token_source, list_token_shards
from limbeck.data.records import (
    MESSAGES_FIELD,
    READERS,
    SUPPORTED_EXTENSIONS,
    FieldReader,
    contains_records,
    convert_read_errors,
    extract_messages,
    extract_text,
    find_column,
    get_extension,
    get_field_names,
    get_format,
    permission_error,
    read_file,
)

# Markdown of these names describes its folder and is no text to train on.
METADATA_FILES = ("readme", "license", "licence", "changelog", "contributing", "code_of_conduct")
ROWS_PER_SHARD = 20_000  # rows of a dataset on disk that make one shard


def iter_documents(
    source: str | LoadedDataset, *, text_field: str = "text", chat: bool = False, allow_empty: bool = False
) -> Iterator[str]:
    """Yield the documents of `source` in stored order.

    Args:
        source: see the table of this module.
        text_field: the field or column of the text.
        chat: the field holds conversations, lists of {"role": ..., "content": ...}; each comes as JSON.
        allow_empty: the source is a part of one, and may be empty.

    Raises:
        LimbeckError: the source is missing, unreadable or empty, or has no such field.
    """
    label = source.label if isinstance(source, LoadedDataset) else source
    documents = empty = 0
    for text in _iter_texts(source, text_field, extract_messages if chat else extract_text):
        if text and not text.isspace():
            documents += 1
            yield text
        else:
            empty += 1
    if not documents and not allow_empty:
        raise LimbeckError(f"no text in '{label}'", expected="at least one document that is not empty")
    if empty:
        console.print(f"'{label}': skipped {empty:,} of {documents + empty:,} documents, which are empty", markup=False)


def _iter_texts(source: str | LoadedDataset, text_field: str, extract: FieldReader) -> Iterator[str | None]:
    if isinstance(source, LoadedDataset):
        yield from iter_dataset_texts(source.dataset, text_field, extract, source.label)
        return
    root, split = resolve_source(source)
    if root is None:
        yield from iter_dataset_texts(load_hub_dataset(source), text_field, extract, source)
    elif is_saved_dataset(root):
        yield from iter_dataset_texts(load_saved_dataset(root, split), text_field, extract, source)
    else:
        without_documents = []
        for path in list_source_files(root, source):
            has_documents = False
            for text in read_file(path, text_field, extract):
                has_documents = True
                yield text
            if not has_documents and path != root:
                without_documents.append(path.name)
        if without_documents:
            names = ", ".join(without_documents[:4]) + (" ..." if len(without_documents) > 4 else "")
            console.print(f"'{source}': {len(without_documents):,} files contain no documents: {names}", markup=False)


def has_messages(source: str | LoadedDataset, text_field: str) -> bool:
    """Return whether the first record has the field `messages`, and not `text_field`."""
    if isinstance(source, LoadedDataset):
        fields = list(source.dataset.column_names or next(iter(source.dataset), {}))
    else:
        root, split = resolve_source(source)
        if root is None:
            fields = list(load_hub_dataset(source).column_names)
        elif is_saved_dataset(root):
            fields = list(load_saved_dataset(root, split).column_names)
        else:
            fields = get_field_names(list_source_files(root, source)[0])
    return MESSAGES_FIELD in fields and find_column(text_field, fields) is None


@dataclass(frozen=True)
class SourceShard:
    """A part of a source that can be read without the others.

    name: of the shard, stable over time.
    size: bytes of a file, rows of a dataset on disk, 0 where neither is known.
    part: what an encoder reads it from.
    files: the files that it is read from; none for a dataset on the hub.
    """

    name: str
    size: int
    part: str | LoadedDataset | TokenShard
    files: tuple[Path, ...] = ()


def list_source_shards(source: str) -> tuple[list[SourceShard], str | LoadedDataset]:
    """List the shards of a source in stored order, with something whose first record shows the fields of all."""
    if is_token_source(source):
        tokens = list_token_shards(source)
        # A shard that is missing is named when it is read.
        sizes = [shard.path.stat().st_size if shard.path.exists() else 0 for shard in tokens]
        return [SourceShard(s.path.name, size, s, (s.path,)) for s, size in zip(tokens, sizes)], source
    root, split = resolve_source(source)
    if root is None:
        hub = load_hub_dataset(source, streaming=True)
        n = hub.num_shards
        rows = [LoadedDataset(hub.shard(num_shards=n, index=i), f"{source}, shard {i}") for i in range(n)]
        shards = [SourceShard(get_hub_shard_name(hub, i), 0, part) for i, part in enumerate(rows)]
        return shards, LoadedDataset(hub, source)
    if is_saved_dataset(root):
        saved = load_saved_dataset(root, split)
        tables = tuple(Path(file["filename"]) for file in saved.cache_files)
        shards = []
        for begin in range(0, saved.num_rows, ROWS_PER_SHARD):
            selected = saved.select(range(begin, min(begin + ROWS_PER_SHARD, saved.num_rows)))
            part = LoadedDataset(selected, f"{source}, rows from {begin:,}")
            shards.append(SourceShard(f"rows-{begin}", selected.num_rows, part, tables))
        return shards, LoadedDataset(saved, source)
    report_skipped_files(source)
    files = list_source_files(root, source)
    return [SourceShard(_relative_name(p, root), p.stat().st_size, str(p), (p,)) for p in files], source


def fingerprint_source(source: str) -> str:
    """Hash the content of `source` to a hex key: all its bytes, or the dataset's name and version.

    Raises:
        LimbeckError: as `iter_documents`, where the source is missing or cannot be read.
    """
    if is_token_source(source):
        lines = [f"{shard.path.name} {shard.dtype} {compute_sha256(shard.path)}\n" for shard in _check_shards(source)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    root, split = resolve_source(source)
    if root is None:
        dataset = load_hub_dataset(source)
        return hashlib.sha256(f"{source} {dataset._fingerprint}".encode()).hexdigest()
    digest = hashlib.sha256((split or "").encode())
    report_skipped_files(source)
    for path in list_source_files(root, source):
        with convert_read_errors(path):
            digest.update(f"{get_extension(path)} {compute_sha256(path)}\n".encode())
    return digest.hexdigest()


def is_subset_of(source: str, whole: str, content: str | None = None) -> bool:
    """Return whether `whole` has all files of `source` by content; for other sources the fingerprints must agree.

    Args:
        content: the fingerprint that `whole` had, for where it cannot be read any more.
    """
    with suppress(OSError):
        if source == whole or Path(source).expanduser().samefile(Path(whole).expanduser()):
            return True
    try:
        return (hashes := _hash_files(source)) <= _hash_files(whole) and bool(hashes)
    except LimbeckError:
        try:
            return content is not None and fingerprint_source(source) == content
        except LimbeckError:  # opening it for real says what is wrong with it
            return False


def _hash_files(source: str) -> set[str]:
    """The fingerprint alone where the source is a dataset, a split of one, or token ids."""
    root, split = (None, None) if is_token_source(source) else resolve_source(source)
    if root is None or split is not None or is_saved_dataset(root):
        return {fingerprint_source(source)}
    hashes = set()
    for path in list_source_files(root, source):
        with convert_read_errors(path):
            hashes.add(compute_sha256(path))
    return hashes


def count_stored_bytes(source: str) -> int:
    """Count the bytes on disk of a local source (compressed as stored); 0 for a hub dataset."""
    if is_token_source(source):
        return sum(shard.path.stat().st_size for shard in _check_shards(source))
    root, _ = resolve_source(source)
    return sum(path.stat().st_size for path in list_source_files(root, source)) if root is not None else 0


def get_file_sizes(source: str) -> dict[str, int]:
    """Return the files of a local source with their sizes in bytes, and how many others its folder has of each kind.

    The keys of the latter begin with "left out: ". Nothing for a dataset on the hub.
    """
    if is_token_source(source):
        return {shard.path.name: shard.path.stat().st_size for shard in list_token_shards(source)}
    root, _ = resolve_source(source)
    if root is None:
        return {}
    files, skipped = _survey(root)
    sizes = {_relative_name(path, root): path.stat().st_size for path in files}
    return sizes | {f"left out: {kind}": count for kind, count in skipped.items()}


def _check_shards(source: str) -> list[TokenShard]:
    """Loading a shard names one that is missing or of the wrong size."""
    shards = list_token_shards(source)
    for shard in shards:
        shard.load_ids()
    return shards


def resolve_source(source: str) -> tuple[Path | None, str | None]:
    """Return (path, split) of a source on this machine, (None, None) for a hub name; LimbeckError for neither."""
    if source == "embedded" or source.startswith("embedded:"):
        return embedded.ensure_embedded_corpus(source.partition(":")[2] or "quick", verify=True), None
    if source.startswith(MEMORY_PREFIX):
        return find_stored_text(source), None
    path = Path(source).expanduser()
    try:
        if path.exists():
            return path, None
        folder, at, split = source.rpartition("@")
        if at and Path(folder).expanduser().is_dir():
            return Path(folder).expanduser(), split
    except PermissionError as error:
        raise permission_error(path) from error
    if (
        HUB_NAME_PATTERN.fullmatch(source)
        and not source.startswith(".")
        and not source.lower().endswith(SUPPORTED_EXTENSIONS)
    ):
        return None, None
    raise LimbeckError(
        f"there is no file or folder '{source}'", expected=SUPPORTED_SOURCES, hint=_suggest_source(source)
    )


def _suggest_source(source: str) -> str | None:
    """Return what to give for the address of a dataset on the hub, a pattern or a list of files; None for all else."""
    if (page := suggest_hub_name(source)) is not None:
        return f"--data {page}"
    names = glob.glob(str(Path(source).expanduser())) if glob.has_magic(source) else source.split(",")
    names = sorted(name for name in names if Path(name).expanduser().exists())
    if not names or (len(names) == 1 and not glob.has_magic(source)):
        return None
    if len(names) > 4:
        return f"a folder with these {len(names):,} files in it"
    return f"--set {shlex.quote('data.sources=' + json.dumps([{'source': name} for name in names]))}"


def report_skipped_files(source: str) -> None:
    """Print in one line what is read of a folder, where it holds anything else too."""
    root, _ = resolve_source(source)
    if root is None or is_saved_dataset(root):
        return
    files, skipped = _survey(root)
    if skipped:
        read = ", ".join(f"{count:,} {kind}" for kind, count in sorted(Counter(map(get_extension, files)).items()))
        rest = ", ".join(f"{count:,} {kind}" for kind, count in skipped.items())
        print_once(f"'{source}': read: {read}; left out: {rest}")


def list_source_files(root: Path, source: str) -> list[Path]:
    """List the files that are read; LimbeckError where there are none."""
    if root.is_file():
        if get_format(root) not in READERS:
            extension = get_extension(root)
            raise LimbeckError(
                f"'{root}' {f'is a {extension} file' if extension else 'has no file extension'}",
                expected=SUPPORTED_SOURCES,
            )
        return [root]
    files, skipped = _survey(root)
    if not files:
        kinds = ", ".join(list(skipped)[:8]) or "nothing"
        raise LimbeckError(f"no text files in the folder '{source}', only: {kinds}", expected=SUPPORTED_SOURCES)
    return files


def _relative_name(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if path != root else path.name


def _survey(root: Path) -> tuple[list[Path], dict[str, int]]:
    """List the files of a folder that are read, by name, and count the others by kind.

    Links are followed, and what several names lead to is read once. Skipped are hidden files and folders, empty
    files, kinds that cannot be read, `.json` that holds no records, and `.md` that is about the folder (README).

    Raises:
        LimbeckError: a link leads nowhere, or a folder must not be read.
    """
    if root.is_file():
        return [root], {}
    skipped: Counter[str] = Counter()
    paths = sorted(_walk(root, {root.resolve()}, skipped))
    if is_saved_dataset(root):
        return paths, {}
    readable = [path for path in paths if get_format(path) in READERS]
    skipped.update(get_extension(path) or path.name for path in paths if get_format(path) not in READERS)
    chosen = []
    for path in readable:
        with convert_read_errors(path):
            metadata = get_format(path) == ".md" and path.stem.lower() in METADATA_FILES and len(readable) > 1
            if path.stat().st_size == 0:
                skipped[f"empty {get_extension(path)}"] += 1
            elif metadata or (get_format(path) == ".json" and not contains_records(path)):
                skipped[get_extension(path)] += 1
            else:
                chosen.append(path)
    return chosen, dict(sorted(skipped.items()))


def _walk(folder: Path, seen: set[Path], skipped: Counter[str]) -> Iterator[Path]:
    with convert_read_errors(folder):
        # Real files come before links, so that a file keeps its own name where a link leads to it.
        entries = sorted(folder.iterdir(), key=lambda path: (path.is_symlink(), path.name))
    for path in entries:
        if path.name.startswith("."):
            skipped["hidden"] += 1
            continue
        with convert_read_errors(path):
            exists, real = path.exists(), path.resolve() if path.exists() else path
        if not exists:
            raise LimbeckError(
                f"the link '{path}' is broken, it points to {path.readlink()}",
                expected="files that exist (mount the disk, or download what is stored elsewhere)",
                hint=f"rm {shlex.quote(str(path))}   (to go on without it)",
            )
        if real in seen:
            skipped["linked twice"] += 1
            continue
        seen.add(real)
        if path.is_dir():
            yield from _walk(path, seen, skipped)
        elif path.is_file():
            yield path
