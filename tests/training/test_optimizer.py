"""What moves which weights, and what scales whose gradients down."""

import contextlib

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

import limbeck
from limbeck.core.stage_settings import Hidden as Settings
from limbeck.data.packing import Batch
from limbeck.models import find_attention_sites
from limbeck.models.backbone import supports_packed_positions
from limbeck.models.hooks import DistillationPair
from limbeck.testing import make_tiny_model
from limbeck.testing.tiny_models import LLAMA_CONFIG, VOCAB_SIZE
from limbeck.training.alignment import HiddenStage, MatrixStage
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.optim import StageOptimizer, clip_gradients, get_lr_multiplier
from limbeck.training.stage_protocol import get_clip_groups


def moved_by(model: nn.Module, **settings) -> dict[str, tuple[str, float]]:
    """Of each parameter which optimiser moves it, and its weight decay."""
    parameters = dict(model.named_parameters())
    names = {id(p): name for name, p in parameters.items()}
    settings = Settings(stage="hidden", tokens=1, weight_decay=0.1, **settings)
    parts = StageOptimizer(parameters, dict.fromkeys(parameters, 1e-3), settings, model).optimizers
    groups = [(type(part).__name__, group) for part in parts for group in part.param_groups]
    return {names[id(p)]: (kind, group["weight_decay"]) for kind, group in groups for p in group["params"]}


class Unusual(nn.Module):
    """Names that say nothing, a table and a head found by asking, and numbers that are no linear map."""

    def __init__(self):
        super().__init__()
        self.words, self.output_layer = nn.Embedding(30, 8), nn.Linear(8, 30, bias=False)
        self.proj = nn.Linear(8, 8)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(8, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 8, bias=False)})
        self.mixer = nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)
        self.A_log, self.kernel = nn.Parameter(torch.ones(8, 4)), nn.Parameter(torch.ones(2, 8, 8))

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.output_layer


def test_muon_takes_linear_maps_and_nothing_else():
    model = nn.ModuleDict({"inner": Unusual()})
    model.get_input_embeddings = model["inner"].get_input_embeddings
    model.get_output_embeddings = model["inner"].get_output_embeddings
    found = moved_by(model, optimizer="muon")
    assert [name for name, (kind, _) in found.items() if kind == "Muon"] == ["inner.proj.weight"]
    decays = {name.removeprefix("inner.") for name, (_, decay) in found.items() if decay}
    lora = {f"lora_{x}.default.weight" for x in "AB"}
    assert decays == {"words.weight", "output_layer.weight", "proj.weight", "kernel", *lora}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "qwen3_moe"])
def test_muon_in_real_families(family):
    model = limbeck.convert(make_tiny_model(family), "gated_deltanet", preset="published")
    found = {name for name, (kind, _) in moved_by(model, optimizer="muon").items() if kind == "Muon"}
    ends = {
        id(p) for table in (model.get_input_embeddings(), model.get_output_embeddings()) for p in table.parameters()
    }
    for name, p in model.named_parameters():
        inside = id(p) not in ends and ".mixer." not in name and p.dim() == 2
        inside = inside and not any(part in name for part in ("embed", "wpe", "mlp.gate.weight"))
        assert (name in found) == inside, name


def test_a_router_of_a_linear_layer_is_none_either():
    config = AutoConfig.for_model("mixtral", **{**LLAMA_CONFIG, "num_local_experts": 4, "num_experts_per_tok": 2})
    model = AutoModelForCausalLM.from_config(config)
    for layer in model.model.layers:
        layer.mlp.old_router = nn.Linear(48, 4, bias=False)  # as families before had it
    found = {name for name, (kind, _) in moved_by(model, optimizer="muon").items() if kind == "Muon"}
    assert found
    assert not [name for name in found if "router" in name or "gate.weight" in name]


def learn(layers: list[int], kind: type, spike: float, steps: int = 4) -> dict[str, torch.Tensor]:
    """The weights of layer 1 after some steps of stage 1 or 2, layer 0's gradients so many times too large."""
    teacher = make_tiny_model("llama").requires_grad_(False)
    student = limbeck.convert(teacher, "gated_deltanet").requires_grad_(False)
    sites = [site for site in find_attention_sites(teacher) if site.shape.layer in layers]
    stage = kind(DistillationPair(teacher, student, sites, contextlib.nullcontext))
    parameters = stage.parameters()
    for p in parameters.values():
        p.requires_grad_(True)
    settings = Settings(stage="hidden", tokens=1, max_grad_norm=0.01)
    optimizer = StageOptimizer(parameters, dict.fromkeys(parameters, 1e-2), settings, student)
    optimizer.set_lr_multiplier(1.0)
    for step in range(steps):
        ids = torch.randint(3, VOCAB_SIZE, (2, 40), generator=torch.Generator().manual_seed(step))
        batch = Batch(ids, torch.arange(40).expand(2, -1), ids)
        stage.backward(batch, stage.count(batch))
        if step == 2:
            for name, p in parameters.items():
                if "layers.0." in name and p.grad is not None:
                    p.grad.mul_(spike)
        norms = [p.grad.norm() for p in parameters.values() if p.grad is not None]
        norm = clip_gradients(parameters, settings.max_grad_norm, clip_groups=get_clip_groups(stage))
        assert float(norm) == pytest.approx(float(torch.stack(norms).norm()), rel=1e-5)  # of all, before
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in parameters.items() if "layers.1." in name}


@pytest.mark.parametrize("kind", [MatrixStage, HiddenStage])
@pytest.mark.parametrize(("layers", "spike"), [([1], 1.0), ([0, 1], 1e4), ([0, 1], 0.0)])
def test_what_a_layer_learns_does_not_depend_on_the_others(kind, layers, spike):
    expected, found = learn([0, 1], kind, 1.0), learn(layers, kind, spike)
    assert expected.keys() == found.keys()
    assert expected
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_each_layer_is_clipped_to_the_largest_norm_and_small_ones_are_left():
    parameters = {name: nn.Parameter(torch.zeros(3)) for name in ("a.x", "a.y", "b.x", "c.x")}
    for name, size in zip(parameters, (3.0, 4.0, 0.1)):
        parameters[name].grad = torch.tensor([size, 0.0, 0.0])
    norm = clip_gradients(parameters, 1.0, clip_groups=[["a.x", "a.y"], ["b.x"], ["c.x"]])
    assert float(norm) == pytest.approx((25 + 0.01) ** 0.5)
    assert [float(p.grad[0]) for p in parameters.values() if p.grad is not None] == pytest.approx([0.6, 0.8, 0.1])
    assert clip_gradients({"c.x": parameters["c.x"]}, 1.0, clip_groups=[["c.x"]]) == 0.0


def test_stage_three_learns_together():
    teacher = make_tiny_model("llama")
    student = limbeck.convert(teacher, "gla")
    both = DistillationPair(teacher, student, find_attention_sites(teacher), contextlib.nullcontext)
    assert get_clip_groups(LogitsStage(both, ObjectiveWeights())) == []


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 9, 40])
def test_wsd_comes_down_however_few_the_steps(steps):
    settings = Settings(
        stage="hidden", tokens=1, lr_scheduler="wsd", warmup_ratio=0.0, decay_ratio=0.1, min_lr_ratio=0.05
    )
    rates = [get_lr_multiplier(step, steps, settings) for step in range(steps)]
    assert rates[0] == 1
    assert rates[-1] == pytest.approx(0.05)


def taught(weights: ObjectiveWeights, batch: Batch):
    """Sums and gradients of a step of stage 3, and how often the teacher ran."""
    teacher = make_tiny_model("gemma2").double().requires_grad_(False)
    torch.manual_seed(0)
    student = limbeck.convert(teacher, "gla")
    calls = []
    teacher.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    supports_packed_positions(teacher)
    stage = LogitsStage(
        DistillationPair(teacher, student, find_attention_sites(teacher), contextlib.nullcontext), weights
    )
    calls.clear()
    for p in stage.parameters().values():
        p.requires_grad_(True)
    sums = stage.backward(batch, stage.count(batch))
    ran = len(calls)
    return stage, sums, {name: p.grad for name, p in stage.parameters().items()}, ran


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_teacher_that_no_objective_asks_does_not_run(temperature):
    ids = torch.randint(3, VOCAB_SIZE, (2, 30), generator=torch.Generator().manual_seed(0))
    batch = Batch(ids, torch.arange(30).expand(2, -1), ids.roll(-1, 1))
    stage, sums, slopes, ran = taught(ObjectiveWeights(ce=1.0, kl=0.0, temperature=temperature), batch)
    _, wanted, expected, other = taught(ObjectiveWeights(ce=1.0, kl=1e-12), batch)
    assert (ran, other) == (0, 1)
    assert sums.keys() == {"ce", "loss"}
    assert {"kl", "agree", "teacher_ce"} <= wanted.keys()
    assert float(sums["loss"]) == float(sums["ce"]) == float(wanted["ce"])
    assert all(torch.allclose(slopes[name], expected[name], rtol=1e-4, atol=1e-6) for name in expected)
    assert {"kl", "reverse_kl", "agree", "ce"} <= stage.evaluate(batch).keys()  # held-out text is compared all the same
