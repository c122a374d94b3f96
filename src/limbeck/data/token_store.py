"""Token store: a source tokenized once into memory-mapped files, split into train and held-out by document.

    store = build_token_store("corpus.jsonl", tokenizer, length=512, vocab_size=model.config.vocab_size)
    store.train.tokens          # uint16 or uint32 [n_tokens], a memory map
    store.held_out.offsets      # int64 [n_documents + 1]: document i is tokens[offsets[i]:offsets[i + 1]]

Every document begins as the tokenizer begins a text and ends with EOS. A hash of its text decides on which side of the
split it falls (`limbeck.data.held_out`) and where in the order it stands, so more data never moves a document across
the split, duplicates stay together, and a limit on tokens takes a fair mix of all sources. The files lie in the cache
under a key of content, tokenizer and settings. The sequence length is not part of that key, because nothing stored
depends on it (`limbeck.data.packing` cuts the sequences): two lengths share one store. Checksums are compared at each
opening; a damaged store is made again.
"""

import mmap
import shlex
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.core.cache import ensure_cached_folder
from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import cache_root, check_disk_space
from limbeck.data.documents import count_stored_bytes, fingerprint_source, get_file_sizes
from limbeck.data.held_out import force_held_out, hash_document, is_split_useless, report_forced_split, select_held_out
from limbeck.data.tokenization import Encoder, collect_store_settings, create_encoder, hash_settings

SPLITS = ("train", "held_out")
BATCH_CHARACTERS = 1_000_000  # of text that is handed to the tokenizer at once
MIN_SEQUENCES = 2  # that each split must have room for
MIN_SEQ_LEN = 16  # tokens in a sequence, as in recipes
LIKELY_EOS_TOKENS = ("</s>", "<|endoftext|>", "<eos>", "<|im_end|>", "<|end_of_text|>", "[EOS]", "[SEP]")


@dataclass(frozen=True)
class Split:
    """Documents one after another.

    Args:
        name: "train" or "held_out".
        tokens: uint16 or uint32 [n_tokens], a read-only memory map.
        offsets: int64 [n_documents + 1], the first token of each document and the end of the last.
        mask: uint8 [n_tokens], 1 for a token that is a target; None: all of them are.
        prefix_ids: ids that every document begins with, and a sequence too that begins inside a document.
    """

    name: str
    tokens: np.ndarray
    offsets: np.ndarray
    mask: np.ndarray | None = None
    prefix_ids: tuple[int, ...] = ()

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.offsets) - 1


@dataclass(frozen=True)
class TokenStore:
    """A tokenized source: two splits, the EOS id and, for the run's manifest, the cache key and `get_file_sizes`."""

    source: str
    folder: Path
    key: str
    eos_id: int
    train: Split
    held_out: Split
    files: dict[str, int]


def build_token_store(
    source: str,
    tokenizer: Any,
    *,
    length: int,
    held_out: float = 0.02,
    max_tokens: int | None = None,
    cache: Path | None = None,
    text_field: str = "text",
    eos_id: int | None = None,
    vocab_size: int | None = None,
    chat: bool | None = False,
) -> TokenStore:
    """Open the tokens of `source`; tokenize it first if they are not in the cache.

    Args:
        source: see `limbeck.data.documents`.
        tokenizer: a tokenizer of transformers.
        length: tokens in a sequence; each split must have room for at least two of them.
        held_out: share of the documents that is kept from training; 0 for none.
        max_tokens: stop after this many (both splits together); the last document is cut there.
        cache: folder of token stores; `cache_root() / "tokens"` by default.
        text_field: field or column of the text.
        eos_id: token that ends a document; the tokenizer's by default.
        vocab_size: rows of the teacher's embedding table; a token id beyond it is an error.
        chat: the records are conversations, whose answers are the targets; None: where they have `messages`.

    Raises:
        LimbeckError: as `iter_documents`; also too few tokens, no EOS, ids beyond `vocab_size`, a disk without room.
    """
    if length < 1 or not 0 <= held_out < 1 or (max_tokens is not None and max_tokens < 1):
        raise LimbeckError(
            f"length={length}, held_out={held_out}, max_tokens={max_tokens}",
            expected="length and max_tokens of at least 1, held_out from 0 to less than 1",
        )
    eos = resolve_eos_id(tokenizer, eos_id)
    check_token_ids(eos, vocab_size)
    encoder = create_encoder(source, tokenizer, int(eos), text_field, chat)
    settings = {
        "content": fingerprint_source(source),
        **collect_store_settings(encoder, tokenizer, text_field, held_out),
        "max_tokens": max_tokens,
    }
    key = hash_settings(settings)
    folder = (cache or cache_root() / "tokens") / key

    def fill(temporary: Path) -> dict[str, Any]:
        counts = tokenize_documents(temporary, encoder.read(source), encoder, settings, source, vocab_size=vocab_size)
        return {"source": source, **settings, **counts}

    # Reading spools the text beside the tokens, so that it can be tokenised in the order of the hashes.
    manifest = ensure_cached_folder(
        folder, fill, what=f"tokens of {source}", required_bytes=2 * count_stored_bytes(source), verify=True
    )
    check_token_ids(manifest["max_id"], vocab_size)
    splits = [open_split(folder, name, manifest["dtype"], encoder.prefix_ids) for name in SPLITS]
    report_forced_split(manifest, source)
    check_token_count(splits if held_out else splits[:1], source, length, max_tokens)
    return TokenStore(source, folder, key, eos, splits[0], splits[1], get_file_sizes(source))


def tokenize_documents(
    folder: Path,
    documents: Iterator[bytes],
    encoder: Encoder,
    settings: dict[str, Any],
    source: str,
    *,
    vocab_size: int | None = None,
    quiet: bool = False,
    check_cancelled: Callable[[], None] = lambda: None,
    allow_forced_split: bool = True,
) -> dict[str, Any]:
    """Write tokens, offsets and, for conversations, masks of both splits into `folder`.

    Args:
        documents: as `encoder.read` gives them.
        settings: held_out and, if there is a limit, max_tokens.
        source: for messages.
        quiet: no progress bar (there is another one, or a thread in the background does this).
        check_cancelled: called between the parts of the work; may raise to end it.
        allow_forced_split: hold something out even where the hash leaves one side of the split next to nothing.

    Returns:
        What the manifest records of them.
    """
    limit = settings.get("max_tokens")
    show = _no_progress if quiet else progress
    dtype = np.dtype("<u2" if encoder.max_token_id < 65536 else "<u4")
    spool = folder / "text"
    starts, order, sides = _spool(spool, documents, settings["held_out"], show, check_cancelled)
    forced = None
    if allow_forced_split and settings["held_out"] and len(order) and is_split_useless(starts, sides):
        starts, order, sides, forced = force_held_out(
            spool, starts, order, settings["held_out"], encoder.find_cut, limit
        )
    # An upper bound for the check, as a token of ordinary text is more than two bytes of it.
    expected_bytes = min(limit or starts[-1], starts[-1] // 2) * dtype.itemsize + 8 * len(order)
    check_disk_space(folder, int(expected_bytes), f"tokens of {source}")

    offsets = {name: array("q", [0]) for name in SPLITS}
    written = read = shown = max_id = 0
    total, unit = (limit, "tokens") if limit else (starts[-1] // 1000, "kB")
    with ExitStack() as stack:
        text: Any = b""  # an empty file cannot be mapped
        if starts[-1]:
            file = stack.enter_context(open(spool, "rb"))
            text = stack.enter_context(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        files = {name: stack.enter_context(open(folder / f"{name}.tokens", "wb")) for name in SPLITS}
        masks = {name: stack.enter_context(open(folder / f"{name}.mask", "wb")) for name in SPLITS if encoder.has_mask}
        advance = stack.enter_context(show("tokenize", total=total, unit=unit))
        for batch in _batch_documents(starts, order):
            check_cancelled()
            for i, (ids, mask) in zip(batch, encoder.encode([text[starts[i] : starts[i + 1]] for i in batch])):
                if limit is not None:
                    ids = ids[: limit - written]
                if not len(ids):
                    continue
                max_id = max(max_id, int(ids.max()))
                check_token_ids(max_id, vocab_size)
                split = SPLITS[sides[i]]
                files[split].write(ids.astype(dtype).tobytes())
                if mask is not None:
                    masks[split].write(mask[: len(ids)].astype(np.uint8).tobytes())
                offsets[split].append(offsets[split][-1] + len(ids))
                written += len(ids)
            read += sum(starts[i + 1] - starts[i] for i in batch)
            now = written if limit else read // 1000
            advance(now - shown, note=f"{written / 1e6:.2f} M tokens")
            shown = now
            if written == limit:
                break
    spool.unlink()
    for name in SPLITS:
        np.frombuffer(offsets[name], np.int64).astype("<i8").tofile(folder / f"{name}.offsets")
    encoder.report(source)
    return {
        "dtype": dtype.str,
        "parted": forced,
        "max_id": max_id,
        "documents": {name: len(offsets[name]) - 1 for name in SPLITS},
        "tokens": {name: offsets[name][-1] for name in SPLITS},
    }


@contextmanager
def _no_progress(*_: Any, **__: Any) -> Iterator[Any]:
    yield lambda amount=1, note="": None


def _spool(
    path: Path,
    documents: Iterator[bytes],
    held_out: float,
    show: Callable[..., Any],
    check_cancelled: Callable[[], None],
) -> tuple[array, np.ndarray, np.ndarray]:
    """Write all documents one after another, so that they can be tokenized in the order of their hashes.

    Returns:
        Byte offsets [n + 1] of the documents, their order by hash [n], and 1 where a document is held out, else 0 [n].
    """
    starts, split_hashes, ranks = array("q", [0]), array("Q"), array("Q")
    with open(path, "wb") as file, show("read", total=None, unit="documents") as advance:
        for raw in documents:
            split_hash, rank = hash_document(raw)
            split_hashes.append(split_hash)
            ranks.append(rank)
            file.write(raw)
            starts.append(starts[-1] + len(raw))
            if len(ranks) % 1000 == 0:
                check_cancelled()
                advance(1000)
        advance(len(ranks) % 1000)
    order = np.argsort(np.frombuffer(ranks, np.uint64), kind="stable")
    return starts, order, select_held_out(split_hashes, held_out)


def _batch_documents(starts: array, order: np.ndarray) -> Iterator[list[int]]:
    batch, size = [], 0
    for i in order.tolist():
        batch.append(i)
        size += starts[i + 1] - starts[i]
        if size >= BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def resolve_eos_id(tokenizer: Any, eos_id: int | None = None) -> int:
    """Return the token that ends a document: the given one, or the tokenizer's EOS.

    Raises:
        LimbeckError: it has none.
    """
    eos = tokenizer.eos_token_id if eos_id is None else eos_id
    if eos is not None:
        return int(eos)
    vocab = tokenizer.get_vocab()
    likely = next(name for name in [*LIKELY_EOS_TOKENS, *tokenizer.all_special_tokens, *vocab] if name in vocab)
    folder = str(getattr(tokenizer, "name_or_path", "")) or "the teacher's folder"
    code = (
        f"from transformers import AutoTokenizer; t = AutoTokenizer.from_pretrained({folder!r}); "
        f"t.eos_token = {likely!r}; t.save_pretrained({folder!r})"
    )
    raise LimbeckError(
        "the tokenizer has no end-of-sequence token (EOS), so nothing can end a document",
        expected="eos_token in tokenizer_config.json",
        hint=f"python -c {shlex.quote(code)}",
    )


def open_split(folder: Path, name: str, dtype: str, prefix_ids: tuple[int, ...] = ()) -> Split:
    """Open a split of a published folder."""

    def map_file(path: Path, dtype: str) -> np.ndarray:  # an empty file cannot be mapped
        return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)

    mask = folder / f"{name}.mask"
    return Split(
        name,
        map_file(folder / f"{name}.tokens", dtype),
        np.fromfile(folder / f"{name}.offsets", "<i8"),
        map_file(mask, "u1") if mask.exists() else None,
        prefix_ids,
    )


def check_token_ids(max_id: int, vocab_size: int | None) -> None:
    """Raise LimbeckError where the teacher has no embedding for a token."""
    if vocab_size is not None and max_id >= vocab_size:
        raise LimbeckError(
            f"the tokenizer does not match the teacher: token id {max_id}, embedding table of {vocab_size} rows",
            expected="the tokenizer that the teacher was trained with",
        )


def check_token_count(splits: list[Split], source: str, length: int, max_tokens: int | None = None) -> None:
    """Raise LimbeckError where a split has no room for `MIN_SEQUENCES`."""
    needed = MIN_SEQUENCES * length + 1
    if all(split.n_tokens >= needed for split in splits):
        return
    smallest = min(splits, key=lambda split: split.n_tokens)
    fitting_length = (smallest.n_tokens - 1) // MIN_SEQUENCES
    hints = [f"--set data.seq_len={fitting_length}"] if fitting_length >= MIN_SEQ_LEN else []
    total = sum(split.n_tokens for split in splits)
    if smallest.name == "held_out" and 4 * needed < total:
        hints.append(f"--set data.held_out={2 * needed / total:.2g}")
    if max_tokens is not None and total >= max_tokens:
        hints.append("--set data.max_tokens=null")
    counts = ", ".join(f"{split.n_documents:,} {split.name.replace('_', ' ')}" for split in splits)
    raise LimbeckError(
        f"'{source}' gives {smallest.n_tokens:,} {smallest.name} tokens in {smallest.n_documents:,} documents "
        f"(split by document: {counts})",
        expected=f"at least {needed:,} tokens: {MIN_SEQUENCES} sequences of {length}; more text",
        hint="   or   ".join(hints) or None,
    )
