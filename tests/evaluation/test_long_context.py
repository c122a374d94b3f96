"""Long context: streaming equals the full pass, questions are what they say, answers are scored as they should be."""

import io
import json
import math
import random
import re
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.core.cache import ensure_cached_folder
from limbeck.core.errors import LimbeckError
from limbeck.data.offline import corpus as wikitext
from limbeck.evaluation import associative_recall, long_text
from limbeck.evaluation import measure as measures
from limbeck.evaluation.haystacks import (
    NOISE,
    Haystack,
    Question,
    build_needle_question,
    build_passkey_question,
    count_prompt_tokens,
)
from limbeck.evaluation.long_text import PrefilledPrompt, compute_token_losses, get_context_length
from limbeck.evaluation.retrieval import answer_question, proportion_with_stderr
from limbeck.evaluation.subject import SubjectLoader
from limbeck.models import cache_bytes, convert
from limbeck.report import comparison

MIXERS = ("gated_deltanet", "retnet", "sliding_window")


@pytest.fixture(scope="module")
def folders(teacher_folder, tmp_path_factory):
    """The teacher, students and a hybrid that nobody has trained."""
    made = {"teacher": teacher_folder}
    for name in (*MIXERS, "hybrid"):
        model = AutoModelForCausalLM.from_pretrained(teacher_folder)
        folder = made[name] = tmp_path_factory.mktemp("long") / name
        layers = [0] if name == "hybrid" else "all"
        torch.manual_seed(0)
        convert(model, "retnet" if name == "hybrid" else name, layers=layers).save_pretrained(folder)
        AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    return made


@pytest.fixture
def haystack(own_cache):
    """RULER's material in the cache, small."""

    def fill(folder):
        texts = {
            "essays": " ".join(f"Thought {i} is long enough to be one." for i in range(300)),
            "adjectives": "green\ntall\n",
            "nouns": "\n".join(["tree", "dog", "work", "license", "code", "or", "and", "the"]),
        }
        lines = [json.dumps({"source": source, "text": text}) for source, text in texts.items()]
        (folder / "corpus.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return {}

    ensure_cached_folder(own_cache / "assets" / "text-haystack", fill, what="haystack")
    return Haystack.load()


@pytest.fixture
def subjects(folders, haystack, corpus, tmp_path):
    opened = SubjectLoader(str(folders["teacher"]), str(corpus), out=tmp_path / "out")
    return {name: opened.load(str(folder)) for name, folder in folders.items()}


def ids_of(model, n):
    torch.manual_seed(1)
    return torch.randint(3, model.config.vocab_size, (n,))


@pytest.mark.parametrize("name", ["teacher", "hybrid", *MIXERS])
def test_streaming_equals_the_full_pass(folders, name):
    model = AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    ids = ids_of(model, 50)
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0, :-1]
    full = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    for piece in (7, 49, 64):
        torch.testing.assert_close(compute_token_losses(model, ids, piece), full, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["teacher", "hybrid", *MIXERS])
def test_a_read_prompt_can_be_asked_again_and_again(folders, name):
    model = AutoModelForCausalLM.from_pretrained(folders[name]).eval()
    ids = ids_of(model, 20)
    read = PrefilledPrompt.from_tokens(model, ids, prefill_chunk_size=6)
    before = cache_bytes(read.cache)
    answers = [[5, 6, 7], [8], [9, 10]]
    scores = read.log_likelihoods(answers)
    for answer, score in zip(answers, scores):
        whole = compute_token_losses(model, torch.cat([ids, torch.tensor(answer)]))[-len(answer) :]
        assert float(score) == pytest.approx(-float(whole.sum()), abs=1e-3)
    made = model.generate(
        ids[None], attention_mask=torch.ones(1, 20), do_sample=False, max_new_tokens=5, pad_token_id=0
    )
    assert read.generate(5) == made[0, 20:].tolist()
    assert len(read.generate(5, lambda tokens: len(tokens) == 2)) == 2
    assert cache_bytes(read.cache) == before
    torch.testing.assert_close(read.log_likelihoods(answers), scores)


def test_a_students_state_does_not_grow(folders):
    model = AutoModelForCausalLM.from_pretrained(folders["retnet"]).eval()
    sizes = {n: cache_bytes(PrefilledPrompt.from_tokens(model, ids_of(model, n), 16).cache) for n in (16, 160)}
    assert sizes[16] == sizes[160] > 0
    teacher = AutoModelForCausalLM.from_pretrained(folders["teacher"]).eval()
    assert cache_bytes(PrefilledPrompt.from_tokens(teacher, ids_of(teacher, 160), 16).cache) > cache_bytes(
        PrefilledPrompt.from_tokens(teacher, ids_of(teacher, 16), 16).cache
    )


PEAK = """
import resource, sys, torch
from transformers import AutoModelForCausalLM
import limbeck.models
from limbeck.evaluation.long_text import compute_token_losses

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
for n in (8192, 65536):
    compute_token_losses(model, torch.arange(n) % 97, 1024)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_64k_tokens_take_no_more_memory_than_8k(folders):
    """Peak memory of a process that streams 8k tokens and then 64k, in MiB: keys and values would add 56k tokens."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folders["retnet"])], capture_output=True, text=True, check=True
    )
    short, long = map(int, done.stdout.split())
    assert long < short + 16


def test_positions(subjects, corpus, tmp_path):
    measure = measures.get_measure("positions")
    given = {"text": str(corpus), "length": 1100, "piece": 100}
    found = [measures.run_measure(measure, subjects[name], given) for name in ("retnet", "hybrid")]
    for one in found:
        assert set(one.values) == {
            *(f"loss, tokens {a} to {b}" for a, b in ((1, 512), (513, 1024), (1025, 1099))),
            *(f"perplexity, first {n} tokens" for n in (512, 1024, 1099)),
        }
        counts = {"loss, tokens 1 to 512": 512, "loss, tokens 513 to 1024": 512, "loss, tokens 1025 to 1099": 75}
        mean = sum(one.values[name] * n for name, n in counts.items()) / 1099
        assert math.log(one.values["perplexity, first 1099 tokens"]) == pytest.approx(mean)
        assert one.data["targets"] == 1099
        assert one.details["curve"][-1][0] == 1099
    comparison.write_comparison(found, tmp_path / "table")
    assert (tmp_path / "table" / "positions.png").is_file()


def test_softmax_stops_at_its_context(subjects, corpus):
    teacher = subjects["teacher"]
    teacher.model.config.max_position_embeddings = 600
    assert get_context_length(teacher.model) == 600
    given = {"text": str(corpus), "length": 700}
    measure = measures.get_measure("positions")
    assert measures.run_measure(measure, teacher, given).data["targets"] == 599
    assert measures.run_measure(measure, teacher, {**given, "past_context": True}).data["targets"] == 699
    with pytest.raises(LimbeckError, match="has a context of 600 tokens"):
        measures.run_measure(measures.get_measure("passkey"), teacher, {"lengths": [700]})


def test_a_long_text_is_made_of_the_longest_documents(tokenizer, tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text(
        "".join(json.dumps({"text": text}) + "\n" for text in ("one", "work " * 9, "the " * 5)), encoding="utf-8"
    )
    text = long_text.load_long_text(str(path), tokenizer, 40)
    assert tokenizer.decode(text.ids).startswith("work work")
    assert text.documents == 2
    with pytest.raises(LimbeckError, match="in 3 documents"):
        long_text.load_long_text(str(path), tokenizer, 1000)


@pytest.mark.parametrize("task", [1, 2, 3])
def test_needles(haystack, tokenizer, task):
    questions = [
        build_needle_question(haystack, task, 1500, depth, tokenizer, random.Random(5), 64) for depth in (0.0, 0.5, 1.0)
    ]
    value = questions[0].answer.strip()
    form = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}" if task == 3 else r"[1-9]\d{6}"
    kind = "uuid" if task == 3 else "number"
    places = []
    for question in questions:
        assert question.answer == f" {value}"
        assert all(re.fullmatch(form, one.strip()) for one in (question.answer, *question.wrong_answers))
        assert len({question.answer, *question.wrong_answers}) == 10
        assert not any(other in question.prompt for other in question.wrong_answers)
        key = re.search(rf"One of the special magic {kind}s for (\w+-\w+) is: {value}\.", question.prompt)[1]
        assert question.prompt.endswith(f" The special magic {kind} for {key} mentioned in the provided text is")
        assert question.prompt.count(value) == 1
        used = count_prompt_tokens(tokenizer, question.prompt) + 64
        assert 1500 - 80 < used <= 1500
        places.append(question.prompt.index(value) / len(question.prompt))
    assert places[0] < 0.3 < places[1] < 0.7 < places[2]
    assert (NOISE in questions[0].prompt) == (task == 1)
    assert build_needle_question(haystack, task, 1500, 0.5, tokenizer, random.Random(5), 64) == questions[1]
    assert build_needle_question(haystack, task, 1500, 0.5, tokenizer, random.Random(6), 64) != questions[1]


def test_passkeys(tokenizer):
    question = build_passkey_question(1500, 0.25, tokenizer, random.Random(0))
    value = question.answer.strip()
    assert 1 <= int(value) <= 50000
    assert f"The pass key is {value}. Remember it. {value} is the pass key.\n" in question.prompt
    assert question.prompt.endswith("What is the pass key? The pass key is")
    before, after = question.prompt.split(f"The pass key is {value}")
    assert after.count(NOISE) > 2 * before.count(NOISE) > 0
    assert count_prompt_tokens(tokenizer, question.prompt) + 8 <= 1500


def test_lengths_that_do_not_fit(haystack, tokenizer):
    with pytest.raises(LimbeckError, match=r"S-NIAH-1: a prompt of \d+ tokens and an answer of 128 do not fit in 200"):
        build_needle_question(haystack, 1, 200, 0.5, tokenizer, random.Random(0))
    with pytest.raises(LimbeckError, match="pass key"):
        build_passkey_question(64, 0.5, tokenizer, random.Random(0))
    with pytest.raises(LimbeckError, match="the haystack has fewer than 100000 tokens"):
        build_needle_question(haystack, 2, 100000, 0.5, tokenizer, random.Random(0))
    with pytest.raises(LimbeckError, match="no S-NIAH-4"):
        build_needle_question(haystack, 4, 1000, 0.5, tokenizer, random.Random(0))


def test_a_model_that_remembers_is_found_out(folders, tokenizer, monkeypatch):
    """What an answer scores, on a model that is made to prefer it."""
    model = AutoModelForCausalLM.from_pretrained(folders["teacher"]).eval()
    right, wrong = tokenizer(" tree").input_ids, tokenizer(" work").input_ids

    def asked(likely):
        monkeypatch.setattr(PrefilledPrompt, "generate", lambda self, new_tokens, done: likely)
        monkeypatch.setattr(
            PrefilledPrompt, "log_likelihoods", lambda self, all_: torch.tensor([-1.0 * (a != likely) for a in all_])
        )
        return answer_question(model, tokenizer, Question("The license is a", " tree", [" work", " code"]), 8)

    good, bad = asked(right), asked(wrong)
    assert (good.found, good.chosen, good.rank) == (True, True, 0)
    assert (bad.found, bad.chosen, bad.rank) == (False, False, 2)
    assert good.share > 1 / 3 > bad.share


def test_equal_candidates_are_no_choice(folders, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(folders["teacher"]).eval()
    assert not answer_question(model, tokenizer, Question("The license", " tree", [" tree"]), 2).chosen


def test_share_of():
    share, error = proportion_with_stderr([True, False, False, False])
    assert share == 0.25
    assert error == pytest.approx(math.sqrt(0.3 * 0.7 / 5))
    assert proportion_with_stderr([False] * 10)[1] > 0


SMALL = {
    "needle": {"lengths": [600], "depths": [0.0, 1.0], "samples": 1, "new_tokens": 2, "tasks": [1, 2]},
    "passkey": {"lengths": [400, 500], "samples": 1, "new_tokens": 2},
}


@pytest.mark.parametrize("name", list(SMALL))
def test_retrieval_measures(subjects, name, tmp_path):
    measure = measures.get_measure(name)
    found = [
        measures.run_measure(measure, subjects[one], {**SMALL[name], "past_context": True})
        for one in ("teacher", "retnet", "hybrid")
    ]
    for one in found:
        assert one.values["chance among 10"] == 0.1
        lengths = SMALL[name]["lengths"]
        for task in ("niah 1", "niah 2") if name == "needle" else ("passkey",):
            for length in lengths:
                assert 0 <= one.values[f"{task}, {length} tokens, among 10"] <= 1
                assert one.errors[f"{task}, {length} tokens"] > 0
    cells = found[0].details["cells"]
    assert len(cells) == (4 if name == "needle" else 2)
    # the same questions for all
    prompts = [[a["depth"] for task in one.details["answers"].values() for a in task] for one in found]
    assert prompts[0] == prompts[1] == prompts[2]
    comparison.write_comparison(found, tmp_path / "table")
    assert (tmp_path / "table" / f"{name}.png").is_file()


def test_a_lookup_asks_for_every_key_once():
    made = associative_recall.RecallSequence.sample(list(range(10, 40)), 5, random.Random(0), [1], [2])
    assert len(made.ids) == 40
    known = {int(made.ids[i]): int(made.ids[i + 2]) for i in range(0, 20, 4)}
    assert sorted(known.values()) == sorted(made.values.tolist())
    assert len({*known, *known.values()}) == 10
    asked = {int(made.ids[q - 1]): int(a) for q, a in zip(made.queries, made.answers)}
    assert asked == known
    assert (made.ids[made.queries] == 1).all()
    assert (made.ids[made.queries + 1] == made.answers).all()
    with pytest.raises(LimbeckError, match="15 pairs or fewer"):
        associative_recall.RecallSequence.sample(list(range(10, 40)), 16, random.Random(0), [1], [2])


def test_recall_counts_what_a_model_says(subjects, monkeypatch, tmp_path):
    """A model that always remembers scores one, one that never does zero, and real ones are asked without an error."""
    monkeypatch.setattr(associative_recall, "select_single_token_words", lambda words, tokenizer: list(range(10, 60)))
    measure = measures.get_measure("recall")
    given = {"pairs": [2, 8], "sequences": 2}
    found = [measures.run_measure(measure, subjects[name], given) for name in ("teacher", "retnet", "hybrid")]
    assert found[1].values["state bytes, 2 pairs"] == found[1].values["state bytes, 8 pairs"]
    assert found[0].values["state bytes, 2 pairs"] < found[0].values["state bytes, 8 pairs"]
    comparison.write_comparison(found, tmp_path / "table")
    assert (tmp_path / "table" / "recall.png").is_file()
    lengths: list[int] = []
    for right in (True, False):

        def know(model, lookup, right=right):
            logits = torch.zeros(len(lookup.answers), 97)
            logits[torch.arange(len(lookup.answers)), lookup.answers] = 1.0 if right else -1.0
            lengths.append(len(lookup.ids))
            return logits, 0

        monkeypatch.setattr(associative_recall, "compute_query_logits", know)
        values = measures.run_measure(measure, subjects["retnet"], given, ignore_cache=True).values
        assert values["recall, 8 pairs"] == values["recall, 8 pairs, among all tokens"] == float(right)
        assert values["chance, 8 pairs"] == 1 / 8
    # the window beside a student has the memory that this has at the end of the longest sequence
    assert measure.baseline_length(subjects["retnet"], measures.parse_settings(measure, given)) == max(lengths)


def test_words_are_single_tokens(tokenizer):
    words = ["the", "or", "Work", "license", "and"]
    tokens = associative_recall.select_single_token_words(words, tokenizer)
    assert {tokenizer.decode([t]).strip() for t in tokens} <= {"the", "license", "and"}
    assert all(tokenizer.decode([t]).startswith(" ") for t in tokens)


EXPORT = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.10/">
<page><title>Moved</title><ns>0</ns><redirect title="x"/><revision><text>== A ==\nB</text></revision></page>
<page><title>Talk:Tea</title><ns>1</ns><revision><text>== A ==\nB</text></revision></page>
<page><title>Tea</title><ns>0</ns><revision><text>{{Infobox|a={{b}}}}'''Tea''' is a drink.

== History ==
[[File:Tea.jpg|thumb|A [[cup]] of it]]
Tea was ''first'' drunk in [[China|old China]]&lt;ref n="x"&gt;Book.&lt;/ref&gt;.&lt;!-- ? --&gt; It [//x.org ran] ().
* a list
{| class="wikitable"
| cell
|}
=== Empty ===
== Taste ==
Bitter &amp;amp; sweet.
== See also ==
Coffee</text></revision></page></mediawiki>"""


def test_wikitext():
    text = "History\n\nTea was first drunk in old China. It ran.\n\nTaste\n\nBitter & sweet."
    assert list(wikitext.iter_articles(io.BytesIO(EXPORT.encode()))) == [("Tea", text)]
