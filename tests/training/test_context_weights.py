"""Tokens of stage 3 weighted by what the teacher loses on them without the far past."""

import contextlib

import pytest
import torch
from torch.nn import functional as F

import limbeck
from limbeck import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.data.packing import Batch
from limbeck.models import find_attention_sites
from limbeck.models.hooks import DistillationPair
from limbeck.testing import make_tiny_model
from limbeck.training import pipeline, setup
from limbeck.training.chunked_losses import TeacherLogitsFromHidden
from limbeck.training.context_weights import ContextWeights, build_windowed_teacher, find_window
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights

LENGTH = 24


def make_pair(mixer: str = "sliding_window", layers="all", **options) -> DistillationPair:
    torch.manual_seed(0)
    teacher = make_tiny_model("llama").double().eval().requires_grad_(False)
    for name, parameter in teacher.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            parameter.mul_(8)  # attention that is not flat, so that the window matters
    student = limbeck.convert(teacher, mixer, layers, options).requires_grad_(False)
    sites = [site for site in find_attention_sites(teacher) if layers == "all" or site.shape.layer in layers]
    return DistillationPair(teacher, student, sites, contextlib.nullcontext)


def make_batch(rows: int = 3) -> Batch:
    ids = torch.randint(3, 60, (rows, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    targets = ids[:, 1:].clone()
    targets[0, :5] = -100
    return Batch(ids[:, :-1].contiguous(), torch.arange(LENGTH).repeat(rows, 1), targets)


def weigh(pair: DistillationPair, batch: Batch, weight: float) -> torch.Tensor:
    head = pair.teacher.get_output_embeddings()
    hidden = pair.teacher.model(input_ids=batch.input_ids, use_cache=False).last_hidden_state
    return ContextWeights(pair, weight, chunk_size=7).weigh(batch, TeacherLogitsFromHidden(head, hidden))


def expected_weights(pair: DistillationPair, batch: Batch, weight: float, **window) -> torch.Tensor:
    """From the definition, in float64, by a windowed teacher that is converted for itself."""
    layers = [site.shape.layer for site in pair.sites]
    windowed = limbeck.convert(pair.teacher, "sliding_window", layers, window)
    log_q, log_p = (
        model(input_ids=batch.input_ids, use_cache=False).logits.log_softmax(-1) for model in (pair.teacher, windowed)
    )
    valid = batch.targets != -100
    raw = (1 + weight * (log_q.exp() * (log_q - log_p)).sum(-1)) * valid
    return raw * (valid.sum(1) / raw.sum(1))[:, None]


@pytest.mark.parametrize(
    ("mixer", "layers", "options", "window"),
    [
        ("sliding_window", "all", {"window": 4, "sinks": 1}, {"window": 4, "sinks": 1}),
        ("lolcats", "all", {"window": 5}, {"window": 5, "sinks": 0}),
        ("lolcats", [1], {"window": 5}, {"window": 5, "sinks": 0}),
        ("gla", "all", {}, {"window": 128, "sinks": 4}),
    ],
)
@torch.no_grad()
def test_weights_follow_what_the_window_costs_the_teacher(mixer, layers, options, window):
    pair, batch = make_pair(mixer, layers, **options), make_batch()
    weights = weigh(pair, batch, 50.0)
    valid = batch.targets != -100
    torch.testing.assert_close(weights.double(), expected_weights(pair, batch, 50.0, **window), atol=1e-4, rtol=1e-4)
    assert bool((weights[~valid] == 0).all())
    torch.testing.assert_close(weights.sum(1), valid.sum(1).to(weights.dtype))
    inside = weights[1, : window["window"]]
    torch.testing.assert_close(inside, inside[:1].expand_as(inside), atol=1e-5, rtol=1e-5)
    if window["window"] < LENGTH:
        assert weights[1].max() > 1.01 * weights[1].min()
    torch.testing.assert_close(weigh(pair, batch, 0.0), valid.to(weights.dtype))


def test_the_windowed_teacher_takes_no_memory():
    pair = make_pair("lolcats", window=5)
    windowed = build_windowed_teacher(pair)
    ours = dict(pair.teacher.named_parameters())
    for name, parameter in windowed.named_parameters():
        assert parameter is ours[name]
    assert not hasattr(pair.teacher.config, "limbeck")


def test_a_window_inside_a_hybrid_is_found():
    pair = make_pair("hybrid")
    mixer = next(iter(limbeck.models.get_mixers(pair.student).values()))
    found = find_window(mixer)
    assert found["window"] == next(m.window for m in mixer.modules() if isinstance(getattr(m, "window", None), int))


def test_the_gradient_of_the_stage_is_that_of_the_weighted_loss():
    pair, batch = make_pair("lolcats", window=5), make_batch()
    objectives = ObjectiveWeights(ce=0.5, kl=1.0)
    stage = LogitsStage(pair, objectives, train="attention", context=ContextWeights(pair, 20.0))
    for parameter in stage.parameters().values():
        parameter.requires_grad_(True)
    losses = stage.backward(batch, stage.count(batch))
    got = {name: p.grad.clone() for name, p in stage.parameters().items() if p.grad is not None}
    weights = expected_weights(pair, batch, 20.0, window=5, sinks=0)
    log_p = pair.student(input_ids=batch.input_ids, use_cache=False).logits.log_softmax(-1)
    log_q = pair.teacher(input_ids=batch.input_ids, use_cache=False).logits.log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    ce = F.nll_loss(log_p.flatten(0, 1), batch.targets.flatten(), ignore_index=-100, reduction="none").view_as(kl)
    loss = (weights * (kl + 0.5 * ce)).sum() / batch.n_targets
    expected = torch.autograd.grad(loss, [stage.parameters()[name] for name in got])
    assert float(losses["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert any(bool(gradient.abs().max() > 1e-4) for gradient in expected)
    for name, gradient in zip(got, expected):
        torch.testing.assert_close(
            got[name], gradient, atol=1e-6, rtol=1e-4, msg=lambda said, name=name: f"{name} {said}"
        )


def test_a_step_may_be_split():
    pair, batch = make_pair("lolcats", window=5), make_batch()
    stage = LogitsStage(pair, ObjectiveWeights(ce=1.0, kl=0.0), train="attention", context=ContextWeights(pair, 20.0))
    for parameter in stage.parameters().values():
        parameter.requires_grad_(True)
    counts = stage.count(batch)

    def gradients(parts: list[Batch]) -> list[torch.Tensor]:
        for part in parts:
            stage.backward(part, counts)
        found = [p.grad.clone() for p in stage.parameters().values() if p.grad is not None]
        for parameter in stage.parameters().values():
            parameter.grad = None
        return found

    whole, split = gradients([batch]), gradients([batch.select_rows(slice(0, 1)), batch.select_rows(slice(1, 3))])
    for one, other in zip(whole, split):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-6)


@pytest.fixture
def recipe(teacher_folder, corpus, tmp_path, own_cache):
    def make(name: str = "run", **changes) -> Recipe:
        stage = {"stage": "logits", "tokens": 256, "batch_size": 2, **changes}
        return Recipe.parse(
            {
                "teacher": str(teacher_folder),
                "student": {"mixer": "lolcats", "options": {"window": 4}},
                "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
                "stages": [stage],
                "evaluation": {"tokens": 128, "prompt": None, "new_tokens": 0},
                "trackers": [],
                "out": str(tmp_path / name),
            }
        )

    return make


def test_a_run_with_weights(recipe):
    plain, weighted = (pipeline.distill(recipe(str(c), context_weight=c)) for c in (0.0, 5.0))
    assert plain["stages"][0]["first_loss"] != weighted["stages"][0]["first_loss"]
    assert weighted["stages"][0]["context_weight"] == 5.0


def test_what_has_no_windowed_teacher_is_refused(recipe, tmp_path):
    cached = {"kl": 0.0, "top_kl": 1.0, "cache_teacher": "top-k"}
    for other in (cached, {"sharding": "full"}):
        with pytest.raises(LimbeckError, match="context_weight needs all of the teacher"):
            recipe(context_weight=1.0, **other)
    quantized = recipe(context_weight=1.0).model_copy(update={"teacher_bits": 8})
    loaded = setup.load_recipe_teacher(recipe(), torch.device("cpu"))
    with pytest.raises(LimbeckError, match="quantized to 8 bits"):
        setup.prepare_job(quantized, loaded)
    assert not (tmp_path / "run").exists()
