"""Sliding-window attention: against plain loops over what each query may see, and whole against split."""

from itertools import pairwise

import pytest
import torch

from limbeck.core.errors import LimbeckError
from limbeck.ops import sliding_window

WINDOWS = pytest.mark.parametrize("window", [1, 2, 5, 64])
SINKS = pytest.mark.parametrize("sinks", [0, 1, 3])
MASKS = pytest.mark.parametrize("masks", ["", "segments", "valid", "segments valid"], ids=lambda m: m or "plain")


@pytest.fixture(autouse=True, params=[4, 64], ids=lambda b: f"block{b}")
def block(request, monkeypatch):
    """Blocks so small that short sequences have many, and those of real use."""
    monkeypatch.setattr(sliding_window, "BLOCK", request.param)


def inputs(length=37, groups=(2, 2), heads=4, key=5, value=3, dtype=torch.float64):
    make = torch.Generator().manual_seed(0)
    shapes = ((heads, key), (groups[0], key), (groups[1], value))
    return tuple(torch.randn(2, length, *s, generator=make, dtype=torch.float64).to(dtype) for s in shapes)


def masked(masks, length=37):
    """Documents that end anywhere, row 1 without document 0; padding at the start, in the middle and at the end."""
    segments = torch.zeros(2, length, dtype=torch.long)
    segments[0, 5:], segments[0, 6:], segments[0, 20:] = 1, 2, 5
    segments[1], segments[1, 16:] = 1, 3
    valid = torch.rand(2, length, generator=torch.Generator().manual_seed(4)) > 0.3
    valid[0, :2], valid[1, -3:], valid[1, 2:12] = False, False, True
    return {name: x for name, x in (("segments", segments), ("valid", valid)) if name in masks.split()}


def definition(q, k, v, window, sinks, scale=1.0, segments=None, valid=None):
    """Softmax over the keys that each query may see, one query after the other."""
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            if valid is not None and not valid[b, i]:
                continue
            past = [
                j
                for j in range(i + 1)
                if (segments is None or segments[b, j] == segments[b, i]) and (valid is None or valid[b, j])
            ]
            seen = sorted({*past[:sinks], *past[-window:]})
            for h in range(q.shape[2]):
                keys, values = (x[b, seen, h // (q.shape[2] // x.shape[2])] for x in (k, v))
                out[b, i, h] = (scale * (keys @ q[b, i, h])).softmax(0) @ values
    return out


def same(found, wanted, tolerance=1e-10):
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=tolerance)


@WINDOWS
@SINKS
@MASKS
@pytest.mark.parametrize("length", [1, 16, 37])
def test_both_forms_are_the_definition(window, sinks, masks, length):
    masks = masked(masks, length)
    q, k, v = inputs(length)
    options = {"window": window, "sinks": sinks, "scale": 0.7, **masks}
    wanted = definition(q, k, v, **options)
    same(sliding_window.chunked(q, k, v, **options)[0], wanted)
    m = sliding_window.matrix(q, k, **options)
    assert m.triu(1).abs().max() == 0
    assert m.min() >= 0
    same(torch.einsum("bhij,bjhv->bihv", m, v.repeat_interleave(2, dim=2)), wanted)


@pytest.mark.parametrize("groups", [(4, 4), (2, 1), (1, 4), (1, 1)], ids=lambda g: f"k{g[0]}v{g[1]}")
def test_grouped_heads(groups):
    q, k, v = inputs(groups=groups)
    same(sliding_window.chunked(q, k, v, window=5, sinks=2)[0], definition(q, k, v, 5, 2))


@WINDOWS
@SINKS
@MASKS
@pytest.mark.parametrize("cuts", [[0, 1, 37], [0, 5, 23, 37], [0, 16, 20, 37], list(range(38))], ids=len)
def test_any_split_is_the_whole(window, sinks, masks, cuts):
    q, k, v = inputs()
    masks = masked(masks)
    options = {"window": window, "sinks": sinks}
    whole, last = sliding_window.chunked(q, k, v, **options, **masks)
    parts, state = [], None
    for start, stop in pairwise(cuts):
        here = {name: x[:, start:stop] for name, x in masks.items()}
        if "segments" in masks and start:  # the document that goes on is number 0
            here["segments"] = here["segments"] - masks["segments"][:, start - 1 : start]
        o, state = sliding_window.chunked(*(x[:, start:stop] for x in (q, k, v)), **options, **here, state=state)
        parts.append(o)
        assert [t.shape for t in state.values()] == [t.shape for t in last.values()]
    same(torch.cat(parts, 1), whole)
    same(state, last)


@WINDOWS
@SINKS
@MASKS
def test_evicting_attends_to_the_bit_and_hands_out_what_leaves(window, sinks, masks):
    q, k, v = inputs()
    masks = masked(masks)
    options = {"window": window, "sinks": sinks}
    token = torch.arange(37, dtype=torch.float64).expand(2, -1)
    k, v = (torch.cat([x[..., :-1], token[..., None, None].expand(-1, -1, 2, 1)], -1) for x in (k, v))  # its number
    whole, _ = sliding_window.chunked(q, k, v, **options, **masks)
    o, (old_k, old_v, left), last = sliding_window.evicting(q, k, v, **options, **masks)
    assert torch.equal(o, whole)
    wanted = [
        [behind_the_window(b, i, window, sinks, **masks) for i in range(37)] for b in range(2)
    ]  # None where no token leaves
    assert left.tolist() == [[j is not None for j in row] for row in wanted]
    for old in (old_k, old_v):
        assert old[left][:, 0, -1].tolist() == [j for row in wanted for j in row if j is not None]
    real = masks.get("valid", torch.ones(2, 37, dtype=torch.bool))
    at, found = sliding_window.find_evicted(real, **options, segments=masks.get("segments"))
    assert torch.equal(found, left)
    assert torch.equal(token.gather(1, at)[left], old_k[left][:, 0, -1])
    state, plain = None, None
    for t in range(37):
        here = {name: x[:, t : t + 1] for name, x in masks.items()}
        if "segments" in masks and t:
            here["segments"] = (here["segments"] != masks["segments"][:, t - 1 : t]).long()
        step = tuple(x[:, t : t + 1] for x in (q, k, v))
        o, evicted, state = sliding_window.evicting(*step, **options, **here, state=state)
        alone, plain = sliding_window.chunked(*step, **options, **here, state=plain)
        assert torch.equal(o, alone)
        assert torch.equal(evicted[2], left[:, t : t + 1])
        for one, all_of_them in zip(evicted[:2], (old_k, old_v)):
            assert torch.equal(one[evicted[2]], all_of_them[:, t : t + 1][evicted[2]])
    same(state, last)


def behind_the_window(b, i, window, sinks, segments=None, valid=None):
    """The token that has left the window of token i just now, and is no sink; None where there is none."""
    past = [
        j
        for j in range(i + 1)
        if (segments is None or segments[b, j] == segments[b, i]) and (valid is None or valid[b, j])
    ]
    if (valid is not None and not valid[b, i]) or len(past) <= window + sinks:
        return None
    return past[-1 - window]


@pytest.mark.parametrize("length", [1, 4, 37])
def test_the_state_is_as_large_as_it_says(length):
    q, k, v = inputs(length)
    _, state = sliding_window.chunked(q, k, v, window=9, sinks=2)
    assert sum(t[0].numel() for t in state.values()) == sliding_window.state_numel(2, 5, 3, 9, 2)
    assert state["count"].tolist() == [length] * 2


@SINKS
def test_left_padding_is_no_padding(sinks):
    q, k, v = inputs(20)
    valid = torch.arange(26).expand(2, -1) >= 6
    wide = [torch.cat([torch.full_like(x[:, :6], 7.0), x], 1) for x in (q, k, v)]
    o, state = sliding_window.chunked(*wide, window=5, sinks=sinks, valid=valid)
    plain, last = sliding_window.chunked(q, k, v, window=5, sinks=sinks)
    same(o[:, 6:], plain)
    assert o[:, :6].abs().max() == 0
    same(state, last)


def test_masked_tokens_leave_the_state_to_the_bit():
    q, k, v = inputs(12)
    _, state = sliding_window.chunked(q, k, v, window=5, sinks=2)
    nothing = torch.zeros(2, 12, dtype=torch.bool)
    o, after = sliding_window.chunked(q, k, v, window=5, sinks=2, state=state, valid=nothing)
    assert o.abs().max() == 0
    assert all(torch.equal(state[name], after[name]) for name in state)


@SINKS
@MASKS
def test_gradients_are_those_of_the_definition(sinks, masks):
    """Through a split as well: what the state holds passes its gradient on."""
    masks = masked(masks)
    weights = torch.randn(2, 37, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    options = {"window": 5, "sinks": sinks, "scale": 0.7}

    def grads(run):
        x = [t.requires_grad_() for t in inputs()]
        return torch.autograd.grad((run(*x) * weights).sum(), x)

    def halves(*x):
        first, second = ({name: m[:, half] for name, m in masks.items()} for half in (slice(0, 18), slice(18, None)))
        if "segments" in masks:
            second["segments"] = second["segments"] - masks["segments"][:, 17:18]
        o, state = sliding_window.chunked(*(t[:, :18] for t in x), **options, **first)
        rest, _ = sliding_window.chunked(*(t[:, 18:] for t in x), **options, **second, state=state)
        return torch.cat([o, rest], 1)

    wanted = grads(lambda *x: definition(*x, **options, **masks))
    for run in (lambda *x: sliding_window.chunked(*x, **options, **masks)[0], halves):
        for a, b in zip(grads(run), wanted, strict=True):
            same(a, b)


def test_gradcheck():
    x = [t[:1].detach().requires_grad_() for t in inputs(7, (1, 2), 2, 2, 2)]

    def run(*x):
        o, state = sliding_window.chunked(*x, window=3, sinks=1)
        return o, state["k"], state["v"]

    assert torch.autograd.gradcheck(run, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_autocast(dtype):
    q, k, v = inputs(dtype=dtype)
    options = {"window": 5, "sinks": 2}
    o, state = sliding_window.chunked(q, k, v, **options)
    assert o.dtype == state["k"].dtype == state["v"].dtype == dtype
    exact, _ = sliding_window.chunked(q.double(), k.double(), v.double(), **options)
    same(o.double(), exact, 1e-6 if dtype == torch.float32 else 2e-2)
    m = sliding_window.matrix(q, k, **options)
    assert m.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(sliding_window.chunked(q, k, v, **options)[0], o)
        assert torch.equal(sliding_window.matrix(q, k, **options), m)


def test_what_does_not_fit_is_refused():
    q, k, v = inputs()
    run = sliding_window.chunked
    with pytest.raises(LimbeckError, match="window is 0"):
        run(q, k, v, window=0)
    with pytest.raises(LimbeckError, match="sinks is -1"):
        sliding_window.matrix(q, k, window=4, sinks=-1)
    with pytest.raises(LimbeckError, match="valid has shape"):
        run(q, k, v, window=4, valid=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(LimbeckError, match=r"dtype torch\.int64"):
        run(q, k, v, window=4, valid=torch.ones(2, 37, dtype=torch.long))
    with pytest.raises(LimbeckError, match="segments has shape"):
        run(q, k, v, window=4, segments=torch.zeros(2, 3))
    with pytest.raises(LimbeckError, match="v has shape"):
        run(q, k, v[:, :5], window=4)
    state = run(q, k, v, window=4, sinks=1)[1]
    with pytest.raises(LimbeckError, match="state's k has shape"):
        run(q, k, v, window=5, sinks=1, state=state)
