"""The guard between stages: a stage that makes the student worse is taken back, and a resumed run decides the same."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from limbeck import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.models.hooks import DistillationPair
from limbeck.report.run_summary import format_summary, list_guard_losses
from limbeck.training import guard, pipeline, setup, trainer

pytestmark = pytest.mark.usefixtures("own_cache")
CALIBRATE = {"stage": "calibrate", "tokens": 512, "ridge": 0.01}
GOOD = {"stage": "logits", "tokens": 1024, "batch_size": 2, "lr": 1e-3, "ce": 1.0, "kl": 0.0}
BAD = {"stage": "hidden", "tokens": 512, "batch_size": 4, "lr": 3.0, "warmup_ratio": 0.0}


@pytest.fixture
def recipe(teacher_folder, corpus, tmp_path):
    def make(name: str, stages: list[dict], **changes) -> Recipe:
        raw = {
            "name": "guarded",
            "teacher": str(teacher_folder),
            "student": {"mixer": "gated_deltanet"},
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": stages,
            "keep_better": True,
            "evaluation": {"tokens": 256, "prompt": None, "new_tokens": 0},
            "checkpoint_seconds": 1e-6,
            "trackers": [],
            "out": str(tmp_path / name),
        }
        return Recipe.parse({**raw, **changes})

    return make


def student_of(made: Recipe) -> dict[str, torch.Tensor]:
    return load_file(Path(made.out) / "student" / "model.safetensors")


def verdicts_of(result: dict) -> list[dict]:
    return [stage["guard"] for stage in result["stages"]]


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "bad",
    [
        BAD,
        {**GOOD, "lr": 1.0, "lr_other": 1.0, "warmup_ratio": 0.0, "train": "all"},
        # all that this one merges outside of the attention, the student has shared with its teacher until then
        {**GOOD, "lr": 3.0, "ce": 0.0, "kl": 1.0, "lora": {"rank": 2, "target_modules": "all-linear"}},
    ],
    ids=["hidden", "logits", "lora"],
)
def test_a_stage_that_makes_the_student_worse_is_not_taken(recipe, bad, capsys):
    if "lora" in bad:
        pytest.importorskip("peft")
    first = {**GOOD, "train": "attention"}
    guarded, alone = recipe("guarded", [first, bad]), recipe("alone", [first])
    result = pipeline.distill(guarded, measure_times=False)
    said = " ".join(capsys.readouterr().err.split())
    pipeline.distill(alone, measure_times=False)
    good, taken_back = verdicts_of(result)
    assert good["kept"]
    assert good["after"] < good["before"]
    assert not taken_back["kept"]
    assert taken_back["before"] == good["after"] < taken_back["after"]
    assert taken_back["difference"] == pytest.approx(taken_back["after"] - taken_back["before"], rel=1e-9)
    assert taken_back["standard_error"] > 0
    assert f"{bad['stage']}: not taken, held-out loss {good['after']:.4f} before" in said
    assert_same(student_of(guarded), student_of(alone))
    unguarded = recipe("unguarded", [first, bad], keep_better=False)
    worse = pipeline.distill(unguarded, measure_times=False)
    assert worse["held_out"]["student_perplexity"] > result["held_out"]["student_perplexity"]
    assert "guard" not in worse["stages"][0]


def test_kept_stages_are_those_of_a_run_without_the_guard(recipe):
    stages = [CALIBRATE, GOOD]
    guarded, alone = (recipe(name, stages, keep_better=name == "guarded") for name in ("guarded", "alone"))
    result = pipeline.distill(guarded, measure_times=False)
    pipeline.distill(alone, measure_times=False)
    if all(verdict["kept"] for verdict in verdicts_of(result)):
        assert_same(student_of(guarded), student_of(alone))
    assert verdicts_of(result)[1]["kept"]
    assert verdicts_of(result)[1]["before"] == min(verdicts_of(result)[0][name] for name in ("before", "after"))


@pytest.mark.parametrize("stop", [(0, 2), (1, 2), (2, 1)], ids=["first", "bad", "last"])
def test_a_killed_run_decides_the_same(recipe, monkeypatch, stop):
    stages = [GOOD, BAD, {**GOOD, "train": "attention"}]
    straight, killed = recipe("straight", stages), recipe("killed", stages)
    expected = pipeline.distill(straight, measure_times=False)
    original = trainer.Trainer.train_step

    def step(self):
        if (self.index, self.state["step"]) == stop:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            pipeline.distill(killed, measure_times=False)
    result = pipeline.distill(killed, measure_times=False)
    assert verdicts_of(result) == verdicts_of(expected)
    assert [verdict["kept"] for verdict in verdicts_of(result)] == [True, False, True]
    assert_same(student_of(killed), student_of(straight))
    # finished stages are loaded with the weights that were handed on
    job = setup.prepare_job(killed)
    assert (
        json.loads((Path(killed.out) / "stages/1-hidden/done/manifest.json").read_text())["facts"]["guard"]
        == (verdicts_of(result)[1])
    )
    assert job.recipe.keep_better


def test_the_losses_are_those_of_the_model_on_held_out_text(recipe):
    """In the longest sequences of any stage, the mean over targets, against a plain forward pass in float64."""
    made = recipe("run", [GOOD, {**GOOD, "seq_len": 64}])
    job = setup.prepare_job(made)
    student = setup.build_student(job)
    data = job.held_out_dataset(made.guard_text)
    assert data.length == 64
    losses = guard.measure_losses(student, data, job.autocast)
    student.double()
    assert len(losses.nats) == min(data.n_sequences, guard.GUARD_TOKENS // 64)
    for at, (nats, targets) in enumerate(zip(losses.nats, losses.targets)):
        batch = data.batch(at, 1)
        if (batch.position_ids[0, 1:] == 0).any():
            continue  # packed documents would see each other here
        logits = student(input_ids=batch.input_ids, use_cache=False).logits[0]
        assert targets == batch.n_targets
        assert nats == pytest.approx(float(F.cross_entropy(logits, batch.targets[0], reduction="sum")), rel=1e-5)


def test_standard_errors_are_paired_over_sequences():
    before = guard.SequenceLosses([10.0, 30.0, 20.0], [5, 10, 10])
    rise, error = guard.compare_losses(before, guard.SequenceLosses([15.0, 40.0, 30.0], [5, 10, 10]))
    assert (rise, error) == (pytest.approx(1.0), pytest.approx(0.0, abs=1e-12))
    rise, error = guard.compare_losses(before, guard.SequenceLosses([10.0, 40.0, 10.0], [5, 10, 10]))
    assert rise == pytest.approx(0.0)
    # ratio of sums: deviations 0, 10, -10 of three sequences over 25 tokens
    assert error == pytest.approx(math.sqrt(200 * 3 / 2) / 25)
    assert guard.compare_losses(guard.SequenceLosses([1.0], [2]), guard.SequenceLosses([3.0], [2])) == (1.0, None)


def test_a_loss_that_is_not_finite_is_not_taken(recipe, monkeypatch):
    job = setup.prepare_job(recipe("run", [GOOD]))
    student = setup.build_student(job)
    pair = DistillationPair(job.teacher, student, job.sites, job.autocast)
    judge = guard.StageGuard(pair, job.held_out_dataset(job.recipe.guard_text))
    judge.open_stage()
    name, parameter = next((n, p) for n, p in student.named_parameters() if n.endswith("o_proj.weight"))
    before = parameter.clone()
    with torch.no_grad():
        parameter.fill_(math.nan)
    facts = judge.close_stage("logits", {name: parameter})
    assert (facts["kept"], facts["after"], facts["difference"]) == (False, None, None)
    assert torch.equal(parameter, before)
    assert "not finite after;" in guard.describe_verdict(facts)


def test_the_summary_begins_with_the_loss_before_training(recipe):
    result = pipeline.distill(recipe("run", [GOOD, BAD]), measure_times=False)
    good, bad = verdicts_of(result)
    assert list_guard_losses(result["stages"]) == [
        f"{good['before']:.3f}",
        f"{good['after']:.3f}",
        f"{bad['after']:.3f}, not taken",
    ]
    rows = [line for line in format_summary(result).splitlines() if line.startswith("| before training")]
    assert len(rows) == 1
    assert f"{good['before']:.3f}" in rows[0]


def test_a_text_too_short_to_judge_by_is_refused_before_anything_is_written(recipe, corpus, tmp_path):
    """The stage that sets the length reads another text; the recipe's own has no such sequences."""
    long = tmp_path / "long.txt"
    long.write_text(corpus.read_text(encoding="utf-8") * 4, encoding="utf-8")
    stage = {**GOOD, "batch_size": 1, "data": {"source": str(long), "seq_len": 256, "held_out": 0.3}}
    short = tmp_path / "short.txt"
    short.write_text(corpus.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    made = recipe("run", [stage], data={"source": str(short), "seq_len": 32, "held_out": 0.2})
    with pytest.raises(LimbeckError, match="held_out tokens") as raised:
        setup.prepare_job(made)
    assert "stages.0.data.seq_len" in str(raised.value)
    assert not Path(made.out).exists()
    setup.prepare_job(made.model_copy(update={"keep_better": False}))
