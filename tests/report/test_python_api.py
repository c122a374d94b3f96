"""The Python door: names or objects in memory, plain results, short errors, docstrings whose examples run."""

import doctest
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import limbeck
from helpers.paths import ROOT
from limbeck import LimbeckError, Recipe
from limbeck.data.in_memory import find_stored_text, store_text

DOCUMENTS = [p for p in (ROOT / "LICENSE").read_text(encoding="utf-8").split("\n\n") if len(p) > 80]
SMALL = {
    "data.seq_len": 32,
    "data.held_out": 0.2,
    "stages": [{"stage": "calibrate", "tokens": 128}, {"stage": "hidden", "tokens": 256, "batch_size": 4, "lr": 1e-3}],
    "evaluation": {"tokens": 64, "new_tokens": 4, "exam_documents": 0},
    "keep_better": False,
    "trackers": [],
}


@pytest.fixture
def place(tmp_path, monkeypatch, own_cache, teacher_folder):
    """An empty folder with a teacher, as a reader of the examples has it."""
    (tmp_path / "my-teacher").symlink_to(teacher_folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_way_from_text_in_memory_to_numbers(place):
    teacher = AutoModelForCausalLM.from_pretrained("my-teacher"), AutoTokenizer.from_pretrained("my-teacher")
    assert torch.equal(next(teacher[0].parameters()), next(limbeck.load("my-teacher")[0].parameters()))
    summary = limbeck.distill("quickstart", teacher=teacher, student="gla", data=DOCUMENTS, overrides=SMALL)
    assert summary["run"] == "runs/quickstart-gla"
    assert summary == json.loads((summary.path / "eval.json").read_text())
    assert all(parameter.requires_grad for parameter in teacher[0].parameters())  # as it was
    shown = summary._repr_markdown_()
    assert "Next:" in str(summary)
    assert "Next:" not in shown
    assert "memory:" in shown
    assert str(place) not in shown
    assert len(repr(summary)) < 200

    # the recipe is complete: the same run by name alone, and nothing is trained again
    assert limbeck.distill(Recipe.load(summary.path / "recipe.yaml")) == summary
    student = AutoModelForCausalLM.from_pretrained(summary.student_folder)
    assert type(limbeck.load(summary.path)[0]) is type(student)
    result = limbeck.evaluate(
        {"mine": student}, teacher, data=DOCUMENTS, tokens=256, length=32, settings={"agreement": {"prefixes": 0}}
    )
    beside = limbeck.evaluate(
        summary.path, data=DOCUMENTS, tokens=256, length=32, window=False, settings={"agreement": {"prefixes": 0}}
    )
    assert next(iter(result)) == "mine"
    assert any(name.startswith("untrained window") for name in result)
    # of the text that the run was trained on, its held-out part; a model in memory has no run that would say so
    assert [one.data["part"] for one in (beside.measurements[0], result.measurements[0])] == ["held-out part", "all"]
    assert "| perplexity" in result._repr_markdown_().lower()
    assert (place / "runs/quickstart-gla/eval/agreement.json").is_file()
    assert {path.name for path in result.save("table")} >= {"table.md", "values.csv"}


def test_conversion_by_name_is_that_of_the_model(place):
    torch.manual_seed(0)
    named = limbeck.convert("my-teacher", "linear_attention")
    torch.manual_seed(0)
    given = limbeck.convert(AutoModelForCausalLM.from_pretrained("my-teacher"), "linear_attention")
    assert named.config.to_dict() == given.config.to_dict()
    assert all(torch.equal(a, b) for a, b in zip(named.parameters(), given.parameters()))
    assert all(parameter.requires_grad for parameter in named.parameters())
    with pytest.raises(LimbeckError, match="unknown mixer 'gal'"):
        limbeck.convert("a-folder-that-is-not-there", "gal")


def test_text_in_memory(own_cache):
    datasets = pytest.importorskip("datasets")
    records = [{"text": text} for text in DOCUMENTS]
    source = store_text(DOCUMENTS)
    assert source == store_text(records) == store_text(datasets.Dataset.from_list(records))
    assert [json.loads(line)["text"] for line in find_stored_text(source).open(encoding="utf-8")] == DOCUMENTS
    assert store_text(DOCUMENTS[:-1]) != source
    with pytest.raises(LimbeckError, match="document 2 of the text is a int"):
        store_text(["a", 2])
    for wrong in (["a", "half of a pair \ud83d"], ["a", {("no", "name"): "b"}]):
        with pytest.raises(LimbeckError, match="document 2 of the text cannot be kept"):
            store_text(wrong)
    with pytest.raises(LimbeckError, match="no documents"):
        store_text([])
    with pytest.raises(LimbeckError, match=r"several splits(.|\n)*data=dataset\['train'\]"):
        store_text(datasets.DatasetDict(train=datasets.Dataset.from_list(records)))
    with pytest.raises(LimbeckError, match="a streamed dataset"):
        store_text(datasets.Dataset.from_list(records).to_iterable_dataset())
    with pytest.raises(LimbeckError, match="the text is a set"):
        store_text({"a"})
    with pytest.raises(LimbeckError, match="does not have it"):
        find_stored_text("memory:0123456789abcdef")


def test_mistakes_are_told_in_three_lines(place, capsys):
    teacher, tokenizer = AutoModelForCausalLM.from_pretrained("my-teacher"), AutoTokenizer.from_pretrained("my-teacher")
    for call, words in (
        (lambda: limbeck.distill("quickstrat"), "did you mean 'quickstart'"),
        (lambda: limbeck.distill("quickstart", teacher="my-teacher", data="two\nlines"), "data=[text]"),
        (lambda: limbeck.distill(teacher=(teacher.to(torch.bfloat16), tokenizer)), "weights are bfloat16"),
        (lambda: Recipe(teachr="x"), "did you mean 'teacher'"),
        (lambda: Recipe("quickstart"), 'Recipe.load("quickstart")'),
        (lambda: Recipe(stages=[{"stage": "hiden", "tokens": 1}]), "unknown stage 'hiden'"),
        (lambda: limbeck.evaluate(teacher), "its teacher and tokenizer are unknown"),
        (lambda: limbeck.distill(teacher=teacher), "the teacher is a LlamaForCausalLM"),
        (lambda: limbeck.distill(teacher=("my-teacher", tokenizer)), "the teacher is (str, "),
        (lambda: limbeck.evaluate("my-teacher", (tokenizer, teacher)), "the teacher is ("),
        (lambda: limbeck.distill("quickstart", tokens="2 many"), "'2 many' is not a count"),
        (lambda: limbeck.distill("quickstart", tokens=float("nan")), "expected: a positive number"),
        (lambda: limbeck.evaluate(42, "my-teacher"), "a int in the place of a model"),
        (lambda: limbeck.evaluate("my-teacher", measure="agreemnt"), "did you mean 'agreement'"),
        (lambda: limbeck.evaluate("my-teacher", settings={"exam": {}}), "which is not measured"),
    ):
        with pytest.raises(LimbeckError) as caught:
            call()
        assert words in str(caught.value)
        lines = caught.value._render_traceback_()
        assert 1 < len(lines) <= 4
        assert "Error" in lines[0]
    assert not (place / "runs").exists()


def test_no_module_hides_a_function():
    import limbeck.evaluate  # a path of 0.1

    assert callable(limbeck.evaluate)
    assert limbeck.evaluate.__module__ == "limbeck.report.evaluate"


def test_help_opens_with_an_example():
    text = limbeck.Recipe.__doc__
    assert text.startswith("All settings of a distillation run")
    assert "Recipe.load(" in text


@pytest.mark.parametrize("name", ["Recipe", "convert", "distill", "evaluate", "load"])
def test_the_examples_of_the_docstrings_run(name, place):
    documents = [path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))]
    names = {"limbeck": limbeck, "documents": documents, "AutoModelForCausalLM": AutoModelForCausalLM}
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    (example,) = doctest.DocTestFinder(recurse=False).find(getattr(limbeck, name), name, globs=names)
    assert example.examples
    runner.run(example)
    assert not runner.failures
