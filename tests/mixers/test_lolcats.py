"""LoLCATs' hybrid: against a loop over its equation, under every mask; its ends are softmax and linear attention."""

import pytest
import torch
import torch.nn.functional as F

from limbeck import LimbeckError, mixers, testing
from limbeck.mixers import HeadShape, Tokens
from limbeck.ops import sliding_window
from limbeck.testing import CHECKS, MixerVariant

SHAPE = HeadShape(hidden=24, heads=4, kv_heads=2, key_width=5, value_width=3, scale=0.4, layers=2)
LENGTH = 33
MASKS = pytest.mark.parametrize("masks", ["", "segments", "valid", "segments valid"], ids=lambda m: m or "plain")


def built(**options):
    """The mixer in float64 with every parameter moved from its start."""
    torch.manual_seed(0)
    mixer = mixers.build("lolcats", SHAPE, options).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def given(length=LENGTH, seed=0):
    make = torch.Generator().manual_seed(seed)
    shapes = ((4, 5), (2, 5), (2, 3), (24,))
    return [torch.randn(2, length, *s, generator=make, dtype=torch.float64) for s in shapes]


def tokens_of(masks):
    """Documents of any length, padding at the start, inside and at the end."""
    segments = torch.zeros(2, LENGTH, dtype=torch.long)
    segments[0, 5:], segments[0, 6:], segments[0, 20:] = 1, 2, 5
    segments[1], segments[1, 16:] = 1, 3
    valid = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(4)) > 0.3
    valid[0, :2], valid[1, -3:], valid[1, 2:12] = False, False, True
    return Tokens(valid if "valid" in masks else None, segments if "segments" in masks else None)


def hedgehog(x, phi):
    """[softmax(Wx), softmax(−Wx)] of x [heads, K] with W [heads, K, K]."""
    y = torch.einsum("hk,hkj->hj", x, phi.weight)
    return torch.cat([y.exp() / y.exp().sum(-1, keepdim=True), (-y).exp() / (-y).exp().sum(-1, keepdim=True)], -1)


def equation(mixer, q, k, v, tokens, branches="both"):
    """Row by row, query by query, head by head; zeros where a token is padding or sees nothing."""
    window, sinks = mixer.options.window, mixer.options.sinks
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            if tokens.valid is not None and not tokens.valid[b, i]:
                continue
            past = [
                j
                for j in range(i + 1)
                if (tokens.segments is None or tokens.segments[b, j] == tokens.segments[b, i])
                and (tokens.valid is None or tokens.valid[b, j])
            ]
            near = sorted({*past[:sinks], *past[-window:]})
            far = [j for j in past if j not in near]
            features = [hedgehog(k[b, j], mixer.linear.phi_k) for j in range(q.shape[1])]
            query = hedgehog(q[b, i], mixer.linear.phi_q)
            for h in range(q.shape[2]):
                group = h // 2
                scores = torch.stack([SHAPE.scale * (k[b, j, group] @ q[b, i, h]) for j in near])
                soft = torch.sigmoid(mixer.factor[h]) * torch.exp(scores - scores.max())
                weight = {j: soft[n] for n, j in enumerate(near)} if branches != "linear" else {}
                if branches != "window":
                    weight |= {j: query[h] @ features[j][group] for j in far}
                if weight:
                    total = sum(weight.values())
                    out[b, i, h] = sum(w / total * v[b, j, group] for j, w in weight.items())
    return out


def same(found, wanted, tolerance=1e-10):
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


@MASKS
@pytest.mark.parametrize("options", [{"window": 5}, {"window": 3, "sinks": 2}], ids=["window", "sinks"])
@torch.no_grad()
def test_it_is_its_equation(options, masks):
    mixer, (q, k, v, x), tokens = built(**options), given(), tokens_of(masks)
    wanted = equation(mixer, q, k, v, tokens)
    same(mixer(q, k, v, x, tokens=tokens)[0], wanted)
    same(mixer.forward_matrix(q, k, v, x, tokens=tokens)[0], wanted)
    state, steps = {}, []
    for t in range(LENGTH):
        one = Tokens(*(None if z is None else z[:, t : t + 1] for z in (tokens.valid, None)))
        if tokens.segments is not None:  # 0 where the document of the state goes on
            before = tokens.segments[:, max(t - 1, 0) : max(t, 1)]
            one = Tokens(one.valid, (tokens.segments[:, t : t + 1] != before).long())
        y, state = mixer(*(z[:, t : t + 1] for z in (q, k, v, x)), tokens=one, state=state)
        steps.append(y)
    same(torch.cat(steps, 1), wanted)


@pytest.mark.parametrize("branches", ["linear", "window"])
@torch.no_grad()
def test_a_branch_alone(branches):
    mixer, (q, k, v, x) = built(window=5, sinks=1, branches=branches), given()
    wanted = equation(mixer, q, k, v, Tokens(), branches)
    same(mixer(q, k, v, x)[0], wanted)
    same(mixer.forward_matrix(q, k, v, x)[0], wanted)
    if branches == "window":
        alone = mixers.build("sliding_window", SHAPE, {"window": 5, "sinks": 1})
        same(mixer(q, k, v, x)[0], alone(q, k, v, x)[0])
    else:
        assert not wanted[:, :6].any()
        assert wanted[:, 6:].all()


@torch.no_grad()
def test_a_window_over_everything_is_softmax_attention():
    mixer, (q, k, v, x) = built(window=LENGTH), given()
    qs, ks, vs = (z.transpose(1, 2) for z in (q, k, v))
    wanted = F.scaled_dot_product_attention(qs, ks, vs, is_causal=True, scale=SHAPE.scale, enable_gqa=True)
    same(mixer(q, k, v, x)[0], wanted.transpose(1, 2))
    same(mixer.forward_matrix(q, k, v, x)[0], wanted.transpose(1, 2))


@torch.no_grad()
def test_without_weight_in_a_window_of_one_it_is_linear_attention_of_the_tokens_before():
    mixer, (q, k, v, x) = built(window=1), given()
    mixer.factor.fill_(-40)
    y = mixer(q, k, v, x)[0]
    same(y[:, 0], v[:, 0].repeat_interleave(2, 1))  # nothing is older: the window has it all
    linear = mixers.build("hedgehog", SHAPE).double()
    linear.load_state_dict({n.removeprefix("linear."): p for n, p in mixer.state_dict().items() if "linear" in n})
    padded = [F.pad(z[:, :-1], (0, 0, 0, 0, 1, 0)) for z in (k, v)]
    valid = torch.arange(LENGTH).expand(2, -1) > 0
    same(y[:, 1:], linear(q, *padded, x, tokens=Tokens(valid))[0][:, 1:])


@pytest.mark.parametrize("sinks", [0, 2])
def test_parts_of_attention_are_attention(sinks):
    q, k, v, _ = (z.requires_grad_() for z in given())
    weight = torch.randn(2, LENGTH, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    settings = {"window": 4, "sinks": sinks, "scale": 0.4}
    parts, (old_k, old_v, left), _ = sliding_window.evicting(q, k, v, **settings, normalize=False)
    joined = parts[..., :-1] / parts[..., -1:]
    wanted, _ = sliding_window.chunked(q, k, v, **settings)
    same(joined, wanted)
    for a, b in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (joined, wanted)), strict=True):
        same(a, b)
    assert left.tolist() == [[t - 4 >= sinks for t in range(LENGTH)]] * 2
    same(old_k[:, 6:], k[:, 2:-4])
    same(old_v[:, 6:], v[:, 2:-4])


@torch.no_grad()
def test_at_the_start_the_window_weighs_what_factor_says():
    mixer = mixers.build("lolcats", SHAPE, {"factor": 0.25})
    same(mixer.factor.sigmoid(), torch.full((4,), 0.25), 1e-6)
    for wrong in (0.0, 1.0, -1.0):
        with pytest.raises(LimbeckError, match="option 'factor'"):
            mixers.build("lolcats", SHAPE, {"factor": wrong})


def test_a_given_state_is_shared_by_window_and_memory():
    shape = HeadShape(hidden=576, heads=9, kv_heads=3, key_width=64, value_width=64, scale=0.125, layers=30)
    for state in (0.5, 1.0, 2.0):
        mixer = mixers.build("lolcats", shape, {"state": state})
        assert mixer.window == min(64, round(48 * state))
        assert 0.9 < mixer.memory_numel() / (9 * 64 * 64 * state) < 1.05


@pytest.mark.parametrize(("check", "family"), testing.list_cases(quick=True))
def test_contract_with_a_window_that_tokens_leave(check, family):
    CHECKS[check](MixerVariant("lolcats", {"window": 2, "sinks": 1}), family)
