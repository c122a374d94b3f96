"""Several processes on the tiny teacher: they give the weights of one process, and end together."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.paths import ROOT
from limbeck import LimbeckError
from limbeck.core.distributed import get_local_rows, get_process_info
from limbeck.core.recipe import Recipe
from limbeck.testing import make_tiny_model
from limbeck.training import pipeline, setup, trainer

SCENARIOS = ROOT / "tests" / "helpers" / "process_scenarios.py"
pytestmark = pytest.mark.usefixtures("own_cache")
SHARDED = {"sharding": "full"}
HIDDEN = {"stage": "hidden", "tokens": 1024, "batch_size": 4}
LOGITS = {"stage": "logits", "tokens": 1024, "batch_size": 4, "ce": 0.5, "train": "all"}
ALIKE = ("calibrate", "matrix", "hidden", "logits", "sharded")
CASES = {
    "calibrate": [{"stage": "calibrate", "tokens": 480, "batch_size": 3, "ridge": 0.01}],
    "matrix": [{"stage": "matrix", "tokens": 512, "batch_size": 3}],
    "hidden": [
        {**HIDDEN, "batch_size": 5, "micro_batch_size": 2, "eval_steps": 3, "eval_sequences": 3, "ema_decay": 0.9}
    ],
    "hidden_converged": [{**HIDDEN, "tokens": 2048, "layer_early_stopping": {"patience": 2, "tolerance": 0.03}}],
    "logits": [{**LOGITS, "batch_size": 3, "micro_batch_size": 1}],
    "sharded": [{**LOGITS, **SHARDED, "micro_batch_size": 1, "ema_decay": 0.9, "eval_steps": 4, "max_grad_norm": 0.01}],
    "sharded_attention": [{**LOGITS, **SHARDED, "train": "attention", "tokens": 512}],
    "sharded_lora": [{**LOGITS, **SHARDED, "train": "lora", "tokens": 512}],
    "sharded_experts": [{**LOGITS, **SHARDED, "tokens": 512}],
    "nan": [HIDDEN],
    "stop": [HIDDEN],
    "sharded_stop": [{**LOGITS, **SHARDED}],
    "short": [{"stage": "calibrate", "tokens": 256}, {**HIDDEN, "batch_size": 1}],
}


def launch(folder: Path, processes: int = 2, returncode: int = 0) -> None:
    """The scenarios in that folder, in so many processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "LIMBECK_TIMEOUT": "30"}
    done = subprocess.run([*command, str(SCENARIOS), str(folder)], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == returncode, done.stdout + done.stderr


def recipe(teacher, corpus, out: Path, stages) -> Recipe:
    return Recipe.parse(
        {
            "name": "tiny",
            "teacher": str(teacher),
            "student": {"mixer": "gated_deltanet"},
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": stages,
            "evaluation": {"tokens": 256, "prompt": None},
            "checkpoint_seconds": 1000,
            "device": "cpu",
            "out": str(out),
        }
    )


@pytest.fixture(scope="module")
def experts_folder(tmp_path_factory, shared_tokenizer):
    """A mixture of experts."""
    folder = tmp_path_factory.mktemp("teacher") / "experts"
    make_tiny_model("qwen3_moe").save_pretrained(folder)
    shared_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, teacher_folder, experts_folder, corpus):
    """Every scenario run in two processes, with one launch."""
    root = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LIMBECK_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        for name, stages in CASES.items():
            made = recipe(experts_folder if "experts" in name else teacher_folder, corpus, root / name, stages)
            (root / f"{name}.yaml").write_text(made.to_yaml(), encoding="utf-8")
        launch(root)
    return root


def told(folder: Path, name: str) -> list[dict]:
    """What both processes have to say of a scenario."""
    found = [json.loads((folder / f"{name}.{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1)]
    assert not any("failed" in one for one in found), found
    return found


def difference(one: Path, other: Path) -> float:
    """The largest difference of two students' tensors, each relative to its norm."""
    ours, theirs = (load_file(path / "student" / "model.safetensors") for path in (one, other))
    assert ours.keys() == theirs.keys()
    return max(float((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(1e-6)) for n in ours)


@pytest.fixture
def alone(teacher_folder, experts_folder, corpus, tmp_path):
    def run(name: str) -> Path:
        teacher = experts_folder if "experts" in name else teacher_folder
        pipeline.distill(recipe(teacher, corpus, tmp_path / name, CASES[name]))
        return tmp_path / name

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in CASES if n.split("_")[0] in ALIKE and "stop" not in n])
def test_two_processes_give_the_weights_of_one(folder, alone, name):
    """Rows are shared out unevenly, in micro-batches, with documents of every length."""
    first, second = told(folder, name)
    assert first["held_out"] == second["held_out"]
    single = alone(name)
    assert difference(folder / name, single) < 1e-5
    for ours, theirs in zip(first["stages"], json.loads((single / "eval.json").read_text(encoding="utf-8"))["stages"]):
        for key in ("loss", "first_loss", "held_out_loss", "tokens", "position", "trained_parameters", "steps"):
            if theirs.get(key) is not None:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-5), key
    lines = (folder / name / "metrics.jsonl", single / "metrics.jsonl")
    if name != "calibrate":
        ours, theirs = ([json.loads(x) for x in path.read_text(encoding="utf-8").splitlines()] for path in lines)
        assert [x["grad_norm"] for x in ours] == pytest.approx([x["grad_norm"] for x in theirs], rel=1e-4)


@pytest.mark.slow
def test_gradients_are_summed_and_none_stays_none(folder):
    for one in told(folder, "gradients"):
        assert one["sums"] == [[3.0, 3.0], [5.0, 5.0], None, [21.0, 21.0]]


@pytest.mark.slow
def test_a_step_that_is_not_finite_in_one_process_is_skipped_in_both(folder):
    for one in told(folder, "nan"):
        assert one["stages"][0]["skipped"] == 1
    tensors = load_file(folder / "nan" / "student" / "model.safetensors")
    assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.slow
def test_stopped_in_two_it_goes_on_in_one_and_again_in_two(
    folder, alone, teacher_folder, corpus, monkeypatch, tmp_path
):
    """SIGTERM in one process ends both with a checkpoint; what comes of it is the run of one process."""
    names = ("stop", "sharded_stop")
    for name in names:
        for one in told(folder, name):
            assert one["exit_code"] == 143
            assert "checkpoint saved" in one["error"]
        assert [path.name for path in (folder / name / "stages").glob("*/step-*")] == ["step-000004"]
    original = trainer.Trainer.train_step

    def step(self):
        if self.state["step"] == 6:
            self.save_checkpoint()
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    for name in names:
        made = recipe(teacher_folder, corpus, folder / name, CASES[name])
        (tmp_path / f"on-{name}.yaml").write_text(made.to_yaml(), encoding="utf-8")
        with pytest.raises(KeyboardInterrupt):
            pipeline.distill(made)
    monkeypatch.setattr(trainer.Trainer, "train_step", original)
    launch(tmp_path)
    for name in names:
        assert all("held_out" in one for one in told(tmp_path, f"on-{name}"))
        assert difference(folder / name, alone(name)) < 1e-5


@pytest.mark.slow
def test_an_error_in_one_process_ends_both_with_the_same_words(teacher_folder, corpus, tmp_path):
    (tmp_path / "error.yaml").write_text(
        recipe(teacher_folder, corpus, tmp_path / "run", [HIDDEN]).to_yaml(), encoding="utf-8"
    )
    launch(tmp_path, returncode=1)
    found = told(tmp_path, "error")
    assert {one["error"] for one in found} == {"the dog ate it\ntry: a cat"}
    assert {one["exit_code"] for one in found} == {2}
    assert [one["quiet"] for one in found] == [True, False], "told once, by the process that it happened to"


@pytest.mark.slow
def test_a_batch_smaller_than_the_processes_is_refused_before_anything_is_written(folder):
    for one in told(folder, "short"):
        assert "a batch of 1 for 2 processes" in one["error"]
        assert "stages.1.batch_size=2" in one["error"]
    assert not (folder / "short").exists()


def test_rows_are_shared_out_whole_and_evenly(monkeypatch):
    for size in (1, 2, 3, 7):
        monkeypatch.setenv("WORLD_SIZE", str(size))
        for rows in (7, 8, 20):
            taken = []
            for rank in range(size):
                monkeypatch.setenv("RANK", str(rank))
                first, count = get_local_rows(rows)
                assert count in (rows // size, -(-rows // size))
                taken += range(first, first + count)
            assert taken == list(range(rows))


def test_a_launcher_that_does_not_say_which_process_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LimbeckError, match="torchrun"):
        get_process_info()
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(LimbeckError, match="RANK=2"):
        get_process_info()
    monkeypatch.setenv("RANK", "x")
    with pytest.raises(LimbeckError, match="numbers"):
        get_process_info()


def test_what_cannot_be_sharded_is_refused(teacher_folder, corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for change, words in (({"optimizer": "muon"}, "whole matrices"), ({"batch_size": 3}, "batch_size=4")):
        made = recipe(teacher_folder, corpus, tmp_path / "x", [{**LOGITS, **SHARDED, **change}])
        with pytest.raises(LimbeckError, match=words):
            setup.prepare_job(made)
    made = recipe(teacher_folder, corpus, tmp_path / "x", [{**LOGITS, **SHARDED}])
    with pytest.raises(LimbeckError, match="8 bits"):
        setup.prepare_job(made.model_copy(update={"teacher_bits": 8}))


def test_alone_nothing_is_communicated(teacher_folder, corpus, tmp_path):
    pipeline.distill(recipe(teacher_folder, corpus, tmp_path / "run", [{**LOGITS, **SHARDED, "tokens": 256}]))
    assert not torch.distributed.is_initialized()
