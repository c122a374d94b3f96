"""The further objectives of stage 3: what each is, what it must not depend on, and that it resumes exactly."""

import contextlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

import limbeck
from limbeck.core.errors import LimbeckError
from limbeck.core.objectives import Objectives
from limbeck.core.recipe import Recipe
from limbeck.data.packing import IGNORE_INDEX, Batch
from limbeck.models import find_attention_sites
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.hooks import DistillationPair
from limbeck.ops.matrix_rows import make_generators
from limbeck.testing import make_tiny_model
from limbeck.testing.tiny_models import VOCAB_SIZE
from limbeck.training import pipeline, setup, stages, trainer
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.objectives.registry import PLUGINS
from limbeck.training.objectives.stage import PREFIX, ObjectivesStage
from limbeck.training.objectives.stochastic_teacher import mix_by_likeness

SETTINGS: dict[str, dict[str, Any]] = {
    "on_policy": {"share": 0.5, "new_tokens": 8},
    "gram": {"weight": 0.7, "blocks": "all", "chunk": 6},
    "features": {"weight": 0.7, "blocks": "all", "block_weights": [1, 3]},
    "exits": {"weight": 0.4, "blocks": [0], "gamma": 1.4},
    "adapted_features": {"weight": 0.7, "blocks": "all", "rank": 3},
    "online_teacher": {"blocks": "all", "rank": 3},
    "stochastic_teacher": {"passes": 2, "dropout": 0.3},
    "teachers": {"names": ["the other"]},  # a folder, which a fixture fills in
}
each = pytest.mark.parametrize("name", SETTINGS)


def batch_of(*documents: int, rows: int = 1, seed: int = 3) -> Batch:
    """Documents of the given lengths packed into each row."""
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(3, VOCAB_SIZE, (rows, n), generator=generator) for n in documents]
    positions = torch.cat([torch.arange(n) for n in documents])[None].expand(rows, -1)
    targets = torch.cat([torch.cat([i[:, 1:], torch.full((rows, 1), IGNORE_INDEX)], 1) for i in ids], 1)
    return Batch(torch.cat(ids, 1), positions, targets)


@pytest.fixture(scope="module")
def other_teacher(tmp_path_factory, shared_tokenizer) -> str:
    """A second random teacher with the shared_tokenizer of the first."""
    folder = tmp_path_factory.mktemp("other") / "teacher"
    torch.manual_seed(5)
    model = make_tiny_model("llama")
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    model.save_pretrained(folder)
    shared_tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def _fill_in_the_other_teacher(other_teacher, monkeypatch):
    monkeypatch.setitem(SETTINGS, "teachers", {"names": [other_teacher]})


def make_stage(mixer: str, chosen: dict[str, Any], weights: ObjectiveWeights | None = None, **settings):
    teacher = make_tiny_model("llama").double().requires_grad_(False)
    torch.manual_seed(0)
    student = limbeck.convert(teacher, mixer).requires_grad_(False)
    pair = DistillationPair(teacher, student, find_attention_sites(teacher), contextlib.nullcontext)
    objectives = Objectives.model_validate(chosen)
    return ObjectivesStage(pair, weights or ObjectiveWeights(ce=0.5, kl=0.5), objectives, seed=7, **settings)


def gradients(stage: ObjectivesStage, batches: list[Batch]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Losses and gradients of a step of these micro-batches."""
    parameters, counts = stage.parameters(), {}
    for p in parameters.values():
        p.requires_grad_(True).grad = None
    for batch in batches:
        for key, value in stage.count(batch).items():
            counts[key] = counts.get(key, 0.0) + value
    losses: dict[str, float] = {}
    for batch in batches:
        for key, value in stage.backward(batch, counts).items():
            losses[key] = losses.get(key, 0.0) + float(value)
    found = {n: p.grad.clone() for n, p in parameters.items() if p.grad is not None}
    for p in parameters.values():
        p.requires_grad_(False).grad = None
    return losses, found


def split(batch: Batch) -> list[Batch]:
    return [batch.select_rows(slice(i, i + 1)) for i in range(len(batch.input_ids))]


def test_every_objective_is_tested_here():
    assert set(SETTINGS) == set(PLUGINS) == set(Objectives.model_fields)


@each
def test_no_gradient_depends_on_how_a_step_is_split(name):
    stage = make_stage("gla", {name: SETTINGS[name]})
    batch = batch_of(9, 14, rows=4)
    batch.targets[0, :7] = IGNORE_INDEX  # rows of unlike weight
    whole, parts = gradients(stage, [batch]), gradients(stage, split(batch))
    assert whole[0] == pytest.approx(parts[0], rel=1e-6)
    assert whole[1].keys() == parts[1].keys()
    assert any(float(g.abs().max()) > 1e-9 for g in whole[1].values())
    for key, gradient in whole[1].items():
        assert torch.allclose(gradient, parts[1][key], atol=1e-8), key


@pytest.mark.parametrize("name", ["gram", "features", "exits", "adapted_features"])
def test_no_value_depends_on_the_length_or_the_packing(name):
    """The documents of a row again behind them, and each in a row of its own: the mean over tokens is the same."""
    stage = make_stage("gla", {name: SETTINGS[name]})
    packed = batch_of(7, 7, rows=2)
    twice = Batch(*(torch.cat([x, x], 1) for x in (packed.input_ids, packed.position_ids, packed.targets)))
    alone = Batch(*(x.reshape(4, 7) for x in (packed.input_ids, packed.position_ids, packed.targets)))
    values = [gradients(stage, [batch])[0] for batch in (packed, twice, alone)]
    assert values[0][name] > 1e-4
    for other in values[1:]:
        assert other[name] == pytest.approx(values[0][name], rel=1e-5)
        assert other["loss"] == pytest.approx(values[0]["loss"], rel=1e-5)


@pytest.mark.parametrize("name", ["gram", "features", "adapted_features"])
def test_a_student_that_equals_its_teacher_has_no_loss(name):
    losses, found = gradients(make_stage("softmax", {name: SETTINGS[name]}), [batch_of(9, 14, rows=2)])
    assert losses[name] == pytest.approx(0, abs=1e-12)
    assert all(float(g.abs().max()) < 1e-9 for key, g in found.items() if key.startswith(PREFIX))


def outputs_of_blocks(model, batch: Batch) -> list[Tensor]:
    """Outputs of both blocks, by transformers itself: the second one's before the final norm."""
    seen: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        for layer in model.model.layers
    ]
    run_backbone(model, batch)
    for hook in hooks:
        hook.remove()
    return seen


def expected_value(name: str, stage: ObjectivesStage, batch: Batch) -> Tensor:
    """The objective as its docstring writes it, one token, pair or document after the other."""
    ours = outputs_of_blocks(stage.student, batch)
    theirs = [x.detach() for x in outputs_of_blocks(stage.teacher, batch)]
    one, total = stage.objectives[name], torch.zeros((), dtype=torch.float64)
    places = [(b, t) for b in range(len(batch.input_ids)) for t in range(batch.input_ids.shape[1])]
    if name == "gram":
        document = (batch.position_ids == 0).cumsum(1)
        for s, t in zip(ours, theirs):
            for b, i in places:
                near = [j for j in range(s.shape[1]) if document[b, j] == document[b, i]]
                near = [j for j in near if batch.position_ids[b, j] // 6 == batch.position_ids[b, i] // 6]
                gaps = [F.cosine_similarity(x[b, i], x[b, near], dim=-1) for x in (s, t)]
                total = total + (gaps[0] - gaps[1]).square().mean() / 2
    elif name == "features":
        for weight, matrix, s, t in zip((0.25, 0.75), one.maps, ours, theirs):
            for b, i in places:
                total = total + weight * (matrix @ s[b, i] - t[b, i]).square().sum() / t[b, i].square().sum()
    elif name == "adapted_features":
        for down, error, up, s, t in zip(one.from_teacher, one.from_error, one.up, ours, theirs):
            for b, i in places:
                target = t[b, i] + (t[b, i] @ down + (s[b, i].detach() - t[b, i]) @ error) @ up
                distance = (s[b, i] - target).square().sum() + (target - t[b, i]).square().sum()
                total = total + distance / t[b, i].square().sum() / 2
    elif name == "exits":
        (matrix,) = one.maps
        log_p = LMHead(stage.student)(stage.student.model.norm(ours[0] @ matrix.T).flatten(0, 1)).log_softmax(-1)
        q = LMHead(stage.teacher)(run_backbone(stage.teacher, batch).detach().flatten(0, 1)).softmax(-1).detach()
        labels = batch.targets.flatten()
        for n in (labels != IGNORE_INDEX).nonzero()[:, 0].tolist():
            y = int(labels[n])
            others = (q[n] * log_p[n]).sum() - q[n, y] * log_p[n, y]
            total = total - (1 + q[n, y]) ** 1.4 * log_p[n, y] - others
        return total / batch.n_targets
    return total / len(places)


@pytest.mark.parametrize("name", ["gram", "features", "exits", "adapted_features"])
def test_value_and_gradients_are_those_of_the_formula(name):
    """With parameters that have moved away from where they began, differentiated by torch in float64."""
    stage = make_stage("gla", {name: SETTINGS[name]}, ObjectiveWeights(ce=1, kl=0))
    batch = batch_of(9, 8)
    generator = torch.Generator().manual_seed(1)
    for p in stage.objectives[name].parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)
    losses, found = gradients(stage, [batch])
    _, plain = gradients(make_stage("gla", {}, ObjectiveWeights(ce=1, kl=0)), [batch])
    parameters = stage.parameters()
    for p in parameters.values():
        p.requires_grad_(True)
    value = expected_value(name, stage, batch)
    assert losses[name] == pytest.approx(float(value.detach()), rel=1e-5)
    assert losses["loss"] == pytest.approx(losses["ce"] + SETTINGS[name]["weight"] * losses[name])
    slopes = torch.autograd.grad(SETTINGS[name]["weight"] * value, list(parameters.values()), allow_unused=True)
    for (key, p), slope in zip(parameters.items(), slopes):
        nothing = torch.zeros_like(p)
        expected = plain.get(key, nothing) + (nothing if slope is None else slope)
        assert torch.allclose(found.get(key, nothing), expected, atol=1e-6), key


def test_the_enhanced_cross_entropy_with_exponent_one_is_ce_and_kl_and_the_teachers_entropy():
    batch = batch_of(9, 8)
    stages = [
        make_stage("gla", {}, weights) for weights in (ObjectiveWeights(kl=0, enhanced=1), ObjectiveWeights(ce=1, kl=1))
    ]
    (enhanced, ours), (both, theirs) = (gradients(stage, [batch]) for stage in stages)
    teacher = stages[0].teacher
    log_q = LMHead(teacher)(run_backbone(teacher, batch).flatten(0, 1)).log_softmax(-1)
    rows = (batch.targets.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    entropy = -float((log_q.exp() * log_q).sum(-1)[rows].mean())
    assert enhanced["loss"] == pytest.approx(both["loss"] + entropy, rel=1e-6)
    for key, gradient in ours.items():
        assert torch.allclose(gradient, theirs[key], atol=1e-6), key


# ---------------------------------------------------------------------- teachers that are not as they were


def test_a_teacher_that_learns_along_begins_as_the_teacher_and_then_comes_nearer_to_the_student():
    stage = make_stage("gla", {"online_teacher": {"blocks": "all", "rank": 3, "ce": 0, "kl": 1}})
    batch = batch_of(9, 14, rows=2)
    before = {name: p.clone() for name, p in stage.teacher.named_parameters()}
    plain, _ = gradients(make_stage("gla", {}), [batch])
    first, found = gradients(stage, [batch])
    assert first["loss"] == pytest.approx(plain["loss"], rel=1e-9)
    modules = {name: p for name, p in stage.parameters().items() if name.startswith(PREFIX)}
    for _ in range(20):
        losses, found = gradients(stage, [batch])
        for name, p in modules.items():
            p.data -= 2.0 * found[name]
    assert losses["online_teacher"] < 0.8 * first["online_teacher"]
    assert losses["kl"] < first["kl"], "the student has not moved, its teacher has"
    assert all(torch.equal(p, before[name]) for name, p in stage.teacher.named_parameters())


def test_the_modules_of_a_teacher_have_the_gradient_of_their_own_loss():
    stage = make_stage("gla", {"online_teacher": {"blocks": [0], "rank": 3, "ce": 0.4, "kl": 0.6}})
    batch, one = batch_of(9, 8), stage.objectives["online_teacher"]
    one.up[0].data += 0.1
    _, found = gradients(stage, [batch])
    for p in one.parameters():
        p.requires_grad_(True)
    hook = stage.teacher.model.layers[0].register_forward_hook(
        lambda m, a, out: out + out @ one.down[0] @ one.up[0] if torch.is_tensor(out) else None
    )
    log_q = LMHead(stage.teacher)(run_backbone(stage.teacher, batch).flatten(0, 1)).log_softmax(-1)
    hook.remove()
    log_p = LMHead(stage.student)(run_backbone(stage.student, batch).flatten(0, 1)).log_softmax(-1).detach()
    rows = (batch.targets.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    labels = batch.targets.flatten()[rows]
    loss = 0.4 * F.nll_loss(log_q[rows], labels) + 0.6 * (log_p.exp() * (log_p - log_q)).sum(-1)[rows].mean()
    for name, slope in zip(dict(one.named_parameters()), torch.autograd.grad(loss, list(one.parameters()))):
        assert torch.allclose(found[f"{PREFIX}online_teacher.{name}"], slope, atol=1e-7), name


def test_passes_are_filtered_and_weighted_by_their_likeness_to_the_student():
    student = torch.tensor([1.0, 0.0])[None, None]
    passes = torch.tensor([[1.0, 0.1], [1.0, 0.2], [-1.0, 5.0]])[:, None, None]
    mixed = mix_by_likeness(student, passes, 0.5)[0, 0]
    cosines = [F.cosine_similarity(student[0, 0], p[0, 0], dim=0) for p in passes[:2]]  # the third is filtered out
    weights = torch.stack(cosines).div(0.5).softmax(0)
    assert torch.allclose(mixed, weights @ passes[:2, 0, 0])
    alike = passes[:1].expand(3, -1, -1, -1)
    assert torch.allclose(mix_by_likeness(student, alike, 0.1), passes[0])


def test_dropout_changes_the_teacher_and_almost_none_leaves_it_as_it_is():
    batch = batch_of(9, 14, rows=2)
    plain, _ = gradients(make_stage("gla", {}), [batch])
    losses = [
        gradients(make_stage("gla", {"stochastic_teacher": {"passes": 2, "dropout": rate}}), [batch])[0]
        for rate in (1e-9, 0.3)
    ]
    assert losses[0]["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert losses[1]["loss"] != pytest.approx(plain["loss"], rel=1e-3)


def test_two_teachers_are_averaged_or_the_better_one_is_taken(other_teacher):
    batch = batch_of(9, 8)
    rules = ("average", "best")
    stages = [make_stage("gla", {"teachers": {"names": [other_teacher], "rule": rule}}) for rule in rules]
    losses = [gradients(stage, [batch])[0] for stage in stages]
    stage = stages[0]
    models = [stage.teacher, *(one.double() for one in stage.objectives["teachers"].others), stage.student]
    logits = [LMHead(model)(run_backbone(model, batch).flatten(0, 1)) for model in models]
    rows = (batch.targets.flatten() != IGNORE_INDEX).nonzero()[:, 0]
    labels = batch.targets.flatten()[rows]
    q = [x[rows].softmax(-1) for x in logits[:2]]
    log_p = logits[2][rows].log_softmax(-1)
    best = min(q, key=lambda one: float(F.nll_loss(one.log(), labels)))
    for wanted, found in zip((sum(q) / 2, best), losses):
        assert found["kl"] == pytest.approx(float((wanted * (wanted.log() - log_p)).sum(-1).mean()), rel=1e-4)


class HeldOut:
    """One held-out sequence."""

    n_sequences, length = 1, 17

    def batch(self, position: int, size: int) -> Batch:
        return batch_of(17, rows=size, seed=9)


def test_the_policy_learns_what_the_reward_says():
    """REINFORCE by hand over three steps: score times how much more the held-out loss fell than on average."""
    stage = make_stage("gla", {"teachers": SETTINGS["teachers"]})
    policy = stage.objectives["teachers"]
    for p in stage.parameters().values():
        p.requires_grad_(True)
    observed: list[Tensor] = []
    original = policy._draw
    policy._draw = lambda done, seen: (observed.append(seen.detach()), original(done, seen))[1]
    losses, gradient = [], []
    for step in range(3):
        policy.theta.grad = policy.bias.grad = None
        policy.begin_step(HeldOut())
        losses.append(float(policy.held_out_loss))
        gradient.append(policy.bias.grad)
        batch = batch_of(9, 8, rows=3, seed=step)  # odd, so that the scores of the rows cannot cancel
        stage.backward(batch, stage.count(batch))
        with torch.no_grad():
            for p in stage.student.parameters():
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step), dtype=p.dtype)
    assert gradient[0] is None, "nothing was selected before the first step"
    assert float(gradient[1].abs().max()) == 0, "the first reward is its own mean"
    rewards = [losses[0] - losses[1], losses[1] - losses[2]]
    generators = make_generators(batch_of(9, 8, rows=3, seed=1).input_ids, policy.seed)
    draws = torch.stack([torch.rand(2, generator=one) for one in generators])
    chance = (observed[1].double() @ policy.theta + policy.bias).sigmoid()
    score = ((draws < chance).double() - chance).sum(0)
    assert float(score.abs().max()) > 0.1
    assert torch.allclose(gradient[2], -(rewards[1] - rewards[0]) * score / 3, atol=1e-7)
    assert float(policy.seen) == 3


# ---------------------------------------------------------------------- runs


@pytest.fixture
def recipe(teacher_folder, corpus, tmp_path, own_cache):
    def make(name: str, objectives: dict[str, Any] | None, **changes) -> Recipe:
        stage = {"stage": "logits", "tokens": 256, "batch_size": 2, "micro_batch_size": 1, "ce": 1, **changes}
        raw = {
            "name": "tiny",
            "teacher": str(teacher_folder),
            "student": {"mixer": "gla"},
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": [stage if objectives is None else {**stage, "objectives": objectives}],
            "evaluation": {"tokens": 64, "prompt": None, "exam_documents": 0},
            "checkpoint_seconds": 1e-6,
            "trackers": [],
            "out": str(tmp_path / name),
        }
        return Recipe.parse(raw)

    return make


def weights_of(made: Recipe) -> dict[str, Tensor]:
    return load_file(Path(made.out) / "student" / "model.safetensors")


def stop_at(monkeypatch, made: Recipe, stop: int) -> None:
    """Run a recipe and break off before the given step, as a kill does."""
    original = trainer.Trainer.train_step

    def step(self):
        if self.state["step"] == stop:
            raise KeyboardInterrupt
        return original(self)

    with monkeypatch.context() as patch:
        patch.setattr(trainer.Trainer, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            pipeline.distill(made, measure_times=False)


FEATURES_AND_WRITING = ("on_policy", "gram", "features", "exits", "adapted_features")
together = pytest.mark.parametrize(
    "names",
    [
        (*FEATURES_AND_WRITING, "online_teacher"),
        ("teachers",),
        pytest.param(("stochastic_teacher",), marks=pytest.mark.slow),  # which remembers nothing
    ],
    ids=lambda names: names[-1],
)


@together
def test_an_interrupted_run_ends_with_the_same_weights(names, recipe, monkeypatch):
    """All that fit together, in one run; what learns along is in the checkpoints, and none of it in the student."""
    chosen = {name: SETTINGS[name] for name in names}
    whole, broken = recipe("whole", chosen), recipe("broken", chosen)
    summary = pipeline.distill(whole, measure_times=False, plot_curves=False)
    stop_at(monkeypatch, broken, 2)
    pipeline.distill(broken, measure_times=False, plot_curves=False)
    ours, theirs = weights_of(whole), weights_of(broken)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not any(name.startswith(PREFIX) for name in ours)
    lines = [
        [{k: v for k, v in json.loads(x).items() if k != "tokens_per_second"} for x in path.read_text().splitlines()]
        for path in (Path(made.out) / "metrics.jsonl" for made in (whole, broken))
    ]
    assert lines[0] == lines[1]
    assert set(names) <= lines[0][0]["losses"].keys()
    assert summary["stages"][0]["steps"] == 4


def test_a_recipe_without_objectives_makes_the_stage_that_it_always_made(recipe):
    """The plug-ins' stage, given none, is the plain one bit for bit; and a recipe without them gets the plain one."""
    batch = batch_of(9, 14, rows=2)
    ours = make_stage("gla", {})
    plain = LogitsStage(DistillationPair(ours.teacher, ours.student, ours.sites, ours.autocast), ours.weights)
    found = [gradients(stage, [batch]) for stage in (ours, plain)]
    assert found[0][0]["loss"] == found[1][0]["loss"]
    assert all(torch.equal(gradient, found[1][1][name]) for name, gradient in found[0][1].items())
    job = setup.prepare_job(recipe("plain", None))
    assert type(stages.make_stage(job, setup.build_student(job), job.recipe.stages[0], 0)) is LogitsStage


def test_what_cannot_be_is_refused_before_anything_is_written(recipe, tmp_path, teacher_folder):
    stranger = tmp_path / "stranger"
    shutil.copytree(teacher_folder, stranger)
    rules = json.loads((stranger / "tokenizer.json").read_text())
    rules["model"]["merges"] = rules["model"]["merges"][:-1]
    (stranger / "tokenizer.json").write_text(json.dumps(rules))
    short = tmp_path / "short"
    shutil.copytree(teacher_folder, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    for objectives, complaint in {
        "gram": ({"gram": {"blocks": "0,7"}}, "the teacher has 2 blocks"),
        "weights": ({"features": {"block_weights": [1, 2], "blocks": [1]}}, "block_weights has 2 numbers"),
        "prompt": ({"on_policy": {"new_tokens": 32}}, "of sequences of 32 tokens"),
        "tokens": ({"teachers": {"names": [str(stranger)]}}, "has another tokenizer"),
        "length": ({"teachers": {"names": [str(short)]}}, "sequences of 32 tokens exceed the maximum of '.*', 16"),
    }.values():
        made = recipe("refused", objectives)
        with pytest.raises(LimbeckError, match=complaint):
            pipeline.distill(made)
        assert not Path(made.out).exists()
    two = {"online_teacher": {}, "stochastic_teacher": {}}
    for objectives, changes, complaint in (
        (two, {}, "set one of them"),
        ({"online_teacher": {}}, {"kl": 0}, "has to be above 0"),
        ({"gram": {}}, {"sharding": "full"}, "cannot be combined with sharding"),
        ({"gram": {}}, {"cache_teacher": "top-k", "kl": 0, "top_kl": 1}, "cannot be combined with cache_teacher"),
        ({"gramm": {}}, {}, "did you mean 'gram'"),
    ):
        with pytest.raises(LimbeckError, match=complaint):
            recipe("refused", objectives, **changes)


# ---------------------------------------------------------------------- several together


def test_modules_in_the_teacher_learn_from_their_own_loss_alone():
    """Other objectives look at the teacher's blocks, and no gradient goes through these into the modules."""
    both = {"online_teacher": SETTINGS["online_teacher"], "features": {"weight": 5, "blocks": "all", "loss": "mse"}}
    batch = batch_of(9, 14, rows=2)
    alone, together = (
        gradients(make_stage("gla", chosen), [batch])[1]
        for chosen in ({"online_teacher": SETTINGS["online_teacher"]}, both)
    )
    modules = [name for name in alone if name.startswith(f"{PREFIX}online_teacher.up")]
    assert len(modules) == 2
    for name in modules:
        assert float(alone[name].abs().max()) > 1e-9
        assert torch.equal(alone[name], together[name]), name


def test_what_one_objective_draws_says_nothing_of_another():
    """Of the sequences that are left to the text, each teacher is selected as often as the policy says."""
    chosen = {"on_policy": {"share": 0.5, "new_tokens": 6}, "teachers": SETTINGS["teachers"]}
    stage = make_stage("gla", chosen)
    batch = batch_of(16, rows=800)
    text = batch.select_rows(~stage.objectives["on_policy"].choose_rows(batch))
    rows = len(text.input_ids)
    with torch.no_grad():
        weights = stage.objectives["teachers"]._draw(SimpleNamespace(batch=text), torch.zeros(rows, 2, 3))
    # probability one half each, and both where none is selected: one alone in a quarter of the sequences
    for teacher in range(2):
        assert float((weights[:, teacher] == 1).double().mean()) == pytest.approx(0.25, abs=4 * (3 / 16 / rows) ** 0.5)


def test_the_policys_gradient_is_scaled_as_all_others_are():
    """The trainer divides every gradient by the loss scale of fp16, those that no backward pass made too."""
    stage = make_stage("gla", {"teachers": SETTINGS["teachers"]})
    policy, found = stage.objectives["teachers"], []
    for scale in (1.0, 1024.0):
        policy.held_out_loss.fill_(9.0)
        policy.baseline.fill_(0.5)
        policy.seen.fill_(2)
        policy.bias_score.copy_(torch.tensor([1.0, -3.0]))
        stage.loss_scale = scale
        stage.begin_step(HeldOut())
        found.append(policy.bias.grad.clone())
    assert float(found[0].abs().min()) > 0
    assert torch.equal(found[1], 1024 * found[0])


@pytest.mark.parametrize(("share", "expected"), [(1, {"loss", "on_policy"}), (1e-9, {"loss", "ce", "kl", "gram"})])
def test_a_step_logs_no_mean_of_nothing(share, expected):
    """A step that has no text, or nothing that the student wrote, has no loss on it: not one of zero."""
    stage = make_stage("gla", {"on_policy": {"share": share, "new_tokens": 6}, "gram": {}})
    losses = gradients(stage, [batch_of(9, 14, rows=2)])[0]
    assert losses.keys() - {"teacher_ce", "agree"} == expected
    assert all(value > 0 for value in losses.values())


# ---------------------------------------------------------------------- on-policy


def written_by_hand(stage: ObjectivesStage, row: Batch) -> tuple[Tensor, Tensor]:
    """The student's and the teacher's log probabilities where the student wrote, each pass over the document alone."""
    written = stage.objectives["on_policy"].write(row)
    begin = int((row.position_ids[0, : -stage.objectives["on_policy"].settings.new_tokens] == 0).nonzero()[-1])
    ids, rows = written.input_ids[:, begin:], (written.targets[0, begin:] != IGNORE_INDEX).nonzero()[:, 0]
    return tuple(model(input_ids=ids).logits[0, rows].log_softmax(-1) for model in (stage.student, stage.teacher))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_on_policy_is_the_divergence_on_what_the_student_wrote(divergence):
    """Value and gradients against the formula, over the last document alone, differentiated by torch."""
    stage = make_stage("gla", {"on_policy": {"share": 1, "new_tokens": 6, "divergence": divergence, "beta": 0.3}})
    batch = batch_of(9, 14, rows=2)
    losses, found = gradients(stage, [batch])
    parameters = stage.parameters()
    for p in parameters.values():
        p.requires_grad_(True)
    total = torch.zeros((), dtype=torch.float64)
    for row in split(batch):
        log_p, log_q = written_by_hand(stage, row)
        log_q = log_q.detach()
        log_m = (0.3 * log_q.exp() + 0.7 * log_p.exp()).log()
        pairs = {
            "forward": [(1.0, log_q, log_p)],
            "reverse": [(1.0, log_p, log_q)],
            "jsd": [(0.3, log_q, log_m), (0.7, log_p, log_m)],
        }
        total = total + sum(w * (a.exp() * (a - b)).sum() for w, a, b in pairs[divergence])
    total = total / 12
    assert losses["loss"] == pytest.approx(float(total.detach()), rel=1e-5)
    expected = dict(zip(parameters, torch.autograd.grad(total, list(parameters.values()), allow_unused=True)))
    for key, gradient in found.items():
        assert torch.allclose(gradient, expected[key], atol=1e-6), key


def test_on_policy_writes_what_the_student_says_and_stays_in_its_document():
    """The tokens are those that the whole student, without a cache, has at the drawn quantiles."""
    stage = make_stage("gated_deltanet", {"on_policy": {"share": 1, "new_tokens": 6}})
    one = stage.objectives["on_policy"]
    batch = batch_of(5, 11, rows=3)
    written = one.write(batch)
    assert torch.equal(written.input_ids[:, :10], batch.input_ids[:, :10])
    assert torch.equal(written.position_ids, batch.position_ids)
    other = Batch(batch.input_ids.clone(), batch.position_ids, batch.targets)
    assert torch.equal(written.input_ids, one.write(other).input_ids), "the same tokens draw the same numbers"
    for row, sequence in zip(split(batch), written.input_ids):
        (generator,) = make_generators(row.input_ids, one.seed + 1)
        for at, draw in zip(range(10, 16), torch.rand(6, generator=generator, dtype=torch.float64)):
            logits = stage.student(input_ids=sequence[None, 5:at]).logits[0, -1]
            assert int((logits.double().softmax(-1).cumsum(-1) < draw).sum()) == int(sequence[at])


def test_a_student_that_equals_its_teacher_has_nothing_to_learn_from_what_it_writes():
    stage = make_stage("softmax", {"on_policy": {"share": 1, "new_tokens": 6}})
    assert gradients(stage, [batch_of(9, 14, rows=2)])[0]["on_policy"] == pytest.approx(0, abs=1e-9)


def test_the_share_of_sequences_is_what_was_asked_for():
    stage = make_stage("gla", {"on_policy": {"share": 0.3, "new_tokens": 6}})
    chosen = stage.objectives["on_policy"].choose_rows(batch_of(16, rows=2000))
    assert float(chosen.double().mean()) == pytest.approx(0.3, abs=0.03)
