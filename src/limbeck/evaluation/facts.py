"""The measure `facts`: facts strewn among long natural text, and a question that takes one to three of them.

    result = run_measure(get_measure("facts"), subject, {"lengths": [0, 1024, 4096], "tasks": [1, 2]})
    result.values["facts 2, 1024 tokens"]                        # the right place is the first that the model writes
    result.values["facts 2, 1024 tokens, among 6"]               # the right place is the likeliest of all places
    result.values["chance among 6"], result.values["mean among 6"]

A needle says what it is, and one look finds it. BABILong (Kuratov et al. 2024, arXiv 2406.10149) asks for more: short
stories in bAbI's form (`limbeck.evaluation.stories`) are strewn sentence by sentence among the sentences of a book, and
the question needs several of them. Here the text is held-out articles, and the stories are our own, so scores are to be
compared between students and their teacher, not with published ones. Length 0 is the story alone.

A prompt begins with worked examples without other text. Each place is the answer equally often, and so is the place
that the story names last: who always says the same, or repeats what came last, is at chance. A student's teacher is
asked too (answers are kept in the cache, by content); where it is at chance the table marks it, and the mean leaves it
out.
"""

import random
from dataclasses import replace
from typing import Annotated, Any

from pydantic import Field

from limbeck.core.console import progress
from limbeck.core.errors import LimbeckError
from limbeck.data.documents import fingerprint_source, iter_documents
from limbeck.evaluation.haystacks import SENTENCE_END, Question, build_longest_prompt
from limbeck.evaluation.long_text import get_context_length
from limbeck.evaluation.measure import Measure, MeasureResult, MeasureSettings
from limbeck.evaluation.recovery import TaskScore, record_mean
from limbeck.evaluation.retrieval import (
    RetrievalAnswer,
    filter_lengths_by_context,
    load_or_answer,
    summarize_answers,
)
from limbeck.evaluation.stories import PEOPLE, PLACES, Story, tell_story
from limbeck.evaluation.subject import Subject

INTRODUCTION = (
    "Some sentences of each text tell where people go and what they carry. The rest of the text has nothing to do with "
    "it. The question is about these people."
)
LEAST_WINDOW_LENGTH = 512  # tokens, about those of a prompt without other text


class FactsSettings(MeasureSettings):
    """Settings of the measure `facts`.

    tasks: 1, 2 or 3 sentences that the answer takes.
    lengths: tokens of prompt and answer together; 0 for the story alone.
    samples: questions per task and length; a multiple of 6 has every place as the answer equally often.
    examples: worked examples before the question, without other text.
    new_tokens: tokens to generate, reserved in the length.
    text: a source of documents, whose sentences stand between those of the story.
    piece: tokens of the prompt per forward pass.
    past_context: also ask a softmax model beyond the context it was made for.
    """

    tasks: Annotated[list[Annotated[int, Field(ge=1, le=3)]], Field(min_length=1)] = [1, 2]
    lengths: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0, 1024, 2048]
    samples: Annotated[int, Field(ge=2)] = 12
    examples: Annotated[int, Field(ge=0)] = 2
    new_tokens: Annotated[int, Field(ge=1)] = 6
    text: str = "embedded:held-out-wikipedia"
    piece: Annotated[int, Field(ge=1)] = 1024
    past_context: bool = False


def measure_facts(subject: Subject, settings: FactsSettings) -> MeasureResult:
    """Ask all tasks at all lengths; tokenizer, text and seed determine the questions."""
    background = load_background(settings.text)
    teacher = subject.teacher_or_none if subject.is_student else None
    asked = filter_lengths_by_context("facts", subject, settings.lengths, settings.past_context)
    context = get_context_length(teacher.model) if teacher and not settings.past_context else None
    judged = [length for length in asked if context is None or length <= context]
    answers: dict[str, list[RetrievalAnswer]] = {f"facts {task}": [] for task in settings.tasks}
    own: dict[str, TaskScore] = {}
    teachers: dict[str, TaskScore] = {}
    n_questions = len(settings.tasks) * settings.samples * (len(asked) + (len(judged) if teacher else 0))
    with progress("facts", n_questions, "questions") as advance:

        def answer_all(model: Subject, questions: list[Question], note: str) -> list[RetrievalAnswer]:
            found = []
            for question in questions:
                answer = load_or_answer(model, question, settings.new_tokens, settings.piece)
                found.append(replace(answer, found=find_first_place(answer.text) == question.answer.strip()))
                advance(1, note=note)
            return found

        for task in settings.tasks:
            for length in asked:
                questions = draw_questions(subject, task, length, background, settings)
                name = f"facts {task}, {length} tokens"
                found = answer_all(subject, questions, name)
                answers[f"facts {task}"] += found
                if length in judged:
                    name = f"{name}, among {len(PLACES)}"
                    of_teacher = answer_all(teacher, questions, f"{name}, teacher") if teacher else found
                    own[name], teachers[name] = _score(found), _score(of_teacher)
    result = summarize_answers(answers, len(PLACES))
    result.data |= {"document_source": settings.text, "contents": {settings.text: fingerprint_source(settings.text)}}
    record_mean(result, f"mean among {len(PLACES)}", own, teachers)
    return result


def _score(answers: list[RetrievalAnswer]) -> TaskScore:
    items = [float(answer.chosen) for answer in answers]
    return TaskScore("acc", {"acc": sum(items) / len(items)}, {}, 1 / len(PLACES), items)


def draw_questions(
    subject: Subject, task: int, length: int, background: list[str], settings: FactsSettings
) -> list[Question]:
    """Draw the questions of a task at a length; tokenizer and seed determine them."""
    shown = [
        _tell_nth_story(task, number, random.Random(f"{subject.seed} facts {task} example {number}"))
        for number in range(settings.examples)
    ]
    questions = []
    for number in range(settings.samples):
        rng = random.Random(f"{subject.seed} facts {task} {length} {number}")
        story = _tell_nth_story(task, number, rng)
        new_tokens, name = settings.new_tokens, f"facts {task}"
        questions.append(
            build_fact_question(story, shown, background, length, subject.tokenizer, rng, new_tokens, name)
        )
    return questions


def _tell_nth_story(task: int, number: int, rng: random.Random) -> Story:
    """Tell a story: of six in a row each place is the answer once, and one, in turn, is the place named last."""
    rounds, answer = divmod(number, len(PLACES))
    return tell_story(task, answer, answer == rounds % len(PLACES), rng)


def build_fact_question(
    story: Story,
    shown: list[Story],
    background: list[str],
    length: int,
    tokenizer: Any,
    rng: random.Random,
    new_tokens: int = 6,
    name: str = "facts",
) -> Question:
    """Strew a story among other sentences, behind worked examples.

    The story's sentences keep their order; each gap between two other sentences is as likely as any. The other
    sentences follow each other as in their source, from a random one on. The question's `depth` is the place of the
    first sentence that the answer takes.

    Args:
        background: sentences; beyond the last one, the first follows.
        length: upper limit of prompt and answer in tokens, 0 for the story alone.

    Raises:
        LimbeckError: the prompt without other text does not fit into `length`, or `background` is shorter than it.
    """
    begin = rng.randrange(len(background))
    rotated = background[begin:] + background[:begin]
    places = sorted(rng.random() for _ in story.sentences)
    examples = "".join(f"{_write(one, one.sentences)} {one.answer}.\n\n" for one in shown)

    def build_prompt(units: int) -> str:
        sentences, done = [], 0
        for place, sentence in zip(places, story.sentences):
            until = int(place * (units + 1))
            sentences += [*rotated[done:until], sentence]
            done = until
        return f"{INTRODUCTION}\n\n{examples}{_write(story, sentences + rotated[done:units])}"

    if length:
        prompt = build_longest_prompt(name, build_prompt, len(background), length, new_tokens, tokenizer)
    else:
        prompt = build_prompt(0)
    text = prompt[prompt.rindex("\n\nText: ") :]
    depth = text.index(story.sentences[story.supports[0]]) / len(text)
    wrong = [f" {place}" for place in story.wrong_answers]
    return Question(prompt, f" {story.answer}", wrong, length, round(depth, 3))


def _write(story: Story, sentences: list[str]) -> str:
    return f"Text: {' '.join(sentences)}\nQuestion: {story.question}\nAnswer: {story.lead}"


def find_first_place(text: str) -> str | None:
    """Find the first of the places that a text names."""
    lower = text.lower()
    return min((place for place in PLACES if place in lower), key=lower.index, default=None)


def load_background(source: str) -> list[str]:
    """Load the sentences of a source's documents, but those that name somebody of the stories.

    Raises:
        LimbeckError: there are none; see also `limbeck.data.documents.iter_documents`.
    """
    sentences = [one for text in iter_documents(source) for one in SENTENCE_END.split(" ".join(text.split()))]
    kept = [one for one in sentences if not any(person in one for person in PEOPLE)]
    if not kept:
        raise LimbeckError(f"no sentence in '{source}' without the people of the stories", expected="running text")
    return kept


def get_facts_length(subject: Subject, settings: FactsSettings) -> int:
    """Return the tokens of the longest prompt with its answer."""
    return max(*settings.lengths, LEAST_WINDOW_LENGTH)


MEASURE = Measure(
    "facts",
    "facts strewn among long text in BABILong's form, by length and the number of facts that the answer takes",
    FactsSettings,
    measure_facts,
    baseline_length=get_facts_length,
)
