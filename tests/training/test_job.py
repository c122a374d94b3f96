"""The main job on a tiny teacher: what it leaves, how it resumes, and what it says of bad input."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from limbeck import LimbeckError
from limbeck.cli import main
from limbeck.core.recipe import Recipe
from limbeck.core.stage_settings import Hidden
from limbeck.training import pipeline, setup
from limbeck.training.optim import ExponentialMovingAverage, count_training_steps, get_lr_multiplier

pytestmark = pytest.mark.usefixtures("own_cache")

EVERY_STEP = 1e-6  # seconds between checkpoints


@pytest.fixture
def recipe(teacher_folder, corpus, tmp_path):
    """A recipe of all four stages that takes seconds; `recipe(key=value)` changes it."""

    def make(**changes) -> Recipe:
        raw = {
            "name": "tiny",
            "teacher": str(teacher_folder),
            "student": {"mixer": "gated_deltanet"},
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": [
                {"stage": "calibrate", "tokens": 512},
                {"stage": "matrix", "tokens": 512},
                {"stage": "hidden", "tokens": 1024, "batch_size": 4, "micro_batch_size": 3},
                {"stage": "logits", "tokens": 512, "batch_size": 2, "ce": 0.5, "train": "all"},
            ],
            "evaluation": {"tokens": 256, "prompt": "the work", "new_tokens": 4},
            "checkpoint_seconds": 60,
            "out": str(tmp_path / "run"),
        }
        return Recipe.parse({**raw, **changes})

    return make


def limbeck(*arguments: str) -> subprocess.CompletedProcess:
    """The command line, in this process: starting one takes longer than what most tests do."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "argv", ["limbeck", *arguments])
        try:
            main()
        except SystemExit as exit:
            code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def test_a_run_leaves_everything_it_promises(recipe):
    made = recipe(checkpoint_seconds=EVERY_STEP)
    result = pipeline.distill(made)
    run = Path(made.out)
    for name in ("recipe.yaml", "manifest.json", "metrics.jsonl", "eval.json", "summary.md", "student/config.json"):
        assert (run / name).is_file(), name
    assert not list(run.glob("stages/*/step-*")), "checkpoints of finished stages are left"
    assert not list(run.glob(".*.tmp")), "half-written files are left"
    held = result["held_out"]
    assert held["teacher_perplexity"] > 1
    assert 0 <= held["top1_agreement"] <= 1
    assert held["kl"] > 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    per_stage = {stage: [x for x in lines if x["stage"] == stage] for stage in ("matrix", "hidden", "logits")}
    assert {stage: len(x) for stage, x in per_stage.items()} == {"matrix": 4, "hidden": 8, "logits": 8}
    assert len(per_stage["hidden"][0]["losses"]) == 2, "one loss a layer"
    last = per_stage["hidden"][-1]
    assert last["lr"] == pytest.approx(made.stages[2].lr * made.stages[2].min_lr_ratio), (
        "the schedule ends at its floor"
    )
    assert Recipe.load(run / "recipe.yaml") == made
    student = AutoModelForCausalLM.from_pretrained(run / "student")
    assert type(student).__name__ == "LimbeckLlamaForCausalLM"
    summary = (run / "summary.md").read_text(encoding="utf-8")
    for word in ("perplexity", "tokens/s", "limbeck generate", "calibrate", "the work"):
        assert word in summary
    assert result["memory"]["student_bytes_per_token"] == 0
    assert result["parameters"]["added"] == 2 * (2 * (48 * 6 + 6) + 6)


def test_the_same_command_on_a_finished_run_does_nothing(recipe):
    made = recipe(stages=[{"stage": "calibrate", "tokens": 256}])
    first = pipeline.distill(made)
    before = {p: p.stat().st_mtime_ns for p in Path(made.out).rglob("*.safetensors")}
    assert pipeline.distill(made) == first
    assert before == {p: p.stat().st_mtime_ns for p in Path(made.out).rglob("*.safetensors")}


def test_a_student_learns(recipe):
    """Each stage leaves its own loss lower than it found it."""
    stages = [
        {"stage": "matrix", "tokens": 4096, "lr": 3e-3},
        {"stage": "hidden", "tokens": 4096, "lr": 3e-3},
        {"stage": "logits", "tokens": 4096, "batch_size": 4, "lr": 3e-3},
    ]
    result = pipeline.distill(recipe(stages=stages))
    for stage in result["stages"]:
        assert stage["loss"] < 0.95 * stage["first_loss"], stage["stage"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["paper", "mohawk", "lolcats", "radlads", "halo", "xlstm_hybrid", "rwkv7_gguf", "qwen3_5"]
)
def test_named_recipes_run(recipe, name, teacher_folder, corpus, tmp_path):
    """With their own settings but for teacher, text and sizes."""
    raw = yaml.safe_load(Recipe.load(name).to_yaml())
    raw["teacher"], raw["out"], raw["evaluation"] = (
        str(teacher_folder),
        str(tmp_path / name),
        {"tokens": 256, "prompt": None},
    )
    raw["data"] = {"source": str(corpus), "seq_len": 32, "held_out": 0.2}
    raw["student"]["softmax_layers"] = "none" if raw["student"]["softmax_layers"] == "none" else "uniform 1"
    for stage in raw["stages"]:
        stage.update(tokens=256, batch_size=2, seq_len=64 if stage["seq_len"] else None)
    result = pipeline.distill(Recipe.parse(raw))
    assert [stage["stage"] for stage in result["stages"]] == [stage["stage"] for stage in raw["stages"]]
    assert 1 < result["held_out"]["student_perplexity"] < 1e4
    if name == "lolcats":
        mixers = [p for n, p in student_parameters(tmp_path / name) if ".mixer." in n]
        assert result["stages"][0]["trained_parameters"] == sum(p.numel() for p in mixers)


def student_parameters(run):
    return AutoModelForCausalLM.from_pretrained(run / "student").named_parameters()


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("mixer", ["gla", "linear_attention", "softmax"])
def test_mixers_go_through_every_stage(recipe, mixer):
    """With gates, without, and without parameters of its own; named recipes run others."""
    result = pipeline.distill(recipe(student={"mixer": mixer, "copy_projections": mixer != "gla"}))
    assert result["held_out"]["targets"] > 100


def test_the_control_arm_comes_out_as_the_teacher(recipe):
    """Through conversion, calibration, export and evaluation; the gradient stages would follow rounding noise."""
    result = pipeline.distill(recipe(student={"mixer": "softmax"}, stages=[{"stage": "calibrate", "tokens": 512}]))
    held = result["held_out"]
    assert held["student_perplexity"] == pytest.approx(held["teacher_perplexity"], rel=1e-4)
    assert held["top1_agreement"] > 0.99


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("hidden", {"optimizer": "muon", "lr_scheduler": "wsd", "weight_decay": 0.1}),
        ("logits", {"ema_decay": 0.9, "eval_steps": 2, "patience": 3}),
        ("matrix", {}),
    ],
    ids=str,
)
def test_killed_twice_in_a_stage_it_ends_bit_equal(recipe, stage, more, tmp_path, monkeypatch):
    """An interrupted run, resumed and interrupted again, ends with the very weights and log of an uninterrupted one."""
    settings = {"stage": stage, "tokens": 1024, "batch_size": 4, **more}
    stages = [{"stage": "calibrate", "tokens": 256}, settings]
    seconds = {"whole": 60, "broken": EVERY_STEP}
    whole, broken = (recipe(stages=stages, out=str(tmp_path / n), checkpoint_seconds=s) for n, s in seconds.items())
    pipeline.distill(whole)
    from limbeck.training import trainer

    original = trainer.Trainer.train_step
    for stop in (3, 6):

        def step(self, stop=stop):
            if self.state["step"] == stop:
                raise KeyboardInterrupt
            return original(self)

        monkeypatch.setattr(trainer.Trainer, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            pipeline.distill(broken)
        # what a kill in the middle of a write leaves
        (tmp_path / "broken" / "metrics.jsonl").open("a", encoding="utf-8").write('{"stage": "hid')
    monkeypatch.setattr(trainer.Trainer, "train_step", original)
    pipeline.distill(broken)
    ours, theirs = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("broken", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        for path in (tmp_path / "broken" / "metrics.jsonl", tmp_path / "whole" / "metrics.jsonl")
    ]
    assert logs[0] == logs[1]


def test_a_damaged_checkpoint_is_passed_over(recipe, monkeypatch, tmp_path):
    stages = [{"stage": "hidden", "tokens": 1024, "batch_size": 4}]
    seconds = {"whole": 60, "broken": EVERY_STEP}
    whole, broken = (recipe(stages=stages, out=str(tmp_path / n), checkpoint_seconds=s) for n, s in seconds.items())
    pipeline.distill(whole)
    from limbeck.training import trainer

    original = trainer.Trainer.train_step

    def step(self):
        if self.state["step"] == 5:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        pipeline.distill(broken)
    newest = sorted((tmp_path / "broken").glob("stages/0-hidden/step-*"))[-1]
    raw = bytearray((newest / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (newest / "model.safetensors").write_bytes(raw)
    monkeypatch.setattr(trainer.Trainer, "train_step", original)
    pipeline.distill(broken)
    ours, theirs = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("broken", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_killed_with_sigkill_the_same_command_goes_on(recipe, tmp_path):
    made = recipe(stages=[{"stage": "hidden", "tokens": 5_000, "batch_size": 2}], checkpoint_seconds=EVERY_STEP)
    path = tmp_path / "recipe.yaml"
    path.write_text(made.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-c", "from limbeck.cli import main; main()", "distill", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(Path(made.out).glob("stages/0-hidden/step-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (Path(made.out) / "eval.json").exists()
    again = limbeck("distill", str(path))
    assert again.returncode == 0, again.stderr
    assert "resuming at step" in again.stderr
    assert (Path(made.out) / "eval.json").exists()
    once_more = limbeck("distill", str(path))
    assert "already complete" in once_more.stderr


def test_a_finished_run_says_so_before_anything_is_loaded(recipe, monkeypatch):
    made = recipe(stages=[{"stage": "hidden", "tokens": 64, "batch_size": 1}])
    first = pipeline.distill(made, measure_times=False)
    monkeypatch.setattr(pipeline, "prepare_job", lambda *_: pytest.fail("a teacher was loaded"))
    assert pipeline.distill(made) == json.loads((Path(made.out) / "eval.json").read_text(encoding="utf-8"))
    assert first["evaluation"] == made.evaluation.model_dump(mode="json")
    with pytest.raises(LimbeckError, match="contains another run"):
        pipeline.distill(made.model_copy(update={"seed": 7}))


@pytest.mark.slow
def test_asked_to_stop_it_keeps_its_state_and_says_so_to_the_scheduler(recipe, tmp_path):
    made = recipe(stages=[{"stage": "hidden", "tokens": 60_000, "batch_size": 1}], checkpoint_seconds=1000)
    path = tmp_path / "recipe.yaml"
    path.write_text(made.to_yaml(), encoding="utf-8")
    command = [sys.executable, "-c", "from limbeck.cli import main; main()", "distill", str(path)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = Path(made.out) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text(encoding="utf-8").count("\n") > 3) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.terminate()
    _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, told
    assert "checkpoint saved" in told
    (kept,) = Path(made.out).glob("stages/0-hidden/step-*")
    assert int(kept.name.removeprefix("step-")) == len(log.read_text(encoding="utf-8").splitlines())


def test_patience_ends_a_stage_early_and_keeps_its_best_weights(recipe):
    settings = {"tokens": 4096, "batch_size": 1, "lr": 3.0, "lr_scheduler": "constant", "eval_steps": 2, "patience": 2}
    made = recipe(stages=[{"stage": "hidden", **settings}])
    stage = pipeline.distill(made)["stages"][0]
    assert stage["steps"] < 128
    assert stage["tokens"] == stage["steps"] * 32
    lines = [json.loads(line) for line in (Path(made.out) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
    assert len(losses) == stage["steps"] // 2
    assert losses.index(min(losses)) == len(losses) - 3
    assert stage["best_loss"] == min(losses) < losses[-1]


def test_the_average_is_what_a_stage_hands_on():
    parameter = torch.nn.Parameter(torch.zeros(2))
    average = ExponentialMovingAverage({"w": parameter}, 0.5)
    for step in range(1, 40):
        with torch.no_grad():
            parameter.fill_(step)
        average.update(step)
    with average.average_parameters():
        lent = float(parameter.detach()[0])
    assert lent == pytest.approx(39 - 1, abs=1e-3)  # of a ramp, one step behind: sum of 2^-k k
    assert float(parameter.detach()[0]) == 39
    average.copy_to_parameters()
    assert float(parameter.detach()[0]) == lent


def test_wsd_stays_at_the_peak_and_comes_down_at_the_end():
    settings = Hidden(
        stage="hidden", tokens=1, warmup_ratio=0.1, min_lr_ratio=0.0, lr_scheduler="wsd", decay_ratio=0.25
    )
    rates = [get_lr_multiplier(i, 40, settings) for i in range(40)]
    assert rates[4:30] == [1.0] * 26
    assert rates[-1] == 0
    assert rates[30:] == sorted(rates[30:], reverse=True)
    assert rates[31] == pytest.approx(1 - (2 / 10) ** 0.5)


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(recipe, monkeypatch):
    from limbeck.training.alignment import HiddenStage as Stage

    original, calls = Stage.backward, []

    def backward(self, batch, counts):
        calls.append(1)
        sums = original(self, batch, counts)
        if len(calls) in bad:
            next(iter(self.parameters().values())).grad.fill_(float("nan"))
        return sums

    monkeypatch.setattr(pipeline, "measure_plan", lambda job, plan: plan)  # its steps would be counted
    monkeypatch.setattr(Stage, "backward", backward)
    bad = {2, 3}
    stages = [{"stage": "hidden", "tokens": 1024, "batch_size": 4}]
    made = recipe(stages=stages)
    result = pipeline.distill(made)
    assert result["stages"][0]["skipped"] == 2
    assert all(t.isfinite().all() for t in load_file(Path(made.out) / "student" / "model.safetensors").values())
    shutil.rmtree(made.out)
    calls.clear()
    bad = set(range(2, 100))
    with pytest.raises(LimbeckError, match="5 steps in a row"):
        pipeline.distill(made)


@pytest.mark.parametrize("batch", [1, 3, 8])
@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_the_schedule_warms_up_and_ends_at_the_floor(batch, decay):
    settings = Hidden(
        stage="hidden", tokens=100 * 512, batch_size=batch, warmup_ratio=0.2, min_lr_ratio=0.05, lr_scheduler=decay
    )
    steps = count_training_steps(settings, 512)
    rates = [get_lr_multiplier(i, steps, settings) for i in range(steps)]
    assert max(rates) == pytest.approx(1, abs=0.02)
    assert rates[-1] == pytest.approx(0.05)
    assert rates[0] < 0.5
    top = rates.index(max(rates))
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert rates[0] > 0


# bad input: exit code 2, a clear word, nothing written


@pytest.fixture
def bad(teacher_folder, corpus, tmp_path):
    """Run `limbeck distill quickstart` on the tiny teacher with more arguments; checks all that a refusal promises."""

    def run(*arguments: str, out: Path | None = None, teacher: str | None = None, data: str | None = None) -> str:
        target = out or tmp_path / "out"
        before = sorted(target.rglob("*")) if target.exists() else None
        done = limbeck(
            "distill", "quickstart", "--teacher", teacher or str(teacher_folder), "--data", data or str(corpus),
            "--out", str(target), "--set", "data.seq_len=32", *arguments,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.strip()
        after = sorted(target.rglob("*")) if target.exists() else None
        assert after == before, "something was written"
        return done.stderr

    return run


def test_unknown_mixer(bad):
    assert "did you mean 'mlstm'" in bad("--student", "mlstn")


def test_unknown_mixer_option(bad):
    assert "did you mean 'write'" in bad("--set", "student.options={writ: 1}")


def test_unknown_stage(bad):
    assert "did you mean 'hidden'" in bad("--stages", "0,hiden")


def test_misspelt_key(bad, tmp_path):
    assert "did you mean 'seq_len'" in bad("--set", "data.seqlen=3")
    path = tmp_path / "wrong.yaml"
    path.write_text("teacher: embedded\nstages:\n  - {stage: hidden, tokens: 100, learning: 3}\n", encoding="utf-8")
    done = limbeck("distill", str(path), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert "stages.0.learning" in done.stderr
    assert not (tmp_path / "out").exists()


def test_impossible_values(bad, tmp_path):
    assert "stages.0.tokens" in bad("--set", "stages.0.tokens=-3")
    assert "no such key" in bad("--set", "stages.9.tokens=3")
    assert "key=value" in bad("--set", "nonsense")
    assert "layers is" in bad("--layers", "0-99")
    (tmp_path / "broken.yaml").write_text("teacher: [", encoding="utf-8")
    assert limbeck("distill", str(tmp_path / "broken.yaml")).returncode == 2
    assert "unknown recipe" in limbeck("distill", "quickstar").stderr


def test_missing_and_empty_data(bad, tmp_path):
    assert "nowhere.jsonl" in bad(data=str(tmp_path / "nowhere.jsonl"))
    empty = tmp_path / "empty.jsonl"
    empty.write_text("", encoding="utf-8")
    assert "empty" in bad(data=str(empty)).lower()
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "too short"}\n' * 3, encoding="utf-8")
    assert "tokens" in bad(data=str(short))


def test_missing_teacher(bad, tmp_path):
    assert "no-such-folder" in bad(teacher=str(tmp_path / "no-such-folder"))
    (tmp_path / "folder").mkdir()
    assert "config.json" in bad(teacher=str(tmp_path / "folder"))


def test_a_tokenizer_that_does_not_match(bad, teacher_folder, tmp_path):
    from limbeck.testing import make_tiny_model

    folder = tmp_path / "small-table"
    shutil.copytree(teacher_folder, folder)
    make_tiny_model("llama", vocab_size=60).save_pretrained(folder)
    assert "60" in bad(teacher=str(folder))


def test_a_family_without_the_attention_interface(bad, tokenizer, tmp_path):
    from transformers import AutoConfig

    folder = tmp_path / "bloom"
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=48, n_layer=1, n_head=6)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert "code of its own" in bad(teacher=str(folder))


def test_a_length_beyond_the_teachers_positions(bad):
    assert "256" in bad("--set", "data.seq_len=512")


def test_a_folder_that_holds_something_else(bad, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.tex").write_text("dear reader", encoding="utf-8")
    assert "do not belong to a run" in bad(out=folder)
    file = tmp_path / "file"
    file.write_text("x", encoding="utf-8")
    assert "is a file" in bad(out=file)


def test_a_folder_that_holds_another_run(bad, recipe):
    made = recipe(stages=[{"stage": "calibrate", "tokens": 256}])
    pipeline.distill(made)
    said = bad(out=Path(made.out))
    assert "another run" in said
    assert "stages" in said


def test_a_disk_without_room(recipe, monkeypatch):
    import collections

    usage = collections.namedtuple("usage", "total used free")
    made = recipe()
    setup.prepare_job(made)  # so that the token cache is there
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(LimbeckError, match="not enough disk space"):
        pipeline.distill(made)
    assert not Path(made.out).exists()


def test_verbs(teacher_folder, corpus, tmp_path):
    """convert, eval, generate, students, doctor: each runs and says what it should."""
    out = tmp_path / "converted"
    assert limbeck("convert", str(teacher_folder), str(out), "--student", "retnet").returncode == 0
    assert limbeck("convert", str(teacher_folder), str(out)).returncode == 2, "overwrote a folder"
    measured = limbeck(
        "eval", str(out), "--teacher", str(teacher_folder), "--data", str(corpus), "--length", "32", "--tokens", "200",
        "--out", str(tmp_path / "measured"),
    )  # fmt: skip
    assert measured.returncode == 0, measured.stderr
    assert "± " in (tmp_path / "measured" / "table.md").read_text(encoding="utf-8")
    said = limbeck("generate", str(out), "copyright", "--tokens", "5")
    assert said.returncode == 0, said.stderr
    assert len(said.stdout.strip()) > 0
    assert limbeck("generate", str(tmp_path / "nothing"), "x").returncode == 2
    assert limbeck("generate", str(out), "").returncode == 2
    assert "gated_deltanet" in limbeck("students").stdout
    assert "transformers" in limbeck("doctor").stdout
    assert limbeck("distill", "--help").returncode == 0
    assert limbeck("no-such-verb").returncode == 2
