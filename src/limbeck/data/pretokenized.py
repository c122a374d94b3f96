"""Token ids as a source: a folder of .bin or .npy shards and an index.json.

    {"dtype": "uint16", "eos_id": 0, "vocab_size": 49152,
     "shards": [{"file": "train_000.bin", "tokens": 100000000, "sha256": "..."}, "train_001.bin"]}

A .bin file is the ids one after another, little endian; a .npy file is a flat array and knows its own type. Documents
end with `eos_id` (the tokenizer's EOS by default). `shards` may be left out: then all .bin and .npy files, by name.
`tokens` and `sha256` are compared where they are given. A single .npy file needs no index.

    for shard in list_token_shards("tokens/"):
        ids = shard.load_ids()
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.core.console import console
from limbeck.core.digests import compute_sha256
from limbeck.core.errors import LimbeckError
from limbeck.data.special_tokens import Encoded, prepend_prefix

INDEX = "index.json"
DTYPES = ("uint16", "uint32", "int32", "int64")
INDEX_FORMAT = 'a folder with index.json: {"dtype": "uint16", "eos_id": 0, "shards": ["a.bin", "b.npy"]}'


@dataclass(frozen=True)
class TokenShard:
    """A file of ids; `dtype` is that of a .bin, `tokens` and `sha256` are what the index says, or None."""

    path: Path
    dtype: str | None
    tokens: int | None
    sha256: str | None

    def load_ids(self) -> np.ndarray:
        """Load the ids [n_tokens], a .npy as a memory map; LimbeckError naming a file that is missing or damaged."""
        try:
            if self.path.suffix == ".npy":
                ids = np.load(self.path, mmap_mode="r", allow_pickle=False)
            else:
                ids = np.fromfile(self.path, np.dtype(self.dtype).newbyteorder("<"))
                if self.path.stat().st_size % np.dtype(self.dtype).itemsize:
                    raise ValueError("half a token at the end")
        except FileNotFoundError as error:
            raise LimbeckError(
                f"the shard '{self.path}' is missing", hint=f"restore it, or remove it from {INDEX}"
            ) from error
        except (OSError, ValueError, EOFError) as error:
            raise LimbeckError(f"the shard '{self.path}' is damaged: {error}") from error
        if ids.ndim != 1 or ids.dtype.kind not in "ui":
            raise LimbeckError(
                f"'{self.path}' holds {ids.dtype} {list(ids.shape)}", expected="a flat array of token ids"
            )
        if self.tokens is not None and len(ids) != self.tokens:
            raise LimbeckError(
                f"the shard '{self.path}' is damaged: {len(ids):,} tokens", expected=f"{self.tokens:,}, as in {INDEX}"
            )
        if self.sha256 is not None and compute_sha256(self.path) != self.sha256:
            raise LimbeckError(f"the shard '{self.path}' is damaged: its sha256 is not the one in {INDEX}")
        return ids


def is_token_source(source: str) -> bool:
    """Return whether `source` is a file or folder of token ids."""
    path = Path(source).expanduser()
    if path.suffix in (".npy", ".bin"):
        return path.is_file()
    return (path / INDEX).is_file()


def list_token_shards(source: str) -> list[TokenShard]:
    """List the shards of a source, in the order of the index."""
    return _read_index(source)[1]


def _read_index(source: str) -> tuple[dict[str, Any], list[TokenShard]]:
    path = Path(source).expanduser()
    if path.suffix == ".npy":
        return {}, [TokenShard(path, None, None, None)]
    folder, only = (path.parent, path.name) if path.suffix == ".bin" else (path, None)
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        entries = index.get("shards") or sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".npy"))
        entries = [{"file": entry} if isinstance(entry, str) else dict(entry) for entry in entries]
        shards = [
            TokenShard(folder / entry["file"], index.get("dtype"), entry.get("tokens"), entry.get("sha256"))
            for entry in entries
            if only in (None, entry["file"])
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LimbeckError(f"'{folder / INDEX}' cannot be read: {error}", expected=INDEX_FORMAT) from error
    if not shards:
        raise LimbeckError(f"'{folder / INDEX}' names no shard{f' {only}' if only else ''}", expected=INDEX_FORMAT)
    if index.get("dtype") not in DTYPES and any(shard.path.suffix == ".bin" for shard in shards):
        raise LimbeckError(f"'{folder / INDEX}': dtype is {index.get('dtype')!r}", expected=", ".join(DTYPES))
    return index, shards


class TokenEncoder:
    """Nothing to encode: ids are cut into documents at EOS, and given the tokenizer's prefix where they lack it.

    Args:
        source: a source of token ids, whose index may name its EOS.
        eos: token that ends a document where the index does not say.
        prefix_ids: what the tokenizer puts before a text.
    """

    has_mask = False

    def __init__(self, source: str, eos: int, prefix_ids: tuple[int, ...] = ()):
        index, _ = _read_index(source)
        self.prefix_ids = prefix_ids
        self.eos = int(index.get("eos_id", eos))
        self.vocab_size = index.get("vocab_size")
        self.settings = {"tokens": True}
        self._documents = self._prefixed = 0

    @property
    def max_token_id(self) -> int:
        """Largest id that can come."""
        return self.vocab_size - 1 if self.vocab_size else 2**32 - 1

    def read(self, source: str | TokenShard, *, allow_empty: bool = False) -> Iterator[bytes]:
        """Yield the documents as uint32."""
        for shard in [source] if isinstance(source, TokenShard) else list_token_shards(source):
            ids = shard.load_ids()
            ends = np.flatnonzero(ids == self.eos) + 1
            for begin, end in zip([0, *ends.tolist()], [*ends.tolist(), len(ids)]):
                if end > begin:
                    yield ids[begin:end].astype("<u4").tobytes()

    def encode(self, documents: list[bytes]) -> list[Encoded]:
        """Return the ids, with the prefix where they lack it, and EOS where the last document of a shard does."""
        encoded: list[Encoded] = []
        for raw in documents:
            ids = prepend_prefix(np.frombuffer(raw, "<u4").tolist(), self.prefix_ids)
            self._documents += 1
            self._prefixed += len(ids) > len(raw) // 4
            encoded.append((np.array(ids if ids[-1] == self.eos else [*ids, self.eos], np.int64), None))
        return encoded

    def find_cut(self, document: bytes, near: int) -> int | None:
        """Cut between two tokens of four bytes."""
        return near // 4 * 4 or None

    def report(self, source: str) -> None:
        """Print how many documents were given the prefix."""
        if self._prefixed:
            console.print(
                f"{self._prefixed:,} of {self._documents:,} documents of '{source}' do not begin with "
                f"{list(self.prefix_ids)}, which the teacher's tokenizer puts before a text: added",
                markup=False,
            )
        self._documents = self._prefixed = 0
