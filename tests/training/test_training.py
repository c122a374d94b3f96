"""The training engine beside the main way: precision, layers that stop early, checkpoints kept, trackers."""

import builtins
import errno
import importlib.util
import json
import math
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import DynamicCache
from typer.testing import CliRunner

import limbeck
from limbeck import LimbeckError, cli
from limbeck.core.recipe import Recipe
from limbeck.core.stage_settings import EarlyStopping
from limbeck.models.hooks import DistillationPair
from limbeck.testing import make_tiny_model
from limbeck.training import pipeline, setup, trackers, trainer
from limbeck.training.alignment import HiddenStage
from limbeck.training.lr_finder import LearningRateSweep, find_learning_rates
from limbeck.training.optim import GROWTH_INTERVAL, INITIAL_SCALE, LayerEarlyStopping, LossScaler, needs_loss_scaling
from limbeck.training.precision import numerics_context, resolve_autocast
from limbeck.training.stage_protocol import accumulate_gradients

pytestmark = pytest.mark.usefixtures("own_cache")
HIDDEN = {"stage": "hidden", "tokens": 1024, "batch_size": 4}
CPU = torch.device("cpu")


@pytest.fixture
def recipe(teacher_folder, corpus, tmp_path):
    def make(name: str = "run", **changes) -> Recipe:
        raw = {
            "name": "tiny",
            "teacher": str(teacher_folder),
            "student": {"mixer": "gated_deltanet"},
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": [HIDDEN],
            "evaluation": {"tokens": 256, "prompt": None},
            "checkpoint_seconds": 1e-6,
            "trackers": [],
            "out": str(tmp_path / name),
        }
        return Recipe.parse({**raw, **changes})

    return make


@pytest.fixture
def stopped_at(monkeypatch):
    """Run a recipe and break off before the given step, as a kill does."""
    original = trainer.Trainer.train_step

    def run(made: Recipe, stop: int, stage: int = 0) -> None:
        def step(self):
            if self.index == stage and self.state["step"] == stop:
                raise KeyboardInterrupt
            return original(self)

        with monkeypatch.context() as patch:
            patch.setattr(trainer.Trainer, "train_step", step)
            with pytest.raises(KeyboardInterrupt):
                pipeline.distill(made)

    return run


def lines_of(made: Recipe) -> list[dict]:
    text = (Path(made.out) / "metrics.jsonl").read_text(encoding="utf-8")
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_second"} for x in text.splitlines()]


def same_students(one: Recipe, other: Recipe) -> bool:
    ours, theirs = (load_file(Path(made.out) / "student" / "model.safetensors") for made in (one, other))
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# ---------------------------------------------------------------------- precision


@pytest.mark.slow
def test_half_precision_learns_what_float32_learns_and_resumes_exactly(recipe, stopped_at):
    stages = [
        {"stage": "matrix", "tokens": 512, "batch_size": 4},
        {**HIDDEN, "loss": "mse"},
        {"stage": "logits", "tokens": 512, "batch_size": 2, "train": "all"},
    ]
    names = ("fp32", "bf16", "fp16")
    made = {name: recipe(name, stages=stages, precision=name, checkpoint_seconds=60.0) for name in names}
    results = {name: pipeline.distill(one) for name, one in made.items()}
    for name in ("bf16", "fp16"):
        for ours, theirs in zip(results[name]["stages"], results["fp32"]["stages"]):
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.1), ours["stage"]
            assert ours["loss"] != theirs["loss"]
        weights = load_file(Path(made[name].out) / "student" / "model.safetensors")
        assert all(t.dtype == torch.float32 for t in weights.values())
        scales = [line.get("loss_scale") for line in lines_of(made[name])]
        assert all(scales) if name == "fp16" else not any(scales)
        broken = recipe(f"broken_{name}", stages=stages, precision=name)
        stopped_at(broken, 3)
        stopped_at(broken, 2, stage=2)
        pipeline.distill(broken)
        assert same_students(broken, made[name])
        assert lines_of(broken) == lines_of(made[name])


@pytest.mark.parametrize("mixer", ["gated_deltanet", "gla", "mlstm", "retnet", "rwkv7"])
@torch.no_grad()
def test_states_stay_float32_under_autocast(mixer):
    teacher = make_tiny_model("llama")
    student = limbeck.convert(teacher, mixer)
    caches = []
    for precision in ("fp32", "bf16"):
        cache = DynamicCache(config=student.config)
        with resolve_autocast(precision, CPU)():
            ids = torch.arange(3, 40)[None]
            student(ids, past_key_values=cache, use_cache=True)
            student(ids[:, :1], past_key_values=cache, use_cache=True)
        caches.append([t for layer in cache.layers for t in memories(layer)])
    assert caches[1]
    assert all(state.dtype == torch.float32 for state in caches[1])
    for exact, mixed in zip(*caches):
        assert float((exact - mixed).norm() / exact.norm()) < 0.05


def memories(layer) -> list[torch.Tensor]:
    """The recurrent states [B, H, K, V] in a layer's cache, with what goes with them; not the convolution's inputs."""
    found = [t for state in layer.states for name, t in (state or {}).items() if name == "memory"]
    inner = [t for one in found for t in (one.values() if isinstance(one, dict) else [one])]
    return [t for t in inner if torch.is_tensor(t) and t.is_floating_point()]


def test_a_loss_that_is_scaled_has_the_same_gradient():
    from limbeck.models import find_attention_sites

    teacher = make_tiny_model("llama").requires_grad_(False)
    student = limbeck.convert(teacher, "gla").requires_grad_(False)
    stage = HiddenStage(
        DistillationPair(teacher, student, find_attention_sites(teacher), resolve_autocast("fp32", CPU))
    )
    from limbeck.data.packing import Batch

    ids = torch.arange(3, 35)[None]
    batch = Batch(ids, torch.arange(32)[None], ids)
    gradients = []
    for scale in (1.0, 1024.0):
        facts = {"loss_scale": scale}
        for p in stage.parameters().values():
            p.requires_grad_(True)
        stage.loss_scale = scale
        accumulate_gradients(stage, [batch])
        LossScaler(facts, enabled=True).unscale_gradients(stage.parameters().values())
        gradients.append({n: p.grad.clone() for n, p in stage.parameters().items() if p.grad is not None})
        student.zero_grad()
    assert gradients[0]
    assert all(torch.equal(gradients[0][n], gradients[1][n]) for n in gradients[0]), "a power of two rounds nothing"


def test_the_loss_scale_comes_down_at_once_and_goes_up_slowly():
    facts = {}
    scale = LossScaler(facts, enabled=True)
    assert scale.value == INITIAL_SCALE
    assert scale.update(finite=False)
    assert scale.value == INITIAL_SCALE / 2
    for _ in range(GROWTH_INTERVAL - 1):
        scale.update(finite=True)
    assert scale.value == INITIAL_SCALE / 2
    again = LossScaler(json.loads(json.dumps(facts)), enabled=True)
    assert not again.update(finite=True)
    assert again.value == INITIAL_SCALE
    while again.value > 1:
        again.update(finite=False)
    assert not again.update(finite=False), "below one nothing is gained"
    assert needs_loss_scaling(resolve_autocast("fp16", CPU), "cpu")
    assert not needs_loss_scaling(resolve_autocast("bf16", CPU), "cpu")


def test_steps_that_overflow_are_counted_and_do_not_end_the_run(recipe, monkeypatch):
    original = HiddenStage.loss

    def loss(self, *args):  # overflows until the scale has come down to 2 ** 8
        value = original(self, *args)
        return value + (float("inf") if self.loss_scale > 2**8 else 0)

    monkeypatch.setattr(HiddenStage, "loss", loss)
    stage = pipeline.distill(recipe(precision="fp16", stages=[{**HIDDEN, "tokens": 2048}]))["stages"][0]
    assert stage["skipped"] == 8
    assert stage["loss_scale"] == 2**8
    assert stage["loss"] < float("inf")


def test_what_the_device_has_not_is_refused(recipe, monkeypatch):
    with pytest.raises(LimbeckError, match="tf32=false"):
        pipeline.distill(recipe(tf32=True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    with pytest.raises(LimbeckError, match="Old GPU does not support bf16"):
        resolve_autocast("bf16", torch.device("cuda"))
    assert resolve_autocast("auto", torch.device("cuda")).keywords["dtype"] == torch.float16


@pytest.mark.slow
def test_deterministic_runs_and_explains_what_cannot_be(recipe, monkeypatch):
    plain, made = recipe("plain"), recipe("deterministic", deterministic=True)
    pipeline.distill(plain)
    pipeline.distill(made)
    assert not torch.are_deterministic_algorithms_enabled(), "the setting was left behind"
    assert same_students(plain, made)

    def step(self):
        raise RuntimeError(
            "put_ does not have a deterministic implementation, but you set 'torch.use_...'. You can ..."
        )

    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    with pytest.raises(LimbeckError, match=r"put_ does not have[^.]*\n.*\ntry: --set deterministic=false"):
        pipeline.distill(recipe("no", deterministic=True))
    with pytest.raises(RuntimeError), numerics_context(plain):
        step(None)


# ---------------------------------------------------------------------- layers that stop early


def test_a_layer_stops_when_its_mean_has_not_fallen_for_long():
    facts = {}
    layers = LayerEarlyStopping(EarlyStopping(patience=4, tolerance=0.01), facts)
    when = {}
    for step in range(1, 120):
        losses = {"falls": 0.9**step, "stays": 1.0, "late": max(0.9**step, 0.1)}
        for name in layers.update(step, {n: v for n, v in losses.items() if n not in layers.stopped}):
            when[name] = step
        layers = LayerEarlyStopping(
            layers.settings, json.loads(json.dumps({"layers": layers.layers}))
        )  # as a resume does
    assert when["stays"] == 4
    assert 22 < when["late"] < 110
    assert "falls" not in when
    assert layers.stopped == {"stays", "late"}
    assert layers.final_losses["stays"] == 1.0
    assert not layers.all_stopped


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("kind", ["matrix", "hidden"])
def test_a_layer_that_has_converged_is_left_out_and_the_resumed_run_agrees(recipe, stopped_at, monkeypatch, kind):
    """The first layer's loss is made to stand still, the other's to fall; then the steps do less."""
    from limbeck.training.alignment import LayerwiseStage, MatrixStage

    cls = HiddenStage if kind == "hidden" else MatrixStage
    original, calls = cls.loss, []

    def loss(self, module, *args):
        first = module is next(iter(self.modules().values()))
        calls.append(first)
        value = 0 * original(self, module, *args)
        return value + 1 if first else value + 5 + next(module.parameters()).mean()  # which falls a little each step

    monkeypatch.setattr(cls, "loss", loss)
    assert issubclass(cls, LayerwiseStage)
    converged = {"patience": 3, "tolerance": 1e-9}
    stages = (
        [{"stage": kind, "tokens": 1280, "batch_size": 4, "sampled_queries": 8}]
        if kind == "matrix"
        else [{**HIDDEN, "tokens": 1280}]
    )
    stages[0] |= {"layer_early_stopping": converged, "micro_batch_size": 4, "lr": 1e-3}
    whole, broken = recipe("whole", stages=stages), recipe("broken", stages=stages)
    calls.clear()
    facts = pipeline.distill(whole)["stages"][0]
    stopped = {name: layer["stopped"] for name, layer in facts["layers"].items()}
    assert stopped["model.layers.0.self_attn"] == 3
    lines = lines_of(whole)
    assert len(lines[2]["losses"]) == 2
    assert "model.layers.0.self_attn" not in lines[3]["losses"]
    assert lines[3]["loss"] == pytest.approx((1 + sum(lines[3]["losses"].values())) / 2), "it counts as it stopped"
    assert calls.count(True) < calls.count(False), "the layer ran on"
    for stop in (2, 5):
        stopped_at(broken, stop)
    pipeline.distill(broken)
    assert same_students(broken, whole)
    assert lines_of(broken) == lines


def test_a_stage_ends_when_all_layers_have_converged(recipe):
    stages = [{**HIDDEN, "tokens": 4096, "lr": 1e-9, "layer_early_stopping": {"patience": 5, "tolerance": 0.5}}]
    facts = pipeline.distill(recipe(stages=stages))["stages"][0]
    assert facts["steps"] == 5 < 32
    assert facts["tokens"] == 5 * 4 * 32


# ---------------------------------------------------------------------- checkpoints and resuming


@pytest.mark.slow
def test_as_many_checkpoints_are_kept_as_asked_for_and_damaged_ones_passed_over(recipe, stopped_at):
    whole, broken = recipe("whole"), recipe("broken", save_total_limit=3)
    pipeline.distill(whole)
    stopped_at(broken, 6)
    kept = sorted(Path(broken.out).glob("stages/0-hidden/step-*"))
    assert [int(path.name[5:]) for path in kept] == [4, 5, 6]
    (kept[2] / "optimizer.pt").write_bytes(b"half of it")
    raw = bytearray((kept[1] / "model.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 1
    (kept[1] / "model.safetensors").write_bytes(raw)
    seen = []
    original = trainer.Trainer._resume

    def resume(self):
        original(self)
        seen.append(self.state["step"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.Trainer, "_resume", resume)
        pipeline.distill(broken)
    assert seen == [4]
    assert same_students(broken, whole)


def test_what_changes_no_number_may_change_when_a_run_goes_on(recipe, stopped_at, corpus):
    data = {"source": str(corpus), "seq_len": 32, "held_out": 0.2}
    other = {**data, "cache_gb": 3.0}
    stages = [HIDDEN, {**HIDDEN, "data": data}]
    stopped_at(recipe(stages=stages), 3)
    on = recipe(
        data=other,
        stages=[HIDDEN, {**HIDDEN, "data": other}],
        save_total_limit=1,
        checkpoint_seconds=60,
        trackers="auto",
    )
    setup.prepare_job(on)
    with pytest.raises(LimbeckError, match="precision: was 'auto', now 'bf16'"):
        setup.prepare_job(on.model_copy(update={"precision": "bf16"}))
    with pytest.raises(LimbeckError, match="seq_len"):
        setup.prepare_job(recipe(data={**data, "seq_len": 16}, stages=stages))
    pipeline.distill(on)


# ---------------------------------------------------------------------- trackers


def events(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(tag)]


@pytest.mark.slow
def test_tensorboard_shows_every_step_once_after_a_resume(recipe, stopped_at):
    pytest.importorskip("tensorboard")
    pytest.importorskip("accelerate")
    stages = [{"stage": "matrix", "tokens": 512, "batch_size": 4}, {"stage": "logits", "tokens": 512, "batch_size": 2}]
    made = recipe(stages=stages, trackers="auto", checkpoint_seconds=1e-6)
    stopped_at(made, 3)
    newest = max(Path(made.out).glob("stages/0-matrix/step-*"))
    (newest / "optimizer.pt").unlink()  # so that a step is done again
    stopped_at(made, 4, stage=1)
    pipeline.distill(made)
    lines = lines_of(made)
    folder = Path(made.out) / "tensorboard"
    for stage, place, before in (("matrix", "0-matrix", 0), ("logits", "1-logits", 4)):
        mine = [line for line in lines if line["stage"] == stage]
        for name in ("loss", "lr", "grad_norm", "skipped"):
            found = events(folder, f"{place}/{name}")
            assert [step for step, _ in found] == [before + line["step"] for line in mine], (place, name)
            assert [value for _, value in found] == pytest.approx([line[name] for line in mine], rel=1e-6)
    assert len(events(folder, "0-matrix/losses/model.layers.1.self_attn")) == 4
    assert all(value > 0 for _, value in events(folder, "1-logits/peak_memory_gb"))
    assert all(value > 0 for _, value in events(folder, "1-logits/tokens_per_second"))


class Recorder:
    """A tracker that keeps what it is sent."""

    sent: list[tuple[int, float]] = []
    started: list[dict] = []

    def __init__(self, project, **settings):
        self.settings = settings

    def start(self):
        self.started.append(self.settings)

    def store_init_configuration(self, values):
        assert values["name"] == "tiny"

    def log(self, values, step):
        if step == 7:
            raise OSError("the network is gone")
        self.sent.append((step, values["0-hidden/loss"]))

    def finish(self):
        self.started.append({"finished": True})


def test_others_are_sent_each_step_once_and_cannot_end_a_run(recipe, stopped_at, monkeypatch, capsys):
    tracking = pytest.importorskip("accelerate.tracking")
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Recorder)
    monkeypatch.setattr(trackers, "_missing", lambda name: [])
    monkeypatch.setattr(Recorder, "sent", [])
    monkeypatch.setattr(Recorder, "started", [])
    made = recipe(trackers=["wandb"])
    stopped_at(made, 3)
    newest = max(Path(made.out).glob("stages/0-hidden/step-*"))
    (newest / "optimizer.pt").unlink()
    pipeline.distill(made)
    assert [step for step, _ in Recorder.sent] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in Recorder.sent] == [line["loss"] for line in lines_of(made)[:6]]
    assert len(lines_of(made)) == 8
    assert "wandb failed and is disabled for the rest of this run: the network is gone" in capsys.readouterr().err
    begun = [one for one in Recorder.started if "id" in one]
    assert len({one["id"] for one in begun}) == 1, "a resumed run is the same run"
    assert begun[0]["resume"] == "allow"


def test_a_full_disk_under_tensorboard_is_one_line(recipe, monkeypatch, capsys):
    """Its writer is a thread: what it raises comes back at the next call, and is no traceback before that."""
    writer = pytest.importorskip("tensorboard.summary.writer.record_writer")

    def write(self, data, real=writer.RecordWriter.write, written=[]):  # noqa: B006
        written.append(data)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, data)

    printed = []
    monkeypatch.setattr(writer.RecordWriter, "write", write)
    monkeypatch.setattr(threading, "excepthook", trackers._print_unkept_errors(printed.append))
    made = recipe(trackers=["tensorboard"])
    pipeline.distill(made)
    assert capsys.readouterr().err.count("tensorboard failed and is disabled for the rest of this run") == 1
    assert printed == []
    assert len(lines_of(made)) == 8
    broken = threading.Thread(target=lambda: 1 / 0)
    broken.start()
    broken.join()
    assert [args.exc_type for args in printed] == [ZeroDivisionError], "others are printed"


def test_a_tracker_that_is_not_installed_is_named_with_the_command(recipe, monkeypatch):
    original = importlib.util.find_spec
    hidden = {"tensorboard", "mlflow", "wandb", "trackio"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in hidden else original(name))
    for name in sorted(hidden):
        made = recipe(name, trackers=[name])
        with pytest.raises(LimbeckError, match=f"{name} requires {name}.*\n.*\ntry: pip install 'limbeck") as caught:
            pipeline.distill(made)
        assert name in str(caught.value).splitlines()[-1] or name == "tensorboard"
        assert not Path(made.out).exists()
    assert trackers.resolve_trackers("auto") == []
    importing = builtins.__import__

    def no_tracker(name, *rest, **more):
        assert name.partition(".")[0] not in (*hidden, "accelerate.tracking")
        return importing(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", no_tracker)
    made = recipe(trackers="auto")
    pipeline.distill(made)
    assert not (Path(made.out) / "tensorboard").exists()
    assert len(lines_of(made)) == 8


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_the_real_one_offline(recipe, name, monkeypatch, tmp_path):
    pytest.importorskip(name)
    pytest.importorskip("accelerate")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    made = recipe(trackers=[name])
    pipeline.distill(made)
    assert name in json.loads((Path(made.out) / "trackers.json").read_text(encoding="utf-8"))


# ---------------------------------------------------------------------- learning rates and curves


@pytest.mark.slow
def test_the_sweep_of_rates_touches_nothing_and_is_the_same_again(recipe):
    stages = [
        {"stage": "calibrate", "tokens": 256},
        {"stage": "matrix", "tokens": 512, "micro_batch_size": 3},
        {**HIDDEN, "train": "block", "target": "block"},
        {"stage": "logits", "tokens": 512, "batch_size": 2, "lora": {"rank": 2}},
    ]
    made = recipe(stages=stages)
    first, again = (find_learning_rates(made, num_points=16) for _ in range(2))
    assert first == again
    assert not Path(made.out).exists()
    assert [(sweep.index, sweep.stage) for sweep in first] == [(1, "matrix"), (2, "hidden"), (3, "logits")]
    assert {sweep.previous_stages for sweep in first} == {"calibrate"}
    for sweep in first:
        assert sweep.learning_rates[0] == pytest.approx(1e-6)
        assert sweep.learning_rates == sorted(sweep.learning_rates)
        assert sweep.suggested_lr is not None, sweep.stage
        assert sweep.suggested_lr < sweep.learning_rates[sweep.lowest_index]
        assert min(sweep.losses) < 0.99 * sweep.losses[0], "the student learnt on the way"
    pipeline.distill(recipe(stages=stages[:2]))
    begun = Path(made.out) / "recipe.yaml"
    before = {path: path.read_bytes() for path in Path(made.out).rglob("*") if path.is_file()}
    gone_on = find_learning_rates(recipe(stages=stages[:2]), num_points=4)
    assert begun in before
    assert {path: path.read_bytes() for path in Path(made.out).rglob("*") if path.is_file()} == before
    assert gone_on[0].losses[0] == pytest.approx(first[0].losses[0])


def test_the_suggested_rate_is_where_the_loss_falls_fastest():
    rates = [10 ** (-6 + i / 5) for i in range(31)]
    falling = LearningRateSweep(
        0, "hidden", "conversion", 1e-3, 4, rates, [1 / (1 + math.exp(2 * (i - 15))) + 0.01 * i for i in range(31)]
    )
    assert falling.suggested_lr == pytest.approx(rates[16], rel=2)
    assert (
        LearningRateSweep(0, "hidden", "conversion", 1e-3, 4, rates, [1 + 0.1 * i for i in range(31)]).suggested_lr
        is None
    )


def test_the_command_line_shows_the_sweep_and_draws_it(recipe, tmp_path):
    made = recipe(stages=[HIDDEN])
    path = tmp_path / "recipe.yaml"
    path.write_text(made.to_yaml(), encoding="utf-8")
    done = CliRunner().invoke(_verbs(), ["distill", str(path), "--find-lr"])
    assert done.exit_code == 0, done.output
    rows = (tmp_path / "run-rates" / "rates.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "stage_index,stage,rate,loss,smooth_loss"
    assert len(rows) > 20
    assert (tmp_path / "run-rates" / "rates.png").stat().st_size > 1000 or not importlib.util.find_spec("matplotlib")
    assert not Path(made.out).exists()


def _verbs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["limbeck", "--help"])
        with pytest.raises(SystemExit):
            cli.main()
    return cli.app


@pytest.mark.slow
def test_the_curves_have_a_line_a_layer(recipe, tmp_path):
    pytest.importorskip("matplotlib")
    from limbeck.report.figures import curves

    made = recipe(stages=[{"stage": "matrix", "tokens": 512}, {"stage": "logits", "tokens": 256}])
    pipeline.distill(made)
    assert (Path(made.out) / "curves.png").stat().st_size > 1000
    drawn = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "save_figure", lambda figure, path: drawn.append(figure))
        curves.draw_loss_curves(Path(made.out) / "metrics.jsonl", tmp_path / "x.png")
    matrix, logits = drawn[0].axes
    assert [len(axes.lines) for axes in (matrix, logits)] == [3, 1]
    assert list(matrix.lines[2].get_ydata()) == [line["loss"] for line in lines_of(made) if line["stage"] == "matrix"]
    with pytest.raises(LimbeckError, match="contains no steps"):
        curves.draw_loss_curves(tmp_path / "nothing.jsonl", tmp_path / "x.png")
