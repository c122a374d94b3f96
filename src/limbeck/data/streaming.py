"""A source too large to tokenise first: shard by shard, ahead of the training, in bounded room.

    stream = Stream("big/", tokenizer, length=2048, vocab_size=49152, cache_gb=20)
    batch = Streamed(stream, length=2048, seed=1).batch(position, size=8)      # of limbeck.data.streamed

A shard is a file of a folder, a part of a Hugging Face dataset (read with streaming=True), or a file of ready tokens.
Its tokens are published whole, with checksums, under the cache. The order of the shards is drawn from (seed, epoch),
that of the documents inside a shard too, and every shard is cut into sequences on its own: so a batch is a function
of its position here as well. How many tokens a shard has is kept even when its tokens are dropped to make room, so to
resume reads nothing of what came before. While one shard is trained on, the next is tokenised in a thread.
"""

import atexit
import json
import os
import shutil
import threading
import uuid
import weakref
from pathlib import Path
from typing import Any

import numpy as np

from limbeck.console import console
from limbeck.data.cache import MANIFEST, cache_root, publish, sound, write_text
from limbeck.data.encode import encoder_of, key_of, stored_settings
from limbeck.data.parts import shards_of
from limbeck.data.shards import Split, check_ids, open_split, tokenise
from limbeck.errors import LimbeckError

OPEN = 2  # shards that are held open


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
            write_text(path, json.dumps(facts) + "\n")
        elif json.loads(path.read_text(encoding="utf-8"))["sha256"] != facts["sha256"]:
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


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def _used(folder: Path) -> float:
    return (folder / MANIFEST).stat().st_mtime


_streams: "weakref.WeakSet[Stream]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for stream in list(_streams):
        stream.close()
