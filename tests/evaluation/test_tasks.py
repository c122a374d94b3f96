"""Benchmarks: the numbers of the harness, whatever the batch, and what a student keeps of its teacher's."""

import json
import math
import os
import sys
import types

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from helpers.paths import ROOT
from limbeck.core.errors import LimbeckError
from limbeck.data.offline import packs
from limbeck.data.offline.packs import Pack, ensure_pack, write_rows
from limbeck.evaluation import measure
from limbeck.evaluation.measure import MeasureResult
from limbeck.evaluation.recovery import (
    TaskScore,
    compute_recovery,
    critical_tolerance,
    record_mean,
    required_tolerances,
)
from limbeck.evaluation.subject import SubjectLoader
from limbeck.models import convert

pytest.importorskip("lm_eval")

WORDS = ("License", "Work", "shall", "mean", "the", "rights", "grant", "of", "any", "source", "form", "Contributor")
ACCURACY = [{"metric": one, "aggregation": "mean", "higher_is_better": True} for one in ("acc", "acc_norm")]
WORD_METRICS = [
    {"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False},
    {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
]
DEFINITIONS = {
    "choices": {
        "tag": "all_tiny",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{options}}",
        "doc_to_target": "{{gold}}",
        "metric_list": ACCURACY,
    },
    "words": {
        "tag": "all_tiny",
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{options[gold]}}",
        "metric_list": WORD_METRICS,
    },
    "answers": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{options[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "of_nobody": {
        "output_type": "multiple_choice",
        "dataset_path": "allenai/winogrande",
        "dataset_name": "winogrande_xl",
        "doc_to_text": "{{sentence}}",
        "doc_to_choice": ["a", "b"],
        "doc_to_target": 0,
        "metric_list": ACCURACY,
    },
}


@pytest.fixture(scope="module")
def definitions(tmp_path_factory):
    """A folder of the harness' task definitions over one JSON-lines file, with questions of very different lengths."""
    folder = tmp_path_factory.mktemp("definitions")
    rng = np.random.default_rng(0)
    rows = []
    for at in range(13):
        options = [" ".join(rng.choice(WORDS, size=1 + (at + i) % 3)) for i in range(2 + at % 3)]
        question = " ".join(rng.choice(WORDS, size=1 + 5 * (at % 4)))
        rows.append({"question": question, "options": options, "gold": int(rng.integers(len(options)))})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    for name, definition in DEFINITIONS.items():
        text = {"task": name, "test_split": "test", **data, **definition, "metadata": {"version": 3.0}}
        if definition.get("dataset_path"):
            text.pop("dataset_kwargs")
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(text), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def student_folder(teacher_folder, tmp_path_factory):
    """A student that nobody has trained."""
    folder = tmp_path_factory.mktemp("student") / "gla"
    torch.manual_seed(1)
    convert(AutoModelForCausalLM.from_pretrained(teacher_folder), "gla").save_pretrained(folder)
    AutoTokenizer.from_pretrained(teacher_folder).save_pretrained(folder)
    return folder


@pytest.fixture
def subject(own_cache, student_folder, teacher_folder, tmp_path):
    return SubjectLoader(str(teacher_folder), out=tmp_path / "out").load(str(student_folder))


def taken(subject, definitions, *names, again=True, **settings):
    given = {"names": list(names), "include": str(definitions), "defaults": False, "limit": None, **settings}
    return measure.run_measure(measure.get_measure("tasks"), subject, given, ignore_cache=again)


@pytest.mark.slow
def test_scores_do_not_change_with_the_batch(subject, definitions):
    one, four = (taken(subject, definitions, "all_tiny", "answers", batch=batch) for batch in (1, 4))
    assert set(one.values) >= {"choices acc", "choices acc_norm", "words perplexity", "words acc"}
    assert four.values == pytest.approx(one.values, rel=1e-5)
    assert four.errors == pytest.approx(one.errors, rel=1e-5)
    some = taken(subject, definitions, "words", batch="auto")
    assert some.values["words perplexity"] == pytest.approx(one.values["words perplexity"], rel=1e-5)
    part = one.details["tasks"]["choices"]["parts"]["choices"]
    assert part == {"items": 13, "of": 13, "chosen": "all", "version": 3.0, "few_shot": 0, "data": "hub"}


def test_the_harness_by_itself_gives_the_same(subject, definitions, student_folder):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    found = taken(subject, definitions, "choices", "words", "answers", batch=4)
    direct = simple_evaluate(
        model=HFLM(pretrained=str(student_folder), device="cpu", batch_size=3),
        tasks=["choices", "words", "answers"],
        task_manager=TaskManager(include_defaults=False, include_path=str(definitions)),
        bootstrap_iters=0,
    )["results"]
    for name, metric in (("choices", "acc"), ("choices", "acc_norm"), ("words", "perplexity"), ("words", "acc")):
        assert found.values[f"{name} {metric}"] == pytest.approx(direct[name][f"{metric},none"], rel=1e-5)
    assert found.values["answers exact_match"] == direct["answers"]["exact_match,none"]


def test_nothing_is_forked(subject, definitions, monkeypatch):
    """A process with threads, as this one has, may hang in a fork; perplexity's standard error is a bootstrap's."""
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("forked"))
    assert taken(subject, definitions, "words").errors["words perplexity"] > 0


def test_padding_on_either_side_gives_the_same_likelihoods(subject):
    """The harness pads on the right without a mask; here the same requests are padded on the left, with one."""
    from lm_eval.api.instance import Instance

    from limbeck.evaluation.scorer import PreloadedHFLM

    pairs = [
        ("The License", " shall mean"),
        ("any source form of the Work shall mean the rights", " of"),
        ("a", " grant"),
    ]
    asked = [Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)]
    found = [value for value, _ in PreloadedHFLM(subject.model, subject.tokenizer, 4).loglikelihood(asked)]
    tokenizer = subject.tokenizer
    whole = [tokenizer(context + rest)["input_ids"] for context, rest in pairs]
    batch = tokenizer.pad({"input_ids": whole}, padding_side="left", return_tensors="pt")
    assert (batch["attention_mask"][:, 0] == 0).any()
    with torch.no_grad():
        likelihoods = subject.model(**batch).logits.log_softmax(-1)
    for row, (context, _) in enumerate(pairs):
        rest = len(whole[row]) - len(tokenizer(context)["input_ids"])
        tokens = batch["input_ids"][row, -rest:]
        left = likelihoods[row, -rest - 1 : -1].gather(1, tokens[:, None]).sum()
        assert found[row] == pytest.approx(float(left), abs=1e-4)


def test_which_items_are_asked(subject, definitions):
    drawn = taken(subject, definitions, "choices", limit=5)
    assert drawn.values == taken(subject, definitions, "choices", limit=5).values
    part = drawn.details["tasks"]["choices"]["parts"]["choices"]
    assert (part["items"], part["of"], part["chosen"]) == (5, 13, "drawn")
    assert taken(subject, definitions, "choices", limit=3, choose="first").details["tasks"]["choices"]["chance"] == (
        pytest.approx((1 / 2 + 1 / 3 + 1 / 4) / 3)
    )


def test_a_score_is_kept_and_a_teacher_is_asked_once(subject, definitions, monkeypatch, teacher_folder, tmp_path):
    from limbeck.evaluation import scorer

    asked = []
    before = scorer.PreloadedHFLM.__init__
    monkeypatch.setattr(scorer.PreloadedHFLM, "__init__", lambda *a, **k: (asked.append(1), before(*a, **k))[1])
    first = taken(subject, definitions, "choices", "words", limit=7)
    assert len(asked) == 4
    asked.clear()
    elsewhere = SubjectLoader(str(teacher_folder), out=tmp_path / "elsewhere")
    teacher = taken(elsewhere.load(str(teacher_folder)), definitions, "choices", again=False, limit=7)
    assert teacher.values["choices acc"] == first.details["teacher"]["choices"]["score"]
    assert "recovery" not in teacher.values
    assert not asked
    again = taken(elsewhere.load(subject.name), definitions, "words", "choices", again=False, limit=7)
    assert not asked
    assert again.values["words acc"] == first.values["words acc"]


def test_a_student_that_is_its_teacher_keeps_all(own_cache, teacher_folder, definitions, tmp_path):
    same = SubjectLoader(out=tmp_path).load(str(teacher_folder))
    score = taken(same, definitions, "choices").details["tasks"]["choices"]
    assert score["metric"] == "acc"
    one = TaskScore("acc", {"acc": 0.5}, {}, 0.25, [1.0, 0.0] * 50)
    values, errors, details = compute_recovery({"a": one, "b": one}, {"a": one, "b": one})
    assert values["recovery"] == values["recovery_above_chance"] == values["C at tolerance 0"] == 1
    assert values["alpha*"] == 0
    assert set(errors.values()) == {0.0}
    assert details["teacher_at_chance"] == []


def test_shares_by_hand():
    def scored(right, of=100, chance=0.25):
        return TaskScore("acc", {"acc": right / of}, {}, chance, [1.0] * right + [0.0] * (of - right))

    teacher = {"a": scored(80), "b": scored(60), "c": scored(50), "d": scored(26)}
    student = {"a": scored(72), "b": scored(60), "c": scored(40), "d": scored(30)}
    values, errors, details = compute_recovery(student, teacher)
    # d is left out of everything: its teacher guesses
    assert details["teacher_at_chance"] == ["d"]
    assert details["recovery_tasks"] == ["a", "b", "c"]
    assert values["recovery"] == pytest.approx((0.9 + 1 + 0.8) / 3)
    assert values["recovery_above_chance"] == pytest.approx((47 / 55 + 1 + 15 / 25) / 3)
    assert values["C at tolerance 0"] == pytest.approx(1 / 3)
    assert values["C at tolerance 0.1"] == pytest.approx(2 / 3)
    assert values["alpha*"] == pytest.approx(0.1)
    assert 0.02 < errors["recovery"] < 0.2
    result = MeasureResult({})
    record_mean(result, "mean score", student, teacher)
    assert result.values["mean score"] == pytest.approx((0.72 + 0.6 + 0.4) / 3)
    assert result.details["teacher_at_chance"] == ["d"]
    # of the teacher itself too, and there is no mean where nothing is left
    record_mean(result, "of nothing", {"d": student["d"]}, {"d": teacher["d"]})
    assert "of nothing" not in result.values


def test_a_teacher_near_chance_gives_a_share_with_an_error_that_means_something():
    """WinoGrande, 200 items, the teacher at 115: a twentieth of the bootstrap's draws are at chance or below it."""
    rng = np.random.default_rng(0)

    def scored(right, chance, of=200):
        items = rng.permutation([1.0] * right + [0.0] * (of - right)).tolist()
        return TaskScore("acc", {"acc": right / of}, {}, chance, items)

    for teacher, student, chance in ((115, 97, 0.5), (58, 39, 0.2), (8, 3, 0.0)):
        values, errors, _ = compute_recovery({"a": scored(student, chance)}, {"a": scored(teacher, chance)})
        for name in ("recovery", "recovery_above_chance"):
            assert math.isfinite(values[name])
            assert 0.01 < errors[name] < 3
    values, _, details = compute_recovery({"a": scored(1, 0.0)}, {"a": scored(0, 0.0)})
    assert values == {}
    assert details["recovery_tasks"] == []


@pytest.mark.slow
def test_the_error_of_a_share_is_what_repeating_the_benchmark_gives():
    rng = np.random.default_rng(1)
    found, said = [], []
    for _ in range(300):
        right = rng.random(400) < 0.6
        kept = np.where(rng.random(400) < 0.8, right, rng.random(400) < 0.4)
        one, other = (
            TaskScore("acc", {"acc": float(x.mean())}, {}, 0.25, x.astype(float).tolist()) for x in (kept, right)
        )
        values, errors, _ = compute_recovery({"a": one}, {"a": other})
        found.append(values["recovery_above_chance"])
        said.append(errors["recovery_above_chance"])
    assert np.mean(said) == pytest.approx(np.std(found), rel=0.15)


def test_the_least_tolerance_by_hand():
    assert critical_tolerance(required_tolerances(np.array([0.9, 0.8, 0.7]), np.ones(3))) == pytest.approx(0.2)
    assert required_tolerances(np.array([0.3, 0.1]), np.array([0.0, 0.1])).tolist() == [0, 0]


def test_a_pack_takes_the_place_of_the_hub(subject, definitions, monkeypatch):
    rows = [{"sentence": "The Work shall", "gold": 1}] * 3

    def make(folder, archives):
        return [write_rows(folder, "allenai/winogrande", "winogrande_xl", {"test": rows})]

    with pytest.raises(LimbeckError, match=r"try: limbeck assets --pack benchmarks"):
        taken(subject, definitions, "of_nobody")
    module = types.ModuleType("a_pack_instead")
    module.PACK = Pack("instead", "", "", (), ("allenai/winogrande",), make, tasks=("its_own",))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(packs.PACK_MODULES, "instead", module.__name__)
    with pytest.raises(LimbeckError, match=r"is part of the pack instead.*\n.*limbeck assets --pack instead"):
        taken(subject, definitions, "its_own")
    ensure_pack(module.PACK)
    found = taken(subject, definitions, "of_nobody")
    assert found.details["tasks"]["of_nobody"]["parts"]["of_nobody"]["data"] == "pack instead"
    with pytest.raises(LimbeckError, match="no data for task of_nobody"):
        taken(subject, definitions, "of_nobody", source="hub")
    with pytest.raises(LimbeckError, match="no pack has the data it needs"):
        taken(subject, definitions, "choices", source="pack")


def test_bad_input(subject, definitions, monkeypatch, tmp_path):
    with pytest.raises(LimbeckError, match="unknown task 'choice', did you mean 'choices'"):
        taken(subject, definitions, "choice")
    with pytest.raises(LimbeckError, match="tasks: limit is 0"):
        taken(subject, definitions, "choices", limit=0)
    with pytest.raises(LimbeckError, match="is not a folder"):
        taken(subject, tmp_path / "nothing", "choices")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(LimbeckError, match=r"pip install 'limbeck\[eval\]'"):
        taken(subject, definitions, "choices")


@pytest.mark.parametrize("name", ["choices", "answers"])
def test_a_context_that_is_too_long_is_an_error(subject, definitions, name):
    subject.model.config.max_position_embeddings = 24
    with pytest.raises(LimbeckError, match=r"too long: \d+ tokens\nexpected: at most \d+, "):
        taken(subject, definitions, name)
    metric = {"choices": "choices acc", "answers": "answers exact_match"}[name]
    assert taken(subject, definitions, name, overlong="left").values[metric] >= 0


def test_the_command_line(own_cache, student_folder, teacher_folder, definitions, tmp_path):
    from limbeck.cli import app
    from limbeck.cli import eval as _  # noqa: F401

    options = ["--teacher", str(teacher_folder), "--tasks", "choices,words", "--out", str(tmp_path / "out")]
    settings = [f"tasks.include={definitions}", "tasks.defaults=false", "tasks.limit=4"]
    command = ["eval", str(student_folder), *options, *(word for one in settings for word in ("--set", one))]
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.exit_code == 0
    lines = (tmp_path / "out" / "values.csv").read_text(encoding="utf-8").splitlines()
    assert any(",tasks,words perplexity," in line for line in lines)
    # a teacher of random weights is at chance on both, so they are marked and there is no mean
    assert not any(",tasks,mean score," in line for line in lines)
    table = (tmp_path / "out" / "table.md").read_text(encoding="utf-8")
    assert "choices acc (teacher at chance)" in table
    assert "at chance on choices; words: they are in no mean" in table
    assert (tmp_path / "out" / "tasks.svg").stat().st_size > 1000


def test_the_document_names_the_settings():

    from limbeck.evaluation.lm_eval_tasks import TaskSettings

    text = (ROOT / "docs" / "guides" / "evaluation.md").read_text(encoding="utf-8")
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `tasks.")]
    told = {row[0].strip("`").removeprefix("tasks."): row[1].strip("`") for row in rows}
    plain = TaskSettings().model_dump(mode="json")
    assert set(told) == set(plain) - {"names", "defaults"}  # --tasks, and one for tests
    assert all(
        told[key] == str(plain[key]).lower() for key in ("limit", "choose", "batch", "source", "overlong", "chat")
    )
