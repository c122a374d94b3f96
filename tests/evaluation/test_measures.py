"""Measures: what they leave behind, when they are taken again, and what bad input says."""

import io
import json
import math
import shutil

import pytest
from huggingface_hub import constants
from matplotlib import rcParams
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from helpers.paths import ROOT
from limbeck.cli import app
from limbeck.cli import eval as _eval  # noqa: F401  registers the verb
from limbeck.core.errors import LimbeckError
from limbeck.evaluation import measure as measures
from limbeck.evaluation.measure import Measurement, render_schema_tables
from limbeck.evaluation.subject import SubjectLoader
from limbeck.models import convert
from limbeck.report import comparison, values
from limbeck.report.figures import style as figure


@pytest.fixture(scope="module")
def student_folder(teacher_folder, tmp_path_factory):
    """A student that nobody has trained, in a folder of its own."""
    folder = tmp_path_factory.mktemp("student") / "retnet"
    convert(AutoModelForCausalLM.from_pretrained(teacher_folder), "retnet").save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def subject(own_cache, student_folder, teacher_folder, corpus, tmp_path):
    return SubjectLoader(str(teacher_folder), str(corpus), out=tmp_path / "out").load(str(student_folder))


def test_a_student_by_its_name_on_the_hub(student_folder, teacher_folder, tmp_path, monkeypatch):
    """From the hub's local cache, as it lies there once the student was used."""
    kept, commit = tmp_path / "hub" / "models--ann--retnet", "0123456789abcdef" * 2 + "01234567"
    shutil.copytree(student_folder, kept / "snapshots" / commit)
    (kept / "refs").mkdir()
    (kept / "refs" / "main").write_text(commit, encoding="utf-8")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    subject = SubjectLoader(str(teacher_folder)).load("ann/retnet")
    assert subject.is_student
    assert subject.teacher_name == str(teacher_folder)
    assert subject.fingerprint == SubjectLoader(str(teacher_folder)).load(str(student_folder)).fingerprint
    assert SubjectLoader().load("ann/retnet").teacher_name is None


SMALL = {"tokens": 128, "length": 32, "prefixes": 2, "prefix": 8, "new": 4}


def test_a_measurement_says_what_made_it(subject):
    found = measures.run_measure(measures.get_measure("agreement"), subject, SMALL)
    stored = Measurement.load(subject.output_dir / "agreement.json")
    assert stored == found
    assert found.values["kl"] > 0
    assert found.settings == measures.get_measure("agreement").settings(**SMALL).model_dump()
    assert found.data["key"]
    assert found.data["targets"] > 50
    assert found.provenance.weights == subject.fingerprint
    assert set(found.provenance.versions) == {"limbeck", "torch", "transformers", "python"}


def test_the_same_is_not_measured_twice(subject, monkeypatch):
    measure = measures.get_measure("agreement")
    first = measures.run_measure(measure, subject, SMALL)
    assert measures.run_measure(measure, subject, SMALL) == first
    assert measures.run_measure(measure, subject, SMALL, ignore_cache=True).provenance.date >= first.provenance.date
    other = measures.run_measure(measure, subject, {**SMALL, "tokens": 64})
    assert other.data["targets"] < first.data["targets"]
    subject.fingerprint = "others"
    assert measures.run_measure(measure, subject, {**SMALL, "tokens": 64}).provenance.weights == "others"
    path = subject.output_dir / "agreement.json"
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    assert measures.run_measure(measure, subject, SMALL).values == first.values


def test_a_teacher_agrees_with_itself(own_cache, teacher_folder, corpus, tmp_path):
    teacher = SubjectLoader(data=str(corpus), out=tmp_path).load(str(teacher_folder))
    found = measures.run_measure(measures.get_measure("agreement"), teacher, SMALL)
    assert abs(found.values["kl"]) < 1e-6
    assert found.values["top1_agreement"] == 1
    assert found.values["perplexity"] == pytest.approx(found.values["teacher_perplexity"])


def test_tables(subject, tmp_path):
    found = [measures.run_measure(measures.get_measure("agreement"), subject, SMALL)]
    comparison.write_comparison(found, tmp_path / "table")
    text = (tmp_path / "table" / "table.md").read_text(encoding="utf-8")
    assert "| **agreement** |" in text
    error = 100 * found[0].errors["top1_agreement"]
    shown = next(line for line in text.splitlines() if line.startswith("| top-1 agreement |"))
    assert f"{100 * found[0].values['top1_agreement']:.1f}" in shown
    assert f"± {error:.1f}" in shown
    lines = (tmp_path / "table" / "values.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "model,measure,name,value,standard_error"
    assert len(lines) == 1 + len(found[0].values)
    assert f"top1_agreement,{found[0].values['top1_agreement']}," in "\n".join(lines)


def on_screen(found):
    console = Console(width=1000, file=io.StringIO())
    console.print(comparison.build_comparison_table(found))
    return console.file.getvalue()


def test_many_models_are_rows(subject):
    one = measures.run_measure(measures.get_measure("agreement"), subject, SMALL)
    names = [f"model-{n}" for n in (3, 1, 2, 5, 4, 0)]
    few = [one.model_copy(update={"model": name}) for name in names]
    assert on_screen(few).splitlines()[0].split() == names  # in the order given
    many = [*few, one.model_copy(update={"model": "one-more"})]
    lines = on_screen(many).splitlines()
    assert lines[0].strip() == "agreement"
    assert "top-1 agreement" in lines[1]
    assert [line.split()[0] for line in lines[2:9]] == [*names, "one-more"]
    rows = comparison.format_comparison(many).splitlines()
    assert rows[0] == "**agreement**"
    assert len({row.count("|") for row in rows[2:]}) == 1


@pytest.mark.parametrize(
    ("name", "label", "value", "shown"),
    [
        ("token_milliseconds@4096x1", "token at 4,096 tokens, ms", 12.3456, "12.35"),
        ("token_milliseconds_static_cache@4096x4", "token static cache at 4,096 tokens, batch 4, ms", 5.0, "5"),
        ("prefill_tokens_per_second@64x1", "prefill tokens a second at 64 tokens", 812.5, "812.5"),
        ("cache_bytes@1024x1", "cache at 1,024 tokens", 4423680.0, "4.42 MB"),
        ("break_even_time_tokens@batch4", "break even time tokens, batch 4", 3012.4, "3,012"),
        ("top1_agreement", "top-1 agreement", 0.528, "52.8 %"),
        ("kl", "KL", 0.61234, "0.6123"),
    ],
)
def test_names_and_numbers_as_people_read_them(name, label, value, shown):
    assert values.format_name(name) == label
    assert values.format_value(name, value) == shown


def test_numbers_with_their_errors():
    assert values.format_value("acc", 0.5, 0.0123) == "50.0 ± 1.2 %"
    assert values.format_value("recall, 8 pairs, among all tokens", 0.78125, 0.073) == "0.7812 ± 0.073"
    assert values.format_value("perplexity, first 512 tokens", 17.43) == "17.43"
    assert values.format_value("break_even_tokens", 170.7) == "171"
    assert values.format_value("loss_difference", 0.71234, 0.0312) == "0.7123 ± 0.031"
    assert values.format_value("cache_bytes", 3.02e9) == "3.02 GB"


def test_what_was_measured_before_without_any_model(subject, tmp_path, monkeypatch):
    one = measures.run_measure(measures.get_measure("agreement"), subject, SMALL)
    later = one.model_copy(deep=True)
    later.provenance.date, later.values["kl"] = "2999-01-01T00:00:00Z", 7.0
    later.save(tmp_path / "later")
    (tmp_path / "later" / "eval.json").write_text('{"mixer": "a run\'s own result, no measurement"}', encoding="utf-8")
    (tmp_path / "later" / "broken.json").write_text("{", encoding="utf-8")
    found = comparison.load_measurements([subject.output_dir, tmp_path / "later"])
    assert [(m.model, m.values["kl"]) for m in found] == [(one.model, 7.0)]
    monkeypatch.setattr(SubjectLoader, "load", None)
    result = CliRunner().invoke(app, ["eval", "--from", str(subject.output_dir), "--out", str(tmp_path / "made")])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "made" / "table.md").is_file()
    assert "top-1 agreement" in result.stdout
    for places, says in (([tmp_path / "none"], "does not exist"), ([tmp_path / "made"], "no measurements in")):
        with pytest.raises(LimbeckError, match=says):
            comparison.load_measurements(places)
    with pytest.raises(LimbeckError, match="together"):
        CliRunner().invoke(app, ["eval", "x", "--from", str(subject.output_dir)], catch_exceptions=False)


def test_the_document_is_the_schema():
    """Its tables are the output of `limbeck.evaluation.measure.render_schema_tables`."""
    assert render_schema_tables() in (ROOT / "docs" / "reference" / "files.md").read_text(encoding="utf-8")


def test_a_model_keeps_its_colour():
    with figure.use_style(["a", "b", "c"]):
        first = [figure.get_marker_style(name) for name in "abc"]
        assert [figure.get_marker_style(name) for name in "ca"] == [first[2], first[0]]
        assert len({style["color"] for style in first}) == 3
        axes = figure.create_figure(3, 2).subplots()
        assert axes.plot([1, 2])[0].get_color() == figure.COLORS[0]
    with figure.use_style():
        assert figure.get_color("c") == figure.COLORS[0]
    assert rcParams["axes.grid"] is False  # what is outside keeps its own settings
    assert len({(figure.get_color(str(n)), figure.get_marker(str(n))) for n in range(24)}) == 24


def test_numbers_that_json_does_not_know(subject, tmp_path):
    found = measures.run_measure(measures.get_measure("agreement"), subject, SMALL)
    found.details["curve"] = [1.0, float("inf"), float("nan")]
    found.values["perplexity"] = float("inf")
    assert json.loads(found.save(tmp_path).read_text(encoding="utf-8"))["details"]["curve"] == [1.0, None, None]
    assert math.isnan(Measurement.load(tmp_path / "agreement.json").values["perplexity"])


def test_bad_input(subject, tmp_path):
    with pytest.raises(LimbeckError, match="did you mean 'agreement'"):
        measures.get_measure("agrement")
    with pytest.raises(LimbeckError, match="did you mean 'tokens'"):
        measures.parse_settings(measures.get_measure("agreement"), {"token": 3})
    with pytest.raises(LimbeckError, match="agreement: tokens is 0"):
        measures.parse_settings(measures.get_measure("agreement"), {"tokens": 0})
    with pytest.raises(LimbeckError, match="is not a measurement"):
        Measurement.load(tmp_path / "nothing.json")
    for content, problem in (("", "Invalid JSON"), ('{"measure": "x"}', "model: Field required")):
        (tmp_path / "half.json").write_text(content, encoding="utf-8")
        with pytest.raises(LimbeckError, match=f"is not a measurement: {problem}") as caught:
            Measurement.load(tmp_path / "half.json")
        assert "pydantic" not in str(caught.value)
    with pytest.raises(LimbeckError, match=r"no config\.json in"):
        SubjectLoader().load(str(tmp_path))
    subject.teacher_or_none = None
    with pytest.raises(LimbeckError, match="is unknown"):
        measures.run_measure(measures.get_measure("agreement"), subject, SMALL)
