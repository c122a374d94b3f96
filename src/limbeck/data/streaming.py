"""A source too large to tokenise first: shard by shard, ahead of the training, in bounded room.

    stream = TokenStream("big/", tokenizer, length=2048, vocab_size=49152, cache_gb=20)
    batch = Streamed(stream, length=2048, seed=1).batch(position, size=8)      # of limbeck.data.streaming

A shard is a file of a folder, a part of a Hugging Face dataset (read with streaming=True), or a file of ready tokens.
Its tokens are published whole, with checksums, under the cache. The order of the shards is drawn from (seed, epoch),
that of the documents inside a shard too, and every shard is cut into sequences on its own: so a batch is a function
of its position here as well. How many tokens a shard has is kept even when its tokens are dropped to make room, so to
resume reads nothing of what came before. While one shard is trained on, the next is tokenised in a thread. What a file
held when it was tokenised is kept as a checksum: where one was edited since, the tokens get another key.

Sequences of a stream, by position.

    batch = StreamingDataset(TokenStream("big/", tokenizer, length=2048), length=2048, seed=1).batch(position, size=8)

The order of shards and documents is `limbeck.data.streaming`'s.
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
from limbeck.core.errors import LimbeckError
from limbeck.core.storage import atomic_write_text, cache_root, compute_sha256
from limbeck.data.packing import Batch, PackedDataset, SequenceDataset, check_position, concatenate_batches, splitmix64
from limbeck.data.source_shards import list_source_shards
from limbeck.data.token_store import (
    Split,
    check_token_count,
    check_token_ids,
    open_split,
    report_forced_split,
    resolve_eos_id,
    tokenize_documents,
)
from limbeck.data.tokenization import collect_store_settings, create_encoder, hash_settings

MAX_OPEN_SHARDS = 2  # shards that are held open


class TokenStream:
    """The shards of one source, tokenised when they are needed.

    Args:
        source: see `limbeck.data.documents`; a folder of many files, a dataset, a folder of ready tokens.
        tokenizer: a tokenizer of transformers.
        length: of the longest sequences that will be read.
        held_out: share of the documents that is kept from training, in every shard.
        held_out_tokens: how many of those are gathered for evaluation, from the first shards by name.
        cache_gb: room for tokens; the shards unused for longest make way. What is being read stays.
        cache: the folder of streams; `cache_root() / "streams"` by default.
        text_field, eos_id, vocab_size, chat: as for `shards.build_token_store`.

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
        self._name()
        self._needed: list[int] = []  # shards that must not make way
        self._ahead: dict[int, threading.Thread] = {}
        self._ending = threading.Event()
        self._lock = threading.Lock()
        _streams.add(self)
        if changed := self._changed():
            self._name(changed=changed)
            self.files |= changed
        self.held_out = self._hold_out(max(held_out_tokens, 2 * length + 1), changed) if held_out else None
        self._check_enough(length)

    def n_tokens(self, index: int) -> int:
        """Training tokens of a shard; it is tokenised now if that was never done."""
        return self._known(index)["tokens"]["train"]

    def load_train_split(self, index: int) -> Split:
        """The training tokens of a shard; tokenised now if they are not there, after damage or to make room."""
        self._needed = [*[i for i in self._needed if i != index], index][-MAX_OPEN_SHARDS:]
        manifest = self._made(index)
        folder = self._of(index)
        try:
            os.utime(folder / MANIFEST)  # used just now
            return open_split(folder, "train", manifest["dtype"], self.encoder.prefix_ids)
        except FileNotFoundError:  # another process made room this very moment
            manifest = self._made(index)
            return open_split(folder, "train", manifest["dtype"], self.encoder.prefix_ids)

    def prefetch(self, index: int) -> None:
        """Begin to tokenise a shard that will be needed next, in a thread."""
        if index in self._ahead or load_valid_manifest(self._of(index)):
            return

        def work() -> None:
            try:
                self._publish(index, background=True)
            except Exception as error:  # it comes again, and is told, when the shard is needed
                if not self._ending.is_set():
                    console.print(f"reading ahead stopped at '{self.shards[index].name}': {error}", markup=False)

        self._needed = [*[i for i in self._needed if i != index], index][-MAX_OPEN_SHARDS:]
        self._ahead[index] = threading.Thread(target=work, daemon=True)
        self._ahead[index].start()

    def wait_for_prefetch(self) -> None:
        """Wait for the thread that reads ahead."""
        for thread in list(self._ahead.values()):
            thread.join()

    def close(self) -> None:
        """End the thread that reads ahead, soon."""
        self._ending.set()
        self.wait_for_prefetch()

    def _name(self, **more: Any) -> None:
        """Under which key the tokens lie."""
        shards = {shard.name: shard.size for shard in self.shards}
        self.key = hash_settings({"stream": self.source, "shards": shards, **self.settings, **more})
        self.folder = self.cache / self.key

    def _changed(self) -> dict[str, str]:
        """Of the shards that were tokenised before, those whose files hold other bytes now, with their checksums.

        Only files that were touched since are read.
        """
        changed = {}
        for index, shard in enumerate(self.shards):
            path = self._facts_of(index)
            if not shard.files or not path.exists():
                continue
            facts = json.loads(path.read_text(encoding="utf-8"))
            if facts["touched"] == (touched := _touched(shard.files)):
                continue
            now = hash_files(shard.files)
            if now == facts["content"]:
                atomic_write_text(path, json.dumps({**facts, "touched": touched}) + "\n")
            else:
                changed[shard.name] = now
        if changed:
            names = ", ".join(list(changed)[:4]) + (" ..." if len(changed) > 4 else "")
            console.print(
                f"'{self.source}': {len(changed):,} shards were edited since they were tokenised: {names}", markup=False
            )
        return changed

    def _check_enough(self, length: int) -> None:
        """Raises LimbeckError where there is no sequence to train on, or too little to measure."""
        if self.held_out is None:
            return  # no shard was looked at
        check_token_count([self.held_out], self.source, length)
        if not any(self.n_tokens(index) > length for index in range(len(self.shards))):
            raise LimbeckError(
                f"no shard of '{self.source}' has {length + 1:,} tokens to train on",
                expected="shards of many sequences; a tail shorter than a sequence is left out of each",
                hint="--set data.streaming=false",
            )

    def _facts_of(self, index: int) -> Path:
        """The file that says what is known of a shard for good."""
        return self.folder / "index" / f"{index:06d}.json"

    def _of(self, index: int) -> Path:
        return self.folder / f"shard-{index:06d}"

    def _known(self, index: int) -> dict[str, Any]:
        """What is kept of a shard for good: its counts and the checksum of its tokens."""
        path = self._facts_of(index)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._made(index)
            return json.loads(path.read_text(encoding="utf-8"))

    def _made(self, index: int) -> dict[str, Any]:
        thread = self._ahead.pop(index, None)
        if thread is not None:
            thread.join()
        return self._publish(index, verify=True)

    def _publish(self, index: int, *, verify: bool = False, background: bool = False) -> dict[str, Any]:
        shard, folder = self.shards[index], self._of(index)

        def check_cancelled() -> None:
            if background and self._ending.is_set():
                raise LimbeckError("asked to stop")

        def fill(temporary: Path) -> dict[str, Any]:
            self._make_room(index)
            before = _touched(shard.files)
            made = tokenize_documents(
                temporary,
                shard.read(self.encoder),
                self.encoder,
                self.settings,
                shard.name,
                vocab_size=self.vocab_size,
                quiet=True,
                check_cancelled=check_cancelled,
                force_held_out=index == self.forced_shard,
            )
            content = hash_files(shard.files)
            if _touched(shard.files) != before:
                raise LimbeckError(f"the shard '{shard.name}' of '{self.source}' was written to while it was read")
            return {"source": self.source, "shard": shard.name, "touched": before, "content": content, **made}

        with self._lock:  # one shard at a time, and the encoder's counts are one shard's
            manifest = ensure_cached_folder(folder, fill, what=f"tokens of {shard.name}", verify=verify)
        check_token_ids(manifest["max_id"], self.vocab_size)
        facts = {
            "shard": shard.name,
            "tokens": manifest["tokens"],
            "documents": manifest["documents"],
            "sha256": manifest["files"]["train.tokens"]["sha256"],
            "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
            "touched": manifest["touched"],
            "content": manifest["content"],
        }
        path = self._facts_of(index)
        if not path.exists():
            atomic_write_text(path, json.dumps(facts) + "\n")
        elif json.loads(path.read_text(encoding="utf-8"))["sha256"] != facts["sha256"]:
            raise LimbeckError(
                f"the shard '{shard.name}' of '{self.source}' is not what it was when it was first read",
                expected="the same text, so that a position means the same sequences; put the old file back",
                hint="--out runs/another-name   (a new run reads it as it is now)",
            )
        return manifest

    def _make_room(self, index: int) -> None:
        """Drop shards, those unused for longest first, until one more like the largest has room."""
        there = {path: _size(path) for path in self.folder.glob("shard-*") if load_valid_manifest(path)}
        room = self.limit - max(there.values(), default=0)
        keep = {self._of(i) for i in (*self._needed, index)}
        for path in sorted(there, key=_used):
            if sum(there.values()) <= room:
                return
            if path not in keep:
                # moved away in one step, so that nobody finds it half deleted; what is mapped stays readable
                away = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
                path.rename(away)
                shutil.rmtree(away, ignore_errors=True)
                del there[path]

    def _hold_out(self, wanted: int, changed: dict[str, str]) -> Split:
        """Held-out documents of the first shards, in a folder of its own that never makes way.

        Where the hash leaves one side without any document, the largest shard is parted otherwise (`shards._part`).
        """
        split = self._gathered(wanted)
        if not split.n_documents or not any(self.n_tokens(index) for index in range(len(self.shards))):
            self.forced_shard = max(range(len(self.shards)), key=lambda index: self.shards[index].size)
            self._name(changed=changed, parted=self.shards[self.forced_shard].name)
            report_forced_split(self._made(self.forced_shard), self.shards[self.forced_shard].name)
            split = self._gathered(wanted)
        if split.n_tokens < wanted:
            console.print(f"'{self.source}' has {split.n_tokens:,} held-out tokens, {wanted:,} were asked for")
        return split

    def _gathered(self, wanted: int) -> Split:
        """The held-out documents of as many shards as give `wanted` tokens, in one split."""

        def fill(temporary: Path) -> dict[str, Any]:
            parts: list[Split] = []
            dtype = "<u4"
            for index in range(len(self.shards)):
                manifest = self._made(index)
                dtype = manifest["dtype"]
                parts.append(open_split(self._of(index), "held_out", dtype))
                if sum(part.n_tokens for part in parts) >= wanted:
                    break
            np.concatenate([part.tokens for part in parts]).astype(dtype).tofile(temporary / "held_out.tokens")
            lengths = np.concatenate([np.diff(part.offsets) for part in parts])
            np.concatenate([[0], np.cumsum(lengths)]).astype("<i8").tofile(temporary / "held_out.offsets")
            if self.encoder.has_mask:
                masks = [part.mask for part in parts if part.mask is not None]
                np.concatenate(masks).tofile(temporary / "held_out.mask")
            return {"source": self.source, "dtype": dtype, "shards": len(parts)}

        folder = self.folder / f"held_out-{wanted}"
        manifest = ensure_cached_folder(folder, fill, what=f"held-out text of {self.source}", verify=True)
        return open_split(folder, "held_out", manifest["dtype"], self.encoder.prefix_ids)


def hash_files(files: tuple[Path, ...]) -> str:
    """Hex sha256 of files, their bytes one after another; read once as long as nobody touches them."""
    return hashlib.sha256("".join(map(compute_sha256, files)).encode()).hexdigest()


def _touched(files: tuple[Path, ...]) -> list[int]:
    """What changes when somebody writes to files or puts others in their place; the time of change cannot be set."""
    states = [path.stat() for path in files if path.exists()]
    return [number for one in states for number in (one.st_size, one.st_mtime_ns, one.st_ctime_ns, one.st_ino)]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _used(folder: Path) -> float:
    return (folder / MANIFEST).stat().st_mtime


_streams: "weakref.WeakSet[TokenStream]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for stream in list(_streams):
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
        """Sequences in an epoch. Tokenises every shard that never was."""
        return self._epoch_end(len(self.stream.shards))

    def batch(self, position: int, size: int) -> Batch:
        """Sequences `position` to `position + size` since the start of training, wherever they are."""
        check_position(position, size)
        parts: list[Batch] = []
        while size:
            epoch, place, row = self._locate(position)
            shard = int(self._order(epoch)[place])
            packed = self._packed(shard)
            take = min(size, packed.n_sequences - row)
            parts.append(packed.batch(epoch * packed.n_sequences + row, take))
            position, size = position + take, size - take
        following = self._order(epoch + (place + 1) // len(self.stream.shards))
        self.stream.prefetch(int(following[(place + 1) % len(following)]))
        return concatenate_batches(parts)

    def position_after(self, read: SequenceDataset, position: int) -> int:
        """The position, in sequences of this length, of what follows the `position` sequences of `read`."""
        assert isinstance(read, StreamingDataset)
        if position == 0:
            return 0
        epoch, place, row = read._locate(position - 1)
        here = min(-(-(row + 1) * read.length // self.length), self._in_shard(int(self._order(epoch)[place])))
        before = sum(self._in_shard(int(i)) for i in self._order(epoch)[:place])
        return (epoch * self.n_sequences if epoch else 0) + before + here

    def _in_shard(self, shard: int) -> int:
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
            self._ends.append((self._ends[-1] if self._ends else 0) + self._in_shard(shard))
        return self._ends[places - 1]

    def _locate(self, position: int) -> tuple[int, int, int]:
        """Epoch, place of the shard in the epoch's order, and row in the shard."""
        for place in range(len(self.stream.shards)):
            if self._epoch_end(place + 1) > position:
                return 0, place, position - (self._ends[place - 1] if place else 0)
        if self.n_sequences == 0:
            raise LimbeckError(
                f"no shard of '{self.stream.source}' has {self.length + 1:,} tokens",
                expected="shards of many sequences",
            )
        epoch, rest = divmod(position, self.n_sequences)
        ends = np.cumsum([self._in_shard(int(shard)) for shard in self._order(epoch)])
        place = int(np.searchsorted(ends, rest, side="right"))
        return epoch, place, rest - (int(ends[place - 1]) if place else 0)

    def _packed(self, shard: int) -> PackedDataset:
        if shard not in self._open:
            self._open = dict(list(self._open.items())[1 - MAX_OPEN_SHARDS :])
            self._open[shard] = PackedDataset(self.stream.load_train_split(shard), self.length, self.seed)
        return self._open[shard]
