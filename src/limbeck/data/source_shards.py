"""The shards of a source: parts that can be read one without the other.

    shards, first = list_source_shards("big/")
    for document in shards[0].read(encoder):
        ...

What a shard is depends on the source; the table is in docs/data.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.data import documents
from limbeck.data.hub import LoadedDataset, load_hub_dataset, load_saved_dataset
from limbeck.data.pretokenized import is_token_source, list_token_shards
from limbeck.data.tokenization import Encoder

ROWS_PER_SHARD = 20_000  # of a dataset on disk that are one shard


@dataclass(frozen=True)
class SourceShard:
    """A part of a source: its name, its size in bytes or rows, its documents, and the files that they are read from."""

    name: str
    size: int
    read: Callable[[Encoder], Iterator[bytes]]
    files: tuple[Path, ...] = ()


def list_source_shards(source: str) -> tuple[list[SourceShard], Any]:
    """The shards of a source in stored order, and something of it whose first record can be looked at."""
    if is_token_source(source):
        ready = list_token_shards(source)
        sizes = [s.path.stat().st_size if s.path.exists() else 0 for s in ready]
        return [SourceShard(s.path.name, size, _ids(s), (s.path,)) for s, size in zip(ready, sizes)], source
    root, split = documents.resolve_source(source)
    if root is None:
        dataset = load_hub_dataset(source, streaming=True)
        n = dataset.num_shards
        parts = [LoadedDataset(dataset.shard(num_shards=n, index=i), f"{source}, shard {i}") for i in range(n)]
        return [SourceShard(_hub_name(dataset, i), 0, _rows(part)) for i, part in enumerate(parts)], LoadedDataset(
            dataset, source
        )
    if documents.is_saved_dataset(root):
        saved = load_saved_dataset(root, split)
        begins = range(0, saved.num_rows, ROWS_PER_SHARD)
        pieces = [saved.select(range(a, min(a + ROWS_PER_SHARD, saved.num_rows))) for a in begins]
        rows = [LoadedDataset(piece, f"{source}, rows from {a:,}") for a, piece in zip(begins, pieces)]
        tables = tuple(Path(file["filename"]) for file in saved.cache_files)
        names = [f"rows-{a}" for a in begins]
        return [SourceShard(n, r.dataset.num_rows, _rows(r), tables) for n, r in zip(names, rows)], LoadedDataset(
            saved, source
        )
    documents.report_skipped_files(source)
    files = documents.list_source_files(root, source)
    names = [path.relative_to(root).as_posix() if path != root else path.name for path in files]
    return [SourceShard(n, p.stat().st_size, _rows(str(p)), (p,)) for n, p in zip(names, files)], source


def _rows(part: Any) -> Callable[[Encoder], Iterator[bytes]]:
    return lambda encoder: encoder.read(part, allow_empty=True)


def _ids(shard: Any) -> Callable[[Encoder], Iterator[bytes]]:
    return lambda encoder: encoder.read_shard(shard)  # type: ignore[attr-defined]


def _hub_name(dataset: Any, index: int) -> str:
    """The file of a shard, with the version that the hub has of it, where `datasets` tells."""
    files = getattr(getattr(dataset, "_ex_iterable", None), "kwargs", {}).get("base_files") or []
    return str(files[index]) if len(files) == dataset.num_shards else f"shard-{index}"
