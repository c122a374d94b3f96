"""Facts strewn in long text: who reads the story is always right, who guesses is at chance, and seeds give the same."""

import random
import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.core.errors import LimbeckError
from limbeck.evaluation import facts, retrieval
from limbeck.evaluation import measure as measures
from limbeck.evaluation.haystacks import count_prompt_tokens
from limbeck.evaluation.stories import PEOPLE, PLACES, tell_story
from limbeck.evaluation.subject import SubjectLoader
from limbeck.models import convert
from limbeck.report import comparison

SETTINGS = {"tasks": [1, 2, 3], "lengths": [0, 1500], "samples": 36, "examples": 1, "past_context": True}


@pytest.fixture
def text(tmp_path):
    """Text that names people of the stories, and places too."""
    path = tmp_path / "text.txt"
    sentences = [f"Sentence {number} is about the tower, not about it." for number in range(200)]
    path.write_text(" ".join([*sentences, f"{PEOPLE[0]} went to the barn.", "The end is near."]), encoding="utf-8")
    return str(path)


@pytest.fixture
def subjects(teacher_folder, tmp_path):
    folder = tmp_path / "retnet"
    model = AutoModelForCausalLM.from_pretrained(teacher_folder)
    torch.manual_seed(0)
    convert(model, "retnet").save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    loader = SubjectLoader(str(teacher_folder), out=tmp_path / "out")
    return {"teacher": loader.load(str(teacher_folder)), "student": loader.load(str(folder))}


def read_prompt(prompt):
    """Answer the question of a prompt by following its sentences, as a reader would."""
    body, _, question = prompt.rpartition("\n\nText: ")[2].partition("\nQuestion: ")
    at, carries, stations = {}, {}, {}
    people, places = "|".join(PEOPLE), "|".join(PLACES)
    went, took, let = "(?:came to|went to|walked into) the", "(?:picked up|got hold of) the", "(?:put|set) the"
    event = rf"({people}) (?:{went} ({places})|{took} (\w+)|{let} (\w+) )"
    for person, place, taken, dropped in re.findall(event, body):
        if place:
            at[person] = place
            for thing in carries.setdefault(person, []):
                stations[thing].append(place)
        elif taken:
            assert not any(taken in held for held in carries.values())
            carries.setdefault(person, []).append(taken)
            assert stations.get(taken, [at[person]])[-1] == at[person]
            stations.setdefault(taken, []).append(at[person])
        else:
            carries[person].remove(dropped)
    if before := re.match(r"Where was the (\w+) before it came to the (\w+)\?", question):
        thing, place = before.groups()
        assert stations[thing].count(place) == 1
        return stations[thing][stations[thing].index(place) - 1]
    asked = re.match(r"Where is (?:the )?(\w+)\?", question)[1]
    return at[asked] if asked in PEOPLE else stations[asked][-1]


def name_last_place(prompt):
    body = prompt.rpartition("\n\nText: ")[2].partition("\nQuestion: ")[0]
    return re.findall(rf"(?:came to|went to|walked into) the ({'|'.join(PLACES)})", body)[-1]


READERS = {
    "reads": (read_prompt, 1.0),
    "always the same": (lambda prompt: PLACES[2], 1 / 6),
    "the last place": (name_last_place, 1 / 6),
}


@pytest.mark.parametrize("reader", READERS)
def test_who_reads_is_right_and_who_guesses_is_at_chance(reader, subjects, text, monkeypatch, tmp_path):
    answer, expected = READERS[reader]
    prompts = []

    def ask(subject, question, new_tokens, piece):
        prompts.append(question.prompt)
        place = answer(question.prompt)
        chosen = f" {place}" == question.answer
        written = f" {place}. Not the {question.answer.strip()}."  # a right place behind a wrong one does not count
        return retrieval.RetrievalAnswer(question.length, question.depth, written, True, chosen, int(not chosen), 0.5)

    monkeypatch.setattr(facts, "load_or_answer", ask)
    found = measures.run_measure(measures.get_measure("facts"), subjects["teacher"], {**SETTINGS, "text": text})
    for task in (1, 2, 3):
        for length in (0, 1500):
            name = f"facts {task}, {length} tokens"
            assert found.values[name] == found.values[f"{name}, among 6"] == pytest.approx(expected)
    assert found.values["chance among 6"] == pytest.approx(1 / 6)
    if reader == "reads":
        assert found.values["mean among 6"] == 1
        assert found.details["teacher_at_chance"] == []
    else:
        assert "mean among 6" not in found.values
        assert len(found.details["teacher_at_chance"]) == 6
    assert len(set(prompts)) == len(prompts) == 6 * 36
    assert not any(f"{PEOPLE[0]} went to the barn. The end is near." in prompt for prompt in prompts)
    tokens = [count_prompt_tokens(subjects["teacher"].tokenizer, prompt) + 6 for prompt in prompts]
    long = [count for count, prompt in zip(tokens, prompts) if "Sentence" in prompt]
    assert len(long) == 3 * 36
    assert all(1500 - 60 < count <= 1500 for count in long)


def test_models_are_asked_the_same_and_a_teacher_beside_its_student(subjects, text, tmp_path):
    given = {"tasks": [1, 2], "lengths": [0, 1200], "samples": 2, "text": text, "past_context": True, "examples": 1}
    found = [measures.run_measure(measures.get_measure("facts"), subjects[name], given) for name in subjects]
    depths = [[a["depth"] for task in one.details["answers"].values() for a in task] for one in found]
    assert depths[0] == depths[1]
    for one in found:
        assert one.errors["facts 2, 1200 tokens, among 6"] > 0
        assert set(one.details["teacher_at_chance"]) <= {
            f"facts {task}, {length} tokens, among 6" for task in (1, 2) for length in (0, 1200)
        }
    # of the student and of its teacher, whatever was asked first
    assert found[0].details["teacher_at_chance"] == found[1].details["teacher_at_chance"]
    comparison.write_comparison(found, tmp_path / "table")
    assert (tmp_path / "table" / "facts.png").is_file()


def test_a_seed_gives_the_same_text(subjects, text):
    subject = subjects["teacher"]
    background = facts.load_background(text)
    assert not any(person in sentence for sentence in background for person in PEOPLE)

    def draw(seed):
        subject.seed = seed
        return facts.draw_questions(subject, 3, 1500, background, facts.FactsSettings(samples=6))

    assert draw(1) == draw(1) != draw(2)
    assert [question.answer.strip() for question in draw(1)] == list(PLACES)


def test_what_cannot_be_asked(subjects, text):
    with pytest.raises(LimbeckError, match="there is no task 4"):
        tell_story(4, 0, False, random.Random(0))
    measure, subject = measures.get_measure("facts"), subjects["teacher"]
    given = {"text": text, "samples": 2, "past_context": True}
    with pytest.raises(LimbeckError, match="do not fit in 64"):
        measures.run_measure(measure, subject, {**given, "lengths": [64]})
    # a student is asked beyond its teacher's context, where nothing says whether the teacher is at chance
    subject.model.config.max_position_embeddings = 600
    found = measures.run_measure(
        measure, subjects["student"], {"text": text, "samples": 2, "tasks": [1], "lengths": [900]}
    )
    assert "facts 1, 900 tokens" in found.values
    assert "mean among 6" not in found.values
    with pytest.raises(LimbeckError, match="fewer than 100000 tokens"):
        measures.run_measure(measure, subject, {**given, "lengths": [100000]})
