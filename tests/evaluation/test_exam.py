"""The exam is the loss of a plain pass over each document; baselines have the student's memory."""

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import limbeck
from limbeck.cli import main
from limbeck.core.errors import LimbeckError
from limbeck.evaluation import baselines, exam
from limbeck.evaluation import measure as measures
from limbeck.evaluation.measure import Measurement
from limbeck.evaluation.subject import SubjectLoader
from limbeck.evaluation.timing import CacheGrowth
from limbeck.models import build_cache_kwargs, cache_bytes
from limbeck.report import comparison
from limbeck.testing import make_tiny_model
from limbeck.testing.tiny_models import VOCAB_SIZE

MIXERS = ("gated_deltanet", "sliding_window", "lolcats")


def ids_of(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def model_of(name: str) -> torch.nn.Module:
    """A tiny model in float64: the teacher, a student, or a hybrid."""
    model = make_tiny_model("llama").double()
    if name == "teacher":
        return model
    torch.manual_seed(0)
    options = {"window": 8} if name in ("sliding_window", "lolcats") else {}
    mixer, layers = ("retnet", [0]) if name == "hybrid" else (name, "all")
    return limbeck.convert(model, mixer, layers, options).eval()


@torch.no_grad()
def plain_losses(model, ids: torch.Tensor) -> torch.Tensor:
    """Losses [T - 1] of one pass over a whole sequence without a cache."""
    return cross_entropy(model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:], reduction="none")


@pytest.mark.parametrize("name", ["teacher", "hybrid", *MIXERS])
@pytest.mark.parametrize("prefix", [0, 1])
def test_losses_and_repeats_are_those_of_plain_passes(name, prefix):
    model, ids = model_of(name), ids_of(70)
    repeat, gaps = 12, [0, 5, 70 - 12 - prefix]  # the last B ends with the document
    losses, repeats = exam.compute_document_losses(model, ids, repeat, gaps, prefix)
    torch.testing.assert_close(losses, plain_losses(model, ids), rtol=1e-9, atol=1e-9)
    assert list(repeats) == [repeat + gap for gap in gaps]
    again = ids[prefix : prefix + repeat]
    for gap in gaps:
        whole = torch.cat([ids[: prefix + repeat + gap], again])
        expected = plain_losses(model, whole)[prefix + repeat + gap :]
        torch.testing.assert_close(repeats[repeat + gap], expected, rtol=1e-9, atol=1e-9)


def test_values_are_those_of_the_reference_script():
    """As shared by those who measured before: mean over documents by position, and the second A of A B A."""
    model, texts = model_of("gated_deltanet"), [ids_of(700, seed) for seed in range(3)]
    documents = exam.ExamDocuments("", texts, 0)
    result = exam.run_exam(model, documents, 700, 64, [64])
    values, errors = result.summarize()
    mean = torch.stack([plain_losses(model, ids) for ids in texts]).mean(0)
    assert values["perplexity"] == pytest.approx(math.exp(float(mean.mean())), rel=1e-9)
    assert values["perplexity@512"] == pytest.approx(math.exp(float(mean[:512].mean())), rel=1e-9)
    again = [torch.cat([ids[:64], ids[64:128], ids[:64]]) for ids in texts]
    of_repeats = torch.stack([plain_losses(model, ids)[128:].mean() for ids in again])
    assert values["repeat_loss@128"] == pytest.approx(float(of_repeats.mean()), rel=1e-9)
    # documents of equal length: the standard error of a mean of three numbers
    assert errors["repeat_loss@128"] == pytest.approx(float(of_repeats.std()) / math.sqrt(3), rel=1e-9)
    by_position, position_errors = result.average_by_position()
    names = {
        "loss, tokens 1 to 64": (0, 64),
        "loss, tokens 65 to 256": (64, 256),
        "loss, tokens 257 to 512": (256, 512),
        "loss, tokens 513 to 699": (512, 699),
    }
    assert list(by_position) == list(names) == list(position_errors)
    for name, (begin, end) in names.items():
        assert by_position[name] == pytest.approx(float(mean[begin:end].mean()), rel=1e-9)


def test_shorter_documents_count_as_far_as_they_go():
    model, texts = model_of("teacher"), [ids_of(600), ids_of(90, 1)]
    result = exam.run_exam(model, exam.ExamDocuments("", texts, 0), 600, 40, [10, 60])
    assert [len(losses) for losses in result.documents] == [599, 89]
    assert {distance: len(losses) for distance, losses in result.repeats.items()} == {50: 2, 100: 1}
    values, errors = result.summarize()
    assert "repeat_loss@50" in errors
    assert "repeat_loss@100" not in errors
    every = torch.cat(result.documents)
    assert values["perplexity"] == pytest.approx(math.exp(float(every.mean())))
    by_position, position_errors = result.average_by_position()
    assert by_position["loss, tokens 65 to 256"] == pytest.approx(
        float(torch.cat([losses[64:256] for losses in result.documents]).mean())
    )
    assert "loss, tokens 257 to 512" not in position_errors


def test_edges_and_gaps():
    assert exam.list_position_edges(2047) == [0, 64, 256, 512, 1024, 2047]
    assert exam.list_position_edges(512) == [0, 64, 256, 512]
    assert exam.list_position_edges(15) == [0, 15]
    assert exam.list_position_edges(5000) == [0, 64, 256, 512, 1024, 2048, 4096, 5000]
    assert exam.list_fitting_gaps(2048, 2048, 256, [1024, 256, 512, 256]) == [256, 512, 1024]
    assert exam.list_fitting_gaps(2048, 1024, 256, [256, 512, 1024]) == [256, 512]
    assert exam.list_fitting_gaps(500, 2048, 256, [256]) == []


@pytest.fixture
def documents(tmp_path):
    """Three documents, of which one is short."""
    text = "Permission is hereby granted to any person who reads this. "
    path = tmp_path / "documents.jsonl"
    lines = [text * 30, text * 2, "Yet another text of some length, which goes on. " * 40]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


def test_documents_are_the_longest_and_shortfalls_are_said(documents, tokenizer, capsys):
    found = exam.load_exam_documents(str(documents), tokenizer, 2, 128)
    assert [len(ids) for ids in found.tokens] == [128, 128]
    assert tokenizer.decode(found.tokens[0]).startswith("Yet another")
    assert capsys.readouterr().err == ""
    longer = exam.load_exam_documents(str(documents), tokenizer, 2, 10_000)
    assert "2 are shorter than 10,000 tokens" in " ".join(capsys.readouterr().err.split())
    assert torch.equal(longer.tokens[0][:128], found.tokens[0])
    with pytest.raises(LimbeckError, match="has 3 documents") as too_few:
        exam.load_exam_documents(str(documents), tokenizer, 4, 128)
    assert "4 or more" in str(too_few.value)
    documents.write_text('{"text": "short"}\n', encoding="utf-8")
    with pytest.raises(LimbeckError, match=r"longest documents .* have"):
        exam.load_exam_documents(str(documents), tokenizer, 1, 128)


# ------------------------------------------------------------------ baselines


def bytes_of(model, length: int) -> int:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids_of(length)[None], **build_cache_kwargs(model, cache))
    return cache_bytes(cache)


@pytest.mark.parametrize("mixer", ["gated_deltanet", "retnet", "mlstm"])
def test_a_window_has_the_bytes_of_the_students_state(mixer):
    teacher = make_tiny_model("llama")
    student = limbeck.convert(teacher, mixer).eval()
    budget = CacheGrowth.measure(student).at(200)
    assert budget == bytes_of(student, 200)
    made = baselines.build_window_baseline(teacher, budget, 200)
    assert made.state_bytes == bytes_of(made.model, 200) == bytes_of(made.model, 7) <= budget
    one_more = limbeck.convert(teacher, "sliding_window", options={"window": made.window + 1, "sinks": made.sinks})
    assert bytes_of(one_more, 200) > budget


def test_a_window_shares_the_teachers_weights_and_is_the_mixer(tmp_path):
    teacher = make_tiny_model("llama")
    made = baselines.build_window_baseline(teacher, 10_000, 64)
    expected = limbeck.convert(teacher, "sliding_window", options={"window": made.window, "sinks": 4}).eval()
    ids = ids_of(60)[None]
    assert torch.equal(made.model(ids).logits, expected(ids).logits)
    assert made.model.get_input_embeddings().weight is teacher.get_input_embeddings().weight


def test_a_window_is_at_least_a_token_and_at_most_the_text():
    teacher = make_tiny_model("llama").double()
    smallest = baselines.build_window_baseline(teacher, 10, 64)
    assert smallest.window == 1
    assert smallest.state_bytes > 10
    whole = baselines.build_window_baseline(teacher, 1e9, 64)
    assert whole.window == 64
    ids = ids_of(64)[None]
    torch.testing.assert_close(whole.model(ids).logits, teacher(ids).logits)


def test_a_hybrids_memory_is_that_at_the_measured_length():
    teacher = make_tiny_model("llama")
    hybrid = limbeck.convert(teacher, "retnet", [0]).eval()
    for length in (50, 200):
        budget = CacheGrowth.measure(hybrid, 20).at(length)
        assert budget == bytes_of(hybrid, length)
        assert budget - 500 < baselines.build_window_baseline(teacher, budget, length).state_bytes <= budget


def test_the_control_arm_is_the_teacher():
    teacher = make_tiny_model("llama").double()
    ids = ids_of(40)[None]
    torch.testing.assert_close(baselines.build_softmax_control(teacher)(ids).logits, teacher(ids).logits)


def test_the_sentence_says_who_is_better():
    worse = baselines.describe_against_window(52.4, 19.1, 142, 4)
    assert worse == (
        "An untrained sliding window of 142 tokens with 4 sinks, in the same memory, is better (19.10 against 52.40): "
        "this student is not worth its training."
    )
    better = baselines.describe_against_window(17.0, 18.05, 1, 4)
    assert better == (
        "It beats an untrained sliding window of 1 token with 4 sinks, in the same memory (17.00 against 18.05)."
    )
    assert "gained nothing" in baselines.describe_against_window(18.052, 18.051, 128, 4)
    for diverged in (math.nan, math.inf):
        assert "not worth its training" in baselines.describe_against_window(diverged, 18.05, 128, 4)
    remembers = baselines.describe_against_window(23.88, 23.86, 168, 4, repeat=baselines.RepeatLosses(512, 0.22, 3.31))
    assert remembers.endswith(
        "is better (23.86 against 23.88), but forgets a passage read 512 tokens before, on which it loses 3.31 nats a "
        "token and the student 0.22."
    )
    # what it remembers is not worth what it forgot of the language: ln(52.4 / 19.1) = 1.01
    dear = baselines.describe_against_window(52.4, 19.1, 142, 4, repeat=baselines.RepeatLosses(512, 2.3, 3.2))
    assert dear == worse
    nothing = baselines.describe_against_window(math.nan, 19.1, 142, 4, repeat=baselines.RepeatLosses(512, 0.1, 3.2))
    assert "not worth its training" in nothing
    assert "which takes more memory" in baselines.describe_against_window(9.0, 8.0, 1, 4, same_memory=False)


# ------------------------------------------------------------------ the measure, with the baselines beside it


@pytest.fixture(scope="module")
def folders(teacher_folder, tmp_path_factory):
    """Two students of one state size that nobody has trained, and their teacher."""
    made = {"teacher": teacher_folder}
    for name in ("gated_deltanet", "gla"):
        torch.manual_seed(0)
        folder = made[name] = tmp_path_factory.mktemp("exam") / name
        limbeck.convert(AutoModelForCausalLM.from_pretrained(teacher_folder), name).save_pretrained(folder)
        AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    return made


def settings_of(documents) -> dict:
    return {"text": str(documents), "documents": 2, "length": 512, "repeat_tokens": 16, "gaps": [16, 32]}


def test_the_measure_ends_at_the_context_and_is_cached(folders, documents, tmp_path, capsys):
    subject = SubjectLoader(str(folders["teacher"]), out=tmp_path / "out").load(str(folders["gla"]))
    one = measures.run_measure(measures.get_measure("exam"), subject, settings_of(documents))
    assert one.data["tokens"] == [256, 256]  # the tiny teacher's context
    assert "context" in capsys.readouterr().err
    assert {"perplexity", "repeat_loss@32", "repeat_loss@48", "loss, tokens 65 to 255"} <= set(one.values)
    assert one.values["state_bytes"] == bytes_of(subject.model, 256)
    assert Measurement.load(tmp_path / "out" / next((tmp_path / "out").iterdir()).name / "exam.json") == one
    assert measures.run_measure(measures.get_measure("exam"), subject, settings_of(documents)) == one
    assert "cached result" in capsys.readouterr().err


def test_baselines_stand_beside_students_and_are_measured_once(
    folders, documents, tmp_path, own_cache, monkeypatch, capsys
):
    measure = measures.get_measure("exam")
    loader = SubjectLoader(str(folders["teacher"]), out=tmp_path / "out")
    found: list[Measurement] = []
    for name in ("gated_deltanet", "gla"):
        subject = loader.load(str(folders[name]))
        found.append(measures.run_measure(measure, subject, settings_of(documents)))
        found += baselines.measure_baselines(measure, subject, settings_of(documents), known=found, control=True)
    first, window, control, second, same_window, same_control = found
    assert (window, control) == (same_window, same_control)
    assert window.model.startswith("untrained window")
    assert window.data["baseline"]["kind"] == "window"
    assert window.values["state_bytes"] == window.data["baseline"]["state_bytes"] <= first.values["state_bytes"]
    teacher = measures.run_measure(measure, loader.load(str(folders["teacher"])), settings_of(documents))
    assert "teacher itself" in control.model
    assert control.values["perplexity"] == pytest.approx(teacher.values["perplexity"], rel=1e-5)
    assert "context" in capsys.readouterr().err

    # and so they are beside a student in another folder, in another process
    again, examined, run = SubjectLoader(str(folders["teacher"]), out=tmp_path / "again"), [], exam.run_exam
    subject = again.load(str(folders["gla"]))
    with monkeypatch.context() as patch:
        patch.setattr(exam, "run_exam", lambda model, *rest: examined.append(model) or run(model, *rest))
        more = baselines.run_measures([subject], [measure], {"exam": settings_of(documents)}, control=True)
        more.append(measures.run_measure(measure, again.load(str(folders["teacher"])), settings_of(documents)))
    assert examined == [subject.model]
    assert more[0].values == second.values
    assert more[1:] == [window, control, teacher]
    assert len(list((tmp_path / "again").rglob("exam.json"))) == 4

    for student in (first, second):
        assert baselines.find_window(student, found) == window
    assert baselines.find_window(window, found) is baselines.find_window(control, found) is None
    assert baselines.find_window(teacher, found) is None
    sentences = baselines.describe_windows(found)
    assert [line.split(": ")[0] for line in sentences] == [first.model, second.model]
    expected = baselines.describe_against_window(
        first.values["perplexity"], window.values["perplexity"], window.data["baseline"]["window"], 4
    )
    assert sentences[0] == f"{first.model}: {expected}"
    stored = comparison.load_measurements([tmp_path / "out"])
    assert sorted(baselines.describe_windows(stored)) == sorted(sentences)
    text = comparison.format_comparison(stored)
    assert all(line in text for line in sentences)
    assert window.model in text
    files = comparison.write_comparison(found, tmp_path / "written")
    assert {"exam.svg", "exam.png"} <= {path.name for path in files}


def test_a_teacher_that_cannot_be_converted_has_no_window(folders, documents, tmp_path, capsys, monkeypatch):
    def refuse(*args, **kwargs):
        raise LimbeckError("this model is quantized")

    monkeypatch.setattr(baselines, "convert", refuse)
    subject = SubjectLoader(str(folders["teacher"]), out=tmp_path / "out").load(str(folders["gla"]))
    measure = measures.get_measure("exam")
    assert baselines.measure_baselines(measure, subject, settings_of(documents)) == []
    assert "quantized" in capsys.readouterr().err
    with pytest.raises(LimbeckError, match="quantized"):
        baselines.measure_baselines(measure, subject, settings_of(documents), control=True)


@pytest.mark.parametrize(("option", "columns"), [([], "untrained window"), (["--no-window", "--control"], "control")])
def test_limbeck_eval_has_the_baselines_it_is_asked_for(
    option, columns, folders, documents, tmp_path, monkeypatch, capsys
):
    words = ["eval", str(folders["gla"]), "--teacher", str(folders["teacher"]), "--measure", "exam"]
    for key, value in settings_of(documents).items():
        words += ["--set", f"exam.{key}={value}"]
    monkeypatch.setattr("sys.argv", ["limbeck", *words, "--out", str(tmp_path / "out"), *option])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert ("untrained window" in table, "control of" in table) == (columns != "control", columns == "control")
    assert ("in the same memory" in table) == (columns != "control")
