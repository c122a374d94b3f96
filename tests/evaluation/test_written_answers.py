"""Answers by letter, in writing, by sampling: batches equal single passes, and known habits score as known."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import limbeck
from limbeck.core.errors import LimbeckError
from limbeck.data.offline import packs, question_sets
from limbeck.data.offline.packs import Pack, ensure_pack, load_pack_manifest, write_rows
from limbeck.data.offline.question_sets import ChoiceQuestion
from limbeck.evaluation import generated, letters, sampled_text
from limbeck.evaluation import measure as measures
from limbeck.evaluation.free_running import compare_free_running, count_common_tokens, decode
from limbeck.evaluation.prompt_batches import SharedPrefix, count_shared_tokens
from limbeck.evaluation.stored_answers import load_or_ask
from limbeck.evaluation.subject import SubjectLoader
from limbeck.evaluation.written_questions import TASKS, get_task
from limbeck.report import comparison
from limbeck.testing import make_tiny_model
from limbeck.testing.tiny_models import VOCAB_SIZE

WORDS = ("License", "Work", "shall", "mean", "rights", "grant", "source", "form", "Contributor", "notice", "terms")


def model_of(name: str) -> torch.nn.Module:
    """A tiny model in float64: the teacher, a student, or a hybrid."""
    family = {"windowed teacher": "mistral", "windowed hybrid": "gemma2"}.get(name, "llama")
    model = make_tiny_model(family).double()
    if name.endswith("teacher"):
        return model
    torch.manual_seed(0)
    options = {"window": 8} if name == "sliding_window" else {}
    mixer, layers = ("retnet", [0]) if name.endswith("hybrid") else (name, "all")
    return limbeck.convert(model, mixer, layers, options).eval()


@pytest.mark.parametrize("shared", [0, 9])
@pytest.mark.parametrize(
    "name", ["teacher", "hybrid", "gated_deltanet", "sliding_window", "windowed teacher", "windowed hybrid"]
)
def test_a_batch_of_prompts_is_each_prompt_alone(name, shared):
    model = model_of(name)
    drawn = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, VOCAB_SIZE, (length,), generator=drawn).tolist() for length in (4, 11, 7)]
    rows = [[5] * shared + [index + 3, *row] for index, row in enumerate(rows)]
    assert count_shared_tokens(rows) == shared
    prefix = SharedPrefix(model, rows)
    # The longest first, so that padding is in the second and third row.
    order = [1, 0, 2]
    batch = prefix.start([rows[index] for index in order])
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([rows[index]])).logits[0, -1] for index in order]
    torch.testing.assert_close(batch.logits.double(), torch.stack(alone), rtol=1e-5, atol=1e-5)
    written = batch.generate(6, lambda tokens: False)
    for index, tokens in zip(order, written):
        expected = decode(model, torch.tensor([rows[index]]), 6)[0].tolist()
        stop = next((at for at, token in enumerate(expected) if token == model.generation_config.eos_token_id), 6)
        assert tokens == expected[:stop]
    answers = [[7, 8], [9]]
    scores = prefix.log_likelihoods(rows[2], answers)
    for answer, score in zip(answers, scores):
        ids = torch.tensor([rows[2] + answer])
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        assert float(score) == pytest.approx(float(logits.gather(1, ids[0, -len(answer) :, None]).sum()), abs=1e-4)


def test_a_prompt_ends_by_itself():
    model = model_of("gated_deltanet")
    batch = SharedPrefix(model, [[5, 6], [5, 7]]).start([[5, 6], [5, 7]])
    one, other = batch.generate(5, lambda tokens: len(tokens) == 2)
    assert len(one) <= 2
    assert len(other) <= 2


@pytest.fixture
def small_pack(own_cache, monkeypatch):
    """Questions in the cache: ARC's form, LAMBADA's, SQuAD's and GSM8K's, in one pack instead of the real ones."""
    rng = np.random.default_rng(0)

    def choice(at):
        options = rng.choice(WORDS, size=4, replace=False).tolist()
        choices = {"text": options, "label": list("ABCD")}
        return {"id": str(at), "question": f"Which {WORDS[at % 11]}?", "choices": choices, "answerKey": "ABCD"[at % 4]}

    def passage(at):
        return {"title": "The_Work", "context": " ".join(rng.choice(WORDS, 5 + at)), "question": "What?"}

    squad = [{**passage(at), "answers": {"text": [WORDS[at % 11]]}} for at in range(12)]
    shown = [{**passage(at), "answer": WORDS[at]} for at in range(5)]
    sums = [{"question": f"{at} and 1", "answer": f"So. #### 1,{at:03}"} for at in range(12)]

    def make(folder, archives):
        return [
            write_rows(
                folder, "allenai/ai2_arc", "ARC-Easy", {key: map(choice, range(9)) for key in ("test", "validation")}
            ),
            write_rows(
                folder, "EleutherAI/lambada_openai", None, {"test": [{"text": f"the {word}"} for word in WORDS]}
            ),
            write_rows(folder, "limbeck/squad", "plain_text", {"validation": squad, "examples": shown}),
            write_rows(folder, "openai/gsm8k", "main", {"test": sums, "examples": shown}),
        ]

    module = types.ModuleType("a_small_pack")
    paths = ("allenai/ai2_arc", "EleutherAI/lambada_openai", "limbeck/squad", "openai/gsm8k")
    module.PACK = Pack("small", "", "", (), paths, make)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(packs, "PACK_MODULES", {"small": module.__name__})
    ensure_pack(module.PACK)
    return module.PACK


@pytest.fixture(scope="module")
def student_folder(teacher_folder, tmp_path_factory):
    """A student that nobody has trained."""
    folder = tmp_path_factory.mktemp("written") / "gated_deltanet"
    torch.manual_seed(1)
    convert = limbeck.convert(AutoModelForCausalLM.from_pretrained(teacher_folder), "gated_deltanet")
    convert.save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def subject(small_pack, student_folder, teacher_folder, corpus, tmp_path):
    return SubjectLoader(str(teacher_folder), str(corpus), out=tmp_path / "out").load(str(student_folder))


def test_letters_are_written_as_in_mmlu_and_rotate():
    question = ChoiceQuestion("Why?", ("x", "y", "z"), 2, "high_school_art")
    example = ChoiceQuestion("How?", ("so", "thus"), 1)
    assert letters.write_letter_prompt(question, 1, [example, example]) == (
        "The following are multiple choice questions (with answers) about high school art.\n\n"
        "How?\nA. thus\nB. so\nAnswer: A\n\nHow?\nA. so\nB. thus\nAnswer: B\n\n"
        "Why?\nA. z\nB. x\nC. y\nAnswer:"
    )


def test_habits_show_in_letters():
    """Who knows scores one, who always says B one in n, whatever the gold answers are; rotations average B away."""
    questions = [ChoiceQuestion("", tuple("wxyz"), 1), ChoiceQuestion("", tuple("xyz"), 1)]

    def answer(score):
        return letters.LetterAnswers(
            [
                [[score(q, (place - r) % n, place) for place in range(n)] for r in range(n)]
                for q in questions
                for n in [len(q.options)]
            ],
            [],
        )

    knows, _, scores = letters.summarize_letters(questions, answer(lambda q, option, place: -float(option != q.answer)))
    assert knows["letter_accuracy"] == knows["rotated_accuracy"] == knows["option_sticks_share"] == 1
    assert knows["letter_sticks_share"] == 0
    assert knows["letter_bias_share"] == pytest.approx(0)
    assert scores["letter"].items == [1, 1]
    always_b, errors, _ = letters.summarize_letters(questions, answer(lambda q, option, place: -float(place != 1)))
    assert always_b["letter_accuracy"] == always_b["chance_accuracy"] == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert always_b["letter_share_B"] == always_b["letter_sticks_share"] == 1
    assert always_b["option_sticks_share"] == errors["letter_share_B"] == 0
    assert always_b["letter_bias_share"] == pytest.approx(1 - (1 / 4 + 1 / 3) / 2)
    # a habit that is stronger than what is known: right by rotation, wrong by letter
    both, _, _ = letters.summarize_letters(
        questions, answer(lambda q, option, place: -3.0 * (place != 1) - 0.5 * (option != q.answer))
    )
    assert both["letter_share_B"] == both["rotated_accuracy"] == 1
    assert letters.compare_choices(answer(lambda q, o, p: -o), answer(lambda q, o, p: -o)) == [1, 1]


def test_the_measure_letters(subject, tmp_path, monkeypatch):
    measure, given = measures.get_measure("letters"), {"questions": 6, "examples": 2}
    found = measures.run_measure(measure, subject, given)
    shares = [found.values[f"arc_easy, letter_share_{letter}"] for letter in "ABCD"]
    assert sum(shares) == pytest.approx(1)
    assert found.values["arc_easy, chance_accuracy"] == 0.25
    assert 0 <= found.values["arc_easy, same_option_share"] <= 1
    # batches and sharing change no answer
    alone = measures.run_measure(measure, subject, {**given, "batch": 1}, ignore_cache=True)
    torch.testing.assert_close(
        torch.tensor(alone.details["sets"]["arc_easy"]["letters"]),
        torch.tensor(found.details["sets"]["arc_easy"]["letters"]),
        rtol=1e-4,
        atol=1e-4,
    )
    # the teacher was asked once, for all its students and itself
    monkeypatch.setattr(letters, "_ask_letters", lambda *given: pytest.fail("asked again"))
    teacher = measures.run_measure(measure, subject.teacher, given)
    assert teacher.values["arc_easy, letter_accuracy"] == found.values["arc_easy, teacher's letter_accuracy"]
    comparison.write_comparison([found, teacher], tmp_path / "table")


def test_words_that_are_right():
    right = {name: task.is_right for name, task in TASKS.items()}
    assert right["lambada"]('Gabriel," she said', ["Gabriel"])
    assert not right["lambada"]("Gabriels", ["Gabriel"])
    assert not right["lambada"]("", ["Gabriel"])
    assert right["sums"]("1,024.", ["1024"])
    assert not right["sums"]("about", ["12"])
    assert right["squad"]("The  Eiffel-Tower.", ["x", "eiffeltower"])
    assert right["gsm8k"]("7 * 2 = 14 dollars. So the answer is $1,400.00.", ["1400"])
    assert not right["gsm8k"]("1400 and 3", ["1400"])
    assert get_task("lambada").cut(" sea. And") == "sea."
    assert not get_task("lambada").is_complete(" se")
    assert get_task("gsm8k").cut("a\nb\n\nQuestion") == "a\nb"
    with pytest.raises(LimbeckError, match="did you mean 'squad'"):
        get_task("squat")


def test_questions_are_those_of_the_seed(small_pack):
    sums = get_task("sums").load(0, 40, 2)
    assert sums == get_task("sums").load(0, 40, 2) != get_task("sums").load(1, 40, 2)
    for one in sums:
        a, b = one.prompt.rpartition("What is ")[2].removesuffix("?\nA:").split(" plus ")
        assert one.answers == (str(int(a) + int(b)),)
        assert len({*one.wrong, *one.answers}) == 10
    assert len({one.prompt for one in sums}) == 40
    squad = get_task("squad").load(0, 5, 2)
    assert squad[0].prompt.count("Background:") == 3
    assert all(one.answers[0] not in one.wrong for one in squad)
    gsm8k = get_task("gsm8k").load(0, None, 1)
    assert {one.answers[0] for one in gsm8k} == {f"1{at:03}" for at in range(12)}


def test_the_measure_generated(subject, tmp_path, monkeypatch):
    measure = measures.get_measure("generated")
    given = {"tasks": ["lambada", "sums", "squad"], "questions": 5, "examples": 1}
    monkeypatch.setattr(subject.model.config, "max_position_embeddings", 4096)
    monkeypatch.setattr(subject.teacher.model.config, "max_position_embeddings", 4096)
    found = measures.run_measure(measure, subject, given)
    assert found.data["questions"] == dict.fromkeys(given["tasks"], 5)
    for name in given["tasks"]:
        assert found.values[f"{name}, generated_accuracy"] in {n / 5 for n in range(6)}
        assert found.errors[f"{name}, likelihood_accuracy"] > 0
    alone = measures.run_measure(measure, subject, {**given, "batch": 1}, ignore_cache=True)
    assert alone.details["answers"] == found.details["answers"]
    # A teacher of random weights writes nothing that is right: marked, and in no mean.
    assert "sums, generated_accuracy" in found.details["teacher_at_chance"]
    assert "mean generated_accuracy" not in found.values
    comparison.write_comparison([found], tmp_path / "table")
    table = (tmp_path / "table" / "table.md").read_text(encoding="utf-8")
    assert "sums, generated accuracy (teacher at chance)" in table

    # who writes the right answers scores one, and keeps what its teacher has
    def write(subject, task, prompts, batch, advance=None):
        questions = {one.prompt: one.answers[0] for one in task.load(subject.seed, 5, 1)}
        return [questions[prompt] for prompt in prompts]

    monkeypatch.setattr(generated, "write_answers", write)
    subject.teacher.ignore_cache = True
    monkeypatch.setattr(generated, "load_or_ask", lambda subject, name, asked, ask: ask())
    given["tasks"] = ["lambada", "sums", "squad", "gsm8k"]
    best = measures.run_measure(measure, subject, {**given, "likelihood": False}, ignore_cache=True)
    assert best.values["mean generated_accuracy"] == best.values["recovery of generated_accuracy"] == 1
    assert best.values["squad, F1"] == 1


def test_answers_that_cannot_be_kept_are_given_all_the_same(subject, tmp_path, monkeypatch, capsys):
    (tmp_path / "no-folder").write_text("", encoding="utf-8")
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "no-folder"))
    assert load_or_ask(subject, "answers", ["a question"], lambda: [1]) == [1]
    assert "are not kept for the next time" in capsys.readouterr().err


def test_a_prompt_longer_than_the_context_is_an_error(subject, monkeypatch):
    monkeypatch.setattr(subject.model.config, "max_position_embeddings", 16)
    for name in ("letters", "generated"):
        with pytest.raises(LimbeckError, match=r"16|expected: at most"):
            measures.run_measure(measures.get_measure(name), subject, {"questions": 3}, ignore_cache=True)


def test_sets_and_packs_that_are_not_there(own_cache, monkeypatch, tmp_path):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path))
    with pytest.raises(LimbeckError, match="unknown set of questions 'arc_esay', did you mean 'arc_easy'"):
        letters.check_letter_settings(letters.LetterSettings(sets=["arc_esay"]))
    for name in ("arc_easy", "mmlu"):
        with pytest.raises(LimbeckError, match="limbeck assets --pack benchmarks"):
            letters.check_letter_settings(letters.LetterSettings(sets=[name]))
    with pytest.raises(LimbeckError, match="limbeck assets --pack answers"):
        generated.check_generated_settings(generated.GeneratedSettings(tasks=["squad"]))


def test_the_divergence_of_sampled_text_is_that_of_all_texts():
    """Two tokens behind one prefix: the sum over all texts against the mean over samples, both estimates of it."""
    one, other = model_of("teacher"), model_of("gated_deltanet")
    prefix = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        first = [model(input_ids=prefix).logits[0, -1].log_softmax(-1) for model in (one, other)]
        both = torch.cat([prefix.expand(VOCAB_SIZE, -1), torch.arange(VOCAB_SIZE)[:, None]], 1)
        second = [model(input_ids=both).logits[:, -1].log_softmax(-1) for model in (one, other)]
    joint, other_joint = (a[:, None] + b for a, b in zip(first, second))
    exact = float((joint.exp() * (joint - other_joint)).sum() / 2)
    assert exact > 1e-4
    prefixes = prefix.expand(150, -1)
    written = decode(one, prefixes, 2, choose=sampled_text.sampler(0, torch.device("cpu")))
    found = sampled_text.compare_on_text(one, other, prefixes, written)
    for estimate in (found.kl, found.log_ratio):
        per_text = estimate.mean(1)
        assert float(per_text.mean()) == pytest.approx(exact, abs=4 * float(per_text.std()) / math.sqrt(150))
    assert found.kl.min() >= -1e-12
    assert found.kl.mean(1).std() < found.log_ratio.mean(1).std()
    assert float(sampled_text.compare_on_text(one, one, prefixes[:3], written[:3]).kl.abs().max()) == 0


def test_a_vocabulary_padded_on_one_side_changes_nothing():
    """Tokens that one model alone has are never written, and count nowhere."""
    teacher, student = model_of("teacher"), model_of("gla")
    padded = model_of("teacher")
    padded.resize_token_embeddings(VOCAB_SIZE + 8, mean_resizing=False)
    with torch.no_grad():
        head = padded.get_output_embeddings().weight
        head[VOCAB_SIZE:] = 3 * head[:8]  # likely ones
    prefixes = torch.arange(3, 15).view(3, 4)
    width = count_common_tokens(padded, student)
    assert width == VOCAB_SIZE
    cpu = torch.device("cpu")
    written = decode(padded, prefixes, 6, choose=sampled_text.sampler(0, cpu), width=width)
    assert torch.equal(written, decode(teacher, prefixes, 6, choose=sampled_text.sampler(0, cpu)))
    for pair, plain in (((padded, student), (teacher, student)), ((student, padded), (student, teacher))):
        found, expected = (sampled_text.compare_on_text(*models, prefixes, written) for models in (pair, plain))
        assert torch.allclose(found.kl, expected.kl, atol=1e-12)
        running, usual = (compare_free_running(*models, prefixes, 6) for models in (pair, plain))
        for name in ("equal_tokens", "text_perplexity", "teacher_text_perplexity"):
            assert running[name] == pytest.approx(usual[name])


def test_the_measure_sampled(subject):
    measure = measures.get_measure("sampled")
    given = {"samples": 4, "prefix": 8, "new_tokens": 6, "tokens": 256, "length": 64}
    found = measures.run_measure(measure, subject, given)
    assert found.values["student_text_kl"] > 0
    assert found.errors["teacher_text_kl"] > 0
    assert len(found.details["kl_by_token"]["student"]) == 6
    again = measures.run_measure(measure, subject, given, ignore_cache=True)
    assert again.values == found.values
    itself = measures.run_measure(measure, subject.teacher, given)
    assert itself.values["student_text_kl"] == itself.values["teacher_text_kl"] == 0
    with pytest.raises(LimbeckError, match=r"sampled\.length=32"):
        measures.run_measure(measure, subject, {"length": 16})


@pytest.mark.assets
def test_real_questions_are_whole():
    if load_pack_manifest(packs.get_pack("benchmarks")) is None:
        pytest.skip("the pack is not here: limbeck assets --pack benchmarks")
    counts = {"arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500, "commonsense_qa": 1216, "mmlu": 14042}
    for name, count in counts.items():
        questions = question_sets.load_choice_questions(name)
        assert len(questions) == count
        assert all(0 <= one.answer < len(one.options) for one in questions)
    assert len(question_sets.load_choice_examples("mmlu")) == 57
    assert len({one.subject for one in questions}) == 57
    assert json.dumps(questions[0].options)
