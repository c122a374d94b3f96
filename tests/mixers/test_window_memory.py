"""The window with a memory behind it: the untrained window to the bit, and the memory sees what the window does not."""

import pytest
import torch
import torch.nn.functional as F

import limbeck
from limbeck import LimbeckError, mixers, testing
from limbeck.mixers import HeadShape, Tokens
from limbeck.ops import sliding_window
from limbeck.testing import CHECKS, MixerVariant
from limbeck.testing.contract import sample_ids, sample_inputs
from limbeck.testing.tiny_models import make_tiny_model

SHAPE = HeadShape(hidden=24, heads=4, kv_heads=2, key_width=5, value_width=3, scale=0.4, layers=2)
LENGTH = 33
WINDOW = {"window": 5, "sinks": 2}
MASKS = pytest.mark.parametrize("masks", ["", "segments", "valid", "segments valid"], ids=lambda m: m or "plain")
OWN = pytest.mark.parametrize("own", [0, 4], ids=["teacher's", "codes"])
LINEAR = [name for name in mixers.list_mixers() if name not in ("hybrid", "window_memory", "sliding_window")]
LINEAR = [name for name in LINEAR if not mixers.get(name).grows]


def tokens_of(masks):
    """Documents of any length, padding at the start, inside and at the end."""
    segments = torch.zeros(2, LENGTH, dtype=torch.long)
    segments[0, 5:], segments[0, 6:], segments[0, 15:] = 1, 2, 5
    segments[1], segments[1, 16:] = 1, 3
    valid = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(4)) > 0.3
    valid[0, :2], valid[1, -3:], valid[1, 2:12] = False, False, True
    return Tokens(valid if "valid" in masks else None, segments if "segments" in masks else None)


def token_by_token(module, given, tokens):
    """Outputs of single steps; the document of the state has number 0."""
    state, steps = {}, []
    for t in range(LENGTH):
        one = Tokens(None if tokens.valid is None else tokens.valid[:, t : t + 1])
        if tokens.segments is not None:
            before = tokens.segments[:, max(t - 1, 0) : max(t, 1)]
            one = Tokens(one.valid, (tokens.segments[:, t : t + 1] != before).long())
        y, state = module(*(z[:, t : t + 1] for z in given), tokens=one, state=state)
        steps.append(y)
    return torch.cat(steps, 1)


@MASKS
@OWN
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_at_the_start_it_is_the_window_to_the_bit(dtype, own, masks):
    torch.manual_seed(0)
    module = mixers.build("window_memory", SHAPE, {**WINDOW, "code_rank": own}).to(dtype)
    alone = mixers.build("sliding_window", SHAPE, WINDOW)
    given, tokens = sample_inputs(module, 2, LENGTH, dtype=dtype), tokens_of(masks)
    qkv = [z.requires_grad_() for z in given[:3]]
    y, wanted = module(*given, tokens=tokens)[0], alone(*given, tokens=tokens)[0]
    assert torch.equal(y, wanted)
    with torch.no_grad():
        assert torch.equal(token_by_token(module, given, tokens), token_by_token(alone, given, tokens))
        assert torch.equal(*(m.forward_matrix(*given, tokens=tokens)[1] for m in (module, alone)))
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)
    parameters = dict(module.named_parameters())
    found = torch.autograd.grad((y * weight).sum(), [*qkv, *parameters.values()])
    for a, b in zip(found, torch.autograd.grad((wanted * weight).sum(), qkv)):
        assert torch.equal(a, b)
    moved = {name for name, slope in zip(parameters, found[3:], strict=True) if slope.any()}
    assert moved == {"readout"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@torch.no_grad()
def test_an_untrained_student_is_the_student_with_the_window_alone(dtype):
    teacher = make_tiny_model("llama").to(dtype)
    ids = sample_ids()
    ours, alone = (
        limbeck.convert(teacher, name, options={"window": 4}) for name in ("window_memory", "sliding_window")
    )
    assert torch.equal(ours(ids).logits, alone(ids).logits)
    told, wanted = (m.generate(ids, max_new_tokens=12, do_sample=False) for m in (ours, alone))
    assert torch.equal(told, wanted)


@MASKS
@OWN
@torch.no_grad()
def test_the_memory_sees_exactly_what_the_window_does_not(own, masks):
    module, tokens = MixerVariant("window_memory", {**WINDOW, "code_rank": own}).build_module(), tokens_of(masks)
    given = sample_inputs(module, 2, LENGTH)
    matrices = {}
    for branches in ("linear", "window", "both"):
        part = MixerVariant("window_memory", {**WINDOW, "code_rank": own, "branches": branches}).build_module()
        y, matrices[branches] = part.forward_matrix(*given, tokens=tokens)
        torch.testing.assert_close(part(*given, tokens=tokens)[0], y)
    real = torch.ones(2, LENGTH, dtype=torch.bool) if tokens.valid is None else tokens.valid
    near = sliding_window.build_window_mask(real, **WINDOW, segments=tokens.segments)[:, None]
    allowed = real[:, None, :, None] & real[:, None, None] & torch.ones(LENGTH, LENGTH).tril().bool()
    if tokens.segments is not None:
        allowed = allowed & (tokens.segments[:, None, :, None] == tokens.segments[:, None, None])
    assert torch.equal(matrices["window"] != 0, near.expand_as(matrices["window"]))
    assert torch.equal(matrices["linear"] != 0, (allowed & ~near).expand_as(matrices["linear"]))
    torch.testing.assert_close(matrices["both"], matrices["linear"] + matrices["window"])


@torch.no_grad()
def test_the_branches_alone_add_up():
    y = {}
    for branches in ("both", "linear", "window"):
        module = MixerVariant("window_memory", {**WINDOW, "branches": branches}).build_module()
        given = sample_inputs(module, 2, LENGTH)
        y[branches] = module(*given)[0]
    torch.testing.assert_close(y["both"], y["linear"] + y["window"])
    assert not y["linear"][:, :7].any()
    assert y["linear"][:, 7:].all()
    alone = mixers.build("sliding_window", module.teacher_shape, WINDOW)
    assert torch.equal(y["window"], alone(*given)[0])


@torch.no_grad()
def test_a_readout_that_is_a_multiple_of_the_identity_leaves_a_matrix_over_tokens():
    module = MixerVariant("window_memory", WINDOW).build_module()
    module.readout.copy_(0.7 * torch.eye(module.teacher_shape.value_width))
    q, k, v, x = sample_inputs(module, 2, LENGTH)
    y, matrix = module.forward_matrix(q, k, v, x)
    torch.testing.assert_close(y, torch.einsum("bhij,bjhv->bihv", matrix, v.repeat_interleave(2, 2)))


def test_the_read_out_learns_what_the_window_misses():
    torch.manual_seed(0)
    module = mixers.build("window_memory", SHAPE, {**WINDOW, "linear": "linear_attention"}).double()
    q, k, v, x = sample_inputs(module, 4, LENGTH)
    target = F.scaled_dot_product_attention(
        *(z.transpose(1, 2) for z in (q, k, v)), is_causal=True, scale=SHAPE.scale, enable_gqa=True
    ).transpose(1, 2)
    optimizer, losses = torch.optim.Adam(module.parameters(), lr=0.05), []
    for _ in range(40):
        losses.append((module(q, k, v, x)[0] - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]


@OWN
def test_codes_are_counted(own):
    plain, module = (mixers.build("window_memory", SHAPE, {**WINDOW, "code_rank": rank}) for rank in (0, own))
    assert module.state_numel() - plain.state_numel() == 5 * own
    queries, keys = 4 * 5 * own, 2 * 5 * own
    parameters = (sum(p.numel() for p in m.parameters()) for m in (module, plain))
    assert next(parameters) - next(parameters) == 24 * own + queries + keys + own * 24


@torch.no_grad()
def test_own_queries_and_keys_start_as_the_product_of_codes_and_know_no_positions():
    module = mixers.build("window_memory", SHAPE, {**WINDOW, "code_rank": 3}).double()
    q, k, v, x = sample_inputs(module, 2, LENGTH)
    codes = module.code(x)
    own_q, own_k, _ = module._read_codes(codes, codes, x)
    for head in range(4):
        products = own_q[:, :, head] @ own_k[:, :, head // 2].mT
        torch.testing.assert_close(products, codes @ codes.mT, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(module.own_x(codes), x @ (module.code.weight.T @ module.code.weight).T)
    module.readout.normal_(generator=torch.Generator().manual_seed(0))
    far, _ = module(torch.zeros_like(q), torch.zeros_like(k), v, x)
    near = mixers.build("sliding_window", SHAPE, WINDOW)
    wanted = module(q, k, v, x)[0] - near(q, k, v, x)[0]
    torch.testing.assert_close(far - near(torch.zeros_like(q), torch.zeros_like(k), v, x)[0], wanted)


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("check", ["split", "three_forms", "padded_module", "documents", "state_size"])
def test_any_linear_mixer_is_a_memory(linear, check):
    CHECKS[check](MixerVariant("window_memory", {**WINDOW, "linear": linear, "conv": 3}))


@pytest.mark.parametrize("options", [{"linear": name} for name in ("softmax", "hybrid", "sliding_window")])
def test_impossible_memories(options):
    with pytest.raises(LimbeckError, match="cannot be the linear branch of mixer 'window_memory'"):
        mixers.build("window_memory", SHAPE, options)


def test_a_rank_below_zero_is_refused():
    with pytest.raises(LimbeckError, match="option 'code_rank' of mixer 'window_memory' is -1"):
        mixers.build("window_memory", SHAPE, {"code_rank": -1})


@pytest.mark.parametrize(("check", "family"), testing.list_cases(quick=True))
@pytest.mark.parametrize("own", [0, 3], ids=["teacher's", "codes"])
def test_contract_with_a_window_that_tokens_leave(check, family, own):
    CHECKS[check](MixerVariant("window_memory", {"window": 2, "sinks": 1, "code_rank": own}), family)
