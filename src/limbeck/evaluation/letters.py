"""The measure `letters`: multiple choice by answer letters, each question with its options in every rotation.

    result = run_measure(get_measure("letters"), subject, {"sets": ["arc_easy"], "questions": 100})
    result.values["arc_easy, letter_accuracy"], result.values["arc_easy, likelihood_accuracy"]
    result.values["arc_easy, letter_sticks_share"], result.values["arc_easy, letter_share_A"]

A model that answers "B" whatever stands there scores 25 % on any test, and so does one that guesses. To tell them apart
each question is asked once for every rotation of its options: in rotation r option i stands at letter (i + r) mod n. So
every option has been at every letter, an unbiased model chooses all letters equally often, and the right option counts
wherever it stands. Questions are written as in MMLU (Hendrycks et al. 2021, arXiv 2009.03300), worked examples first,
whose right options are at A, B, C, ... in turn; the letter is the likeliest of those shown. That models prefer letters,
and that averaging over rotations removes it: Zheng et al. 2024 (arXiv 2309.03882).

Beside it the same questions without letters: the option whose text is the likeliest for its length, as most benchmarks
ask. Standard errors are over questions. Legend: N questions, R rotations, n options.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise, takewhile
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError
from limbeck.data.offline.question_sets import (
    EXAMPLES,
    ChoiceQuestion,
    draw_items,
    get_choice_set,
    load_choice_examples,
    load_choice_questions,
)
from limbeck.data.special_tokens import encode_continuations, encode_prompt
from limbeck.evaluation.measure import Measure, MeasureResult, MeasureSettings
from limbeck.evaluation.prompt_batches import SharedPrefix
from limbeck.evaluation.recovery import TaskScore, record_mean
from limbeck.evaluation.stored_answers import load_or_ask
from limbeck.evaluation.subject import Subject
from limbeck.evaluation.truncation import resolve_max_length
from limbeck.models.generation import check_finite

LETTERS = "ABCDEFGHIJ"
HEADING = "The following are multiple choice questions (with answers){about}."
FORMS = ("letter", "likelihood")  # the two ways to ask, and the beginnings of their accuracies' names


class LetterSettings(MeasureSettings):
    """Settings of the measure `letters`.

    sets: arc_easy, arc_challenge, openbookqa, commonsense_qa, mmlu.
    questions: of each set, drawn with the seed; None for all.
    rotations: of each question; None for as many as it has options.
    examples: worked examples before the question, 5 at most.
    likelihood: ask by the likelihood of the options' texts too.
    batch: prompts in a forward pass.
    """

    sets: Annotated[list[str], Field(min_length=1)] = ["arc_easy"]
    questions: Annotated[int, Field(ge=2)] | None = 100
    rotations: Annotated[int, Field(ge=2)] | None = None
    examples: Annotated[int, Field(ge=0, le=EXAMPLES)] = EXAMPLES
    likelihood: bool = True
    batch: Annotated[int, Field(ge=1)] = 8


@dataclass(frozen=True)
class LetterAnswers:
    """Answers to the questions of one set.

    letters: of each question, rotation by rotation, the log-probability of each letter: N lists of R lists of n.
    likelihoods: of each question the log-probability of each option's text; empty if that was not asked.
    """

    letters: list[list[list[float]]]
    likelihoods: list[list[float]]


def measure_letters(subject: Subject, settings: LetterSettings) -> MeasureResult:
    """Ask all questions in all rotations; a student's teacher too, whose answers are kept in the cache."""
    result = MeasureResult(values={}, data={"questions": {}}, details={"sets": {}})
    own: dict[str, dict[str, TaskScore]] = {form: {} for form in FORMS}
    teachers: dict[str, dict[str, TaskScore]] = {form: {} for form in FORMS}
    teacher = subject.teacher_or_none if subject.is_student else None
    for name in settings.sets:
        questions = draw_questions(name, settings.questions, subject.seed)
        result.data["questions"][name] = len(questions)
        answers = _answer(subject, name, questions, settings)
        values, errors, scores = summarize_letters(questions, answers)
        result.values |= {f"{name}, {key}": value for key, value in values.items()}
        result.errors |= {f"{name}, {key}": error for key, error in errors.items()}
        result.details["sets"][name] = asdict(answers)
        judged = scores
        if teacher is not None:
            of_teacher = _answer(teacher, name, questions, settings)
            values, errors, judged = summarize_letters(questions, of_teacher)
            for key in ("letter_accuracy", "likelihood_accuracy", "letter_sticks_share"):
                if key in values:
                    result.values[f"{name}, teacher's {key}"] = values[key]
                    result.errors[f"{name}, teacher's {key}"] = errors[key]
            same, error = _average(compare_choices(answers, of_teacher))
            result.values[f"{name}, same_option_share"], result.errors[f"{name}, same_option_share"] = same, error
        for form, score in scores.items():
            own[form][f"{name}, {form}_accuracy"], teachers[form][f"{name}, {form}_accuracy"] = score, judged[form]
    for form in FORMS:
        if own[form]:
            record_mean(result, f"mean {form}_accuracy", own[form], teachers[form])
    return result


def draw_questions(name: str, count: int | None, seed: int) -> list[ChoiceQuestion]:
    """Draw questions of a set, in the order of the data."""
    questions = load_choice_questions(name)
    return [questions[index] for index in draw_items(f"letters {name}", len(questions), count, seed)]


def _answer(subject: Subject, name: str, questions: list[ChoiceQuestion], settings: LetterSettings) -> LetterAnswers:
    """Let a model answer, or load its answers to the same questions."""
    examples = {about: made[: settings.examples] for about, made in load_choice_examples(name).items()}
    groups: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        groups.setdefault(question.subject, []).append(index)
    asked = {
        "questions": [asdict(question) for question in questions],
        "examples": {about: [asdict(one) for one in examples[about]] for about in groups},
        "rotations": settings.rotations,
        "likelihood": settings.likelihood,
        "form": HEADING,
    }

    def ask() -> Any:
        letters: list[Any] = [[] for _ in questions]
        likelihoods: list[Any] = [[] for _ in questions]
        with progress(f"letters, {subject.name}", len(questions), f"questions of {name}") as advance:
            for about, indices in groups.items():
                chosen = [questions[index] for index in indices]
                found = _ask_letters(subject, chosen, examples[about], settings, advance)
                for index, one in zip(indices, found):
                    letters[index] = one
                if settings.likelihood:
                    for index, likely in zip(indices, _ask_likelihoods(subject, chosen, examples[about])):
                        likelihoods[index] = likely
        return asdict(LetterAnswers(letters, likelihoods if settings.likelihood else []))

    return LetterAnswers(**load_or_ask(subject, f"letters-{name}", asked, ask))


def write_letter_prompt(question: ChoiceQuestion, rotation: int, examples: Sequence[ChoiceQuestion] = ()) -> str:
    """Write a question with its options rotated, behind worked examples; it ends where the letter is to come."""
    about = f" about {question.subject.replace('_', ' ')}" if question.subject else ""
    parts = [HEADING.format(about=about)]
    for turn, example in enumerate(examples):
        n = len(example.options)
        shift = (turn - example.answer) % n  # the right option of example t is at letter t mod n
        parts.append(f"{_write_options(example, shift)} {LETTERS[turn % n]}")
    return "\n\n".join([*parts, _write_options(question, rotation)])


def _write_options(question: ChoiceQuestion, rotation: int) -> str:
    n = len(question.options)
    rotated = [question.options[(place - rotation) % n] for place in range(n)]
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, rotated)]
    return "\n".join([question.question, *lines, "Answer:"])


def _ask_letters(
    subject: Subject,
    questions: list[ChoiceQuestion],
    examples: Sequence[ChoiceQuestion],
    settings: LetterSettings,
    advance: Any,
) -> list[list[list[float]]]:
    """Ask for the letters: of each question and rotation the log-probability of each letter."""
    prompts, places = [], []
    for index, question in enumerate(questions):
        n = len(question.options)
        for rotation in range(min(n, settings.rotations or n)):
            prompts.append(write_letter_prompt(question, rotation, examples))
            places.append(index)
    room = resolve_max_length(subject.model, subject.tokenizer)
    rows, letter_ids = [], []
    for prompt, index in zip(prompts, places):
        row, ids = encode_letters(subject.tokenizer, prompt, len(questions[index].options))
        check_length(f"letters: a question with {len(examples)} examples", len(row), room)
        rows.append(row)
        letter_ids.append(ids)
    shared = SharedPrefix(subject.model, rows)
    found: list[list[list[float]]] = [[] for _ in questions]
    for begin in range(0, len(rows), settings.batch):
        batch = shared.start(rows[begin : begin + settings.batch])
        for number, logits in enumerate(batch.logits.log_softmax(-1), begin):
            index = places[number]
            # of letters that are all NaN the first would always be chosen
            found[index].append(check_finite(logits[letter_ids[number]]).tolist())
            advance(1 / min(len(questions[index].options), settings.rotations or len(LETTERS)))
    return found


def encode_letters(tokenizer: Any, prompt: str, n: int) -> tuple[list[int], list[int]]:
    """Encode a prompt, and the token with which each of the first n letters continues it.

    Raises:
        LimbeckError: the tokenizer writes a letter as several tokens.
    """
    whole = [encode_prompt(tokenizer, f"{prompt} {letter}") for letter in LETTERS[:n]]
    shared = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*whole)))
    if any(len(ids) != shared + 1 for ids in whole):
        raise LimbeckError(
            "the tokenizer writes an answer letter as several tokens",
            expected="a tokenizer in which ' A', ' B', ... differ by one token",
            hint="--measure tasks, which compares whole answers",
        )
    return whole[0][:shared], [ids[-1] for ids in whole]


def check_length(what: str, tokens: int, room: int) -> None:
    """Raise LimbeckError if a prompt is longer than the model's context."""
    if tokens > room:
        raise LimbeckError(
            f"{what} has {tokens} tokens",
            expected=f"at most the model's context, {room}",
            hint="--set letters.examples=1, or 0",
        )


def _ask_likelihoods(
    subject: Subject, questions: list[ChoiceQuestion], examples: Sequence[ChoiceQuestion]
) -> list[list[float]]:
    """Ask without letters: of each question the log-probability of each option's text over its length."""

    def write(question: ChoiceQuestion) -> str:
        return f"Question: {question.question}\nAnswer:"

    shown = [f"{write(example)} {example.options[example.answer]}" for example in examples]
    rows = [encode_prompt(subject.tokenizer, "\n\n".join([*shown, write(question)])) for question in questions]
    shared = SharedPrefix(subject.model, rows)
    found = []
    for row, question in zip(rows, questions):
        options = encode_continuations(subject.tokenizer, [f" {option}" for option in question.options])
        sums = shared.log_likelihoods(row, options)
        found.append([float(value) / max(1, len(text.encode())) for value, text in zip(sums, question.options)])
    return found


def choose_options(letters: Sequence[Sequence[float]]) -> list[int]:
    """Choose the likeliest letter of each rotation r, and return the option that stands there: letter − r mod n."""
    return [(int(np.argmax(row)) - rotation) % len(row) for rotation, row in enumerate(letters)]


def compare_choices(first: LetterAnswers, second: LetterAnswers) -> list[float]:
    """Compute for each question the share of rotations in which two models choose the same option."""
    pairs = zip(first.letters, second.letters)
    return [float(np.mean(np.equal(choose_options(one), choose_options(other)))) for one, other in pairs]


def summarize_letters(
    questions: Sequence[ChoiceQuestion], answers: LetterAnswers
) -> tuple[dict[str, float], dict[str, float], dict[str, TaskScore]]:
    """Average the answers to one set.

    Returns:
        values: letter_accuracy: the right option chosen, over questions and rotations; rotated_accuracy: the option
            with the highest probability averaged over all rotations is right; likelihood_accuracy; chance_accuracy of
            guessing; letter_sticks_share: how often the same letter is chosen in the next rotation, where every option
            has moved on by one; option_sticks_share: how often the same option is; letter_share_A, ...: of all choices;
            letter_bias_share: half the sum of the differences between these shares and equal ones.
        errors: their standard errors over questions.
        scores: accuracies by form, for means over sets.
    """
    per_question: dict[str, list[float]] = {}
    chance = [1 / len(question.options) for question in questions]
    widest = max(len(question.options) for question in questions)
    shares, expected = np.zeros((len(questions), widest)), np.zeros(widest)
    for index, (question, rotations) in enumerate(zip(questions, answers.letters)):
        n, options = len(question.options), choose_options(rotations)
        letters = [int(np.argmax(row)) for row in rotations]
        shares[index] = np.bincount(letters, minlength=widest) / len(letters)
        expected[:n] += 1 / n / len(questions)
        of_question: dict[str, Any] = {
            "letter_accuracy": np.mean([option == question.answer for option in options]),
            "letter_sticks_share": np.mean([a == b for a, b in pairwise(letters)]),
            "option_sticks_share": np.mean([a == b for a, b in pairwise(options)]),
        }
        if len(rotations) == n:
            by_option = [np.roll(np.exp(row), -rotation) for rotation, row in enumerate(rotations)]
            of_question["rotated_accuracy"] = float(np.mean(by_option, 0).argmax() == question.answer)
        for key, value in of_question.items():
            per_question.setdefault(key, []).append(float(value))
    if answers.likelihoods:
        right = [np.argmax(row) == one.answer for row, one in zip(answers.likelihoods, questions)]
        per_question["likelihood_accuracy"] = [float(one) for one in right]
    per_question |= {f"letter_share_{LETTERS[place]}": shares[:, place].tolist() for place in range(widest)}
    order = ("letter_accuracy", "rotated_accuracy", "likelihood_accuracy", "letter_sticks_share", "option_sticks_share")
    complete = [key for key in (*order, *per_question) if len(per_question.get(key, ())) == len(questions)]
    values, errors = {}, {}
    for key in dict.fromkeys(complete):
        values[key], errors[key] = _average(per_question[key])
    values["letter_bias_share"] = float(np.abs(shares.mean(0) - expected).sum() / 2)
    values["chance_accuracy"] = sum(chance) / len(chance)
    scores = {
        form: TaskScore("acc", {"acc": values[key]}, {}, values["chance_accuracy"], per_question[key])
        for form, key in (("letter", "letter_accuracy"), ("likelihood", "likelihood_accuracy"))
        if key in values
    }
    return values, errors, scores


def _average(numbers: Sequence[float]) -> tuple[float, float]:
    return float(np.mean(numbers)), float(np.std(numbers, ddof=1) / len(numbers) ** 0.5)


def check_letter_settings(settings: LetterSettings) -> None:
    """Raise LimbeckError for a set that does not exist or is not in the cache."""
    for name in settings.sets:
        get_choice_set(name)
        load_choice_examples(name)


MEASURE = Measure(
    "letters",
    "multiple choice by answer letters in every rotation of the options, and by likelihood",
    LetterSettings,
    measure_letters,
    check_letter_settings,
)
