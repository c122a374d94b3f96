"""Sources, token stores and packing, on small files and a tiny tokenizer that is trained here."""

import errno
import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from limbeck.core import cache, storage
from limbeck.core.cache import MANIFEST, ensure_cached_folder, load_valid_manifest
from limbeck.core.errors import LimbeckError
from limbeck.data.documents import fingerprint_source, iter_documents
from limbeck.data.packing import IGNORE_INDEX, PackedDataset
from limbeck.data.token_store import Split, build_token_store
from limbeck.data.tokenization import hash_tokenizer_rules

WORDS = [
    "the",
    "old",
    "still",
    "turns",
    "wine",
    "into",
    "spirit",
    "and",
    "water",
    "salt",
    "while",
    "slow",
    "fire",
    "burns",
]
others = multiprocessing.get_context("forkserver")  # a fork of this process, with its threads, may wait for ever
others.set_forkserver_preload(["limbeck.data.token_store", "torch", "transformers"])
needs_locks = pytest.mark.skipif(storage.fcntl is None, reason="needs file locks")


def make_tokenizer(vocab: int = 300, **changes) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        [" ".join(WORDS)] * 4,
        trainers.BpeTrainer(vocab_size=vocab, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"eos_token": "<eos>", **changes})


class Counting:
    """A tokenizer that counts the texts it is given, takes its time, or fails at the second call."""

    def __init__(self, inner: PreTrainedTokenizerFast, fail: BaseException | None = None, pause: float = 0):
        self.inner, self.fail, self.pause, self.texts = inner, fail, pause, 0

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def __call__(self, texts: list[str] | str, **settings):
        if isinstance(texts, str):  # a look at what the tokenizer puts around a text
            return self.inner(texts, **settings)
        if self.fail and self.texts:
            raise self.fail
        self.texts += len(texts)
        time.sleep(self.pause)
        return self.inner(texts, **settings)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return tmp_path / "cache"


def texts_of(n: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [f"{seed}.{i} " + " ".join(draw.choices(WORDS, k=draw.randint(3, 60))) for i in range(n)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> str:
    path.write_text("".join(json.dumps({"source": "s", field: text}) + "\n" for text in texts), encoding="utf-8")
    return str(path)


def leftovers(folder: Path) -> list[Path]:
    """Everything in a cache folder that is neither published nor a lock."""
    return [path for path in folder.rglob("*") if path.name.endswith(".tmp") or path.name == "text"]


@contextmanager
def as_nobody():
    """Permissions do not bind root, so tests of them become someone else for a moment."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


# --- sources ---


def source_of(kind: str, folder: Path, texts: list[str]) -> str:
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "jsonl":
        return write_jsonl(folder / "a.jsonl", texts)
    if kind == "jsonl.gz":
        path = folder / "a.jsonl.gz"
        with gzip.open(path, "wt", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": text}) + "\n\n" for text in texts)  # empty lines are passed over
        return str(path)
    if kind == "parquet":
        pq.write_table(pa.table({"id": list(range(len(texts))), "text": texts}), folder / "a.parquet")
        return str(folder / "a.parquet")
    if kind == "saved":
        datasets.Dataset.from_dict({"text": texts}).save_to_disk(folder / "saved")
        return str(folder / "saved")
    if kind == "saved splits":
        rows = datasets.Dataset.from_dict({"text": texts})
        datasets.DatasetDict({"test": rows, "more": rows.select([0])}).save_to_disk(folder / "splits")
        return str(folder / "splits") + "@test"
    assert kind == "folder"
    (folder / "mixed/below").mkdir(parents=True)
    (folder / "mixed/0.txt").write_text(texts[0], encoding="utf-8-sig")
    write_jsonl(folder / "mixed/1.jsonl", texts[1:2])
    pq.write_table(pa.table({"text": texts[2:]}), folder / "mixed/below/2.parquet")
    (folder / "mixed/readme.md").write_text("not text to learn from", encoding="utf-8")
    (folder / "mixed/.hidden.txt").write_text("not this either", encoding="utf-8")
    return str(folder / "mixed")


KINDS = ["jsonl", "jsonl.gz", "parquet", "saved", "saved splits", "folder"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_of_source_gives_its_documents_and_a_key_of_its_content(kind: str, tmp_path: Path):
    texts = ["one café", "two\nlines", "three"]
    source = source_of(kind, tmp_path, texts)
    assert list(iter_documents(source)) == texts
    first = fingerprint_source(source)
    assert first == fingerprint_source(source)
    (tmp_path / "other").mkdir()
    assert (
        first == fingerprint_source(source_of(kind, tmp_path / "other", texts)) or "saved" in kind
    )  # saved: random file ids
    (tmp_path / "third").mkdir()
    assert first != fingerprint_source(source_of(kind, tmp_path / "third", ["one cafe", "two\nlines", "three"]))


def test_a_txt_file_is_one_document_and_empty_documents_are_left_out(tmp_path: Path):
    (tmp_path / "a.txt").write_text("first\n\nsecond\n", encoding="utf-8")
    assert list(iter_documents(str(tmp_path / "a.txt"))) == ["first\n\nsecond\n"]
    assert list(iter_documents(write_jsonl(tmp_path / "b.jsonl", ["", " \n", "x"]))) == ["x"]
    assert list(iter_documents(write_jsonl(tmp_path / "c.jsonl", ["x"], "body"), text_field="body")) == ["x"]


def test_the_embedded_text_is_a_source(own_cache: Path):
    def fill(folder: Path) -> dict:
        write_jsonl(folder / "corpus.jsonl", ["stands for the real one"])
        return {}

    ensure_cached_folder(own_cache / "assets" / "text-quick", fill, what="text")
    assert list(iter_documents("embedded")) == list(iter_documents("embedded:quick")) == ["stands for the real one"]
    assert fingerprint_source("embedded") == fingerprint_source("embedded:quick")
    with pytest.raises(LimbeckError, match=r"unknown tier 'quik'.*did you mean 'quick'"):
        list(iter_documents("embedded:quik"))


def test_hub_names_are_taken_apart(monkeypatch: pytest.MonkeyPatch):
    import datasets

    asked = []

    def load(name: str, config: str | None):
        asked.append((name, config))
        rows = datasets.Dataset.from_dict({"text": ["a", "b"]})
        return datasets.DatasetDict({"train": rows, "test": rows.select([1])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert list(iter_documents("owner/name")) == ["a", "b"]
    assert list(iter_documents("owner/name:small@test")) == ["b"]
    assert asked == [("owner/name", None), ("owner/name", "small")]
    assert fingerprint_source("owner/name") != fingerprint_source("owner/name@test")
    with pytest.raises(LimbeckError, match=r"no split 'dev', found: train, test"):
        list(iter_documents("owner/name@dev"))


def test_a_hub_that_cannot_be_reached_is_said_so(monkeypatch: pytest.MonkeyPatch):
    import datasets
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(LimbeckError, match=r"no file or folder 'limbeck/nothing'.*cannot be loaded"):
        list(iter_documents("limbeck/nothing"))


def test_missing_packages_name_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    parquet = source_of("parquet", tmp_path, ["x"])
    for module, source in (("datasets", "owner/name"), ("pyarrow", parquet)):
        monkeypatch.setitem(sys.modules, module, None)
        with pytest.raises(LimbeckError, match=r"pip install 'limbeck\[data\]'"):
            list(iter_documents(source))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'["x"]\n', r"line 1: a JSON list"),
        (
            "a.jsonl",
            b'{"body": "x", "id": 1}\n',
            r"line 1: no field 'text', only: body, id\n.*data.text_field=body",
        ),
        ("a.jsonl", b'{"text": 5}\n', r"line 1: the field 'text' holds a int"),
        ("a.jsonl", b"\n\n", r"no text in '.*a\.jsonl'"),
        ("a.jsonl", b'{"text": "\xff"}\n', r"not UTF-8 text \(byte 10\)"),
        ("a.jsonl.gz", b"plain text", r"not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(mtime=0, data=b'{"text": "x"}\n' * 99)[:-12], r"not a whole gzip file"),
        ("a.parquet", b"plain text", r"not a whole parquet file"),
        ("a.txt", b"", r"no text in '.*a\.txt'"),
        ("a.pdf", b"x", r"is a \.pdf file\nexpected: a \.txt, \.md"),
    ],
)
def test_unreadable_files_are_named(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(LimbeckError, match=f"(?s){message}"):
        list(iter_documents(str(tmp_path / name)))


def test_missing_and_empty_sources_are_named(tmp_path: Path):
    for source in ("no.jsonl", "./no/folder", "x/y/z", str(tmp_path / "no"), "data/no.parquet", ""):
        if source:
            with pytest.raises(LimbeckError, match=f"there is no file or folder '{source}'"):
                list(iter_documents(source))
            with pytest.raises(LimbeckError, match="there is no file or folder"):
                fingerprint_source(source)
    (tmp_path / "empty").mkdir()
    with pytest.raises(LimbeckError, match=r"no text files in the folder .* only: nothing"):
        list(iter_documents(str(tmp_path / "empty")))
    (tmp_path / "empty" / "a.csv").touch()
    (tmp_path / "empty" / "a.pdf").touch()
    with pytest.raises(LimbeckError, match=r"only: \.pdf, empty \.csv"):
        list(iter_documents(str(tmp_path / "empty")))
    (tmp_path / "empty" / "dataset_dict.json").write_text("{}", encoding="utf-8")
    with pytest.raises(LimbeckError, match=r"datasets cannot load|no text"):
        list(iter_documents(str(tmp_path / "empty")))


def test_parquet_and_saved_datasets_without_the_field_are_named(tmp_path: Path):
    for kind in ("parquet", "saved"):
        source = source_of(kind, tmp_path, ["x"])
        with pytest.raises(LimbeckError, match=r"no field 'body', only:.*text"):
            list(iter_documents(source, text_field="body"))
    with pytest.raises(LimbeckError, match="several splits and none called train, found: test, more"):
        list(iter_documents(source_of("saved splits", tmp_path, ["x"]).partition("@")[0]))


def test_no_permission_is_said_so():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        source = write_jsonl(folder / "a.jsonl", ["x"])
        os.chmod(source, 0)
        with as_nobody(), pytest.raises(LimbeckError, match=r"no permission to read .*a.jsonl"):
            list(iter_documents(source))
        with as_nobody(), pytest.raises(LimbeckError, match=r"no permission to read .*a.jsonl"):
            fingerprint_source(source)
        folder.chmod(0)
        with as_nobody(), pytest.raises(LimbeckError, match="no permission to read"):
            list(iter_documents(name))
        folder.chmod(0o700)


# --- shards ---


def store_of(tmp_path: Path, tokenizer, texts: list[str], **settings):
    source = write_jsonl(tmp_path / "corpus.jsonl", texts)
    return build_token_store(source, tokenizer, **{"length": 8, "held_out": 0.2, **settings})


def decoded(split: Split, tokenizer) -> list[str]:
    rows = [split.tokens[a:b].tolist() for a, b in pairwise(split.offsets)]
    assert all(row[-1] == tokenizer.eos_token_id and tokenizer.eos_token_id not in row[:-1] for row in rows)
    return [tokenizer.decode(row[:-1]) for row in rows]


def test_every_document_is_stored_once_with_eos(tmp_path: Path, tokenizer):
    texts = texts_of(200)
    store = store_of(tmp_path, tokenizer, texts)
    train, held = decoded(store.train, tokenizer), decoded(store.held_out, tokenizer)
    assert sorted(train + held) == sorted(texts)
    assert 15 < len(held) < 70
    assert store.train.tokens.dtype == np.uint16
    assert isinstance(store.train.tokens, np.memmap)
    assert not store.train.tokens.flags.writeable
    assert train != [text for text in texts if text in set(train)]  # the order is drawn


def test_the_split_is_stable_when_data_is_added_and_duplicates_stay_together(tmp_path: Path, tokenizer):
    texts = texts_of(150)
    before = set(decoded(store_of(tmp_path, tokenizer, texts).held_out, tokenizer))
    grown = store_of(tmp_path, tokenizer, [*texts_of(100, seed=1), *texts[::-1], *texts[:40]])
    after, train = decoded(grown.held_out, tokenizer), decoded(grown.train, tokenizer)
    assert before == {text for text in after if text in set(texts)}
    assert not set(after) & set(train)
    assert len(after) + len(train) == 290


def test_a_second_call_does_not_tokenise_again_and_another_length_needs_none_either(tmp_path: Path, tokenizer):
    counting = Counting(tokenizer)
    first = store_of(tmp_path, counting, texts_of(100))
    assert counting.texts == 100
    second = store_of(tmp_path, counting, texts_of(100), length=16)
    assert counting.texts == 100
    assert first.key == second.key
    for length in (8, 16):
        assert PackedDataset(second.train, length).batch(0, 3).input_ids.shape == (3, length)


def test_the_key_changes_with_content_tokenizer_and_settings(tmp_path: Path, tokenizer):
    texts = texts_of(100)
    keys = [
        store_of(tmp_path, tokenizer, texts).key,
        store_of(tmp_path, tokenizer, [*texts, "one more"]).key,
        store_of(tmp_path, make_tokenizer(310), texts).key,
        store_of(tmp_path, tokenizer, texts, held_out=0.3).key,
        store_of(tmp_path, tokenizer, texts, max_tokens=1000).key,
        store_of(tmp_path, tokenizer, texts, eos_id=5).key,
    ]
    assert len(set(keys)) == len(keys)
    source = tmp_path / "two.jsonl"
    source.write_text("".join(json.dumps({"text": t, "body": t[::-1]}) + "\n" for t in texts), encoding="utf-8")
    fields = [
        build_token_store(str(source), tokenizer, length=8, held_out=0.2, text_field=f).key for f in ("text", "body")
    ]
    assert fields[0] != fields[1]


def test_the_tokenizer_key_ignores_how_it_was_last_called(tokenizer):
    before = hash_tokenizer_rules(tokenizer)
    tokenizer("a long enough text", truncation=True, max_length=2)
    assert hash_tokenizer_rules(tokenizer) == before
    changed = make_tokenizer()
    changed.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    assert hash_tokenizer_rules(changed) != before  # same vocabulary, other rule


def test_max_tokens_is_exact_and_takes_a_fair_mix(tmp_path: Path, tokenizer):
    texts = [f"{side} {text}" for side in ("left", "right") for text in texts_of(300)]
    store = store_of(tmp_path, tokenizer, texts, max_tokens=6000)
    assert store.train.n_tokens + store.held_out.n_tokens == 6000
    split = store.train
    heads = [tokenizer.decode(split.tokens[a : a + 4].tolist()) for a in split.offsets[:-1]]
    left = sum(head.startswith("l") for head in heads) / len(heads)
    assert 0.3 < left < 0.7
    assert store_of(tmp_path, tokenizer, texts, max_tokens=10**9).train.n_documents > 400


def test_long_documents_are_tokenised_in_pieces(tmp_path: Path, tokenizer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("limbeck.data.tokenization.PIECE_CHARACTERS", 100)
    texts = ["\n".join(texts_of(20)), "x" * 450]
    store = store_of(tmp_path, tokenizer, texts, held_out=0)
    assert sorted(decoded(store.train, tokenizer)) == sorted(texts)
    assert store.held_out.n_tokens == store.held_out.n_documents == 0


def test_a_wide_vocabulary_takes_four_bytes(tmp_path: Path):
    wide = make_tokenizer()
    wide.add_tokens([f"<extra{i}>" for i in range(65536)])
    store = store_of(tmp_path, wide, [*texts_of(50), "<extra65535>" * 5])
    assert store.train.tokens.dtype == np.uint32
    assert max(store.train.tokens.max(), store.held_out.tokens.max()) > 65535


def test_tokens_that_the_teacher_has_no_row_for_are_an_error(tmp_path: Path, tokenizer):
    message = r"does not match the teacher: token id \d+, embedding table of 280 rows"
    with pytest.raises(LimbeckError, match=message):
        store_of(tmp_path, tokenizer, texts_of(100), vocab_size=280)
    assert store_of(tmp_path, tokenizer, texts_of(100), vocab_size=512)  # a padded table is fine
    with pytest.raises(LimbeckError, match=message):  # from the cache as well
        store_of(tmp_path, tokenizer, texts_of(100), vocab_size=280)
    with pytest.raises(LimbeckError, match="token id 600, embedding table of 512"):
        store_of(tmp_path, tokenizer, texts_of(100), vocab_size=512, eos_id=600)


def test_too_little_data_says_how_much_there_is_and_how_much_is_needed(tmp_path: Path, tokenizer):
    with pytest.raises(LimbeckError, match=r"(?s)gives [\d,]+ held_out tokens in \d+ documents.*at least 20,001"):
        store_of(tmp_path, tokenizer, texts_of(40), length=10_000)
    with pytest.raises(LimbeckError, match=r"(?s)gives [\d,]+ held_out tokens.*--set data.seq_len=\d+"):
        store_of(tmp_path, tokenizer, texts_of(40), held_out=1e-9, length=600)
    assert store_of(tmp_path, tokenizer, texts_of(40), held_out=0).held_out.n_tokens == 0
    with pytest.raises(LimbeckError, match="no text in"):
        store_of(tmp_path, tokenizer, ["", " "])
    with pytest.raises(LimbeckError, match="no end-of-sequence token"):
        store_of(tmp_path, make_tokenizer(eos_token=None), texts_of(40))
    for wrong in ({"length": 0}, {"held_out": 1.0}, {"max_tokens": 0}):
        with pytest.raises(LimbeckError, match="expected: length and max_tokens of at least 1"):
            store_of(tmp_path, tokenizer, texts_of(40), **wrong)


@pytest.mark.parametrize("fail", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_a_failure_half_way_leaves_nothing(
    tmp_path: Path, tokenizer, own_cache: Path, fail: BaseException, monkeypatch
):
    monkeypatch.setattr("limbeck.data.token_store.BATCH_CHARACTERS", 1000)
    full = isinstance(fail, OSError)
    with pytest.raises(
        LimbeckError if full else KeyboardInterrupt, match=r"is full\n.*LIMBECK_CACHE" if full else None
    ):
        store_of(tmp_path, Counting(tokenizer, fail), texts_of(200))
    assert not leftovers(own_cache)
    assert store_of(tmp_path, tokenizer, texts_of(200)).train.n_tokens


def test_a_disk_without_room_is_noticed_before(tmp_path: Path, tokenizer, own_cache: Path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=100))
    counting = Counting(tokenizer)
    with pytest.raises(LimbeckError, match=r"(?s)not enough disk space for tokens of .*expected: at least"):
        store_of(tmp_path, counting, texts_of(200))
    assert counting.texts == 0
    assert not leftovers(own_cache)


@pytest.mark.parametrize("damage", ["shorter", "flipped", "missing", "manifest"])
def test_a_damaged_store_is_made_again(tmp_path: Path, tokenizer, damage: str):
    counting = Counting(tokenizer)
    store = store_of(tmp_path, counting, texts_of(100))
    whole = store.train.tokens.tolist()
    path = store.folder / ("manifest.json" if damage == "manifest" else "train.tokens")
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        path.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    else:
        path.write_bytes(content[: len(content) // 2])
    assert store_of(tmp_path, counting, texts_of(100)).train.tokens.tolist() == whole
    assert counting.texts == 200


def test_a_cache_that_may_not_be_written_is_named(monkeypatch):
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        monkeypatch.setenv("LIMBECK_CACHE", name)
        with as_nobody(), pytest.raises(LimbeckError, match=r"(?s)cannot write to .*LIMBECK_CACHE=FOLDER"):
            ensure_cached_folder(Path(name) / "a", lambda folder: {}, what="thing")
        os.chmod(name, 0o700)


def _prepare(cache: str, source: Path, tokenizer, answers) -> None:
    os.environ["LIMBECK_CACHE"] = cache
    counting = Counting(tokenizer, pause=1)
    store = build_token_store(source, counting, length=8, held_out=0.2)
    answers.put((counting.texts, int(store.train.tokens.astype(np.int64).sum())))


def _hang(started, temporary: Path) -> dict:
    (temporary / "half").write_text("half", encoding="utf-8")
    started.set()
    time.sleep(600)
    return {}


def _hanging(folder: Path):
    """A process in the middle of making a thing, for ever."""
    started = others.Event()
    process = others.Process(
        target=ensure_cached_folder, args=(folder, partial(_hang, started)), kwargs={"what": "thing"}
    )
    process.start()
    assert started.wait(60)
    return process


@needs_locks
def test_two_processes_at_once_make_one_store(tmp_path: Path, tokenizer):
    source = write_jsonl(tmp_path / "corpus.jsonl", texts_of(300))
    answers = others.Queue()
    work = (os.environ["LIMBECK_CACHE"], source, tokenizer, answers)
    processes = [others.Process(target=_prepare, args=work) for _ in range(3)]
    for process in processes:
        process.start()
    got = sorted(answers.get(timeout=60) for _ in processes)
    for process in processes:
        process.join(60)
    assert [texts for texts, _ in got] == [0, 0, 300]
    assert len({total for _, total in got}) == 1


@needs_locks
def test_a_killed_process_leaves_no_lock_and_its_rubbish_is_removed(tmp_path: Path):
    folder = tmp_path / "thing"
    process = _hanging(folder)
    assert load_valid_manifest(folder) is None
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert len(list(tmp_path.glob(".*.tmp"))) == 1

    def fill(temporary: Path) -> dict:
        (temporary / "whole").write_text("whole", encoding="utf-8")
        return {"by": "the second"}

    assert ensure_cached_folder(folder, fill, what="thing")["by"] == "the second"
    assert load_valid_manifest(folder, verify=True)
    assert not list(tmp_path.glob(".*.tmp"))


@needs_locks
def test_a_process_that_stands_still_is_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "thing"
    process = _hanging(folder)
    monkeypatch.setattr(cache, "LOCK_TIMEOUT_SECONDS", 0.3)
    with pytest.raises(LimbeckError, match="another process holds the lock of the thing"):
        ensure_cached_folder(folder, lambda temporary: {}, what="thing")
    process.kill()
    process.join(60)


def test_without_file_locks_the_first_rename_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(storage, "fcntl", None)
    folder = tmp_path / "thing"

    def overtaken(temporary: Path) -> dict:
        (temporary / "file").write_text("second", encoding="utf-8")
        ensure_cached_folder(
            folder, lambda other: {"file": (other / "file").write_text("first", encoding="utf-8")}, what="thing"
        )
        return {}

    ensure_cached_folder(folder, overtaken, what="thing")
    assert (folder / "file").read_text(encoding="utf-8") == "first"
    assert load_valid_manifest(folder, verify=True)
    assert sorted(path.name for path in folder.iterdir()) == ["file", MANIFEST]
    assert not list(tmp_path.glob(".*.tmp"))


# --- packing ---


def numbered(n_documents: int = 60, seed: int = 0) -> Split:
    """A split in which every token is its own place, so that it says where it came from."""
    lengths = np.random.default_rng(seed).integers(1, 30, n_documents)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return Split("train", np.arange(offsets[-1], dtype=np.uint32), offsets)


@pytest.mark.parametrize("length", [1, 7, 64])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_token_of_an_epoch_is_an_input_once(length: int, shuffle: bool):
    packed = PackedDataset(numbered(), length, seed=3, shuffle=shuffle)
    n = packed.split.n_tokens
    assert packed.n_sequences == (n - 1) // length
    inputs = packed.batch(0, packed.n_sequences).input_ids.flatten()
    assert len(set(inputs.tolist())) == len(inputs) == packed.n_sequences * length > n - 1 - length


@pytest.mark.parametrize("length", [1, 7, 64])
def test_targets_are_the_next_token_and_never_cross_a_document(length: int):
    split = numbered()
    batch = PackedDataset(split, length, seed=3).batch(0, 5)
    last = torch.isin(batch.input_ids, torch.from_numpy(split.offsets[1:] - 1))
    assert torch.equal(batch.targets == IGNORE_INDEX, last)
    assert torch.equal(batch.targets[~last], batch.input_ids[~last] + 1)
    assert batch.n_targets == int((~last).sum())
    assert batch.input_ids.dtype == batch.position_ids.dtype == batch.targets.dtype == torch.int64


def test_a_target_at_the_end_of_a_row_is_the_first_input_of_the_next():
    split = Split("train", np.arange(100, dtype=np.uint16), np.array([0, 100]))
    batch = PackedDataset(split, 9).batch(0, 11)
    assert torch.equal(batch.targets[:-1, -1], batch.input_ids[1:, 0])
    assert batch.n_targets == 99


def test_positions_start_again_at_each_document_and_row():
    split = numbered()
    batch = PackedDataset(split, 16, seed=5).batch(0, 20)
    starts = torch.isin(batch.input_ids, torch.from_numpy(split.offsets[:-1]))
    for row in range(20):
        at = 0
        for t in range(16):
            at = 0 if t == 0 or starts[row, t] else at + 1
            assert batch.position_ids[row, t] == at


def test_a_batch_is_a_pure_function_of_the_position():
    one, two = (PackedDataset(numbered(), 16, seed=7) for _ in range(2))
    total = one.n_sequences * 2 + 5
    whole = one.batch(0, total).input_ids
    for position in (total - 3, 0, one.n_sequences - 1, 4):  # any order, across the end of an epoch
        assert torch.equal(two.batch(position, 3).input_ids, whole[position : position + 3])
    assert not torch.equal(PackedDataset(numbered(), 16, seed=8).batch(0, 4).input_ids, whole[:4])


def test_to_resume_is_an_integer_however_often():
    steps, size = 30, 4
    straight = PackedDataset(numbered(), 16, seed=7)
    expected = [straight.batch(step * size, size) for step in range(steps)]
    position, got = 0, []
    for stop in (11, 12, 30):  # stopped and resumed twice
        packed = PackedDataset(numbered(), 16, seed=7)
        while position < stop * size:
            got.append(packed.batch(position, size))
            position += size
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a.input_ids, b.input_ids)
        assert torch.equal(a.position_ids, b.position_ids)
        assert torch.equal(a.targets, b.targets)


def test_epochs_differ_unless_the_order_is_kept():
    packed, kept = PackedDataset(numbered(), 16, seed=1), PackedDataset(numbered(), 16, seed=1, shuffle=False)
    n = packed.n_sequences
    assert not torch.equal(packed.batch(0, n).input_ids, packed.batch(n, n).input_ids)
    assert torch.equal(kept.batch(0, n).input_ids, kept.batch(n, n).input_ids)
    assert torch.equal(kept.batch(0, n).input_ids.flatten(), torch.arange(n * 16))


def test_the_order_is_the_same_on_every_machine():
    split = Split("train", np.arange(13, dtype=np.uint16), np.arange(14))  # documents of one token
    packed = PackedDataset(split, 12, seed=1234)
    assert packed.batch(0, 2).input_ids.tolist() == [
        [11, 2, 7, 0, 6, 3, 4, 9, 1, 12, 8, 5],
        [4, 8, 6, 9, 10, 3, 1, 12, 2, 0, 7, 11],
    ]


def test_a_batch_moves_to_a_device():
    assert PackedDataset(numbered(), 8).batch(0, 2).to("meta").targets.device.type == "meta"


def test_too_short_a_split_and_wrong_positions_are_errors():
    with pytest.raises(LimbeckError, match=r"5 train tokens\nexpected: more than 5"):
        PackedDataset(Split("train", np.arange(5, dtype=np.uint16), np.array([0, 5])), 5)
    with pytest.raises(LimbeckError, match="0 held_out tokens"):
        PackedDataset(Split("held_out", np.empty(0, np.uint16), np.array([0])), 5)
    for position, size in ((-1, 2), (0, 0)):
        with pytest.raises(LimbeckError, match="expected: position >= 0 and size >= 1"):
            PackedDataset(numbered(), 8).batch(position, size)
