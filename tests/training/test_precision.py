"""What must be exact stays so under autocast: normal equations, divergences, states, and what is measured."""

import functools

import pytest
import torch

import limbeck
from limbeck.core.errors import LimbeckError
from limbeck.data.packing import Batch
from limbeck.evaluation.hidden_states import linear_cka
from limbeck.models import find_attention_sites
from limbeck.models.backbone import supports_packed_positions
from limbeck.models.hooks import DistillationPair
from limbeck.testing import MixerVariant, make_tiny_model
from limbeck.testing.contract import sample_inputs
from limbeck.testing.tiny_models import VOCAB_SIZE
from limbeck.training.alignment import HiddenStage, MatrixStage
from limbeck.training.calibration import RIDGES, NormalEquations
from limbeck.training.chunked_losses import TeacherLogitsFromHidden, logit_losses
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights

HALVES = [torch.bfloat16, torch.float16]


def half(dtype: torch.dtype, enabled: bool = True):
    return functools.partial(torch.autocast, "cpu", dtype=dtype, enabled=enabled)


def batch_of(rows: int = 4, length: int = 100) -> Batch:
    ids = torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(3))
    return Batch(ids, torch.arange(length).expand(rows, -1), torch.cat([ids[:, 1:], ids[:, :1] * 0 - 100], 1))


def pair(mixer: str, autocast, **options) -> DistillationPair:
    teacher = make_tiny_model("llama").requires_grad_(False)
    torch.manual_seed(0)  # some maps start at random
    student = limbeck.convert(teacher, mixer, **options).requires_grad_(False)
    return DistillationPair(teacher, student, find_attention_sites(teacher), autocast)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mixer", ["linear_attention", "gated_deltanet", "gla"])
def test_calibration_under_autocast_solves_under_the_smallest_ridge(mixer, dtype, capsys):
    """Products rounded to half precision are not positive definite; these are, and lead where float32 leads."""
    found = []
    for enabled in (False, True):
        fits = NormalEquations(pair(mixer, half(dtype, enabled)))
        fits.add(batch_of())
        for name, gram in fits.gram.items():
            assert gram.dtype == torch.float64
            assert torch.linalg.eigvalsh(gram)[0] > -1e-12 * gram.diagonal().mean(), name
        found.append([fits.solve(ridge) for ridge in RIDGES])
    assert found[1] == pytest.approx(found[0], rel=0.05)
    assert "too small" not in capsys.readouterr().err


def test_sums_of_squares_beyond_half_precision():
    """16 tokens of 200 are 640,000 in a sum of squares, ten times what float16 can hold."""
    fits = NormalEquations(pair("retnet", half(torch.float16)))
    name, projection = next(iter(fits.projections.items()))
    f = torch.full((16, projection.in_features), 200.0, dtype=torch.float64)
    fits._accumulate(name, f, f[:, : projection.out_features])
    assert fits.gram[name].max() == 640_000


def test_a_layer_that_a_ridge_is_too_small_for_takes_a_larger_one(capsys):
    fits = NormalEquations(pair("gla", half(torch.bfloat16)))
    fits.add(batch_of())
    bad, good = fits.projections
    gram = fits.gram[bad]
    lowest = torch.linalg.eigvalsh(gram)[0] + 2e-3 * gram.diagonal().mean()  # then negative by a share of 0.002
    fits.gram[bad] = gram - lowest * torch.eye(len(gram))
    before = {name: p.weight.clone() for name, p in fits.projections.items()}
    fits.solve(1e-5)
    told = " ".join(capsys.readouterr().err.split())
    assert "ridge 1e-05 is too small" in told
    assert f"{bad} (0.01)" in told
    assert good not in told
    assert not any(torch.equal(p.weight, before[name]) for name, p in fits.projections.items())


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_sums_that_are_not_finite_end_in_an_error_that_says_so(broken):
    fits = NormalEquations(pair("gla", half(torch.float16)))
    fits.add(batch_of())
    fits.gram[list(fits.projections)[1]][3, 3] = broken
    with pytest.raises(LimbeckError, match=r"model\.layers\.1\.self_attn has no solution .* not finite"):
        fits.solve(1e-2)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mixer", ["gated_deltanet", "rwkv6", "cosformer", "mlstm"])
def test_every_stage_runs_under_autocast(mixer, dtype):
    both, batch = pair(mixer, half(dtype), preset="published"), batch_of(2, 40)
    fits = NormalEquations(both)
    fits.add(batch)
    assert 0 < fits.solve(1e-3) < 1
    stages = [
        MatrixStage(both),
        MatrixStage(both, sampled_queries=8),
        HiddenStage(both),
        HiddenStage(both, target="block", loss="cosine"),
    ]
    for stage in (
        *stages,
        LogitsStage(both, ObjectiveWeights(ce=0.3, kl=0.3, jsd=0.2, reverse_kl=0.2, temperature=1.5)),
    ):
        parameters = stage.parameters()
        for p in parameters.values():
            p.requires_grad_(True)
        losses = stage.backward(batch, stage.count(batch))
        assert all(torch.isfinite(value) for value in losses.values())
        grads = [p.grad for p in parameters.values() if p.grad is not None]
        assert grads
        assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)
        for p in parameters.values():
            p.requires_grad_(False).grad = None


@pytest.mark.parametrize("dtype", HALVES)
def test_divergences_are_in_full_precision_under_autocast(dtype):
    """Of the same logits: each is a small difference of row products that are a hundred times as large."""
    draw = torch.Generator().manual_seed(0)
    teacher = 8 * torch.randn(48, 500, generator=draw)
    student = teacher + 0.3 * torch.randn(48, 500, generator=draw)
    targets = torch.randint(0, 500, (1, 48), generator=draw)
    rows = torch.arange(48.0).view(1, 48, 1)

    def run(enabled: bool):
        heads = (lambda h, logits=logits: logits[h[:, 0].long()] for logits in (student, teacher))
        own, other = heads
        with half(dtype, enabled)():
            weights = ObjectiveWeights(kl=0.4, reverse_kl=0.3, jsd=0.3, temperature=2.0)
            return logit_losses(own, rows, TeacherLogitsFromHidden(other, rows), targets, weights, compute_grad=False)[
                0
            ]

    exact, mixed = run(False), run(True)
    for name, value in exact.items():
        assert float(mixed[name]) == float(value), name


@pytest.mark.parametrize("dtype", HALVES)
def test_likeness_of_hidden_states_is_measured_in_full_precision(dtype):
    x = torch.randn(60, 20, generator=torch.Generator().manual_seed(0))
    y = x + 0.1 * torch.randn(60, 20, generator=torch.Generator().manual_seed(1))
    with half(dtype)():
        mixed = linear_cka(100 * x, y)
    assert mixed == pytest.approx(linear_cka(x, y), rel=1e-9)


def test_whether_a_family_packs_by_position_is_not_decided_by_rounding():
    teacher = make_tiny_model("llama")
    for layer in teacher.model.layers:
        layer.mlp.down_proj.weight.data.mul_(30)
    with half(torch.bfloat16)():
        assert supports_packed_positions(teacher)


OPERATED = [name for name in limbeck.mixers.list_mixers() if limbeck.mixers.get(name).operator is not None]


@pytest.mark.parametrize("preset", ["default", "published"])
@pytest.mark.parametrize("mixer", OPERATED)
@torch.no_grad()
def test_a_state_is_read_in_full_precision_under_autocast(mixer, preset, monkeypatch):
    module = MixerVariant(mixer, preset=preset).build_module(dtype=torch.float32)
    q, k, v, x = sample_inputs(module, 2, 24, dtype=torch.float32)
    tokens = limbeck.mixers.Tokens()
    q, k, v = module._prepare(q, k, v, tokens, {}, {})
    _, state = module.attend(q, k, v, x, tokens, {})
    step = [z[:, -1:] for z in (q, k, v, x)]
    operands = module.compute_masked_inputs(*step, tokens, state)
    monkeypatch.setattr(
        module, "compute_masked_inputs", lambda *given: operands
    )  # products of gates may be rounded, these may not
    exact, _ = module.attend(*step, tokens, state)
    with half(torch.bfloat16)():
        mixed, _ = module.attend(*step, tokens, state)
    assert torch.equal(mixed, exact)
