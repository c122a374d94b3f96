"""A source too large to tokenise first: shard by shard, ahead of the training, in bounded room.

    stream = Stream("big/", tokenizer, length=2048, vocab_size=49152, cache_gb=20)
    batch = Streamed(stream, length=2048, seed=1).batch(position, size=8)

A shard is a file of a folder, a part of a Hugging Face dataset (read with streaming=True), or a file of ready tokens. Its
tokens are published whole, with checksums, under the cache. The order of the shards is drawn from (seed, epoch), that of the
documents inside a shard too, and every shard is cut into sequences on its own: so a batch is a function of its position
here as well. How many tokens a shard has is kept even when its tokens are dropped to make room, so to resume reads nothing
of what came before. While one shard is trained on, the next is tokenised in a thread.
"""

import atexit
import json
import os
import shutil
import threading
import uuid
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limbeck.console import console
from limbeck.data import sources
from limbeck.data.cache import MANIFEST, cache_root, publish, sound
from limbeck.data.encode import Encoder, TextEncoder, encoder_of
from limbeck.data.packing import Batch, Packed, Sequences, check_position, mix
from limbeck.data.shards import Split, check_ids, key_of, open_split, stored_settings, tokenise
from limbeck.data.tokens import TokenEncoder, is_tokens, token_shards
from limbeck.errors import LimbeckError

ROWS = 20_000  # of a dataset on disk that are one shard
OPEN = 2  # shards that are held open


@dataclass(frozen=True)
class Shard:
    """A part of a source: its name, what tells whether it is still the same, and its documents."""

    name: str
    size: int
    read: Callable[[Encoder], Iterator[bytes]]


class Stream:
    """The shards of one source, tokenised when they are needed.

    Args:
        source: see `limbeck.data.sources`; a folder of many files, a dataset, a folder of ready tokens.
        tokenizer: a tokenizer of transformers.
        length: of the longest sequences that will be read.
        held_out: share of the documents that is kept from training, in every shard.
        held_out_tokens: how many of those are gathered for evaluation, from the first shards by name.
        cache_gb: room for tokens; the shards unused for longest make way. What is being read stays.
        cache: the folder of streams; `cache_root() / "streams"` by default.
        text_field, eos_id, vocab_size, chat: as for `shards.prepare`.

    Raises:
        LimbeckError: the source is missing or has no shards; later, a shard that is gone, damaged or changed.
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
        eos = tokenizer.eos_token_id if eos_id is None else eos_id
        if eos is None:
            raise LimbeckError("the tokenizer has no end-of-sequence token", hint="give eos_id")
        check_ids(eos, vocab_size)
        self.source, self.vocab_size, self.limit = source, vocab_size, int(cache_gb * 1e9)
        self.shards, first = shards_of(source)
        self.encoder = encoder_of(first, tokenizer, int(eos), text_field, chat)
        self.settings = stored_settings(self.encoder, tokenizer, text_field, held_out)
        self.files = {shard.name: shard.size for shard in self.shards}
        self.key = key_of({"stream": source, "shards": self.files, **self.settings})
        self.folder = (cache or cache_root() / "streams") / self.key
        self._needed: list[int] = []  # shards that must not make way
        self._ahead: dict[int, threading.Thread] = {}
        self._ending = threading.Event()
        self._lock = threading.Lock()
        _streams.add(self)
        self.held_out = self._hold_out(max(held_out_tokens, 2 * length + 1)) if held_out else None

    def n_tokens(self, index: int) -> int:
        """Training tokens of a shard; it is tokenised now if that was never done."""
        return self._known(index)["tokens"]["train"]

    def train(self, index: int) -> Split:
        """The training tokens of a shard; tokenised now if they are not there, after damage or to make room."""
        self._needed = [*[i for i in self._needed if i != index], index][-OPEN:]
        manifest = self._made(index)
        folder = self._of(index)
        try:
            os.utime(folder / MANIFEST)  # used just now
            return open_split(folder, "train", manifest["dtype"])
        except FileNotFoundError:  # another process made room this very moment
            manifest = self._made(index)
            return open_split(folder, "train", manifest["dtype"])

    def ahead(self, index: int) -> None:
        """Begin to tokenise a shard that will be needed next, in a thread."""
        if index in self._ahead or sound(self._of(index)):
            return

        def work() -> None:
            try:
                self._publish(index, background=True)
            except Exception as error:  # it comes again, and is told, when the shard is needed
                if not self._ending.is_set():
                    console.print(f"reading ahead stopped at '{self.shards[index].name}': {error}", markup=False)

        self._needed = [*[i for i in self._needed if i != index], index][-OPEN:]
        self._ahead[index] = threading.Thread(target=work, daemon=True)
        self._ahead[index].start()

    def wait(self) -> None:
        """Wait for the thread that reads ahead."""
        for thread in list(self._ahead.values()):
            thread.join()

    def close(self) -> None:
        """End the thread that reads ahead, soon."""
        self._ending.set()
        self.wait()

    def _of(self, index: int) -> Path:
        return self.folder / f"shard-{index:06d}"

    def _known(self, index: int) -> dict[str, Any]:
        """What is kept of a shard for good: its counts and the checksum of its tokens."""
        path = self.folder / "index" / f"{index:06d}.json"
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError):
            self._made(index)
            return json.loads(path.read_text())

    def _made(self, index: int) -> dict[str, Any]:
        thread = self._ahead.pop(index, None)
        if thread is not None:
            thread.join()
        return self._publish(index, verify=True)

    def _publish(self, index: int, *, verify: bool = False, background: bool = False) -> dict[str, Any]:
        shard, folder = self.shards[index], self._of(index)

        def going() -> None:
            if background and self._ending.is_set():
                raise LimbeckError("asked to stop")

        def fill(temporary: Path) -> dict[str, Any]:
            self._make_room(index)
            made = tokenise(
                temporary,
                shard.read(self.encoder),
                self.encoder,
                self.settings,
                shard.name,
                vocab_size=self.vocab_size,
                quiet=True,
                going=going,
            )
            return {"source": self.source, "shard": shard.name, **made}

        with self._lock:  # one shard at a time, and the encoder's counts are one shard's
            manifest = publish(folder, fill, what=f"tokens of {shard.name}", verify=verify)
        check_ids(manifest["max_id"], self.vocab_size)
        facts = {
            "shard": shard.name,
            "tokens": manifest["tokens"],
            "documents": manifest["documents"],
            "sha256": manifest["files"]["train.tokens"]["sha256"],
            "bytes": sum(entry["bytes"] for entry in manifest["files"].values()),
        }
        path = self.folder / "index" / f"{index:06d}.json"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
            temporary.write_text(json.dumps(facts) + "\n")
            temporary.replace(path)
        elif json.loads(path.read_text())["sha256"] != facts["sha256"]:
            raise LimbeckError(
                f"the shard '{shard.name}' of '{self.source}' is not what it was when it was first read",
                expected="the same text, so that a position means the same sequences",
                hint=f"put the old file back, or delete {self.folder} and begin a new run",
            )
        return manifest

    def _make_room(self, index: int) -> None:
        """Drop shards, those unused for longest first, until one more like the largest has room."""
        there = {path: _size(path) for path in self.folder.glob("shard-*") if sound(path)}
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

    def _hold_out(self, wanted: int) -> Split:
        """Held-out documents of the first shards, in a folder of its own that never makes way."""

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
            if self.encoder.masked:
                masks = [part.mask for part in parts if part.mask is not None]
                np.concatenate(masks).tofile(temporary / "held_out.mask")
            return {"source": self.source, "dtype": dtype, "shards": len(parts)}

        folder = self.folder / f"held_out-{wanted}"
        manifest = publish(folder, fill, what=f"held-out text of {self.source}", verify=True)
        split = open_split(folder, "held_out", manifest["dtype"])
        if split.n_tokens < wanted:
            console.print(f"'{self.source}' has {split.n_tokens:,} held-out tokens, {wanted:,} were asked for")
        return split


class Streamed:
    """Sequences of a stream, by position.

    Args:
        stream: its shards.
        length: T, tokens in a sequence.
        seed: of the order of the shards, and of the documents in each.
    """

    def __init__(self, stream: Stream, length: int, seed: int = 0):
        self.stream, self.length, self.seed = stream, length, seed
        self._ends: list[int] = []  # of the shards of epoch 0, in its order, as far as they were needed
        self._orders: dict[int, np.ndarray] = {}
        self._open: dict[int, Packed] = {}

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
        self.stream.ahead(int(following[(place + 1) % len(following)]))
        names = ("input_ids", "position_ids", "targets")
        return Batch(*(torch.cat([getattr(part, name) for part in parts]) for name in names))

    def after(self, read: Sequences, position: int) -> int:
        """The position, in sequences of this length, of what follows the `position` sequences of `read`."""
        assert isinstance(read, Streamed)
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
            self._orders[epoch] = np.argsort(mix(shards, self.seed, epoch), kind="stable")
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
                f"no shard of '{self.stream.source}' has {self.length + 1:,} tokens", expected="shards of many sequences"
            )
        epoch, rest = divmod(position, self.n_sequences)
        ends = np.cumsum([self._in_shard(int(shard)) for shard in self._order(epoch)])
        place = int(np.searchsorted(ends, rest, side="right"))
        return epoch, place, rest - (int(ends[place - 1]) if place else 0)

    def _packed(self, shard: int) -> Packed:
        if shard not in self._open:
            self._open = dict(list(self._open.items())[1 - OPEN :])
            self._open[shard] = Packed(self.stream.train(shard), self.length, self.seed)
        return self._open[shard]


def shards_of(source: str) -> tuple[list[Shard], Any]:
    """The shards of a source in stored order, and something of it whose first record can be looked at."""
    if is_tokens(source):
        ready = token_shards(source)
        return [Shard(s.path.name, s.path.stat().st_size if s.path.exists() else 0, _ids(s)) for s in ready], source
    root, split = sources._local(source)
    if root is None:
        dataset = sources._hub(source, streaming=True)
        n = dataset.num_shards
        parts = [sources.Rows(dataset.shard(num_shards=n, index=i), f"{source}, shard {i}") for i in range(n)]
        return [Shard(_hub_name(dataset, i), 0, _rows(part)) for i, part in enumerate(parts)], sources.Rows(dataset, source)
    if sources._is_saved_dataset(root):
        saved = sources._saved(root, split)
        begins = range(0, saved.num_rows, ROWS)
        pieces = [saved.select(range(a, min(a + ROWS, saved.num_rows))) for a in begins]
        rows = [sources.Rows(piece, f"{source}, rows from {a:,}") for a, piece in zip(begins, pieces)]
        return [Shard(f"rows-{a}", r.dataset.num_rows, _rows(r)) for a, r in zip(begins, rows)], sources.Rows(saved, source)
    files = sources._files(root, source)
    names = [path.relative_to(root).as_posix() if path != root else path.name for path in files]
    return [Shard(n, p.stat().st_size, _rows(str(p))) for n, p in zip(names, files)], source


def _rows(part: Any) -> Callable[[Encoder], Iterator[bytes]]:
    return lambda encoder: encoder.read(part, part=True)


def _ids(shard: Any) -> Callable[[Encoder], Iterator[bytes]]:
    return lambda encoder: encoder.read_shard(shard)  # type: ignore[attr-defined]


def _hub_name(dataset: Any, index: int) -> str:
    """The file of a shard, with the version that the hub has of it, where `datasets` tells."""
    files = getattr(getattr(dataset, "_ex_iterable", None), "kwargs", {}).get("base_files") or []
    return str(files[index]) if len(files) == dataset.num_shards else f"shard-{index}"


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _used(folder: Path) -> float:
    return (folder / MANIFEST).stat().st_mtime


_streams: "weakref.WeakSet[Stream]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for stream in list(_streams):
        stream.close()
