"""LoRA through peft: a student from Python, and the stage `logits` with adapters, killed and resumed."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import limbeck
from limbeck import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.models import find_attention_sites
from limbeck.testing import make_tiny_model
from limbeck.training import export, pipeline, setup, stages
from limbeck.training.lora import LoraAdapters, count_lora_parameters, resolve_lora_targets
from limbeck.training.plan import make_plan

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("own_cache")

IDS = torch.tensor([[5, 9, 23, 4, 77, 31, 8, 60, 12, 3]])


@pytest.fixture
def recipe(teacher_folder, corpus, tmp_path):
    """A run that ends in a stage with adapters; `recipe(lora={...}, key=value)` changes it."""

    def make(lora=None, stage=None, **changes) -> Recipe:
        lora = {"rank": 4, "alpha": 8} if lora is None else lora
        raw = {
            "teacher": str(teacher_folder),
            "student": {"mixer": "gla"},
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": [
                {"stage": "calibrate", "tokens": 256},
                {"stage": "logits", "tokens": 1024, "batch_size": 4, "lr": 3e-3, "lora": lora, **(stage or {})},
            ],
            "evaluation": {"tokens": 256, "prompt": None},
            "checkpoint_seconds": 1e-6,
            "out": str(tmp_path / "run"),
        }
        return Recipe.parse({**raw, **changes})

    return make


@pytest.mark.parametrize(("family", "whole"), [("llama", None), ("qwen3", None), ("llama", ["mixer"])])
def test_a_student_takes_adapters_from_python(family, whole, tmp_path):
    """get_peft_model, a step, save, reload onto a reloaded student, merge: the logits stay what they are."""
    from peft import LoraConfig, PeftModel, get_peft_model

    student = limbeck.convert(make_tiny_model(family), mixer="gated_deltanet").eval()
    student.save_pretrained(tmp_path / "student")
    before = student(IDS).logits.detach()
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, modules_to_save=whole)
    model = get_peft_model(student, config)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert bool(whole) == any(".mixer." in n and p.requires_grad for n, p in model.named_parameters())
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    for _ in range(2):  # B is zero at first, so A learns from the second step on
        optimizer.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        assert all(p.grad is not None for p in learning)
        optimizer.step()
    after = model(IDS).logits.detach()
    assert (after - before).abs().max() > 1e-3
    model.save_pretrained(tmp_path / "adapter")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student").eval()
    again = PeftModel.from_pretrained(reloaded, tmp_path / "adapter")
    assert torch.equal(again(IDS).logits, after)
    merged = again.merge_and_unload()
    assert type(merged) is type(reloaded)
    torch.testing.assert_close(merged(IDS).logits, after, rtol=1e-4, atol=1e-5)
    out = merged.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert out.shape[1] == IDS.shape[1] + 3


def test_the_stage_learns_and_leaves_an_ordinary_student(recipe):
    made = recipe(stage={"tokens": 8192, "lr": 1e-2})
    result = pipeline.distill(made)
    stage = result["stages"][1]
    assert stage["loss"] < 0.97 * stage["first_loss"]
    folder = Path(made.out) / "student"
    names = set(load_file(folder / "model.safetensors"))
    assert not [name for name in names if "lora" in name or "base_layer" in name]
    plain = limbeck.convert(make_tiny_model("llama"), mixer="gla")
    assert set(plain.state_dict()) - {"lm_head.weight"} <= names | {"model.rotary_emb.inv_freq"}
    taught = load_file(Path(made.out) / "stages" / "1-logits" / "done" / "model.safetensors")
    student = AutoModelForCausalLM.from_pretrained(folder)
    weights = dict(student.named_parameters())
    assert all(torch.equal(weights[name], tensor) for name, tensor in taught.items())
    ends = {name.split("self_attn.")[1].split(".")[0] for name in taught}
    assert ends == {"q_proj", "k_proj", "v_proj", "o_proj", "mixer"}
    start = make_tiny_model("llama")
    moved = weights["model.layers.0.self_attn.q_proj.weight"] - start.model.layers[0].self_attn.q_proj.weight
    assert torch.linalg.matrix_rank(moved, rtol=1e-3) == 4
    assert torch.equal(weights["model.layers.0.mlp.up_proj.weight"], start.model.layers[0].mlp.up_proj.weight)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [
        {"rank": 4},
        {"rank": 2, "target_modules": "all-linear", "dropout": 0.2},
        {"rank": 2, "target_modules": ["down_proj"]},
    ],
)
def test_killed_twice_it_ends_bit_equal(recipe, lora, tmp_path, monkeypatch):
    """Dropout included; and once more after the stage, before the export."""
    from limbeck.training import trainer

    whole, broken = (recipe(lora, out=str(tmp_path / name)) for name in ("whole", "broken"))
    torch.manual_seed(1)
    pipeline.distill(whole)
    original = trainer.Trainer.train_step
    for stop in (3, 6):

        def step(self, stop=stop):
            if self.state["step"] == stop:
                raise KeyboardInterrupt
            torch.rand(stop)  # the state of the generator is not what it was
            return original(self)

        monkeypatch.setattr(trainer.Trainer, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            pipeline.distill(broken)
    monkeypatch.setattr(trainer.Trainer, "train_step", original)
    with monkeypatch.context() as patch:
        patch.setattr(export, "_export", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            pipeline.distill(broken)
    pipeline.distill(broken)
    ours, theirs = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("broken", "whole"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    start = load_file(Path(whole.teacher) / "model.safetensors")
    assert any(not torch.equal(start[name], theirs[name]) for name in start if "down_proj" in name) == (
        "target_modules" in lora
    )


def test_the_teacher_keeps_its_weights(recipe):
    """Adapters outside the attention are merged into weights that the student shared with the teacher until then."""
    ready = setup.prepare_job(recipe())
    before = {name: p.clone() for name, p in ready.teacher.named_parameters()}
    student = setup.build_student(ready)
    inside = LoraAdapters(student, resolve_lora_targets(student, ready.sites, "all-linear"), rank=2)
    with torch.no_grad():
        for p in inside.parameters().values():
            p.add_(0.1)
    learnt = inside.merge()
    assert all(torch.equal(p, before[name]) for name, p in ready.teacher.named_parameters())
    name = "model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(learnt[name], before[name])
    another = setup.build_student(ready)  # as in a run that is gone on with after the stage
    stages.load_stage_weights(another, ready.teacher, {name: learnt[name]})
    assert torch.equal(another.get_parameter(name), learnt[name])
    assert torch.equal(ready.teacher.get_parameter(name), before[name])


def test_the_plan_counts_what_the_stage_trains(recipe):
    for lora in ({"rank": 4}, {"rank": 2, "target_modules": "all-linear"}, {"target_modules": ["v_proj", "o_proj"]}):
        made = recipe(lora, out=None, name="plan")
        ready = setup.prepare_job(made)
        row = make_plan(made, ready.teacher, ready.sites).stages[1]
        student = setup.build_student(ready)
        settings = made.stages[1]
        trained = stages.make_stage(ready, student, settings, 1).parameters()
        assert row.trained_parameters == sum(p.numel() for p in trained.values())
        adapted = [p for name, p in trained.items() if "lora_" in name]
        names = resolve_lora_targets(ready.teacher, ready.sites, settings.lora.target_modules)
        assert sum(p.numel() for p in adapted) == count_lora_parameters(ready.teacher, names, settings.lora.rank)
    whole = Recipe.parse({**made.model_dump(), "stages": [{"stage": "logits", "tokens": 512, "train": "attention"}]})
    row = make_plan(whole, ready.teacher, ready.sites).stages[0]
    plain = stages.make_stage(ready, setup.build_student(ready), whole.stages[0], 0).parameters()
    assert row.trained_parameters == sum(p.numel() for p in plain.values())


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_linear_layers_are_found_in_any_family(family):
    """GPT-2's are stored the other way round, phi3's q, k and v are one layer."""
    student = limbeck.convert(make_tiny_model(family), mixer="gla").eval().requires_grad_(False)
    before = student(IDS).logits
    sites = find_attention_sites(make_tiny_model(family))
    inside = LoraAdapters(student, resolve_lora_targets(student, sites, "attention"), rank=2)
    assert torch.equal(student(IDS).logits, before)
    with torch.no_grad():
        for name, p in inside.parameters().items():
            if "lora_" in name:
                p.add_(0.05)
    after = student(IDS).logits
    assert (after - before).abs().max() > 1e-3
    inside.merge()
    torch.testing.assert_close(student(IDS).logits, after, rtol=1e-4, atol=1e-5)
    assert not [name for name, _ in student.named_modules() if "lora" in name]


def test_attention_means_the_converted_layers(recipe):
    ready = setup.prepare_job(recipe(student={"mixer": "gla", "softmax_layers": [0]}))
    names = resolve_lora_targets(ready.teacher, ready.sites, "attention")
    assert names
    assert not [name for name in names if ".0." in name]
    assert len(resolve_lora_targets(ready.teacher, ready.sites, ["q_proj"])) == 2


def test_unknown_targets_are_refused_with_the_names_there_are(recipe):
    made = recipe({"target_modules": ["q_prj"]})
    with pytest.raises(LimbeckError, match="did you mean 'q_proj'") as caught:
        pipeline.distill(made)
    assert "down_proj" in str(caught.value)
    assert not Path(made.out).exists()
    with pytest.raises(LimbeckError, match="did you mean 'attention'"):
        setup.prepare_job(recipe({"target_modules": "atention"}))


def test_without_peft_the_extra_is_named(recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    made = recipe()
    with pytest.raises(LimbeckError, match=r"limbeck\[peft\]"):
        pipeline.distill(made)
    assert not Path(made.out).exists()


def test_the_recipe_says_once_what_trains(recipe):
    made = recipe({"rank": 3})
    assert made.stages[1].train == "lora"
    assert Recipe.parse(json.loads(json.dumps(made.model_dump(mode="json")))) == made
    plain = recipe(stage={"lora": None}).model_dump(mode="json")  # as `--set stages.1.lora=...` changes a whole recipe
    assert plain["stages"][1]["train"] == "body"
    plain["stages"][1]["lora"] = {"rank": 2}
    assert Recipe.parse(plain).stages[1].train == "lora"
    assert recipe({}, {"train": "lora", "lora": None}).stages[1].lora.rank == 8
    with pytest.raises(LimbeckError, match="lora is set"):
        recipe({}, {"train": "attention"})
    with pytest.raises(LimbeckError, match=r"unknown key 'stages.1.lora.rnk', did you mean 'rank'"):
        recipe({"rnk": 3})
    with pytest.raises(LimbeckError, match="rank"):
        recipe({"rank": 0})
