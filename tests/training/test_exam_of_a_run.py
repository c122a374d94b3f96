"""The end of a run: exam and untrained window in eval.json and in the summary, from the cache the second time."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.core.errors import LimbeckError
from limbeck.core.recipe import Evaluation, Recipe
from limbeck.evaluation import baselines, exam
from limbeck.evaluation.agreement import evaluate_agreement
from limbeck.report import run_summary
from limbeck.report.collection import load_collection
from limbeck.report.tables import build_headline_tables, describe_windows, group_seeds
from limbeck.report.values import flatten_values, get_window_tokens
from limbeck.training import pipeline, run_exam
from limbeck.training.setup import prepare_job

OLD_RUN = Path(__file__).parent.parent / "fixtures" / "run_of_0.1"


@pytest.fixture
def documents(tmp_path):
    """A text of two documents that are long enough."""
    path = tmp_path / "documents.jsonl"
    lines = [
        "Permission is hereby granted to whoever reads this. " * 20,
        "The work is provided as it is, without more. " * 20,
    ]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def recipe(teacher_folder, corpus, documents, tmp_path, own_cache):
    evaluation = {"tokens": 128, "prompt": "the work", "new_tokens": 2}
    return Recipe.parse(
        {
            "teacher": str(teacher_folder),
            "student": {"mixer": "gated_deltanet"},
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": [{"stage": "hidden", "tokens": 256, "batch_size": 4}],
            "evaluation": {**evaluation, "exam_documents": 2, "exam_tokens": 200, "exam_text": str(documents)},
            "trackers": [],
            "out": str(tmp_path / "run"),
        }
    )


def test_a_run_has_its_exam_and_its_window(recipe, documents, monkeypatch):
    result = pipeline.distill(recipe, measure_times=False)
    assert result == json.loads((Path(recipe.out) / "eval.json").read_text(encoding="utf-8"))
    window, found, held_out = result["window"], result["exam"], result["held_out"]
    teacher = AutoModelForCausalLM.from_pretrained(recipe.teacher).eval()
    tokenizer = AutoTokenizer.from_pretrained(recipe.teacher)
    student = AutoModelForCausalLM.from_pretrained(Path(recipe.out) / "student").eval()
    made = baselines.build_window_baseline(teacher, window["student_state_bytes"], 200)
    assert (window["tokens"], window["sinks"], window["state_bytes"]) == (made.window, made.sinks, made.state_bytes)

    # the numbers are those of the measures, taken one by one
    texts = exam.load_exam_documents(str(documents), tokenizer, 2, 200)
    for name, model in (("teacher", teacher), ("student", student), ("window", made.model)):
        values, errors = exam.run_exam(model, texts, 200).summarize()
        assert values
        for key, value in values.items():
            assert found[f"{name}_{key}"] == pytest.approx(value, rel=1e-4), (name, key)
        assert found["errors"][f"{name}_perplexity"] == pytest.approx(errors["perplexity"], rel=1e-3)
        assert 0 < found[f"{name}_distinct_bigrams"] <= 1
    job = prepare_job(recipe)
    compared = evaluate_agreement(teacher, made.model, job.held_out_dataset(recipe.data), 128)
    assert held_out["window_perplexity"] == pytest.approx(compared["student_perplexity"], rel=1e-5)
    assert held_out["window_kl"] == pytest.approx(compared["kl"], rel=1e-4)
    difference = torch.tensor(found["student_perplexity"]).log() - torch.tensor(found["window_perplexity"]).log()
    assert found["window_loss_difference"] == pytest.approx(float(difference), abs=1e-4)

    sentence = run_summary.describe_window(result)
    beats = found["student_perplexity"] < found["window_perplexity"]
    assert ("It beats" if beats else "is better") in sentence
    summary = (Path(recipe.out) / "summary.md").read_text(encoding="utf-8")
    assert sentence in summary
    assert f"untrained window, {made.window:,} tokens" in summary
    assert "exam: perplexity of 200 tokens" in summary

    # the same for a report
    values, errors = flatten_values(result, [], None)
    assert values["exam.window_perplexity"] == found["window_perplexity"]
    assert errors["exam.student_perplexity"] == found["errors"]["student_perplexity"]
    assert get_window_tokens("exam.student_perplexity", values) == made.window
    groups = group_seeds(load_collection([Path(recipe.out)]))
    (table,) = build_headline_tables(groups)
    assert [row.cells[0].text for row in table.rows] == ["teacher", f"untrained window, {made.window} tokens", "run"]
    assert describe_windows(groups)[0].startswith("Better" if beats else "No better")

    # another student of the same teacher: nothing of teacher and window is computed again
    examined = []
    monkeypatch.setattr(
        run_exam, "run_exam", lambda *args, label, **rest: examined.append(label) or exam.run_exam(*args)
    )
    other = recipe.model_copy(update={"out": f"{recipe.out}-2", "stages": []})
    again = pipeline.distill(other, measure_times=False)
    assert [label for label in examined if label == "exam of the student"] == ["exam of the student"] * 2  # rehearsed
    assert len([label for label in examined if label != "exam of the student"]) == 2  # only in the rehearsal
    for key in ("teacher_perplexity", "window_perplexity"):
        assert again["exam"][key] == found[key]
    assert again["held_out"]["window_perplexity"] == held_out["window_perplexity"]


def test_without_an_exam_the_window_stands_beside_the_held_out_text(recipe):
    evaluation = recipe.evaluation.model_copy(update={"exam_documents": 0})
    result = pipeline.distill(recipe.model_copy(update={"evaluation": evaluation}), measure_times=False)
    assert result["exam"] is None
    assert result["window"]["length"] == 32
    assert "on the held-out text" in run_summary.describe_window(result)


def test_a_short_context_has_no_exam_by_itself(recipe):
    teacher = AutoModelForCausalLM.from_pretrained(recipe.teacher)  # 256 tokens
    assert run_exam.resolve_exam_tokens(Evaluation(), teacher) == 0
    assert run_exam.resolve_exam_tokens(Evaluation(exam_tokens=64), teacher) == 64
    assert run_exam.resolve_exam_tokens(Evaluation(exam_tokens=1000), teacher) == 256
    assert run_exam.resolve_exam_tokens(Evaluation(exam_tokens=64, exam_documents=0), teacher) == 0
    teacher.config.max_position_embeddings = 1024
    assert run_exam.resolve_exam_tokens(Evaluation(), teacher) == 1024
    teacher.config.max_position_embeddings = 100_000
    assert run_exam.resolve_exam_tokens(Evaluation(), teacher) == 2048
    assert run_exam.count_evaluation_tokens(Evaluation(exam_documents=0), teacher) == 8192 * 3 // 2


def test_a_text_that_does_not_do_is_refused_before_anything_is_written(recipe, documents):
    evaluation = recipe.evaluation.model_copy(update={"exam_documents": 3})
    with pytest.raises(LimbeckError, match="has 2 documents"):
        pipeline.distill(recipe.model_copy(update={"evaluation": evaluation}), measure_times=False)
    assert not Path(recipe.out).exists()


def test_the_text_that_comes_with_it_may_be_missing(recipe, monkeypatch):
    def refuse(*args):
        raise LimbeckError("there is no network")

    monkeypatch.setattr(run_exam, "load_exam_documents", refuse)
    evaluation = recipe.evaluation.model_copy(update={"exam_text": exam.HELD_OUT_TEXT})
    result = pipeline.distill(recipe.model_copy(update={"evaluation": evaluation}), measure_times=False)
    assert result["exam"] == {"missing": "there is no network"}
    assert "No exam: there is no network." in run_summary.format_summary(result)
    assert "on the held-out text" in run_summary.describe_window(result)


def test_a_teacher_without_a_window_is_said(recipe, monkeypatch):
    def refuse(*args):
        raise LimbeckError("this model is quantized")

    monkeypatch.setattr(run_exam, "build_window_baseline", refuse)
    result = pipeline.distill(recipe, measure_times=False)
    assert result["window"] == {"missing": "this model is quantized"}
    assert not any(name.startswith("window") for name in {**result["exam"], **result["held_out"]})
    summary = run_summary.format_summary(result)
    assert "No untrained window stands beside the student: this model is quantized." in summary


def test_a_run_of_an_earlier_version_has_neither():
    result = json.loads((OLD_RUN / "eval.json").read_text(encoding="utf-8"))
    assert "window" not in result
    assert "exam" not in result
    assert run_summary.describe_window(result) == run_summary.describe_exam(result) == ""
    summary = run_summary.format_summary(result)
    assert "| teacher | student |" in summary
    assert "window" not in summary
    assert Evaluation(**result["evaluation"]).matches(result["evaluation"])
    assert not Evaluation(**{**result["evaluation"], "tokens": 3}).matches(result["evaluation"])
    assert not Evaluation(exam_documents=2).matches(Evaluation().model_dump(mode="json"))
    values, _ = flatten_values(result, [], None)
    assert get_window_tokens("held_out.student_perplexity", values) is None
