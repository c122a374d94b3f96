"""Questions of the offline packs as plain values: options of multiple choice, and answers that are written.

    questions = load_choice_questions("arc_easy")
    questions[0].question, questions[0].options, questions[0].answer        # the index of the right option
    load_choice_examples("mmlu")["anatomy"]                                 # worked examples, by subject
    load_rows("EleutherAI/lambada_openai", None, "test")

The packs are `benchmarks` and `answers` (`limbeck assets --pack NAME`); their modules say what they leave out.
"""

import json
import random
from dataclasses import dataclass
from typing import Any

from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.data.offline.packs import find_local_dataset, find_pack_of_dataset, get_pack, load_pack_manifest

MMLU = "cais/mmlu"
# Name of a set -> dataset and configuration, split of the questions, split of the examples, field of the question.
# CommonsenseQA has one split in the pack, so its first rows are the examples, and no questions.
CHOICE_SETS: dict[str, tuple[str, str | None, str, str, str]] = {
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", "validation", "question"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", "validation", "question"),
    "openbookqa": ("allenai/openbookqa", "main", "test", "validation", "question_stem"),
    "commonsense_qa": ("tau/commonsense_qa", None, "validation", "validation", "question"),
    "mmlu": (MMLU, None, "test", "dev", "question"),
}
EXAMPLES = 5  # of a set, or of a subject of MMLU, whose split `dev` has as many


@dataclass(frozen=True)
class ChoiceQuestion:
    """A question with its options, of which `answer` is the index of the right one; `subject` in MMLU, else ""."""

    question: str
    options: tuple[str, ...]
    answer: int
    subject: str = ""


def load_choice_questions(name: str) -> list[ChoiceQuestion]:
    """Load the questions of a set, in the order of the data.

    Raises:
        LimbeckError: no such set, or its pack is not in the cache.
    """
    path, configuration, split, examples, field = get_choice_set(name)
    questions = [
        _parse_choice(row, field, subject)
        for subject in _list_subjects(path)
        for row in load_rows(path, subject or configuration, split)
    ]
    return questions[EXAMPLES:] if split == examples else questions


def load_choice_examples(name: str) -> dict[str, list[ChoiceQuestion]]:
    """Load `EXAMPLES` worked examples of a set, by subject; the only subject is "" except in MMLU."""
    path, configuration, _, split, field = get_choice_set(name)
    return {
        subject: [
            _parse_choice(row, field, subject) for row in load_rows(path, subject or configuration, split)[:EXAMPLES]
        ]
        for subject in _list_subjects(path)
    }


def get_choice_set(name: str) -> tuple[str, str | None, str, str, str]:
    """Look up a set of questions; raises LimbeckError for an unknown one."""
    if name not in CHOICE_SETS:
        raise LimbeckError(
            f"unknown set of questions '{name}'{suggest_closest(name, CHOICE_SETS)}", expected=", ".join(CHOICE_SETS)
        )
    return CHOICE_SETS[name]


def load_rows(path: str, configuration: str | None, split: str) -> list[dict[str, Any]]:
    """Load the rows of a split from the first cached pack that has the dataset.

    Raises:
        LimbeckError: no cached pack has it.
    """
    dataset = find_local_dataset(path, configuration)
    if dataset is None or split not in dataset.data_files:
        pack = find_pack_of_dataset(path)
        raise LimbeckError(
            f"no data of {path}: " + ("no pack has them" if pack is None else f"the pack {pack.name} is not cached"),
            hint=None if pack is None else pack.command,
        )
    with open(dataset.data_files[split], encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def draw_items(name: str, total: int, count: int | None, seed: int) -> list[int]:
    """Draw the indices of `count` items of `total`, ascending; all for None. Another name draws others."""
    return sorted(random.Random(f"{seed} {name}").sample(range(total), min(total, count or total)))


def _list_subjects(path: str) -> list[str]:
    """List the subjects of MMLU; [""] for any other dataset."""
    if path != MMLU:
        return [""]
    pack = find_pack_of_dataset(path)
    manifest = load_pack_manifest(pack) if pack is not None else None
    if pack is None or manifest is None:
        raise LimbeckError(f"no data of {path}", hint=get_pack("benchmarks").command)
    return sorted(entry["name"] for entry in manifest["datasets"] if entry["path"] == path)


def _parse_choice(row: dict[str, Any], field: str, subject: str) -> ChoiceQuestion:
    """Convert a row of the Hub: MMLU has the answer's index, the others the label of the right option."""
    if isinstance(row["choices"], list):
        return ChoiceQuestion(row[field].strip(), tuple(row["choices"]), row["answer"], subject)
    options, labels = row["choices"]["text"], row["choices"]["label"]
    return ChoiceQuestion(row[field].strip(), tuple(options), labels.index(row["answerKey"]), subject)
