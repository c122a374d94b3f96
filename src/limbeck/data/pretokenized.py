"""Tokens that were made before: a folder of .bin or .npy shards and an index.json.

    {"dtype": "uint16", "eos_id": 0, "vocab_size": 49152,
     "shards": [{"file": "train_000.bin", "tokens": 100000000, "sha256": "..."}, "train_001.bin"]}

A .bin file is the ids one after another, little endian; a .npy file is a flat array and knows its own type. Documents
end with `eos_id` (the tokenizer's EOS by default). `shards` may be left out: then all .bin and .npy files, by name.
`tokens` and `sha256` are compared where they are given. A single .npy file needs no index.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.core.console import console
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import compute_sha256
from limbeck.data.special_tokens import prepend_prefix

INDEX = "index.json"
TYPES = ("uint16", "uint32", "int32", "int64")
EXPECTED = 'a folder with index.json: {"dtype": "uint16", "eos_id": 0, "shards": ["a.bin", "b.npy"]}'


@dataclass(frozen=True)
class TokenShard:
    """A file of ids."""

    path: Path
    dtype: str | None  # of a .bin
    tokens: int | None
    sha256: str | None

    def load_ids(self) -> np.ndarray:
        """The ids, a memory map; LimbeckError naming the file where it is missing or damaged."""
        try:
            if self.path.suffix == ".npy":
                ids = np.load(self.path, mmap_mode="r", allow_pickle=False)
            else:
                ids = np.fromfile(self.path, np.dtype(self.dtype).newbyteorder("<"))
                if self.path.stat().st_size % np.dtype(self.dtype).itemsize:
                    raise ValueError("half a token at the end")
        except FileNotFoundError as error:
            raise LimbeckError(
                f"the shard '{self.path}' is not there", hint=f"put it back, or take it out of {INDEX}"
            ) from error
        except (OSError, ValueError, EOFError) as error:
            raise LimbeckError(f"the shard '{self.path}' is damaged: {error}") from error
        if ids.ndim != 1 or ids.dtype.kind not in "ui":
            raise LimbeckError(
                f"'{self.path}' holds {ids.dtype} {list(ids.shape)}", expected="a flat array of token ids"
            )
        if self.tokens is not None and len(ids) != self.tokens:
            raise LimbeckError(
                f"the shard '{self.path}' is damaged: {len(ids):,} tokens", expected=f"{self.tokens:,}, says {INDEX}"
            )
        if self.sha256 is not None and compute_sha256(self.path) != self.sha256:
            raise LimbeckError(f"the shard '{self.path}' is damaged: its sha256 is not the one in {INDEX}")
        return ids


def is_token_source(source: str) -> bool:
    """Is `source` a file or folder of this kind?"""
    path = Path(source).expanduser()
    if path.suffix in (".npy", ".bin"):
        return path.is_file()
    return (path / INDEX).is_file()


def list_token_shards(source: str) -> list[TokenShard]:
    """The shards of a source, in the order of the index."""
    return _read(source)[1]


def _read(source: str) -> tuple[dict[str, Any], list[TokenShard]]:
    path = Path(source).expanduser()
    if path.suffix == ".npy":
        return {}, [TokenShard(path, None, None, None)]
    folder, only = (path.parent, path.name) if path.suffix == ".bin" else (path, None)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        entries = index.get("shards") or sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".npy"))
        entries = [{"file": one} if isinstance(one, str) else dict(one) for one in entries]
        shards = [
            TokenShard(folder / one["file"], index.get("dtype"), one.get("tokens"), one.get("sha256"))
            for one in entries
            if only in (None, one["file"])
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LimbeckError(f"'{folder / INDEX}' cannot be read: {error}", expected=EXPECTED) from error
    if not shards:
        raise LimbeckError(f"'{folder / INDEX}' names no shard{f' {only}' if only else ''}", expected=EXPECTED)
    if index.get("dtype") not in TYPES and any(shard.path.suffix == ".bin" for shard in shards):
        raise LimbeckError(f"'{folder / INDEX}': dtype is {index.get('dtype')!r}", expected=", ".join(TYPES))
    return index, shards


class TokenEncoder:
    """Nothing to encode: documents are cut at EOS, and kept behind what the tokenizer begins a text with."""

    has_mask = False

    def __init__(self, source: str, eos: int, prefix_ids: tuple[int, ...] = ()):
        index, _ = _read(source)
        self.prefix_ids = prefix_ids
        self.eos = int(index.get("eos_id", eos))
        self.vocab = index.get("vocab_size")
        self.settings = {"tokens": True}
        self.seen = self.put = 0

    @property
    def max_token_id(self) -> int:
        """Largest id that can come."""
        return self.vocab - 1 if self.vocab else 2**32 - 1

    def read(self, source: Any, *, allow_empty: bool = False) -> Iterator[bytes]:
        """The documents as uint32."""
        for shard in list_token_shards(source):
            yield from self.read_shard(shard)

    def read_shard(self, shard: TokenShard) -> Iterator[bytes]:
        """The documents of one shard."""
        ids = shard.load_ids()
        ends = np.flatnonzero(ids == self.eos) + 1
        for begin, end in zip([0, *ends.tolist()], [*ends.tolist(), len(ids)]):
            if end > begin:
                yield ids[begin:end].astype("<u4").tobytes()

    def encode(self, documents: list[bytes]) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """The ids, with the beginning where they lack it, and EOS where the last document of a shard does."""
        made: list[tuple[np.ndarray, np.ndarray | None]] = []
        for raw in documents:
            ids = prepend_prefix(np.frombuffer(raw, "<u4").tolist(), self.prefix_ids)
            self.seen, self.put = self.seen + 1, self.put + (len(ids) > len(raw) // 4)
            made.append((np.array(ids if ids[-1] == self.eos else [*ids, self.eos], np.int64), None))
        return made

    def report(self, source: str) -> None:
        """Says how many documents were given a beginning."""
        if self.put:
            console.print(
                f"{self.put:,} of {self.seen:,} documents of '{source}' do not begin with {list(self.prefix_ids)}, which "
                "the teacher's tokenizer puts before a text: put there",
                markup=False,
            )
        self.seen = self.put = 0
