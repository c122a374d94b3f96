"""Data loading: the sources of a recipe opened, and batches made from them, one step ahead of a GPU.

    text = open_text_data(recipe.data, tokenizer, teacher)
    dataset = text.train_sequences(512, seed=0)
    loader = BatchPrefetcher(lambda step: [dataset.batch(4 * step, 4)], torch.device("cuda"))
    batches = loader.get_batches(0)                        # on the device; those of step 1 are being made

A source is tokenized first (`limbeck.data.token_store`), streamed (`limbeck.data.streaming`), or generated
(`limbeck.data.synthetic`). There is no torch DataLoader: a batch is a function of its position
(`limbeck.data.packing`), so one thread that makes the next is enough, and resuming needs no state but the position. A
text is opened once, for the longest sequences that are read of it.
"""

import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from limbeck.core.cache import MANIFEST
from limbeck.core.errors import LimbeckError, rewrite_hints
from limbeck.core.repeated_text import REPEATED_TEXT, REPEATED_TEXT_PREFIX
from limbeck.core.text_settings import Data
from limbeck.data.mixture import MixtureDataset
from limbeck.data.packing import Batch, PackedDataset, SequenceDataset
from limbeck.data.streaming import StreamingDataset, TokenStream
from limbeck.data.synthetic import HELD_OUT_SEED, REPEATS_SOURCE, RepeatedSequenceSource, RepeatedTextSource
from limbeck.data.token_store import Split, TokenStore, build_token_store
from limbeck.data.tokenization import hash_settings
from limbeck.data.whole_documents import WholeDocumentDataset

GeneratedSource = RepeatedSequenceSource | RepeatedTextSource
OpenedSource = TokenStore | TokenStream | GeneratedSource


@dataclass(frozen=True)
class TextData:
    """Opened sources and their weights. `key` says which tokens they are, for the run's manifest."""

    sources: list[OpenedSource]
    weights: list[float]
    documents: str = "packed"  # how they become sequences (`Data.documents`)

    @property
    def key(self) -> str:
        """The key of a single source; of several a key of all keys and weights."""
        keys = [part.key for part in self.sources]
        return keys[0] if len(keys) == 1 else hash_settings({"parts": keys, "weights": self.weights})

    @property
    def train_tokens(self) -> int | None:
        """Training tokens of all sources; None where one is streamed or has no end."""
        counts = [part.train.n_tokens for part in self.sources if isinstance(part, TokenStore)]
        return sum(counts) if len(counts) == len(self.sources) else None

    @property
    def held_out_tokens(self) -> int:
        """Held-out tokens of all sources."""
        return sum(split.n_tokens for split, _ in self._held_out)

    @property
    def files(self) -> dict[str, int]:
        """Files of the sources, or the shards of those that are streamed, and their sizes."""
        stored = [part for part in self.sources if not isinstance(part, RepeatedSequenceSource)]
        return {f"{part.source}: {name}": size for part in stored for name, size in part.files.items()}

    @property
    def content_fingerprints(self) -> list[str | None]:
        """The fingerprint of each source's content; None for one that is streamed or generated."""
        fingerprints: list[str | None] = []
        for part in self.sources:
            store = part.store if isinstance(part, RepeatedTextSource) else part
            manifest = store.folder / MANIFEST if isinstance(store, TokenStore) else None
            fingerprints.append(json.loads(manifest.read_text(encoding="utf-8"))["content"] if manifest else None)
        return fingerprints

    def train_sequences(self, length: int, seed: int) -> SequenceDataset:
        """Open the training text in sequences of `length` tokens."""
        datasets: list[SequenceDataset] = []
        for part in self.sources:
            if isinstance(part, GeneratedSource):
                datasets.append(part.train_sequences(length, seed))
            elif isinstance(part, TokenStream):
                datasets.append(StreamingDataset(part, length, seed))
            else:
                datasets.append(self._open_split(part.train, length, seed))
        return datasets[0] if len(datasets) == 1 else MixtureDataset(datasets, self.weights, seed)

    def held_out_sequences(self, length: int) -> SequenceDataset:
        """Open the held-out text in sequences of `length` tokens, in a fixed order; several sources by their weights.

        Repeated lists and repeated text are evaluated on only where there is nothing else.
        """
        datasets = [self._open_split(split, length, shuffle=False) for split, _ in self._held_out]
        generated = [part for part in self.sources if isinstance(part, GeneratedSource)]
        if generated and not datasets:
            return generated[0].held_out_sequences(length)
        if len(datasets) == 1:
            return datasets[0]
        return MixtureDataset(datasets, [weight for _, weight in self._held_out], shuffle=False)

    def _open_split(self, split: Split, length: int, seed: int = 0, shuffle: bool = True) -> SequenceDataset:
        if self.documents == "whole":
            return WholeDocumentDataset(split, length, seed, shuffle=shuffle)
        return PackedDataset(
            split, length, seed, shuffle=shuffle, shuffle_rows=shuffle and self.documents == "shuffled"
        )

    @property
    def _held_out(self) -> list[tuple[Split, float]]:
        pairs = zip(self.sources, self.weights)
        return [(part.held_out, weight) for part, weight in pairs if part.held_out is not None]

    def all_sequences(self, length: int) -> SequenceDataset:
        """Open a single source's training text, which is all of it where nothing is held out, in stored order."""
        (part,) = self.sources
        if isinstance(part, RepeatedTextSource):
            return part.train_sequences(length, HELD_OUT_SEED)
        if isinstance(part, RepeatedSequenceSource):
            return part.held_out_sequences(length)
        assert isinstance(part, TokenStore)
        return self._open_split(part.train, length, shuffle=False)

    def close(self) -> None:
        """End the threads of streams."""
        for part in self.sources:
            if isinstance(part, TokenStream):
                part.close()


def open_text_data(
    data: Data,
    tokenizer: Any,
    teacher: Any,
    *,
    length: int | None = None,
    held_out: float | None = None,
    held_out_tokens: int = 8192,
) -> TextData:
    """Open the sources of a recipe for a teacher; what is not in the cache is tokenized first, unless it is streamed.

    Args:
        data: what to read.
        teacher: the model whose embedding table must have a row for each token.
        length: of the longest sequences that will be read; `data.seq_len` by default.
        held_out: overrides the share `data.held_out`, for example by 0.
        held_out_tokens: how many held-out tokens a stream gathers.

    Raises:
        LimbeckError: see `token_store.build_token_store` and `streaming.TokenStream`.
    """
    share = data.held_out if held_out is None else held_out
    common: dict[str, Any] = {
        "length": length or data.seq_len,
        "held_out": share,
        "vocab_size": int(teacher.get_input_embeddings().weight.shape[0]),
    }
    parts: list[OpenedSource] = []
    sources = data.list_sources()
    for number, source in enumerate(sources):
        key = "data" if data.sources is None else f"data.sources.{number}"
        common |= {"text_field": source.text_field, "chat": source.chat}
        with rewrite_hints({"data.text_field": f"{key}.text_field", "data.chat": f"{key}.chat"}):
            if source.source == REPEATS_SOURCE:
                parts.append(RepeatedSequenceSource.from_tokenizer(tokenizer, common["vocab_size"]))
            elif data.streaming:
                if share == 0:
                    raise LimbeckError("a streamed source has no end", expected="held-out text to evaluate on")
                cache_gb = data.cache_gb / len(sources)
                stream = TokenStream(
                    source.source, tokenizer, held_out_tokens=held_out_tokens, cache_gb=cache_gb, **common
                )
                parts.append(stream)
            else:
                name = source.source.removeprefix(REPEATED_TEXT_PREFIX)
                if name == REPEATED_TEXT:
                    raise LimbeckError(f"{name} does not say of which text", expected=f"{REPEATED_TEXT_PREFIX}SOURCE")
                store = build_token_store(name, tokenizer, max_tokens=data.max_tokens, **common)
                parts.append(store if name == source.source else RepeatedTextSource(store))
    return TextData(parts, [source.weight for source in sources], documents=data.documents)


_reading = threading.Lock()  # students that train together read one text, whose caches are not thread-safe


class BatchPrefetcher:
    """Makes the batches of the next step while the current one runs.

    A thread reads and packs the tokens and puts them into pinned memory, from which a GPU copies asynchronously.
    Batches are a function of the step alone, so steps may come in any order. On a CPU nothing is made ahead: its cores
    are busy with the step.

    Args:
        make: returns the batches of a step, on the CPU.
        device: where they go.
        enabled: make batches ahead; None: where the device is not a CPU.
    """

    def __init__(self, make: Callable[[int], list[Batch]], device: torch.device, enabled: bool | None = None):
        self.make, self.device = make, device
        self.enabled = device.type != "cpu" if enabled is None else enabled
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches") if self.enabled else None
        self._next_step = -1
        self._next_batches: Future[list[Batch]] | None = None  # of `_next_step`

    def get_batches(self, step: int, last: bool = False) -> list[Batch]:
        """Return the batches of a step on the device; unless it is the last one, begin to make the next step's."""
        if self._pool is None:
            return [batch.to(self.device) for batch in self._make(step)]
        future = self._next_batches
        if future is None or self._next_step != step:
            future = self._pool.submit(self._make, step)
        self._next_batches = None
        batches = [batch.to(self.device) for batch in future.result()]
        if not last:
            self._next_step, self._next_batches = step + 1, self._pool.submit(self._make, step + 1)
        return batches

    def close(self) -> None:
        """End the thread."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def _make(self, step: int) -> list[Batch]:
        with _reading:
            batches = self.make(step)
        return [batch.pin_memory() for batch in batches] if self.device.type == "cuda" else batches
