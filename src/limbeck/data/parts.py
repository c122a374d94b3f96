"""The shards of a source: parts that can be read one without the other.

    shards, first = shards_of("big/")
    for document in shards[0].read(encoder):
        ...

What a shard is depends on the source; the table is in docs/data.md.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from limbeck.data import sources
from limbeck.data.encode import Encoder
from limbeck.data.hub import Rows, open_hub, open_saved
from limbeck.data.tokens import is_tokens, token_shards

ROWS = 20_000  # of a dataset on disk that are one shard


@dataclass(frozen=True)
class Shard:
    """A part of a source: its name, its size in bytes or rows, its documents, and the files that they are read from."""

    name: str
    size: int
    read: Callable[[Encoder], Iterator[bytes]]
    files: tuple[Path, ...] = ()


def shards_of(source: str) -> tuple[list[Shard], Any]:
    """The shards of a source in stored order, and something of it whose first record can be looked at."""
    if is_tokens(source):
        ready = token_shards(source)
        sizes = [s.path.stat().st_size if s.path.exists() else 0 for s in ready]
        return [Shard(s.path.name, size, _ids(s), (s.path,)) for s, size in zip(ready, sizes)], source
    root, split = sources._local(source)
    if root is None:
        dataset = open_hub(source, streaming=True)
        n = dataset.num_shards
        parts = [Rows(dataset.shard(num_shards=n, index=i), f"{source}, shard {i}") for i in range(n)]
        return [Shard(_hub_name(dataset, i), 0, _rows(part)) for i, part in enumerate(parts)], Rows(dataset, source)
    if sources._is_saved_dataset(root):
        saved = open_saved(root, split)
        begins = range(0, saved.num_rows, ROWS)
        pieces = [saved.select(range(a, min(a + ROWS, saved.num_rows))) for a in begins]
        rows = [Rows(piece, f"{source}, rows from {a:,}") for a, piece in zip(begins, pieces)]
        tables = tuple(Path(file["filename"]) for file in saved.cache_files)
        names = [f"rows-{a}" for a in begins]
        return [Shard(n, r.dataset.num_rows, _rows(r), tables) for n, r in zip(names, rows)], Rows(saved, source)
    sources.tell_what_is_left_out(source)
    files = sources._files(root, source)
    names = [path.relative_to(root).as_posix() if path != root else path.name for path in files]
    return [Shard(n, p.stat().st_size, _rows(str(p)), (p,)) for n, p in zip(names, files)], source


def _rows(part: Any) -> Callable[[Encoder], Iterator[bytes]]:
    return lambda encoder: encoder.read(part, part=True)


def _ids(shard: Any) -> Callable[[Encoder], Iterator[bytes]]:
    return lambda encoder: encoder.read_shard(shard)  # type: ignore[attr-defined]


def _hub_name(dataset: Any, index: int) -> str:
    """The file of a shard, with the version that the hub has of it, where `datasets` tells."""
    files = getattr(getattr(dataset, "_ex_iterable", None), "kwargs", {}).get("base_files") or []
    return str(files[index]) if len(files) == dataset.num_shards else f"shard-{index}"
