"""The held-out split: which documents are never trained on.

    split_hash, rank = hash_document(raw)
    sides = select_held_out(split_hashes, share=0.02)           # int8 [n], 1: held out

A hash of a document's text decides, so more data never moves a document across the split and duplicates stay together.
Where that leaves one side next to nothing (`is_split_useless`), `force_held_out` takes the first ones in the order of
the hashes, or, of a single text, its end. `limbeck.data.token_store` writes both sides.
"""

import hashlib
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.core.console import print_once

MIN_HELD_BYTES = 4_096  # by the hash: less measures nothing, if it is less than a hundredth of the text too
MIN_FORCED_BYTES = 16_384  # least to hold out of a text that has to be cut, if that is no more than a tenth of it


def hash_document(raw: bytes) -> tuple[int, int]:
    """Return two independent numbers below 2**64 from a document's bytes: its side of the split, its rank in the order.

    A document is held out where the first is below `share * 2**64`.
    """
    digest = hashlib.blake2b(raw, digest_size=16).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")


def select_held_out(split_hashes: array, share: float) -> np.ndarray:
    """Return int8 [n]: 1 for each document whose first hash is below the share that is held out, else 0."""
    return (np.frombuffer(split_hashes, np.uint64) < np.uint64(int(share * 2**64))).astype(np.int8)


def is_split_useless(starts: array, sides: np.ndarray) -> bool:
    """Tell whether the hash leaves nothing to train on, or too little to measure on: of few documents one short one.

    Args:
        starts: byte offsets [n + 1] of the documents.
        sides: 1 where a document is held out [n].
    """
    held = int(np.diff(np.frombuffer(starts, np.int64))[sides == 1].sum())
    return bool(sides.all()) or held < max(min(MIN_HELD_BYTES, starts[-1] // 100), 1)


def force_held_out(
    spool: Path,
    starts: array,
    order: np.ndarray,
    share: float,
    find_cut: Callable[[bytes, int], int | None],
    max_tokens: int | None,
) -> tuple[array, np.ndarray, np.ndarray, str | None]:
    """Hold something out where the hash of so few documents has put all, or nearly all, on one side.

    The first documents in the order by hash while they fit, those that are the same together; where too few do, the
    end of the longest, cut at a blank line, a line or a space where there is one. All that comes first in the order, so
    that no limit on tokens cuts it off.

    Args:
        spool: the file of all documents, one after another.
        starts: byte offsets [n + 1] of the documents in it.
        order: their order by hash [n].
        share: of the text that is to be held out.
        find_cut: see `Encoder.find_cut`.
        max_tokens: limit of both splits together.

    Returns:
        Offsets [n + 1], order [n], and 1 where a document is held out [n], with one document more where one was cut;
        and what was held out in words, None where a single document cannot be cut.
    """
    sides = np.zeros(len(order), np.int8)
    sizes, total = np.diff(np.frombuffer(starts, np.int64)), starts[-1]
    usable = min(total, 3 * max_tokens) if max_tokens else total  # about three bytes a token
    target = max(round(share * usable), min(MIN_FORCED_BYTES, usable // 10))
    held = documents = begin = 0
    with open(spool, "rb") as file:

        def read(i: int) -> bytes:
            file.seek(starts[i])
            return file.read(int(sizes[i]))

        while begin < len(order) and held < target:
            end = begin + 1  # documents of one hash are neighbors
            while end < len(order) and read(order[end]) == read(order[begin]):
                end += 1
            size = int(sizes[order[begin:end]].sum())
            if held + size <= 2 * target:
                sides[order[begin:end]] = 1
                held, documents = held + size, documents + end - begin
            begin = end
        whole = f"the first {documents:,} of {len(order):,} documents by their hash" if documents else None
        if held >= target // 2:
            return starts, order, sides, whole
        longest = int(np.argmax(np.where(sides, 0, sizes)))
        size = int(sizes[longest])
        cut = find_cut(read(longest), max(size - (target - held), size // 2))
    if cut is None:
        return starts, order, sides, whole
    cut_starts = array("q", starts)
    cut_starts.insert(longest + 1, starts[longest] + cut)
    order = np.insert(np.where(order > longest, order + 1, order), 0, longest + 1)
    words = f"the last {sizes[longest] - cut:,} of the {sizes[longest]:,} bytes of the longest document"
    return cut_starts, order, np.insert(sides, longest + 1, 1), f"{words}, and {whole}" if whole else words


def report_forced_split(manifest: dict[str, Any], source: str) -> None:
    """Print what is held out where hardly anything was by its hash."""
    if manifest.get("parted"):
        words = f"the split by hash would leave one side next to nothing, so held out: {manifest['parted']}"
        print_once(f"'{source}': {words}")
