"""The plan: what a rehearsal makes of it, and that it leaves everything as it was."""

import json

import pytest
import torch

from limbeck.core.recipe import Recipe
from limbeck.training import logit_distillation, pipeline, rehearsal, setup
from limbeck.training.plan import make_plan
from limbeck.training.rehearsal import StageTimes

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def recipe(teacher_folder, corpus, tmp_path) -> Recipe:
    return Recipe.parse(
        {
            "teacher": str(teacher_folder),
            "student": {"mixer": "gla"},
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": [
                {"stage": "calibrate", "tokens": 256},
                {"stage": "matrix", "tokens": 512, "sampled_queries": 8},
                {
                    "stage": "logits",
                    "tokens": 1024,
                    "batch_size": 4,
                    "micro_batch_size": 2,
                    "train": "all",
                    "optimizer": "muon",
                },
                {"stage": "logits", "tokens": 256, "kl": 0, "top_kl": 1, "top_k": 20, "cache_teacher": "top-k"},
            ],
            "evaluation": {"tokens": 128, "prompt": None},
            "out": str(tmp_path / "run"),
        }
    )


def test_a_rehearsal_counts_steps_and_moves_nothing(recipe, monkeypatch):
    """Everything that is timed takes a second."""

    def timed(work):
        work()
        return 1.0

    monkeypatch.setattr(rehearsal, "_timed", timed)
    ready = setup.prepare_job(recipe)
    before = {name: p.clone() for name, p in ready.teacher.named_parameters()}
    counted = make_plan(recipe, ready.teacher, ready.sites)
    state = torch.random.get_rng_state()
    plan = pipeline.measure_plan(ready, counted)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert plan.is_measured
    assert not counted.is_measured
    assert all(torch.equal(before[name], p) for name, p in ready.teacher.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in ready.teacher.parameters())
    # 8 sequences, 7 solutions, 6 ridges tried on 2 sequences; 4 steps of 4 micro-batches; 8 of 2; 8 of 1, 8 asked for
    wanted = [8 + 7 + 12, 4 * 5, 8 * 3, 8 * 2 + 8]
    assert [row.seconds for row in plan.stages] == pytest.approx(wanted)
    # the window beside the student adds half of what teacher and student take
    assert plan.seconds == pytest.approx(sum(wanted) + 1.5 * 128 / 32)


def test_not_even_a_nan_reaches_the_weights(recipe, monkeypatch):
    original = logit_distillation.LogitsStage.backward

    def backward(self, batch, counts):
        sums = original(self, batch, counts)
        for p in self.parameters().values():
            p.grad = torch.full_like(p, torch.nan)
        return sums

    monkeypatch.setattr(logit_distillation.LogitsStage, "backward", backward)
    ready = setup.prepare_job(recipe)
    pipeline.measure_plan(ready, make_plan(recipe, ready.teacher, ready.sites), [2])
    assert all(p.isfinite().all() for p in ready.teacher.parameters())


def test_the_memory_is_that_of_the_rehearsal_and_of_what_comes_after(recipe):
    ready = setup.prepare_job(recipe)
    counted = make_plan(recipe, ready.teacher, ready.sites)
    plan = counted.with_measured_times(StageTimes({1: 5.0}, 0.5, 1_000_000))
    sizes = {name: p.numel() for name, p in ready.teacher.named_parameters()}
    outside = sum(n for name, n in sizes.items() if "self_attn" not in name)
    assert plan.memory_bytes == 1_000_000 + 4 * outside
    assert plan.stages[1].seconds == 5
    assert plan.stages[0].seconds == counted.stages[0].seconds


def test_a_run_keeps_its_plan_and_says_what_became_of_it(recipe, tmp_path):
    shown = []
    result = pipeline.distill(recipe, confirm=shown.append)
    kept = json.loads((tmp_path / "run" / "plan.json").read_text(encoding="utf-8"))
    assert kept == result["plan"]
    assert kept["rehearsed"]
    assert [row.seconds for row in shown[0].stages] == [stage["seconds"] for stage in kept["stages"]]
    assert "Actual (planned): calibrate" in (tmp_path / "run" / "summary.md").read_text(encoding="utf-8")
    (tmp_path / "run" / "eval.json").unlink()
    kept["seconds"] = 12345.0
    (tmp_path / "run" / "plan.json").write_text(json.dumps(kept), encoding="utf-8")
    pipeline.distill(recipe, confirm=shown.append)
    assert shown[1].seconds == 12345.0, "a run that goes on was planned anew"
