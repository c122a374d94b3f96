"""Cached teacher logits: the teacher's most likely tokens at every position, and their log probabilities, on disk.

    cache = TeacherLogitsCache(folder, vocab_size=49152, top_k=64)
    cache.fill(packed, 0, 400, compute)               # compute(batch) -> index and log probability [B, T, 64] each
    batch = TeacherLogitsDataset(packed, cache, 0, 400).batch(7, 1)  # a batch with `index` and `log_q`

Parts of about 8,192 tokens lie in folders of their own, whole and with checksums or not there: a pass that is killed
resumes at the part that is missing. Token ids take 2 bytes (2.5 where the vocabulary is larger than 65,536), a log
probability 2 (float16): 64 of them are 256 or 288 bytes a token. The remaining mass follows from the rest.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.cache import ensure_cached_folder, load_valid_manifest
from limbeck.core.console import console, progress
from limbeck.core.errors import LimbeckError
from limbeck.data.packing import Batch, PackedDataset

PART_TOKENS = 8192
MAX_VOCAB_SIZE = 1 << 20  # an id is stored in 16 bits and a nibble

TopLogProbs = Callable[[Batch], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class TeacherLogitsBatch(Batch):
    """A batch with the teacher's most likely tokens [B, T, k] and their log probabilities [B, T, k]."""

    index: Tensor
    log_q: Tensor


class TeacherLogitsCache:
    """A folder of parts, by position of their sequences.

    Args:
        folder: of this teacher, text, length, seed and number of tokens.
        vocab_size: of the teacher, at most 2²⁰.
        top_k: k, tokens that are stored.
    """

    def __init__(self, folder: Path, vocab_size: int, top_k: int):
        if vocab_size > MAX_VOCAB_SIZE:
            raise LimbeckError(
                f"a vocabulary of {vocab_size:,} tokens",
                expected=f"at most {MAX_VOCAB_SIZE:,} for a cached teacher",
                hint="--set stages.N.cache_teacher=null",
            )
        self.folder, self.top_k = folder, min(top_k, vocab_size)
        self.wide = vocab_size > 1 << 16
        self._open: tuple[Path, tuple[np.ndarray, np.ndarray]] | None = None
        self._verified: set[Path] = set()

    @property
    def bytes_per_token(self) -> int:
        """Bytes on disk of one token's index and log probabilities."""
        return 4 * self.top_k + (self.wide * (self.top_k + 1)) // 2

    def missing_parts(self, length: int, begin: int, end: int) -> list[tuple[int, int]]:
        """List the parts of sequences `begin` to `end` that are missing or damaged."""
        return [part for part in _parts(length, begin, end) if self._part(length, *part) is None]

    def fill(self, data: PackedDataset, begin: int, end: int, compute: TopLogProbs, name: str = "teacher") -> int:
        """Compute what is missing of sequences `begin` to `end`; return the number of tokens computed."""
        missing = self.missing_parts(data.length, begin, end)
        if not missing:
            return 0
        with progress(f"{name}, once", sum(b - a for a, b in missing), "sequences") as advance:
            for first, last in missing:

                def fill(temporary: Path, first: int = first, last: int = last) -> dict[str, Any]:
                    outputs = []
                    for at in range(first, last):
                        outputs.append([x.cpu() for x in compute(data.batch(at, 1))])
                        advance(1)
                    self._write(temporary, *(torch.cat(tensors) for tensors in zip(*outputs)))
                    return {"sequences": [first, last], "length": data.length, "top": self.top_k}

                size = (last - first) * data.length * self.bytes_per_token
                ensure_cached_folder(
                    self._path(first, last), fill, what="teacher's logits", required_bytes=size, verify=True
                )
        return sum(b - a for a, b in missing) * data.length

    def read(self, length: int, begin: int, end: int, position: int) -> tuple[Tensor, Tensor]:
        """Read index [T, k] int64 and log probability [T, k] float16 of one sequence of the range `begin` to `end`."""
        part = next(p for p in _parts(length, begin, end) if p[0] <= position < p[1])
        path = self._part(length, *part)
        if path is None:
            raise LimbeckError(f"the teacher's logits of sequence {position} are missing from {self.folder}")
        if self._open is None or self._open[0] != path:
            self._open = path, (np.load(path / "index.npy", mmap_mode="r"), np.load(path / "log_q.npy", mmap_mode="r"))
        index, log_q = (x[position - int(path.name.partition("-")[0])] for x in self._open[1])
        return self._unpack(index), torch.from_numpy(np.array(log_q))

    def _path(self, first: int, last: int) -> Path:
        return self.folder / f"{first:09d}-{last:09d}"

    def _part(self, length: int, first: int, last: int) -> Path | None:
        """Return the folder that holds a part: its own, or that of the full-size part around it; None for neither."""
        size = _sequences_per_part(length)
        whole = first - first % size
        for path in dict.fromkeys((self._path(whole, whole + size), self._path(first, last))):
            # Checksums are compared once in a process.
            if path in self._verified or load_valid_manifest(path, verify=True):
                self._verified.add(path)
                return path
        return None

    def _write(self, folder: Path, index: Tensor, log_q: Tensor) -> None:
        """Pack and save index and log_q, both [n, T, k]."""
        low = (index & 0xFFFF).to(torch.int32).numpy().astype("<u2").view(np.uint8)
        if self.wide:
            high = (index >> 16).to(torch.uint8)
            high = torch.nn.functional.pad(high, (0, self.top_k % 2))
            low = np.concatenate([low, (high[..., ::2] | high[..., 1::2] << 4).numpy()], -1)
        np.save(folder / "index.npy", low)
        np.save(folder / "log_q.npy", log_q.to(torch.float16).numpy())

    def _unpack(self, packed: np.ndarray) -> Tensor:
        low = torch.from_numpy(np.ascontiguousarray(packed[:, : 2 * self.top_k]).view("<u2").astype(np.int64))
        if not self.wide:
            return low
        nibbles = torch.from_numpy(np.array(packed[:, 2 * self.top_k :])).long()
        high = torch.stack([nibbles & 15, nibbles >> 4], -1).flatten(1)[:, : self.top_k]
        return low | high << 16


class TeacherLogitsDataset(PackedDataset):
    """Sequences `begin` to `end` of a split, each with the teacher's cached logits."""

    def __init__(self, data: PackedDataset, cache: TeacherLogitsCache, begin: int, end: int):
        self.__dict__.update(vars(data))
        self.cache, self.begin, self.end = cache, begin, end

    def batch(self, position: int, size: int) -> Batch:
        """Return what `PackedDataset.batch` does, with `index` and `log_q` [size, length, k]."""
        cached = [self.cache.read(self.length, self.begin, self.end, position + i) for i in range(size)]
        plain = super().batch(position, size)
        index, log_q = (torch.stack(x) for x in zip(*cached))
        return TeacherLogitsBatch(**vars(plain), index=index, log_q=log_q)


def _sequences_per_part(length: int) -> int:
    return max(1, PART_TOKENS // length)


def _parts(length: int, begin: int, end: int) -> list[tuple[int, int]]:
    """Cut a range at multiples of the part size, so that overlapping ranges share what they can."""
    size = _sequences_per_part(length)
    cuts = [begin, *range(begin - begin % size + size, end, size), end]
    return list(pairwise(cuts))


def report_teacher_cache(cache: TeacherLogitsCache, tokens: int, computed: int, seconds: float) -> None:
    """Print how many of the tokens were computed, and how many were in the cache already."""
    if computed:
        console.print(
            f"cached the teacher's top {cache.top_k} logits of {computed:,} tokens in {seconds:.0f} s, "
            f"{cache.bytes_per_token} bytes a token"
        )
    if computed < tokens:
        console.print(f"the teacher's logits of {tokens - computed:,} tokens are read from the cache")
