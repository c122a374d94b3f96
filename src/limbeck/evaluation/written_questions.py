"""Questions whose answers are written: prompts, right and wrong answers, and how an answer is judged, by task.

    task = get_task("sums")
    questions = task.load(seed=0, count=100, examples=3)
    questions[0].prompt, questions[0].answers, questions[0].wrong
    task.is_right("124. Q:", questions[0].answers)

* lambada: a passage without its last word; right if the first word of the text is it, apart from punctuation around it
  (Paperno et al. 2016, arXiv 1606.06031).
* sums: "Q: What is 48 plus 76? A:" in two lines, as in the paper on GPT-3 (Brown et al. 2020, arXiv 2005.14165, section
  3.9.1); right if the first number is the sum.
* squad: title, background and question; right if the line equals an answer after SQuAD's normalization: lower case, no
  punctuation, no articles (Rajpurkar et al. 2016, arXiv 1606.05250).
* gsm8k: a question, with examples that reason aloud; right if the last number is the final one, without commas (Cobbe
  et al. 2021, arXiv 2110.14168).

Sums are generated: both numbers are uniform from 0 to 99, drawn from the seed, and no sum is asked twice. LAMBADA is in
the pack `benchmarks`, SQuAD and GSM8K with their worked examples in `answers`. Wrong answers, for likelihood, are those
of other questions; of a sum, other numbers within 20 of it.
"""

import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from limbeck.core.errors import LimbeckError, suggest_closest
from limbeck.data.offline.answers import GSM8K, SQUAD
from limbeck.data.offline.question_sets import draw_items, load_rows
from limbeck.evaluation.lm_eval_tasks import normalize_answer

WRONG_ANSWERS = 9  # beside the right one
LARGEST = 99  # of the numbers that are added
NEAR = 20  # wrong sums are within
SQUAD_INTRODUCTION = "Each question is answered by a few words of its background.\n\n"
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True)
class WrittenQuestion:
    """A prompt with its answers.

    answers: all that are right; likelihood asks for the first.
    wrong: answers that likelihood compares it with.
    lead: text between prompt and answer for likelihood, where the generated answer begins with reasoning.
    """

    prompt: str
    answers: tuple[str, ...]
    wrong: tuple[str, ...] = ()
    lead: str = ""


@dataclass(frozen=True)
class WrittenTask:
    """A task by name.

    build: all questions from the seed, the number of questions and that of examples, without wrong answers from others.
    is_right: judges a generated text by the right answers.
    new_tokens: of the longest answer.
    end: an answer ends where this is first found, behind the blanks that it begins with.
    has_f1: whether token F1 is among its values.
    """

    name: str
    build: Callable[[int, int | None, int], list[WrittenQuestion]]
    is_right: Callable[[str, Sequence[str]], bool]
    new_tokens: int
    end: re.Pattern[str]
    has_f1: bool = False

    def load(self, seed: int, count: int | None, examples: int) -> list[WrittenQuestion]:
        """Load `count` questions, drawn with the seed; all for None.

        Raises:
            LimbeckError: the task's pack is not in the cache; fewer than two questions.
        """
        questions = self.build(seed, count, examples)
        known = list(dict.fromkeys(question.answers[0] for question in questions))
        complete = []
        for number, question in enumerate(questions):
            others = [answer for answer in known if not self.is_right(answer, question.answers)]
            rng = random.Random(f"{seed} {self.name} {number}")
            wrong = question.wrong or tuple(rng.sample(others, min(WRONG_ANSWERS, len(others))))
            complete.append(replace(question, wrong=wrong))
        if len(complete) < 2 or not complete[0].wrong:
            raise LimbeckError(f"{self.name} has {len(complete)} questions", expected="two or more")
        return complete

    def cut(self, text: str) -> str:
        """Cut a generated text where the answer ends."""
        return self.end.split(text.lstrip(), maxsplit=1)[0].strip()

    def is_complete(self, text: str) -> bool:
        """Whether the answer has ended: what follows cannot change it."""
        return self.end.search(text.lstrip()) is not None


def _build_lambada(seed: int, count: int | None, examples: int) -> list[WrittenQuestion]:
    rows = load_rows("EleutherAI/lambada_openai", None, "test")
    passages = [rows[index]["text"].rsplit(" ", 1) for index in draw_items("lambada", len(rows), count, seed)]
    return [WrittenQuestion(begin, (word,)) for begin, word in passages]


def is_first_word(text: str, answers: Sequence[str]) -> bool:
    """Whether the first word of a text is an answer, apart from punctuation around it."""
    words = text.split()
    return bool(words) and words[0].strip(string.punctuation) in answers


def _build_sums(seed: int, count: int | None, examples: int) -> list[WrittenQuestion]:
    if count is None:
        raise LimbeckError("sums have no end", expected="a number of questions", hint="--set generated.questions=100")
    pairs = [(a, b) for a in range(LARGEST + 1) for b in range(LARGEST + 1)]
    rng = random.Random(f"{seed} sums")
    drawn = rng.sample(pairs, min(len(pairs) - examples, count) + examples)
    shown = "".join(f"Q: What is {a} plus {b}?\nA: {a + b}\n\n" for a, b in drawn[:examples])
    questions = []
    for a, b in drawn[examples:]:
        near = [other for other in range(max(0, a + b - NEAR), a + b + NEAR + 1) if other != a + b]
        wrong = tuple(map(str, rng.sample(near, WRONG_ANSWERS)))
        questions.append(WrittenQuestion(f"{shown}Q: What is {a} plus {b}?\nA:", (str(a + b),), wrong))
    return questions


def is_first_number(text: str, answers: Sequence[str]) -> bool:
    """Whether the first number of a text is an answer."""
    found = NUMBER.search(text)
    return found is not None and found[0].replace(",", "") in answers


def _build_squad(seed: int, count: int | None, examples: int) -> list[WrittenQuestion]:
    def write(row: dict[str, Any]) -> str:
        title = row["title"].replace("_", " ")
        return f"Title: {title}\nBackground: {row['context']}\nQuestion: {row['question']}\nAnswer:"

    shown = _show(SQUAD, examples, write)
    rows = load_rows(*SQUAD, "validation")
    questions = []
    for index in draw_items("squad", len(rows), count, seed):
        answers = tuple(dict.fromkeys(rows[index]["answers"]["text"]))
        questions.append(WrittenQuestion(f"{SQUAD_INTRODUCTION}{shown}{write(rows[index])}", answers))
    return questions


def is_same_answer(text: str, answers: Sequence[str]) -> bool:
    """Whether a text is an answer after SQuAD's normalization."""
    return any(normalize_answer(text) == normalize_answer(answer) for answer in answers)


def _build_gsm8k(seed: int, count: int | None, examples: int) -> list[WrittenQuestion]:
    def write(row: dict[str, Any]) -> str:
        return f"Question: {row['question']}\nAnswer:"

    shown = _show(GSM8K, examples, write)
    rows = load_rows(*GSM8K, "test")
    questions = []
    for index in draw_items("gsm8k", len(rows), count, seed):
        answer = rows[index]["answer"].rpartition("#### ")[2].replace(",", "").strip()
        questions.append(WrittenQuestion(f"{shown}{write(rows[index])}", (answer,), lead=" So the answer is"))
    return questions


def is_last_number(text: str, answers: Sequence[str]) -> bool:
    """Whether the last number of a text is an answer; 18.00 is 18."""
    found = NUMBER.findall(text)
    return bool(found) and any(float(found[-1].replace(",", "")) == float(answer) for answer in answers)


def _show(dataset: tuple[str, str], examples: int, write: Callable[[dict[str, Any]], str]) -> str:
    """Write worked examples, each behind the one before."""
    rows = load_rows(*dataset, "examples")[:examples]
    return "".join(f"{write(row)} {row['answer']}\n\n" for row in rows)


TASKS = {
    task.name: task
    for task in (
        WrittenTask("lambada", _build_lambada, is_first_word, 8, re.compile(r"\s")),
        WrittenTask("sums", _build_sums, is_first_number, 8, re.compile(r"\n")),
        WrittenTask("squad", _build_squad, is_same_answer, 24, re.compile(r"\n"), has_f1=True),
        WrittenTask("gsm8k", _build_gsm8k, is_last_number, 160, re.compile(r"\n\n|Question:")),
    )
}


def get_task(name: str) -> WrittenTask:
    """Look up a task; raises LimbeckError for an unknown one."""
    if name not in TASKS:
        raise LimbeckError(f"unknown task '{name}'{suggest_closest(name, TASKS)}", expected=", ".join(TASKS))
    return TASKS[name]
