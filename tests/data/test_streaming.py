"""Streams: shards tokenised as they are needed, in bounded room, and batches by position all the same."""

import gzip
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from limbeck.core import cache
from limbeck.core.errors import LimbeckError
from limbeck.data import documents as document_sources
from limbeck.data import streaming, token_store
from limbeck.data.streaming import StreamingDataset, TokenStream
from limbeck.data.token_store import build_token_store

WORDS = ["the", "old", "still", "turns", "wine", "into", "spirit", "and", "water", "salt", "slow", "fire", "burns"]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return tmp_path / "cache"


def texts(shard: int, n: int = 30) -> list[str]:
    draw = np.random.default_rng(shard)
    return [f"s{shard} d{i} " + " ".join(draw.choice(WORDS, 12)) for i in range(n)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards in four formats."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    root = tmp_path / "big"
    (root / "below").mkdir(parents=True)
    for i in (0, 1):
        (root / f"{i}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts(i)), encoding="utf-8"
        )
    with gzip.open(root / "2.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts(2))
    pq.write_table(pa.table({"text": texts(3)}), root / "below" / "3.parquet")
    (root / "4.txt").write_text(" ".join(texts(4)), encoding="utf-8")
    return root


def stream(folder, tokenizer, **changes) -> TokenStream:
    return TokenStream(str(folder), tokenizer, **{"length": 32, "held_out": 0.1, "held_out_tokens": 100, **changes})


def batches(streamed: StreamingDataset, sizes: list[int], position: int = 0) -> torch.Tensor:
    made = []
    for size in sizes:
        made.append(streamed.batch(position, size).input_ids)
        position += size
    return torch.cat(made)


def test_an_epoch_has_every_document_once_and_never_one_that_is_held_out(folder, tokenizer):
    whole = stream(folder, tokenizer)
    splits = [whole.load_train_split(i) for i in range(5)]
    train = [tokenizer.decode(s.tokens[a : b - 1].tolist()) for s in splits for a, b in pairwise(s.offsets)]
    held = whole.held_out
    assert held is not None
    kept = [tokenizer.decode(held.tokens[a : b - 1].tolist()) for a, b in pairwise(held.offsets)]
    assert held.n_tokens >= 100
    assert not set(train) & set(kept)
    every = {text for i in range(4) for text in texts(i)} | {" ".join(texts(4))}
    assert set(train) | set(kept) <= every
    assert len(every) * 0.8 < len(train) == len(set(train))
    streamed = StreamingDataset(whole, 32, seed=3)
    n = streamed.n_sequences
    assert n == sum((s.n_tokens - 1) // 32 for s in splits)
    starts = {tuple(row) for row in streamed.batch(0, n).input_ids.tolist()}
    assert len(starts) == n
    assert not torch.equal(streamed.batch(0, n).input_ids, streamed.batch(n, n).input_ids)


def test_a_batch_is_a_pure_function_of_the_position_and_resuming_twice_changes_nothing(folder, tokenizer, tmp_path):
    straight = StreamingDataset(stream(folder, tokenizer), 32, seed=1)
    total = 2 * straight.n_sequences + 5
    expected = batches(straight, [total])
    position, got = 0, []
    for stop in (7, 20, total):  # a new process each time; the second has another cache: all is made again
        cache = tmp_path / f"cache-{stop == 20}"
        again = StreamingDataset(stream(folder, tokenizer, cache=cache), 32, seed=1)
        got.append(batches(again, [stop - position], position))
        position = stop
    assert torch.equal(torch.cat(got), expected)
    assert not torch.equal(batches(StreamingDataset(stream(folder, tokenizer), 32, seed=2), [total]), expected)


def test_only_what_is_needed_is_tokenised_and_to_resume_reads_nothing_of_before(folder, tokenizer, monkeypatch):
    read = []
    tokenise = token_store.tokenize_documents

    def counting(folder, documents, encoder, settings, source, **more):
        read.append(source)
        return tokenise(folder, documents, encoder, settings, source, **more)

    monkeypatch.setattr(streaming, "tokenize_documents", counting)
    one = stream(folder, tokenizer, held_out=0)
    streamed = StreamingDataset(one, 32, seed=1)
    streamed.batch(0, 1)
    one.wait_for_prefetch()
    order = [one.shards[i].name for i in streamed._order(0)]
    assert read == order[:2]  # the one that is needed, and the next one ahead of time
    streamed.batch(streamed._ends[0] + 1, 1)
    one.wait_for_prefetch()
    assert read[:2] == order[:2]
    for place in (0, 1):  # the tokens of what came before are gone, their counts are known
        shutil.rmtree(one._shard_folder(int(streamed._order(0)[place])))
    position = streamed._epoch_end(2)
    read.clear()
    monkeypatch.setattr(TokenStream, "prefetch", lambda self, index: None)
    StreamingDataset(stream(folder, tokenizer, held_out=0), 32, seed=1).batch(position, 1)
    assert set(read) <= {order[2]}


def test_the_cache_stays_within_its_room_and_shards_come_back(folder, tokenizer, monkeypatch):
    free = stream(folder, tokenizer)
    n = StreamingDataset(free, 32).n_sequences
    expected = batches(StreamingDataset(free, 32), [1] * (2 * n))
    size = max(streaming._folder_size(path) for path in free.folder.glob("shard-*"))
    shutil.rmtree(free.folder)
    tight = stream(folder, tokenizer, cache_gb=3.1 * size / 1e9)
    most, publish = [], cache.ensure_cached_folder

    def watching(*given, **more):
        made = publish(*given, **more)
        most.append(sum(streaming._folder_size(path) for path in tight.folder.glob("shard-*")))
        return made

    monkeypatch.setattr(streaming, "ensure_cached_folder", watching)
    assert torch.equal(batches(StreamingDataset(tight, 32), [1] * (2 * n)), expected)
    tight.wait_for_prefetch()
    assert max(most) <= 3.1 * size
    assert len(list(tight.folder.glob("index/*.json"))) == 5


def test_a_damaged_shard_is_made_again_and_one_that_changed_or_went_is_named(folder, tokenizer):
    one = stream(folder, tokenizer)
    expected = one.load_train_split(1).tokens.tolist()
    path = one._shard_folder(1) / "train.tokens"
    content = path.read_bytes()
    path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    assert stream(folder, tokenizer).load_train_split(1).tokens.tolist() == expected
    shutil.rmtree(one._shard_folder(1))
    lines = (folder / "1.jsonl").read_text(encoding="utf-8")
    name = one.shards[1].name
    (folder / name).write_text(lines.replace("still", "stale"), encoding="utf-8")  # as long as before
    with pytest.raises(LimbeckError, match=rf"the shard '{name}' .* is not what it was"):
        one.load_train_split(1)
    shutil.rmtree(one._shard_folder(1))
    (folder / name).unlink()
    with pytest.raises(LimbeckError, match=rf"there is no file or folder '.*{name}'"):
        one.load_train_split(1)


@pytest.mark.parametrize(("before", "now"), [(8, 32), (32, 8), (16, 16)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.4])
def test_a_change_of_length_goes_on_in_the_same_shard(folder, tokenizer, before, now, share):
    one = stream(folder, tokenizer)
    first, second = StreamingDataset(one, before, 1), StreamingDataset(one, now, 1)
    position = int(share * first.n_sequences)
    at = second.position_after(first, position)
    if before == now or position == 0:
        assert at == position
        return
    epoch, place, row = first._locate(position - 1)
    assert second._locate(at - 1)[:2] == (epoch, place)
    there = second._locate(at - 1)[2] + 1
    assert (row + 1) * before <= there * now + before  # up to the tail that is shorter than a sequence
    assert (there - 1) * now < (row + 1) * before


def test_a_hub_dataset_is_streamed_shard_by_shard(folder, tokenizer, tmp_path, monkeypatch):
    import datasets

    hub = tmp_path / "hub"
    hub.mkdir()
    for i in range(3):
        (hub / f"{i}.jsonl").write_text(
            "".join(json.dumps({"id": i, "text": text}) + "\n" for text in texts(i)), encoding="utf-8"
        )
    load, asked = datasets.load_dataset, []

    def local(name, config, **more):
        asked.append((name, config, more))
        return load(str(hub), **more)

    monkeypatch.setattr(datasets, "load_dataset", local)
    one = TokenStream("owner/name@train", tokenizer, length=32, held_out=0.1, held_out_tokens=100)
    assert asked == [("owner/name", None, {"streaming": True})]
    assert len(one.shards) == 3
    two = StreamingDataset(one, 32, seed=1)
    assert torch.equal(two.batch(0, 9).input_ids, StreamingDataset(one, 32, seed=1).batch(0, 9).input_ids)
    found = {
        tokenizer.decode(s.tokens[a : b - 1].tolist())
        for s in map(one.load_train_split, range(3))
        for a, b in pairwise(s.offsets)
    }
    assert found <= {text for i in range(3) for text in texts(i)}
    assert len(found) > 70


def test_a_saved_dataset_is_cut_into_shards(tokenizer, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(document_sources, "ROWS_PER_SHARD", 20)
    datasets.Dataset.from_dict({"text": texts(0, 50)}).save_to_disk(tmp_path / "saved")
    one = stream(tmp_path / "saved", tokenizer)
    assert [shard.size for shard in one.shards] == [20, 20, 10]
    StreamingDataset(one, 32).batch(0, 3)


# --- tokens that were made before ---


@pytest.fixture
def ready(tmp_path: Path) -> Path:
    root = tmp_path / "ready"
    root.mkdir()
    for i, name in enumerate(("a.bin", "b.npy")):
        ids = np.concatenate([[*draw, 2] for draw in np.random.default_rng(i).integers(3, 90, (40, 15))])
        if name.endswith(".bin"):
            ids.astype("<u2").tofile(root / name)
        else:
            np.save(root / name, ids.astype(np.uint32))
    index = {"dtype": "uint16", "eos_id": 2, "shards": [{"file": "a.bin", "tokens": 640}, "b.npy"]}
    (root / "index.json").write_text(json.dumps(index), encoding="utf-8")
    return root


def test_ready_tokens_are_a_source_whole_or_streamed(ready, tokenizer):
    store = build_token_store(str(ready), tokenizer, length=8, held_out=0.1, vocab_size=97)
    assert store.train.n_tokens + store.held_out.n_tokens == 1280
    assert store.train.n_documents + store.held_out.n_documents == 80
    one = stream(ready, tokenizer, length=8, vocab_size=97)
    assert [shard.name for shard in one.shards] == ["a.bin", "b.npy"]
    documents = {
        tuple(s.tokens[a:b].tolist()) for s in map(one.load_train_split, (0, 1)) for a, b in pairwise(s.offsets)
    }
    stored = {tuple(store.train.tokens[a:b].tolist()) for a, b in pairwise(store.train.offsets)}
    assert documents == stored
    with pytest.raises(LimbeckError, match="does not match the teacher"):
        build_token_store(str(ready), tokenizer, length=32, held_out=0.1, vocab_size=50)
    assert build_token_store(str(ready / "b.npy"), tokenizer, length=8, held_out=0, eos_id=2).train.n_documents > 20


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda r: (r / "a.bin").unlink(), r"the shard '.*a\.bin' is missing"),
        (lambda r: (r / "a.bin").write_bytes((r / "a.bin").read_bytes()[:-20]), r"a\.bin' is damaged: 630 tokens"),
        (lambda r: (r / "b.npy").write_bytes(b"nothing"), r"b\.npy' is damaged"),
        (lambda r: (r / "index.json").write_text("{", encoding="utf-8"), r"index\.json' cannot be read"),
        (
            lambda r: (r / "index.json").write_text('{"dtype": "float32"}', encoding="utf-8"),
            r"dtype is 'float32'\nexpected: uint16",
        ),
    ],
)
def test_damaged_ready_tokens_are_named(ready, tokenizer, damage, message):
    damage(ready)
    with pytest.raises(LimbeckError, match=message):
        build_token_store(str(ready), tokenizer, length=32, held_out=0.1)
    with pytest.raises(LimbeckError, match=message):
        StreamingDataset(stream(ready, tokenizer), 32).batch(0, 30)
