"""Measures: what they leave behind, when they are taken again, and what bad input says."""

import json

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from limbeck.errors import LimbeckError
from limbeck.evaluate import measures
from limbeck.evaluate.measurement import Measurement
from limbeck.evaluate.subject import Subjects
from limbeck.model import convert
from limbeck.report import comparison


@pytest.fixture(scope="module")
def student_folder(teacher_folder, tmp_path_factory):
    """A student that nobody has trained, in a folder of its own."""
    folder = tmp_path_factory.mktemp("student") / "retnet"
    convert(AutoModelForCausalLM.from_pretrained(teacher_folder), "retnet").save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def subject(own_cache, student_folder, teacher_folder, corpus, tmp_path):
    return Subjects(str(teacher_folder), str(corpus), out=tmp_path / "out").open(str(student_folder))


SMALL = {"tokens": 128, "length": 32, "prefixes": 2, "prefix": 8, "new": 4}


def test_a_measurement_says_what_made_it(subject):
    found = measures.take(measures.find("agreement"), subject, SMALL)
    stored = Measurement.load(subject.home / "agreement.json")
    assert stored == found
    assert found.values["kl"] > 0
    assert found.settings == measures.find("agreement").settings(**SMALL).model_dump()
    assert found.data["key"]
    assert found.data["targets"] > 50
    assert found.provenance.weights == subject.weights
    assert set(found.provenance.versions) == {"limbeck", "torch", "transformers", "python"}


def test_the_same_is_not_measured_twice(subject, monkeypatch):
    measure = measures.find("agreement")
    first = measures.take(measure, subject, SMALL)
    assert measures.take(measure, subject, SMALL) == first
    assert measures.take(measure, subject, SMALL, again=True).provenance.date >= first.provenance.date
    other = measures.take(measure, subject, {**SMALL, "tokens": 64})
    assert other.data["targets"] < first.data["targets"]
    subject.weights = "others"
    assert measures.take(measure, subject, {**SMALL, "tokens": 64}).provenance.weights == "others"
    path = subject.home / "agreement.json"
    path.write_text(path.read_text()[:100])
    assert measures.take(measure, subject, SMALL).values == first.values


def test_a_teacher_agrees_with_itself(own_cache, teacher_folder, corpus, tmp_path):
    teacher = Subjects(data=str(corpus), out=tmp_path).open(str(teacher_folder))
    found = measures.take(measures.find("agreement"), teacher, SMALL)
    assert abs(found.values["kl"]) < 1e-6
    assert found.values["top1_agreement"] == 1
    assert found.values["perplexity"] == pytest.approx(found.values["teacher_perplexity"])


def test_tables(subject, tmp_path):
    found = [measures.take(measures.find("agreement"), subject, SMALL)]
    comparison.write(found, tmp_path / "table")
    assert "| agreement: kl |" in (tmp_path / "table" / "table.md").read_text()
    lines = (tmp_path / "table" / "values.csv").read_text().splitlines()
    assert lines[0] == "model,measure,name,value,standard_error"
    assert len(lines) == 1 + len(found[0].values)


def test_numbers_that_json_does_not_know(subject, tmp_path):
    found = measures.take(measures.find("agreement"), subject, SMALL)
    found.details["curve"] = [1.0, float("inf"), float("nan")]
    assert json.loads(found.save(tmp_path).read_text())["details"]["curve"] == [1.0, None, None]


def test_bad_input(subject, tmp_path):
    with pytest.raises(LimbeckError, match="did you mean 'agreement'"):
        measures.find("agrement")
    with pytest.raises(LimbeckError, match="did you mean 'tokens'"):
        measures.settings_of(measures.find("agreement"), {"token": 3})
    with pytest.raises(LimbeckError, match=r"agreement\.tokens is 0"):
        measures.settings_of(measures.find("agreement"), {"tokens": 0})
    with pytest.raises(LimbeckError, match="holds no measurement"):
        Measurement.load(tmp_path / "nothing.json")
    with pytest.raises(LimbeckError, match="holds no model"):
        Subjects().open(str(tmp_path))
    subject.base = None
    with pytest.raises(LimbeckError, match="is not known"):
        measures.take(measures.find("agreement"), subject, SMALL)
