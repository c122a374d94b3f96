"""What people really have: mixed folders, links, one long text, other formats and encodings; and what is said of it."""

import gzip
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from limbeck import LimbeckError
from limbeck.cli.distill import build_recipe
from limbeck.core.recipe import Recipe
from limbeck.data.documents import fingerprint_source, get_file_sizes, iter_documents, report_skipped_files
from limbeck.data.held_out import hash_document
from limbeck.data.streaming import TokenStream
from limbeck.data.token_store import build_token_store
from limbeck.training import setup

pytestmark = pytest.mark.usefixtures("own_cache")
SIX = ["one", "two", "three", "four", "five", "six"]


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))


def lines(texts, field="text") -> str:
    return "".join(json.dumps({field: text}) + "\n" for text in texts)


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


FORMATS = {
    "a.jsonl": lines(SIX),
    "a.ndjson": lines(SIX),
    "a.json": json.dumps([{"text": text} for text in SIX], indent=2),
    "lines.json": lines(SIX),
    "a.csv": "id,text\n" + "".join(f'{i},"{text}"\n' for i, text in enumerate(SIX)),
    "semicolons.csv": "id;text\r\n" + "".join(f"{i};{text}\r\n" for i, text in enumerate(SIX)),
    "a.tsv": "id\ttext\n" + "".join(f"{i}\t{text}\n" for i, text in enumerate(SIX)),
    "marked.jsonl": "\ufeff" + lines(SIX).replace("\n", "\r\n") + "\r\n\r\n",
    "marked.csv": "\ufefftext\n" + "\n".join(SIX) + "\n",
}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_each_format_gives_its_documents(name, zipped, tmp_path):
    content = FORMATS[name].encode()
    path = write(tmp_path / f"{name}{'.gz' * zipped}", gzip.compress(content) if zipped else content)
    assert list(iter_documents(str(path))) == SIX
    assert list(iter_documents(str(path.parent))) == SIX
    assert fingerprint_source(str(path)) == fingerprint_source(str(path.parent))


def test_a_cell_may_be_long_and_have_lines(tmp_path):
    import csv

    long = "a line\nanother, with a comma\n" * 10_000
    before = csv.field_size_limit()
    path = write(tmp_path / "a.csv", f'text,id\n"{long}",1\nshort,2\n')
    assert list(iter_documents(str(path))) == [long, "short"]
    assert csv.field_size_limit() == before


def test_a_folder_is_read_once_and_what_is_left_out_is_said(tmp_path, capsys):
    root = tmp_path / "text"
    write(root / "a.jsonl", lines(SIX[:2]))
    write(root / ".ipynb_checkpoints" / "a-checkpoint.jsonl", lines(["hidden"]))
    write(root / ".b.jsonl", lines(["hidden"]))
    write(tmp_path / "elsewhere" / "b.jsonl", lines(SIX[2:4]))
    (root / "more").symlink_to(tmp_path / "elsewhere")
    (root / "twice").symlink_to(tmp_path / "elsewhere")
    (root / "more" / "back").symlink_to(root)
    (root / "latest.jsonl").symlink_to(root / "a.jsonl")
    write(root / "c.ndjson", lines(SIX[4:]))
    write(root / "README.md", "# about it")
    write(root / "dataset_info.json", json.dumps({"features": {"text": "string"}}, indent=1))
    write(root / "picture.png", b"\x89PNG")
    write(root / "empty.jsonl", "")
    write(root / "blank.jsonl", "\n\r\n\n")
    assert sorted(iter_documents(str(root))) == sorted(SIX)
    assert "1 files contain no documents: blank.jsonl" in capsys.readouterr().err
    report_skipped_files(str(root))
    told = " ".join(capsys.readouterr().err.split())
    left = "left out: 1 .json, 1 .md, 1 .png, 1 empty .jsonl, 2 hidden, 3 linked twice"
    assert f"read: 3 .jsonl, 1 .ndjson; {left}" in told
    report_skipped_files(str(root))
    assert not capsys.readouterr().err  # it has been said
    kept = get_file_sizes(str(root))
    assert kept["left out: hidden"] == 2
    assert kept["more/b.jsonl"] == len(lines(SIX[2:4]))


def test_a_folder_of_notes_is_read(tmp_path):
    write(tmp_path / "notes" / "a.md", "one")
    write(tmp_path / "notes" / "b.md", "two")
    assert list(iter_documents(str(tmp_path / "notes"))) == ["one", "two"]
    write(tmp_path / "alone" / "README.md", "one")
    assert list(iter_documents(str(tmp_path / "alone"))) == ["one"]


@pytest.mark.parametrize("target", ["/nowhere/b.jsonl", "b.jsonl", "../gone"])
def test_a_link_that_leads_nowhere_is_named(target, tmp_path):
    write(tmp_path / "text" / "a.jsonl", lines(SIX))
    (tmp_path / "text" / "b.jsonl").symlink_to(target)
    with pytest.raises(LimbeckError, match=rf"b\.jsonl' is broken, it points to {target}") as found:
        fingerprint_source(str(tmp_path / "text"))
    subprocess.run(found.value.hint.partition("   ")[0], shell=True, check=True)
    assert list(iter_documents(str(tmp_path / "text"))) == SIX


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            '{"text": "x"}\n{"text": "y", "meta": ' + "[" * 100_000 + "]" * 100_000 + "}\n",
            "line 2: not JSON",
        ),
        ("a.json", "[" * 100_000 + "]" * 100_000, "not JSON"),
        ("a.json", '[{"text": "x"}, 5]', "record 2: a JSON int"),
        ("a.json", '[{"text": "x"},', "not JSON"),
        ("a.json", '{"text": "x"}\n[]\n', "line 2: a JSON list"),
        ("a.json", '{"data": [1], "version": 2}', "record 1: no field 'text', only: data, version"),
        ("a.ndjson", "5\n", "line 1: a JSON int"),
        ("a.ndjson", '{"text": ["x"]}\n', "line 1: the field 'text' holds a list"),
        ("a.csv", "id,text\n1,x\n2,y,z\n", "line 3: 3 cells\nexpected: 2"),
        ("a.csv", 'text\nx\n"y" z\n', "line 3: not a valid table"),
        ("a.tsv", "id\tbody\n1\tx\n", "line 2: no field 'text', only: id, body"),
        ("a.csv", "", "no text in"),
        ("a.json", '{"text": 1e5}', "holds a float"),
    ],
)
def test_what_is_wrong_is_said_with_file_and_line(name, content, message, tmp_path):
    path = write(tmp_path / name, content)
    with pytest.raises(LimbeckError, match=message) as found:
        list(iter_documents(str(path)))
    assert str(path) in str(found.value)


NESTED = {
    "an object": ('{"id": "aa", "data": {"title": "x", "story": "one, longer"}}\n', "data.story"),
    "deep": ('{"a": {"b": {"c.d": "one, longer"}}, "e": "short"}\n', "a.b.c.d"),
    "a list of records": ('{"version": "1", "train": [{"body": "one, longer"}]}', "train.body"),
    "lists of lists": (
        '{"data": [{"paragraphs": [{"context": "one, longer", "qas": []}]}]}',
        "data.paragraphs.context",
    ),
}


@pytest.mark.parametrize("kind", NESTED)
def test_a_field_in_another_is_found_and_read(kind, tmp_path):
    content, field = NESTED[kind]
    path = write(tmp_path / "a.json", content)
    with pytest.raises(LimbeckError, match=rf"no field 'text', only: .*\n(.|\n)*data\.text_field={field}$"):
        list(iter_documents(str(path)))
    assert list(iter_documents(str(path), text_field=field)) == ["one, longer"]
    with pytest.raises(LimbeckError, match=f"no field '{field}.more'"):
        list(iter_documents(str(path), text_field=f"{field}.more"))


def test_a_field_in_others_has_as_many_documents_as_they_have(tmp_path, capsys):
    rows = [{"a": [{"b": "one"}, {"b": None}, {"b": "two"}]}, {"a": None}, {"a": []}, {"a": [{"b": "three"}]}]
    path = write(tmp_path / "a.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert list(iter_documents(str(path), text_field="a.b")) == ["one", "two", "three"]
    assert "skipped 2 of 5 documents, which are empty" in capsys.readouterr().err


def test_a_column_in_another_is_read_of_parquet_and_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{"id": "a", "number": 1, "data": {"story": f"text {i}", "size": 2}} for i in range(3)]
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for source in ("a.parquet", "saved"):
        with pytest.raises(LimbeckError, match="no field 'text', only: id, number, data"):
            list(iter_documents(str(tmp_path / source)))
        assert list(iter_documents(str(tmp_path / source), text_field="data.story")) == [f"text {i}" for i in range(3)]
        with pytest.raises(LimbeckError, match=r"no field 'data\.storey'"):
            list(iter_documents(str(tmp_path / source), text_field="data.storey"))
    only = datasets.Dataset.from_list([{"number": 1, "data": {"story": "text"}}])
    only.to_parquet(tmp_path / "b.parquet")
    with pytest.raises(LimbeckError, match=r"text_field=data\.story"):
        list(iter_documents(str(tmp_path / "b.parquet")))


@pytest.mark.parametrize(("name", "content"), [("a.json", '["one", "two"]'), ("a.jsonl", '"one"\n"two"\n')])
def test_strings_are_texts(name, content, tmp_path):
    path = write(tmp_path / name, content)
    assert list(iter_documents(str(path))) == ["one", "two"]
    with pytest.raises(LimbeckError, match="1: no field 'body', only: text"):
        list(iter_documents(str(path), text_field="body"))


@pytest.mark.parametrize("name", ["it's a.tsv", "a.tsv.gz"])
def test_a_table_whose_quotes_are_letters_is_converted_by_the_command(name, tmp_path):
    content = b'id\ttext\n1\t"License" shall mean\n2\t5" and 6"\n'
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(LimbeckError, match="line 2: not a valid table") as found:
        list(iter_documents(str(path)))
    subprocess.run(found.value.hint.replace("python", sys.executable, 1), shell=True, check=True)
    assert list(iter_documents(f"{path}.jsonl")) == ['"License" shall mean', '5" and 6"']


@pytest.mark.parametrize("name", ["a.txt", "b.jsonl", "c.csv.gz"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "cp1252", "utf-32"])
def test_another_encoding_is_told_and_the_command_mends_it(name, encoding, tmp_path):
    text = {"a": "Zoë’s café\n", "b": '{"text": "Zoë’s café"}\n', "c": "text\nZoë’s café\n"}[name[0]]
    if encoding == "utf-16-le" and name != "a.txt":
        pytest.skip("is no JSON or table without a mark")
    content = text.encode(encoding)
    path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(LimbeckError, match="not UTF-8 text") as found:
        list(iter_documents(str(path)))
    if encoding in ("utf-16", "utf-32"):
        assert f"begins as {encoding.upper()}" in str(found.value)
    subprocess.run(found.value.hint, shell=True, check=True)
    assert [one.strip() for one in iter_documents(str(path))] == ["Zoë’s café"]


def test_empty_documents_are_counted(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", lines(["x", "", "  \n", "y"]) + '{"text": null}\n')
    assert list(iter_documents(str(path))) == ["x", "y"]
    assert "skipped 3 of 5 documents, which are empty" in " ".join(capsys.readouterr().err.split())


# --- one text, few texts ---

WORDS = [
    "river",
    "stone",
    "light",
    "winter",
    "garden",
    "letter",
    "market",
    "engine",
    "summer",
    "window",
    "paper",
    "gate",
]


def book(paragraphs: int, start: int = 0) -> str:
    return "\n\n".join(" ".join(WORDS[(i * 7 + j) % 12] for j in range(40)) for i in range(start, start + paragraphs))


def few(path: Path) -> Path:
    return write(path.with_suffix(".jsonl"), lines(f"{i} {book(4, i)}" for i in range(5)))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.45])
@pytest.mark.parametrize("kind", ["book", "one paragraph", "lines", "few", "tokens", "folder"])
def test_a_text_that_the_hash_does_not_part_holds_out_its_end(kind, share, tmp_path, tokenizer, capsys):
    import numpy as np

    path = {
        "book": lambda: write(tmp_path / "book.txt", book(300)),
        "one paragraph": lambda: write(tmp_path / "book.txt", book(300).replace("\n\n", " ")),
        "lines": lambda: write(tmp_path / "a.csv", 'text\n"' + book(300).replace("\n\n", "\n") + '"\n'),
        "few": lambda: write(tmp_path / "few.jsonl", lines(f"{i} {book(100, i)}" for i in range(3))),
        "tokens": lambda: tmp_path / "ids.npy",
        "folder": lambda: write(tmp_path / "books" / "a.txt", book(300)).parent,
    }[kind]()
    if kind == "tokens":
        np.save(path, np.random.default_rng(0).integers(3, 90, 20_000).astype("<u2"))
    whole = build_token_store(str(path), tokenizer, length=32, held_out=0)
    store = build_token_store(str(path), tokenizer, length=32, held_out=share)
    counts = store.train.n_tokens, store.held_out.n_tokens
    assert min(counts) > 65
    assert sum(counts) == pytest.approx(whole.train.n_tokens, abs=4)
    if kind != "few":
        assert counts[1] / sum(counts) == pytest.approx(max(share, min(0.1, 16384 / (4 * sum(counts)))), rel=0.9)
    told = " ".join(capsys.readouterr().err.split())
    assert ("the split by hash would leave one side next to nothing, so held out: the" in told) == (store_parted(store))
    # nothing is learnt that is measured on, and the two are the text
    if kind in ("book", "folder"):
        train, held = (tokenizer.decode(split.tokens.tolist()) for split in (store.train, store.held_out))
        assert (train + held).replace("</s>", "") == tokenizer.decode(whole.train.tokens.tolist()).replace("</s>", "")
    assert build_token_store(str(path), tokenizer, length=64, held_out=share).key == store.key


def test_one_short_document_is_not_all_that_is_held_out(tmp_path, tokenizer):
    """Thirty documents, of which the hash holds out the shortest: 2 % of a small text is nothing to measure on."""
    documents = [book(12, i) for i in range(30)]
    share = 0.02
    short = next(f"word {i}" for i in range(10_000) if hash_document(f"word {i}".encode())[0] < share * 2**64)
    assert not any(hash_document(text.encode())[0] < share * 2**64 for text in documents)
    path = write(tmp_path / "a.jsonl", lines([*documents, short]))
    store = build_token_store(str(path), tokenizer, length=32, held_out=share)
    assert store.held_out.n_tokens > 0.05 * store.train.n_tokens
    assert store.train.n_documents > 20


def store_parted(store) -> bool:
    return bool(json.loads((store.folder / "manifest.json").read_text(encoding="utf-8"))["parted"])


def test_a_limit_on_tokens_leaves_both_sides_something(tmp_path, tokenizer):
    path = write(tmp_path / "book.txt", book(300))
    store = build_token_store(str(path), tokenizer, length=16, held_out=0.02, max_tokens=3000)
    assert store.train.n_tokens + store.held_out.n_tokens == 3000
    assert min(store.train.n_tokens, store.held_out.n_tokens) > 33


def test_duplicates_are_held_out_together(tmp_path, tokenizer):
    path = write(tmp_path / "a.jsonl", lines([book(3, i // 4) for i in range(80)]))
    store = build_token_store(str(path), tokenizer, length=16, held_out=1e-9)
    sides = [
        {bytes(split.tokens[a:b]) for a, b in zip(split.offsets, split.offsets[1:])}
        for split in (store.train, store.held_out)
    ]
    assert sides[1]
    assert not sides[0] & sides[1]


@pytest.mark.parametrize("kind", ["book", "few", "folder"])
def test_a_stream_holds_something_out_too_before_the_run_exists(kind, tmp_path, tokenizer, capsys):
    path = write(tmp_path / "book.txt", book(300)) if kind == "book" else few(tmp_path / "few")
    if kind == "folder":
        path = write(tmp_path / "books" / "a.txt", book(60)).parent
        write(path / "b.txt", book(200, 7))
    stream = TokenStream(str(path), tokenizer, length=16, held_out=1e-6, held_out_tokens=64)
    assert stream.held_out is not None
    assert stream.held_out.n_tokens >= 33
    assert "held out: the" in " ".join(capsys.readouterr().err.split())
    again = TokenStream(str(path), tokenizer, length=16, held_out=1e-6, held_out_tokens=64)
    assert again.key == stream.key
    with pytest.raises(LimbeckError, match="at least"):
        TokenStream(str(path), tokenizer, length=100_000, held_out=1e-6, held_out_tokens=64)


@pytest.mark.parametrize("kind", ["jsonl", "txt", "tokens", "saved"])
def test_an_edit_of_the_same_size_is_noticed_whatever_its_times(kind, tmp_path, tokenizer, capsys):
    import numpy as np

    folder = tmp_path / "shards"
    if kind == "tokens":
        folder.mkdir()
        for i in range(3):
            ids = np.random.default_rng(i).integers(3, 90, 4000)
            ids[::20] = 2
            ids.astype("<u2").tofile(folder / f"{i}.bin")
        (folder / "index.json").write_text('{"dtype": "uint16"}', encoding="utf-8")
    elif kind == "saved":
        import datasets

        datasets.Dataset.from_dict({"text": [book(1, i) for i in range(90)]}).save_to_disk(str(folder))
    else:
        for i in range(3):
            texts = [book(1, 30 * i + j) for j in range(30)]
            write(folder / f"{i}.{kind}", lines(texts) if kind == "jsonl" else book(60, 50 * i))

    def opened() -> TokenStream:
        stream = TokenStream(str(folder), tokenizer, length=16, held_out=0.2, held_out_tokens=64)
        for index in range(len(stream.shards)):
            stream.load_train_split(index)
        return stream

    first = opened()
    assert opened().key == first.key
    files = {path: path.read_bytes() for shard in first.shards for path in shard.files}
    path = sorted(files)[0]
    states = os.stat(path)
    content = files[path]
    if kind == "tokens":
        path.write_bytes(content[:100] + bytes([content[100] ^ 1]) + content[101:])
    elif kind == "saved":
        path.write_bytes(content.replace(b"river", b"RIVER"))
    else:
        path.write_text(content.decode().replace("river", "RIVER"), encoding="utf-8")
    os.utime(path, ns=(states.st_atime_ns, states.st_mtime_ns))  # as cp -p and rsync -t leave it
    capsys.readouterr()
    edited = opened()
    assert edited.key != first.key
    assert "modified since they were tokenized" in " ".join(capsys.readouterr().err.split())
    assert not all(
        np.array_equal(edited.load_train_split(i).tokens, first.load_train_split(i).tokens)
        for i in range(len(first.shards))
    )
    assert opened().key == edited.key
    path.write_bytes(content)
    assert opened().key == first.key, "the old text has its old tokens"


# --- hints ---


@pytest.fixture
def recipe(teacher_folder, tmp_path):
    def make(source: Path, **changes) -> dict:
        return {
            "teacher": str(teacher_folder),
            "student": {"mixer": "gla"},
            "data": {"source": str(source), "seq_len": 64, "held_out": 0.1, **changes.pop("data", {})},
            "stages": [{"stage": "logits", "tokens": 256, "batch_size": 1}],
            "evaluation": {"tokens": 64, "prompt": None},
            "out": str(tmp_path / "run"),
            **changes,
        }

    return make


def rows(path: Path, field: str = "text", n: int = 40) -> Path:
    return write(path, lines([f"{i} {book(1, i)}" for i in range(n)], field))


HINTED = {
    "another field": lambda p, make: make(rows(p / "a.jsonl", "content")),
    "a field with a space": lambda p, make: make(rows(p / "a.jsonl", "my text")),
    "a field of one of several": lambda p, make: {
        **make(p),
        "data": {"seq_len": 64, "sources": [{"source": str(p / "a.jsonl")}, {"source": str(p / "b.csv")}]},
    },
    "the field of a stage's text": lambda p, make: make(
        rows(p / "a.jsonl"),
        stages=[
            {"stage": "hidden", "tokens": 128, "batch_size": 1},
            {"stage": "logits", "tokens": 128, "data": {"source": str(rows(p / "b.jsonl", "body")), "seq_len": 64}},
        ],
    ),
    "too long": lambda p, make: make(rows(p / "a.jsonl", n=12), data={"seq_len": 512}),
    "too long, streamed": lambda p, make: make(rows(p / "a.jsonl", n=12), data={"seq_len": 256, "streaming": True}),
    "a stage too long": lambda p, make: make(
        rows(p / "a.jsonl", n=12), stages=[{"stage": "logits", "tokens": 128, "batch_size": 1, "seq_len": 500}]
    ),
    "short shards": lambda p, make: make(
        next(reversed([write(p / "many" / f"{i}.txt", f"{i} {book(1, i)}") for i in range(60)])).parent,
        data={"seq_len": 400, "streaming": True, "held_out": 0.3},
    ),
    "no end": None,
    "not UTF-8": lambda p, make: make(write(p / "a.txt", "Zoë ".encode("latin-1") + book(200).encode())),
    "dangling": None,
}


@pytest.mark.parametrize("name", HINTED)
def test_every_hint_works_when_it_is_typed(name, tmp_path, recipe, teacher_folder):
    if name == "no end":
        import shutil

        teacher = tmp_path / "teacher"
        shutil.copytree(teacher_folder, teacher)
        file = teacher / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        settings.pop("eos_token")
        file.write_text(json.dumps(settings), encoding="utf-8")
        raw = {**recipe(rows(tmp_path / "a.jsonl")), "teacher": str(teacher)}
    elif name == "dangling":
        rows(tmp_path / "text" / "a.jsonl")
        (tmp_path / "text" / "b.jsonl").symlink_to("/nowhere")
        raw = recipe(tmp_path / "text")
    elif name == "a field of one of several":
        raw = HINTED[name](rows(tmp_path / "a.jsonl").parent, recipe)
        write(tmp_path / "b.csv", "b,id\n" + "".join(f"{i} {book(1, i)},{i}\n" for i in range(40)))
    else:
        raw = HINTED[name](tmp_path, recipe)
    file = tmp_path / "mine.yaml"
    settings: list[str] = []
    seen = []
    file.write_text(yaml.safe_dump(raw), encoding="utf-8")
    while (said := refusal(file, settings)) is not None:
        assert not (tmp_path / "run").exists()
        assert said not in seen, "the advice did not help"
        seen.append(said)
        hint = said.partition("   ")[0]
        if hint.startswith("--set"):
            settings += shlex.split(hint)[1::2]
        else:
            subprocess.run(hint.replace("python -c", f"{sys.executable} -c"), shell=True, check=True)
    assert seen


def refusal(file: Path, settings: list[str]) -> str | None:
    """The hint of the error that a recipe with these settings ends with before the run; None where there is none."""
    try:
        setup.prepare_job(build_recipe(str(file), None, None, None, None, None, None, None, settings))
    except LimbeckError as error:
        return str(error.hint)
    return None


# --- the command line ---


def test_the_users_own_limit_stays_and_a_named_recipes_goes(tmp_path):
    file = tmp_path / "mine.yaml"
    stages = [{"stage": "hidden", "tokens": 1280}]
    own = {"data": {"source": "a.jsonl", "max_tokens": 2000, "text_field": "body"}, "stages": stages}
    file.write_text(yaml.safe_dump(own), encoding="utf-8")

    def built(name, data=None, tokens=None, settings=()) -> Recipe:
        return build_recipe(name, None, None, None, None, tokens, data, None, list(settings))

    for given in ({"data": "b.jsonl"}, {"tokens": 640}, {"data": "b.jsonl", "tokens": 640}, {}):
        made = built(str(file), **given)
        assert (made.data.max_tokens, made.data.text_field) == (2000, "body")
    assert built("quickstart").data.max_tokens == 1_000_000
    assert built("quickstart", tokens=10_000).data.max_tokens is None
    assert built("quickstart", data="b.jsonl").data.max_tokens is None
    assert built("quickstart", data="b.jsonl", settings=["data.max_tokens=5000"]).data.max_tokens == 5000
    assert built("lolcats").data.text_field == "output"
    assert built("lolcats", data="b.jsonl").data.text_field == "text"
    assert built("lolcats", data="b.jsonl", settings=["data.text_field=output"]).data.text_field == "output"
