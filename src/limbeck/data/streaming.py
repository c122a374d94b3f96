"""Streaming: a source too large to tokenize first is tokenized shard by shard during training, in bounded disk space.

    stream = TokenStream("big/", tokenizer, length=2048, vocab_size=49152, cache_gb=20)
    batch = StreamingDataset(stream, length=2048, seed=1).batch(position, size=8)

A shard is a file of a folder, a part of a Hugging Face dataset (read with streaming=True), or a file of token ids; see
`limbeck.data.documents.list_source_shards`. The order of the shards is drawn from (seed, epoch), that of the documents
inside a shard too, and every shard is cut into sequences on its own: so a batch is a function of its position here as
well. While one shard is trained on, the next is tokenized in a thread.

In the cache, under a key of source, shards, tokenizer and settings:

    shard-000003/           tokens of a shard, whole and with checksums; dropped when the space runs out
    index/000003.json       its counts and checksums, which stay: so resuming reads nothing of what came before
    held_out-8192/          held-out documents of the first shards, which stay

Where a file was edited since it was tokenized, as its checksum tells, the tokens get another key.
"""

import atexit
import hashlib
import json
import os
import shutil
import threading
import uuid
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.core.cache import MANIFEST, ensure_cached_folder, load_valid_manifest
from limbeck.core.console import console
from limbeck.core.digests import compute_sha256
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import atomic_write_text, cache_root
from limbeck.data.documents import list_source_shards
from limbeck.data.held_out import report_forced_split
from limbeck.data.packing import Batch, PackedDataset, SequenceDataset, check_position, concatenate_batches, splitmix64
from limbeck.data.token_store import (
    Split,
    check_token_count,
    check_token_ids,
    open_split,
    resolve_eos_id,
    tokenize_documents,
)
from limbeck.data.tokenization import collect_store_settings, create_encoder, hash_settings

MAX_OPEN_SHARDS = 2  # shards that are held open


class TokenStream:
    """The shards of one source, tokenized when they are needed.

    Args:
        source: see `limbeck.data.documents`; a folder of many files, a dataset, a folder of ready tokens.
        tokenizer: a tokenizer of transformers.
        length: of the longest sequences that will be read.
        held_out: share of the documents that is held out from training, in every shard.
        held_out_tokens: how many of those are gathered for evaluation, from the first shards by name.
        cache_gb: disk space for tokens; the least recently used shards are dropped. What is being read stays.
        cache: the folder of streams; `cache_root() / "streams"` by default.
        text_field, eos_id, vocab_size, chat: as for `token_store.build_token_store`.

    Raises:
        LimbeckError: the source is missing, has no shards, or too little text to train or measure on; later, a shard
            that is gone, damaged or changed.
    """

    def __init__(
        self,
        source: str,
        tokenizer: Any,
        *,
        length: int,
        held_out: float = 0.02,
        held_out_tokens: int = 8192,
        cache_gb: float = 20.0,
        cache: Path | None = None,
        text_field: str = "text",
        eos_id: int | None = None,
        vocab_size: int | None = None,
        chat: bool | None = False,
    ):
        eos = resolve_eos_id(tokenizer, eos_id)
        check_token_ids(eos, vocab_size)
        self.source, self.vocab_size, self.limit = source, vocab_size, int(cache_gb * 1e9)
        self.shards, first = list_source_shards(source)
        self.encoder = create_encoder(first, tokenizer, eos, text_field, chat)
        self.settings = collect_store_settings(self.encoder, tokenizer, text_field, held_out)
        self.files: dict[str, Any] = {shard.name: shard.size for shard in self.shards}
        self.cache = cache or cache_root() / "streams"
        self.forced_shard: int | None = None  # the shard of which something is held out although no hash says so
        self._set_key()
        self._in_use: list[int] = []  # shards that must not be dropped
        self._threads: dict[int, threading.Thread] = {}  # that tokenize a shard ahead of time
        self._closing = threading.Event()
        self._lock = threading.Lock()
        _open_streams.add(self)
        if changed := self._find_changed_shards():
            self._set_key(changed=changed)
            self.files |= changed
        self.held_out = self._hold_out(max(held_out_tokens, 2 * length + 1), changed) if held_out else None
        self._check_enough(length)

    def n_tokens(self, index: int) -> int:
        """Return the number of training tokens of a shard; it is tokenized now if that was never done."""
        return self._load_index_entry(index)["tokens"]["train"]

    def load_train_split(self, index: int) -> Split:
        """Open the training tokens of a shard; tokenized now if they are missing, damaged or were dropped."""
        self._in_use = [*[i for i in self._in_use if i != index], index][-MAX_OPEN_SHARDS:]
        manifest = self._ensure_shard(index)
        folder = self._shard_folder(index)
        try:
            os.utime(folder / MANIFEST)  # used just now
            return open_split(folder, "train", manifest["dtype"], self.encoder.prefix_ids)
        except FileNotFoundError:  # another process dropped it this very moment
            manifest = self._ensure_shard(index)
            return open_split(folder, "train", manifest["dtype"], self.encoder.prefix_ids)

    def prefetch(self, index: int) -> None:
        """Begin to tokenize the shard that will be needed next, in a thread."""
        if index in self._threads or load_valid_manifest(self._shard_folder(index)):
            return

        def work() -> None:
            try:
                self._publish(index, background=True)
            except Exception as error:  # it is raised in the main thread when the shard is needed
                if not self._closing.is_set():
                    name = self.shards[index].name
                    console.print(
                        f"prefetching shard '{name}' failed; it will be retried when needed: {error}", markup=False
                    )

        self._in_use = [*[i for i in self._in_use if i != index], index][-MAX_OPEN_SHARDS:]
        self._threads[index] = threading.Thread(target=work, daemon=True)
        self._threads[index].start()

    def wait_for_prefetch(self) -> None:
        """Wait for the thread that prefetches."""
        for thread in list(self._threads.values()):
            thread.join()

    def close(self) -> None:
        """End the thread that prefetches, soon."""
        self._closing.set()
        self.wait_for_prefetch()

    def _set_key(self, **more: Any) -> None:
        shards = {shard.name: shard.size for shard in self.shards}
        self.key = hash_settings({"stream": self.source, "shards": shards, **self.settings, **more})
        self.folder = self.cache / self.key

    def _find_changed_shards(self) -> dict[str, str]:
        """Return the new checksums of shards whose files changed since they were tokenized.

        Only files whose size, times or inode changed are read.
        """
        changed = {}
        for index, shard in enumerate(self.shards):
            path = self._index_file(index)
            if not shard.files or not path.exists():
                continue
            entry = json.loads(path.read_text(encoding="utf-8"))
            if entry["touched"] == (stamps := _file_stamps(shard.files)):
                continue
            content = hash_files(shard.files)
            if content == entry["content"]:
                atomic_write_text(path, json.dumps({**entry, "touched": stamps}) + "\n")
            else:
                changed[shard.name] = content
        if changed:
            names = ", ".join(list(changed)[:4]) + (" ..." if len(changed) > 4 else "")
            words = f"{len(changed):,} shards were modified since they were tokenized: {names}"
            console.print(f"'{self.source}': {words}", markup=False)
        return changed

    def _check_enough(self, length: int) -> None:
        """Raise LimbeckError where there is no sequence to train on, or too few to evaluate."""
        if self.held_out is None:
            return  # no shard was read
        check_token_count([self.held_out], self.source, length)
        if not any(self.n_tokens(index) > length for index in range(len(self.shards))):
            raise LimbeckError(
                f"no shard of '{self.source}' has {length + 1:,} tokens to train on",
                expected="shards of many sequences; a tail shorter than a sequence is left out of each",
                hint="--set data.streaming=false",
            )

    def _index_file(self, index: int) -> Path:
        return self.folder / "index" / f"{index:06d}.json"

    def _shard_folder(self, index: int) -> Path:
        return self.folder / f"shard-{index:06d}"

    def _load_index_entry(self, index: int) -> dict[str, Any]:
        path = self._index_file(index)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._ensure_shard(index)
            return json.loads(path.read_text(encoding="utf-8"))

    def _ensure_shard(self, index: int) -> dict[str, Any]:
        """Return the manifest of a shard's tokens, tokenizing it first unless a thread does already."""
        thread = self._threads.pop(index, None)
        if thread is not None:
            thread.join()
        return self._publish(index, verify=True)

    def _publish(self, index: int, *, verify: bool = False, background: bool = False) -> dict[str, Any]:
        shard, folder = self.shards[index], self._shard_folder(index)

        def check_cancelled() -> None:
            if background and self._closing.is_set():
                raise LimbeckError("stopped")

        def fill(temporary: Path) -> dict[str, Any]:
            self._free_space(index)
            before = _file_stamps(shard.files)
            counts = tokenize_documents(
                temporary,
                self.encoder.read(shard.part, allow_empty=True),
                self.encoder,
                self.settings,
                shard.name,
                vocab_size=self.vocab_size,
                quiet=True,
                check_cancelled=check_cancelled,
                allow_forced_split=index == self.forced_shard,
            )
            content = hash_files(shard.files)
            if _file_stamps(shard.files) != before:
                raise LimbeckError(f"the shard '{shard.name}' of '{self.source}' was modified while it was read")
            return {"source": self.source, "shard": shard.name, "touched": before, "content": content, **counts}

        with self._lock:  # one shard at a time, and the encoder's counts are one shard's
            manifest = ensure_cached_folder(folder, fill, what=f"tokens of {shard.name}", verify=verify)
        check_token_ids(manifest["max_id"], self.vocab_size)
        entry = {
            "shard": shard.name,
            "tokens": manifest["tokens"],
            "documents": manifest["documents"],
            "sha256": manifest["files"]["train.tokens"]["sha256"],
            "bytes": sum(file["bytes"] for file in manifest["files"].values()),
            "touched": manifest["touched"],
            "content": manifest["content"],
        }
        path = self._index_file(index)
        if not path.exists():
            atomic_write_text(path, json.dumps(entry) + "\n")
        elif json.loads(path.read_text(encoding="utf-8"))["sha256"] != entry["sha256"]:
            raise LimbeckError(
                f"the shard '{shard.name}' of '{self.source}' is not what it was when it was first read",
                expected="the same text, so that a position means the same sequences; put the old file back",
                hint="--out runs/another-name   (a new run reads it as it is now)",
            )
        return manifest

    def _free_space(self, index: int) -> None:
        """Drop shards, the least recently used first, until one more like the largest fits."""
        sizes = {path: _folder_size(path) for path in self.folder.glob("shard-*") if load_valid_manifest(path)}
        limit = self.limit - max(sizes.values(), default=0)
        in_use = {self._shard_folder(i) for i in (*self._in_use, index)}
        for path in sorted(sizes, key=lambda path: (path / MANIFEST).stat().st_mtime):
            if sum(sizes.values()) <= limit:
                return
            if path not in in_use:
                # Moved away in one step, so that nobody finds it half deleted; what is mapped stays readable.
                dropped = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
                path.rename(dropped)
                shutil.rmtree(dropped, ignore_errors=True)
                del sizes[path]

    def _hold_out(self, n_tokens: int, changed: dict[str, str]) -> Split:
        """Gather held-out documents of the first shards in a folder of its own that is never dropped.

        Where the hash leaves one side without any document, the largest shard is split by `held_out.force_held_out`.
        """
        split = self._gather_held_out(n_tokens)
        if not split.n_documents or not any(self.n_tokens(index) for index in range(len(self.shards))):
            self.forced_shard = max(range(len(self.shards)), key=lambda index: self.shards[index].size)
            self._set_key(changed=changed, parted=self.shards[self.forced_shard].name)
            report_forced_split(self._ensure_shard(self.forced_shard), self.shards[self.forced_shard].name)
            split = self._gather_held_out(n_tokens)
        if split.n_tokens < n_tokens:
            console.print(f"'{self.source}' has only {split.n_tokens:,} of the {n_tokens:,} held-out tokens requested")
        return split

    def _gather_held_out(self, n_tokens: int) -> Split:
        """Open one split of the held-out documents of as many shards as give `n_tokens`."""

        def fill(temporary: Path) -> dict[str, Any]:
            parts: list[Split] = []
            dtype = "<u4"
            for index in range(len(self.shards)):
                manifest = self._ensure_shard(index)
                dtype = manifest["dtype"]
                parts.append(open_split(self._shard_folder(index), "held_out", dtype))
                if sum(part.n_tokens for part in parts) >= n_tokens:
                    break
            np.concatenate([part.tokens for part in parts]).astype(dtype).tofile(temporary / "held_out.tokens")
            lengths = np.concatenate([np.diff(part.offsets) for part in parts])
            np.concatenate([[0], np.cumsum(lengths)]).astype("<i8").tofile(temporary / "held_out.offsets")
            if self.encoder.has_mask:
                masks = [part.mask for part in parts if part.mask is not None]
                np.concatenate(masks).tofile(temporary / "held_out.mask")
            return {"source": self.source, "dtype": dtype, "shards": len(parts)}

        folder = self.folder / f"held_out-{n_tokens}"
        manifest = ensure_cached_folder(folder, fill, what=f"held-out text of {self.source}", verify=True)
        return open_split(folder, "held_out", manifest["dtype"], self.encoder.prefix_ids)


def hash_files(files: tuple[Path, ...]) -> str:
    """Return the hex sha256 of files one after another; each is read once as long as it stays as it is."""
    return hashlib.sha256("".join(map(compute_sha256, files)).encode()).hexdigest()


def _file_stamps(files: tuple[Path, ...]) -> list[int]:
    """What changes when somebody writes to files or replaces them; unlike the others, ctime cannot be set."""
    stats = [path.stat() for path in files if path.exists()]
    return [number for stat in stats for number in (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)]


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


_open_streams: "weakref.WeakSet[TokenStream]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for stream in list(_open_streams):
        stream.close()


class StreamingDataset:
    """Sequences of a stream, by position.

    Args:
        stream: its shards.
        length: T, tokens in a sequence.
        seed: of the order of the shards, and of the documents in each.
    """

    def __init__(self, stream: TokenStream, length: int, seed: int = 0):
        self.stream, self.length, self.seed = stream, length, seed
        self._ends: list[int] = []  # of the shards of epoch 0, in its order, as far as they were needed
        self._orders: dict[int, np.ndarray] = {}
        self._open: dict[int, PackedDataset] = {}

    @property
    def n_sequences(self) -> int:
        """Sequences in an epoch. Tokenizes every shard that never was."""
        return self._epoch_end(len(self.stream.shards))

    def batch(self, position: int, size: int) -> Batch:
        """Return sequences `position` to `position + size` since the start of training, from whatever shards."""
        check_position(position, size)
        parts: list[Batch] = []
        while size:
            epoch, place, row = self._locate(position)
            shard = int(self._order(epoch)[place])
            packed = self._packed(shard)
            take = min(size, packed.n_sequences - row)
            parts.append(packed.batch(epoch * packed.n_sequences + row, take))
            position, size = position + take, size - take
        next_order = self._order(epoch + (place + 1) // len(self.stream.shards))
        self.stream.prefetch(int(next_order[(place + 1) % len(next_order)]))
        return concatenate_batches(parts)

    def position_after(self, read: SequenceDataset, position: int) -> int:
        """Return the position, in sequences of this length, of what follows the `position` sequences of `read`."""
        assert isinstance(read, StreamingDataset)
        if position == 0:
            return 0
        epoch, place, row = read._locate(position - 1)
        counts = [self._count_sequences(int(i)) for i in self._order(epoch)[: place + 1]]
        before, in_shard = sum(counts[:-1]), min(-(-(row + 1) * read.length // self.length), counts[-1])
        return (epoch * self.n_sequences if epoch else 0) + before + in_shard

    def _count_sequences(self, shard: int) -> int:
        return max(self.stream.n_tokens(shard) - 1, 0) // self.length

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            shards = np.arange(len(self.stream.shards))
            self._orders[epoch] = np.argsort(splitmix64(shards, self.seed, epoch), kind="stable")
        return self._orders[epoch]

    def _epoch_end(self, places: int) -> int:
        """Sequences in the first `places` shards of epoch 0."""
        while len(self._ends) < places:
            shard = int(self._order(0)[len(self._ends)])
            self._ends.append((self._ends[-1] if self._ends else 0) + self._count_sequences(shard))
        return self._ends[places - 1]

    def _locate(self, position: int) -> tuple[int, int, int]:
        """Return the epoch, the place of the shard in the epoch's order, and the row in the shard."""
        for place in range(len(self.stream.shards)):
            if self._epoch_end(place + 1) > position:
                return 0, place, position - (self._ends[place - 1] if place else 0)
        if self.n_sequences == 0:
            raise LimbeckError(
                f"no shard of '{self.stream.source}' has {self.length + 1:,} tokens",
                expected="shards of many sequences",
            )
        epoch, rest = divmod(position, self.n_sequences)
        ends = np.cumsum([self._count_sequences(int(shard)) for shard in self._order(epoch)])
        place = int(np.searchsorted(ends, rest, side="right"))
        return epoch, place, rest - (int(ends[place - 1]) if place else 0)

    def _packed(self, shard: int) -> PackedDataset:
        if shard not in self._open:
            self._open = dict(list(self._open.items())[1 - MAX_OPEN_SHARDS :])
            self._open[shard] = PackedDataset(self.stream.load_train_split(shard), self.length, self.seed)
        return self._open[shard]
