"""The measure `generated`: answers that a model writes, beside what likelihood says of the same questions.

    result = run_measure(get_measure("generated"), subject, {"tasks": ["lambada", "sums", "squad"], "questions": 100})
    result.values["sums, generated_accuracy"]          # the right answer was written
    result.values["sums, likelihood_accuracy"]         # the right answer is the likeliest of ten
    result.values["recovery of generated_accuracy"]    # the share of its teacher's, above chance

Most benchmarks never let a model write: they compare the likelihoods of given answers, and a student may keep its rank
there while what it writes falls apart (GenDistill, arXiv 2603.26556, finds rankings reversed). Here each question is
asked both ways. Text is decoded greedily in batches on the model's own cache, a student's constant state; prompts of a
task begin with the same worked examples, which are read once. By likelihood an answer is chosen among ten by its
log-probability over its length in bytes, as `acc_norm` is; chance is one tenth. Tasks, and how answers are normalized:
`limbeck.evaluation.written_questions`.
"""

from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from limbeck.core.console import progress
from limbeck.data.special_tokens import encode_continuations, encode_prompt
from limbeck.evaluation.lm_eval_tasks import best_f1
from limbeck.evaluation.measure import Measure, MeasureResult, MeasureSettings
from limbeck.evaluation.prompt_batches import SharedPrefix
from limbeck.evaluation.recovery import TaskScore, compute_recovery, record_mean
from limbeck.evaluation.retrieval import proportion_with_stderr
from limbeck.evaluation.stored_answers import load_or_ask
from limbeck.evaluation.subject import Subject
from limbeck.evaluation.truncation import compute_max_prompt_length, resolve_max_length, truncate_prompt
from limbeck.evaluation.written_questions import WrittenQuestion, WrittenTask, get_task

FORMS = ("generated", "likelihood")


class GeneratedSettings(MeasureSettings):
    """Settings of the measure `generated`.

    tasks: lambada, sums, squad, gsm8k.
    questions: of each task, drawn with the seed; None for all that the pack has.
    examples: worked examples before a question; lambada has none, squad at most 5 and gsm8k at most 8.
    likelihood: ask for the likeliest of ten answers too.
    batch: prompts that are continued at a time.
    """

    tasks: Annotated[list[str], Field(min_length=1)] = ["lambada", "sums", "squad"]
    questions: Annotated[int, Field(ge=2)] | None = 100
    examples: Annotated[int, Field(ge=0, le=8)] = 3
    likelihood: bool = True
    batch: Annotated[int, Field(ge=1)] = 8


def measure_generated(subject: Subject, settings: GeneratedSettings) -> MeasureResult:
    """Ask all questions both ways; a student's teacher too, whose answers are kept in the cache."""
    result = MeasureResult(values={}, data={"questions": {}}, details={"answers": {}})
    own: dict[str, dict[str, TaskScore]] = {form: {} for form in FORMS}
    teachers: dict[str, dict[str, TaskScore]] = {form: {} for form in FORMS}
    teacher = subject.teacher_or_none if subject.is_student else None
    for name in settings.tasks:
        task = get_task(name)
        questions = task.load(subject.seed, settings.questions, settings.examples)
        answers = answer_questions(subject, task, questions, settings)
        scores = score_answers(task, questions, answers)
        judged = scores
        if teacher is not None:
            judged = score_answers(task, questions, answer_questions(teacher, task, questions, settings))
        for form, score in scores.items():
            key = f"{name}, {form}_accuracy"
            result.values[key], result.errors[key] = proportion_with_stderr([one > 0 for one in score.items])
            if teacher is not None:
                result.values[f"{name}, teacher's {form}_accuracy"] = judged[form].primary_value
            own[form][key], teachers[form][key] = score, judged[form]
        if task.has_f1:
            overlaps = [best_f1(text, one.answers) for text, one in zip(answers["texts"], questions)]
            result.values[f"{name}, F1"] = float(np.mean(overlaps))
            result.errors[f"{name}, F1"] = float(np.std(overlaps, ddof=1) / len(overlaps) ** 0.5)
        result.data["questions"][name] = len(questions)
        result.details["answers"][name] = [
            {"answer": one.answers[0], "written": text, "right": bool(item)}
            for one, text, item in zip(questions, answers["texts"], scores["generated"].items)
        ]
    for form in FORMS:
        if not own[form]:
            continue
        record_mean(result, f"mean {form}_accuracy", own[form], teachers[form])
        if teacher is not None:
            values, errors, _ = compute_recovery(own[form], teachers[form], subject.seed)
            if "recovery_above_chance" in values:
                result.values[f"recovery of {form}_accuracy"] = values["recovery_above_chance"]
                result.errors[f"recovery of {form}_accuracy"] = errors["recovery_above_chance"]
    return result


def answer_questions(
    subject: Subject, task: WrittenTask, questions: list[WrittenQuestion], settings: GeneratedSettings
) -> dict[str, Any]:
    """Let a model answer, or load its answers to the same questions.

    Returns:
        texts: of each question what the model wrote, up to the end of the answer;
        likelihoods: of each question the log-probability a byte of its answers, the right one first; empty if that was
        not asked.
    """
    asked = [[asdict(question) for question in questions], task.new_tokens, task.end.pattern, settings.likelihood]

    def ask() -> dict[str, Any]:
        total = len(questions) * (1 + settings.likelihood)
        with progress(f"generated, {subject.name}", total, f"questions of {task.name}") as advance:
            texts = write_answers(subject, task, [one.prompt for one in questions], settings.batch, advance)
            likelihoods = _compare_likelihoods(subject, questions, advance) if settings.likelihood else []
        return {"texts": texts, "likelihoods": likelihoods}

    return load_or_ask(subject, f"generated-{task.name}", asked, ask)


def write_answers(
    subject: Subject, task: WrittenTask, prompts: list[str], batch: int, advance: Any = lambda amount: None
) -> list[str]:
    """Continue prompts greedily until their answers end, in batches of prompts of similar length."""
    rows = _encode(subject, prompts, task.new_tokens, task.name)

    def is_complete(tokens: list[int]) -> bool:
        return task.is_complete(subject.tokenizer.decode(tokens, skip_special_tokens=True))

    shared = SharedPrefix(subject.model, rows)
    by_length = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    texts = [""] * len(rows)
    for begin in range(0, len(rows), batch):
        indices = by_length[begin : begin + batch]
        written = shared.start([rows[index] for index in indices]).generate(task.new_tokens, is_complete)
        for index, tokens in zip(indices, written):
            texts[index] = task.cut(subject.tokenizer.decode(tokens, skip_special_tokens=True))
        advance(len(indices))
    return texts


def _compare_likelihoods(subject: Subject, questions: list[WrittenQuestion], advance: Any) -> list[list[float]]:
    """Compute the log-probability a byte of each question's answers, the right one first."""
    rows = _encode(subject, [f"{one.prompt}{one.lead}" for one in questions], 0, "likelihood")
    shared = SharedPrefix(subject.model, rows)
    found = []
    for row, question in zip(rows, questions):
        answers = [question.answers[0], *question.wrong]
        continuations = encode_continuations(subject.tokenizer, [f" {answer}" for answer in answers])
        sums = shared.log_likelihoods(row, continuations)
        found.append([float(value) / len(f" {answer}".encode()) for value, answer in zip(sums, answers)])
        advance(1)
    return found


def _encode(subject: Subject, prompts: list[str], new_tokens: int, name: str) -> list[list[int]]:
    """Encode prompts; raises LimbeckError for one that leaves no room for its answer in the model's context."""
    room = compute_max_prompt_length(resolve_max_length(subject.model, subject.tokenizer), new_tokens, name, 1)
    rows = [encode_prompt(subject.tokenizer, prompt) for prompt in prompts]
    hint = "--set generated.examples=1, or 0"
    return [truncate_prompt(row, room, "refuse", f"generated: a prompt of {name}", hint) for row in rows]


def score_answers(task: WrittenTask, questions: list[WrittenQuestion], answers: dict[str, Any]) -> dict[str, TaskScore]:
    """Judge the answers: a score by form."""
    right = {"generated": [task.is_right(text, one.answers) for text, one in zip(answers["texts"], questions)]}
    if answers["likelihoods"]:
        # a tie is no choice
        right["likelihood"] = [all(row[0] > other for other in row[1:]) for row in answers["likelihoods"]]
    chance = {"generated": 0.0, "likelihood": float(np.mean([1 / (1 + len(one.wrong)) for one in questions]))}
    return {
        form: TaskScore("acc", {"acc": float(np.mean(hits))}, {}, chance[form], [float(hit) for hit in hits])
        for form, hits in right.items()
    }


def check_generated_settings(settings: GeneratedSettings) -> None:
    """Raise LimbeckError for an unknown task, or data that are not in the cache."""
    for name in settings.tasks:
        get_task(name).load(0, settings.questions, settings.examples)


MEASURE = Measure(
    "generated",
    "answers that the model writes, beside likelihood: LAMBADA's word, sums, SQuAD, GSM8K",
    GeneratedSettings,
    measure_generated,
    check_generated_settings,
)
