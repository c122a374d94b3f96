"""Numbers that a mixer must keep: in half precision, on the lean route of a CPU, beyond a horizon, with no tokens."""

import math

import pytest
import torch
from torch.nn import functional as F

import limbeck
from limbeck import mixers
from limbeck.core.errors import LimbeckError
from limbeck.mixers import HeadShape, Tokens
from limbeck.ops import cpu, delta_rule, dplr, scalar_decay, value_decay, vector_decay
from limbeck.testing import MixerVariant, make_tiny_model
from limbeck.testing.contract import sample_inputs

WIDE = HeadShape(hidden=96, heads=3, kv_heads=1, key_width=64, value_width=64, scale=0.125)
PRESETS = ("default", "published", "controlled")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mixer", mixers.list_mixers())
@torch.no_grad()
def test_half_precision_weights_cost_no_more_than_their_rounding(mixer, preset):
    """Heads as wide as a real teacher's, values below one: nothing much larger than they may be added on the way."""
    torch.manual_seed(0)
    half = mixers.build(mixer, WIDE, preset=preset).bfloat16()
    exact = mixers.build(mixer, WIDE, preset=preset).double()
    exact.load_state_dict(half.state_dict())
    given = [z.bfloat16() for z in sample_inputs(exact, 1, 160)]
    given[2] = 0.3 * given[2]
    y, _ = half(*given)
    assert y.dtype == torch.bfloat16
    expected, _ = exact(*(z.double() for z in given))
    assert float((y.double() - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("moved", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("documents", [False, True])
def test_mlstms_decays_never_grow_and_still_learn(moved, documents):
    module = MixerVariant("mlstm").build_module(dtype=torch.float32, perturbation=moved)
    q, k, v, x = sample_inputs(module, 2, 128, dtype=torch.float32)
    segments = (torch.arange(128) // 50).expand(2, -1) if documents else None
    given = module.inputs(q, k, v, x, Tokens(segments=segments), {})
    assert float(given.log_decay.detach().max()) <= 0
    assert cpu.plan_chunks(q, given.log_decay.unsqueeze(-1), None) is not None
    slope = torch.autograd.grad(given.log_decay.sum(), module.forget_gate.bias)[0]
    cap = module.options.soft_cap
    raw = module.forget_gate(x).detach().requires_grad_()
    F.logsigmoid(cap * torch.tanh(raw / cap)).sum().backward()  # the stabiliser takes no gradient
    assert torch.allclose(slope, raw.grad.sum((0, 1)), rtol=1e-4)


@pytest.mark.parametrize("horizon", [16, 64])
@torch.no_grad()
def test_a_cosformer_never_weighs_below_zero(horizon):
    module = MixerVariant("cosformer", {"horizon": horizon}).build_module()
    given = sample_inputs(module, 1, 6 * horizon)
    y, matrix = module.forward_matrix(*given)
    assert matrix.min() >= 0
    total = matrix.sum(-1)
    assert torch.allclose(
        total[total > 0], torch.ones(()).double(), atol=1e-4
    )  # nothing where all products are cut off
    assert y.abs().max() <= given[2].abs().max()
    whole, state = module(*given)
    assert torch.allclose(whole, y, atol=1e-10)
    assert int(state["position"]) == 6 * horizon


@torch.no_grad()
def test_up_to_its_horizon_a_cosformer_is_the_papers():
    module = MixerVariant("cosformer", {"horizon": 32}).build_module()
    q, k, v, x = sample_inputs(module, 1, 32)
    weights = torch.einsum("bihk,bjhk->bhij", q.relu(), k.relu().repeat_interleave(2, 2)).tril()
    i = torch.arange(32.0, dtype=torch.float64)
    weights = weights * torch.cos(math.pi / 2 * (i[:, None] - i) / 32)
    expected = weights / weights.sum(-1, keepdim=True)
    assert torch.allclose(module.forward_matrix(q, k, v, x)[1], expected, atol=1e-10)
    half = module.bfloat16()
    found = half.forward_matrix(*(z.bfloat16() for z in (q, k, v, x)))[1].double()
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize(("length", "expected"), [(None, 256), (64, 64), (512, 512)])
def test_a_horizon_is_the_length_that_a_student_learns_from(length, expected):
    teacher = make_tiny_model("llama")

    def horizons(mixer, **given):
        layers = limbeck.convert(teacher, mixer, seq_len=length, **given).config.limbeck["layers"]
        found = [{**one["options"], **one["options"].get("linear_options", {})}.get("horizon") for one in layers]
        return found

    assert horizons("cosformer") == horizons("hybrid", options={"linear": "cosformer"}) == [expected] * 2
    assert horizons("linear_attention", options={"feature_map": "cosformer"}) == [expected] * 2
    assert horizons("gla", rules=[{"layers": "1", "mixer": "cosformer"}]) == [None, expected]
    assert horizons("cosformer", options={"horizon": 40}) == [40] * 2
    assert horizons("hybrid", options={"linear": "cosformer", "linear_options": {"horizon": 7}}) == [7] * 2


def test_a_horizon_below_zero_is_refused():
    with pytest.raises(LimbeckError, match="'horizon'"):
        mixers.resolve_options("cosformer", {"horizon": -1})


def test_an_inner_gate_needs_a_rank_and_starts_open_with_channels_that_learn_apart():
    with pytest.raises(LimbeckError, match="gate_rank is 0"):
        mixers.build("gla", WIDE, {"output_gate": "inner"})
    module = mixers.build("gla", WIDE, {"output_gate": "inner", "gate_rank": 8})
    o, x = torch.randn(1, 5, 3, 64), torch.randn(1, 5, 96)
    assert torch.allclose(module._apply_gate(o, x), o, atol=1e-5)
    module._apply_gate(o, x).square().sum().backward()
    slopes = module.gate_down.weight.grad
    assert torch.linalg.matrix_rank(slopes) > 1


def test_no_tokens_give_no_outputs_in_either_form():
    def draw(*shape):
        return torch.randn(shape)

    q, v, decay, rate = draw(2, 0, 3, 4), draw(2, 0, 3, 5), draw(2, 0, 3, 4), draw(2, 0, 3)
    state = draw(2, 3, 4, 5)
    calls = {
        scalar_decay: (q, q, v, rate),
        vector_decay: (q, q, v, decay),
        delta_rule: (q, q, v, rate, decay),
        dplr: (q, q, v, q, q, decay),
        value_decay: (q, q, v, draw(2, 0, 3, 5)),
    }
    for operator, given in calls.items():
        o, last = operator.recurrent(*given, state=state)
        assert o.shape == (2, 0, 3, 5)
        assert torch.equal(last, state)
