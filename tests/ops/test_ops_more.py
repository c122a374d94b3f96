"""Diagonal plus rank one and value decay: each form against the definition and against the other."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import LimbeckError
from limbeck.ops import cpu, dplr, value_decay

OPERATORS = pytest.mark.parametrize("op", [dplr, value_decay], ids=["diagonal_plus_rank_one", "value_decay"])
# Both of the ways through a chunk: it forgets little, or anything from nothing to a near reset.
ROUTES = pytest.mark.parametrize("level", [0.5, 200.0], ids=["mild", "any"])
GROUPED = pytest.mark.parametrize("groups", [(4, 4), (2, 2), (2, 1), (1, 4)], ids=lambda g: f"k{g[0]}v{g[1]}")
FORMS = pytest.mark.parametrize("form", ["recurrent", "chunked"])


def case(op, level=0.5, *, batch=2, length=37, heads=4, groups=(2, 2), key=5, value=3, dtype=torch.float64):
    """Named arguments of an operator, `state` among them."""
    make = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    x = {
        "q": random(batch, length, heads, key) / key**0.5,
        "k": F.normalize(random(batch, length, groups[0], key), dim=-1),
        "v": random(batch, length, groups[1], value),
        "state": random(batch, heads, key, value),
    }
    if op is dplr:
        x["a"] = -F.normalize(random(batch, length, heads, key), dim=-1)
        x["b"] = -x["a"] * random(batch, length, heads, key).sigmoid()
    width = key if op is dplr else value
    x["log_decay"] = -level * torch.rand(batch, length, heads, width, generator=make, dtype=torch.float64) ** 4
    return {name: t.to(dtype) for name, t in x.items()}


def times(x, change):
    """`change` on everything that runs along time."""
    return {name: t if name == "state" or t is None else change(t) for name, t in x.items()}


def cut(x, start, stop, state):
    return {**times(x, lambda t: t[:, start:stop]), "state": state}


def leaves(x):
    return {name: t.detach().clone().requires_grad_() for name, t in x.items() if t is not None}


def definition(op, x):
    """The recurrence as it is written down, head by head."""
    batch, length, heads, _ = x["q"].shape
    out = torch.empty(batch, length, heads, x["v"].shape[-1], dtype=x["q"].dtype)
    last = x["state"].clone()
    for n in range(batch):
        for h in range(heads):
            s = x["state"][n, h]
            for t in range(length):
                write = torch.outer(*(x[name][n, t, h // (heads // x[name].shape[2])] for name in "kv"))
                decay = torch.diag(x["log_decay"][n, t, h].exp())
                if op is value_decay:
                    s = s @ decay + write
                else:
                    s = (decay + torch.outer(x["b"][n, t, h], x["a"][n, t, h])) @ s + write
                out[n, t, h] = s.T @ x["q"][n, t, h]
            last[n, h] = s
    return out, last


def documents():
    """Row 0: the incoming document ends at 5, others at 6 and 20; row 1 starts a new document and skips a number."""
    numbers = torch.zeros(2, 37, dtype=torch.long)
    numbers[0, 5:], numbers[0, 6:], numbers[0, 20:] = 1, 2, 5
    numbers[1], numbers[1, 16:] = 1, 3
    return numbers


def same(found, wanted, tolerance=1e-10):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def gradients(results, x):
    """Of a fixed weighting of outputs and state, for every argument."""
    make = torch.Generator().manual_seed(3)
    weights = (torch.randn(r.shape, generator=make, dtype=torch.float64).to(r.dtype) for r in results)
    return torch.autograd.grad(sum((r * w).sum() for r, w in zip(results, weights)), list(x.values()))


@OPERATORS
@GROUPED
def test_recurrent_is_the_definition(op, groups):
    x = case(op, 200.0, groups=groups, length=9)
    same(op.recurrent(**x), definition(op, x))
    blank = {**x, "state": torch.zeros_like(x["state"])}
    same(op.recurrent(**{**x, "state": None}), definition(op, blank))


@OPERATORS
@ROUTES
@GROUPED
@pytest.mark.parametrize("length", [1, 16, 37])
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_chunked_is_recurrent(op, level, groups, length, chunk):
    x = case(op, level, groups=groups, length=length)
    same(op.chunked(**x, chunk=chunk), op.recurrent(**x))
    x["state"] = None
    same(op.chunked(**x, chunk=chunk), op.recurrent(**x))


@ROUTES
@GROUPED
@pytest.mark.parametrize("apart", [False, True])
def test_matrix_times_values_is_the_output(level, groups, apart):
    op, segments = dplr, documents() if apart else None
    x = case(op, level, groups=groups)
    m = op.matrix(x["q"], x["k"], x["a"], x["b"], x["log_decay"], segments=segments)
    assert m.triu(1).abs().max() == 0
    values = x["v"].repeat_interleave(4 // groups[1], dim=2)
    wanted, _ = op.recurrent(**{**x, "state": None}, segments=segments)
    same([torch.einsum("bhij,bjhv->bihv", m, values)], [wanted])


def test_matrix_is_differentiable():
    op = dplr
    x = leaves({name: t for name, t in case(op, length=11).items() if name != "state"})
    y = leaves(x)
    m = op.matrix(*(x[name] for name in ("q", "k", "a", "b", "log_decay")))
    out = torch.einsum("bhij,bjhv->bihv", m, x["v"].repeat_interleave(2, dim=2))
    same(gradients([out], x), gradients(op.recurrent(**y)[:1], y))


@OPERATORS
@ROUTES
@FORMS
def test_any_split_is_the_whole(op, level, form):
    x = case(op, level)
    run = getattr(op, form)
    whole, last = run(**x)
    for cuts in ([0, 1, 37], [0, 16, 37], [0, 5, 23, 37], list(range(38))):
        parts, state = [], x["state"]
        for start, stop in pairwise(cuts):
            o, state = run(**cut(x, start, stop, state))
            parts.append(o)
        same([torch.cat(parts, 1), state], [whole, last])


@OPERATORS
@ROUTES
@pytest.mark.parametrize("chunk", [None, 8, 64])
def test_documents_do_not_see_each_other(op, level, chunk):
    x, segments = case(op, level), documents()
    if chunk is None:
        out, last = op.recurrent(**x, segments=segments)
    else:
        out, last = op.chunked(**x, segments=segments, chunk=chunk)
    for i in range(2):
        row = {name: t[i : i + 1] for name, t in x.items()}
        for number in segments[i].unique():
            where = (segments[i] == number).nonzero().squeeze(-1)
            start, stop = int(where[0]), int(where[-1]) + 1
            alone, end = op.recurrent(**cut(row, start, stop, row["state"] if number == 0 else None))
            same([out[i : i + 1, start:stop]], [alone])
        same([last[i : i + 1]], [end])


@OPERATORS
@ROUTES
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("chunk", [8, 64])
def test_chunked_has_the_gradients_of_recurrent(op, level, apart, chunk):
    x, y = leaves(case(op, level)), leaves(case(op, level))
    segments = documents() if apart else None
    found = gradients(op.chunked(**x, segments=segments, chunk=chunk), x)
    same(found, gradients(op.recurrent(**y, segments=segments), y), 1e-9)


@OPERATORS
@ROUTES
def test_without_the_cpus_route(op, level, monkeypatch):
    """What an accelerator computes."""
    monkeypatch.setattr(cpu, "plan_chunks", lambda *given: None)
    x, y = leaves(case(op, level)), leaves(case(op, level))
    found, wanted = (form(**z, segments=documents()) for form, z in ((op.chunked, x), (op.recurrent, y)))
    same([*found, *gradients(found, x)], [*wanted, *gradients(wanted, y)], 1e-9)


@OPERATORS
@ROUTES
def test_gradcheck(op, level):
    x = leaves(case(op, level, batch=1, length=5, heads=2, groups=(1, 2), key=2, value=2))
    assert torch.autograd.gradcheck(lambda *given: op.chunked(**dict(zip(x, given)), chunk=4), list(x.values()))


@OPERATORS
@ROUTES
@FORMS
def test_no_op_tokens_leave_no_trace(op, level, form):
    x, run = case(op, level), getattr(op, form)
    keep = [t for t in range(43) if t not in (0, 1, 9, 10, 11, 39)]

    def padded(t):
        wide = t.new_zeros(t.shape[0], 43, *t.shape[2:])
        wide[:, keep] = t
        return wide

    out, last = run(**times(x, padded))
    plain, end = run(**x)
    same([out[:, keep], last], [plain, end], 1e-12)
    x = times(x, torch.zeros_like)
    assert torch.equal(run(**x)[1], x["state"])


@OPERATORS
@pytest.mark.parametrize("level", [0.0, -50.0, -1e4, float("-inf")])
def test_extreme_gates(op, level):
    """Values as the definition has them, in fp32; gradients finite. Strong gates come alone and in runs."""
    x = case(op, length=150, dtype=torch.float32)
    x["log_decay"][:, 3] = level
    x["log_decay"][:, 70:140] = level
    x["log_decay"][1, :, 1] = level
    wanted = definition(op, {name: t.double() for name, t in x.items()})
    x = leaves(x)
    for form in (op.recurrent, op.chunked):
        results = form(**x)
        same([r.double() for r in results], wanted, 2e-5)
        assert all(g.isfinite().all() for g in gradients(results, x))


@OPERATORS
@pytest.mark.parametrize("level", [0.5, 2.0, 200.0], ids=["mild", "nearly", "any"])
@FORMS
def test_fp32_error_bound(op, level, form):
    """`nearly`: decays add up to just what a chunk may forget on the shorter way."""
    exact, x = (case(op, level, length=300, key=32, value=16, dtype=dtype) for dtype in (torch.float64, torch.float32))
    for a, b in zip(getattr(op, form)(**x), getattr(op, form)(**exact), strict=True):
        assert a.dtype == torch.float32
        assert (a.double() - b).norm() <= 2e-6 * b.norm()


@OPERATORS
@ROUTES
def test_long_sequences(op, level):
    """32k tokens in fp32 stay as near to fp64 as a short sequence does; gradients too."""
    results = []
    for dtype in (torch.float64, torch.float32):
        x = leaves(case(op, level, batch=1, length=32768, heads=1, groups=(1, 1), key=8, value=4, dtype=dtype))
        out = op.chunked(**x)
        results.append((*out, *gradients(out, x)))
    for exact, found in zip(*results, strict=True):
        assert (found.double() - exact).norm() <= 2e-5 * exact.norm()


@OPERATORS
@ROUTES
def test_autocast_changes_nothing(op, level):
    x = leaves(case(op, level, dtype=torch.float32))
    for form in (op.recurrent, op.chunked):
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                out = form(**x)
            results.append((*out, *gradients(out, x)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@OPERATORS
@FORMS
def test_bf16_in_bf16_out_fp32_state(op, form):
    x = case(op, dtype=torch.bfloat16)
    x["log_decay"] = x["log_decay"].float()
    out, last = getattr(op, form)(**x)
    assert out.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    exact, end = op.recurrent(**{name: t.double() for name, t in x.items()})
    torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=2**-8)
    torch.testing.assert_close(last.double(), end, atol=1e-5, rtol=1e-5)


@OPERATORS
def test_what_does_not_fit_is_refused(op):
    x = case(op)
    with pytest.raises(LimbeckError, match="chunk is 48"):
        op.chunked(**x, chunk=48)
    wrong = {
        "log_decay": x["log_decay"][..., :-1],
        "state": x["state"][:, :1],
        "k": x["k"][:, :, :1].expand(2, 37, 3, 5),
    }
    if op is dplr:
        wrong |= {"a": x["a"][:, :, :2], "b": x["b"][:, :1]}
    for form in (op.recurrent, op.chunked):
        for name, bad in wrong.items():
            with pytest.raises(LimbeckError, match=f"{name} has shape"):
                form(**{**x, name: bad})
        with pytest.raises(LimbeckError, match="segments has shape"):
            form(**x, segments=torch.zeros(2, 3))
