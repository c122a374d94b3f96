"""The three recurrences: each form against the definition, against each other and against other people's code."""

import pytest
import torch
import torch.nn.functional as F

from limbeck.core.errors import LimbeckError
from limbeck.ops import cpu, cpu_chunk, delta_rule, scalar_decay, vector_decay

CASES = [
    (scalar_decay, None),
    (scalar_decay, "scalar"),
    (scalar_decay, "constant"),
    (vector_decay, None),
    (vector_decay, "vector"),
    (delta_rule, None),
    (delta_rule, "scalar"),
    (delta_rule, "vector"),
]


def cases(*gates):
    chosen = [(op, gate) for op, gate in CASES if gate in gates]
    ids = [f"{op.__name__.rsplit('.', 1)[1]}-{gate or 'none'}" for op, gate in chosen]
    return pytest.mark.parametrize(("op", "gate"), chosen, ids=ids)


case = cases(None, "scalar", "constant", "vector")


@pytest.fixture(params=["cached", "exact"])
def route(request, monkeypatch):
    """Both ways through `chunked`: chunk by chunk with factored decays, and all chunks at once with halvings."""
    if request.param == "exact":
        monkeypatch.setattr(cpu, "plan_chunks", lambda *_: None)
    return request.param


both = pytest.mark.usefixtures("route")
grouped = pytest.mark.parametrize("groups", [(4, 4), (2, 2), (2, 1), (1, 4)], ids=lambda g: f"k{g[0]}v{g[1]}")


class Inputs:
    """Random inputs of one case; `cut` and `pad` keep all of them in step."""

    def __init__(
        self, op, gate, *, batch=2, length=37, heads=4, groups=(2, 2), key=5, value=3, dtype=torch.float64, seed=0
    ):
        make = torch.Generator().manual_seed(seed)

        def random(*shape):
            return torch.randn(*shape, generator=make, dtype=torch.float64)

        self.op = op
        self.q = random(batch, length, heads, key) / key**0.5
        self.k = F.normalize(random(batch, length, groups[0], key), dim=-1)
        self.v = random(batch, length, groups[1], value)
        self.beta = 2 * random(batch, length, heads).sigmoid() if op is delta_rule else None
        shape = {"scalar": (batch, length, heads), "constant": (heads,), "vector": (batch, length, heads, key)}
        # From nearly no forgetting to a near reset.
        self.log_decay = None if gate is None else -(2 * random(*shape[gate]) - 1).exp()
        self.state = random(batch, heads, key, value)
        self._each(lambda name, x: x.to(dtype))

    def _each(self, change):
        for name in ("q", "k", "v", "beta", "log_decay", "state"):
            x = getattr(self, name)
            setattr(self, name, None if x is None else change(name, x))
        return self

    def _times(self, change):
        """`change` on everything that runs along time, in a copy."""
        other = Inputs.__new__(Inputs)
        other.__dict__ = dict(self.__dict__)
        return other._each(lambda name, x: x if name == "state" or x.dim() == 1 else change(x))

    def cut(self, start, stop):
        return self._times(lambda x: x[:, start:stop])

    def row(self, i):
        other = self._times(lambda x: x[i : i + 1])
        other.state = self.state[i : i + 1]
        return other

    def leaves(self):
        self._each(lambda name, x: x.detach().clone().requires_grad_())
        return [x for x in (self.q, self.k, self.v, self.beta, self.log_decay, self.state) if x is not None]

    @property
    def args(self):
        return (self.q, self.k, self.v, *(() if self.beta is None else (self.beta,)), self.log_decay)

    def recurrent(self, state="own", **options):
        return self.op.recurrent(*self.args, state=self.state if state == "own" else state, **options)

    def chunked(self, state="own", **options):
        return self.op.chunked(*self.args, state=self.state if state == "own" else state, **options)

    def matrix(self, **options):
        return self.op.matrix(self.q, self.k, *self.args[3:], **options)


def definition(x, state):
    """The recurrence as the papers write it, with explicit matrices, head by head."""
    batch, length, heads, key = x.q.shape
    out = torch.empty(batch, length, heads, x.v.shape[-1], dtype=x.q.dtype)
    last = state.clone()
    for b in range(batch):
        for h in range(heads):
            s = state[b, h]
            for t in range(length):
                k = x.k[b, t, h // (heads // x.k.shape[2])]
                v = x.v[b, t, h // (heads // x.v.shape[2])]
                a = torch.ones(key, dtype=x.q.dtype)
                if x.log_decay is not None:
                    g = x.log_decay[h] if x.log_decay.dim() == 1 else x.log_decay[b, t, h]
                    a = g.exp().expand(key)
                if x.beta is None:
                    s = torch.diag(a) @ s + torch.outer(k, v)
                else:
                    rate = x.beta[b, t, h]
                    s = (torch.eye(key, dtype=k.dtype) - rate * torch.outer(k, k)) @ torch.diag(a) @ s
                    s = s + rate * torch.outer(k, v)
                out[b, t, h] = s.T @ x.q[b, t, h]
            last[b, h] = s
    return out, last


def same(found, wanted, tolerance=1e-10):
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@case
@grouped
def test_recurrent_is_the_definition(op, gate, groups):
    x = Inputs(op, gate, groups=groups, length=9)
    same(x.recurrent(), definition(x, x.state))
    same(x.recurrent(state=None), definition(x, torch.zeros_like(x.state)))


@both
@case
@grouped
@pytest.mark.parametrize("length", [1, 16, 37])
@pytest.mark.parametrize("chunk", [1, 8, 64])
def test_chunked_is_recurrent(op, gate, groups, length, chunk):
    x = Inputs(op, gate, groups=groups, length=length)
    same(x.chunked(chunk=chunk), x.recurrent())
    same(x.chunked(state=None, chunk=chunk), x.recurrent(state=None))


@both
@case
@grouped
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("length", [37, 150])
def test_matrix_times_values_is_the_output(op, gate, groups, documents, length):
    x = Inputs(op, gate, groups=groups, length=length)
    segments = _documents(x) if documents else None
    m = x.matrix(segments=segments)
    assert m.triu(1).abs().max() == 0
    values = x.v.repeat_interleave(4 // groups[1], dim=2)
    found = torch.einsum("bhij,bjhv->bihv", m, values)
    same([found], x.recurrent(state=None, segments=segments)[:1])


@both
@case
@pytest.mark.parametrize("length", [11, 150])
def test_matrix_is_differentiable(op, gate, length):
    x, y = Inputs(op, gate, length=length), Inputs(op, gate, length=length)
    weight = torch.randn(2, length, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaves, others = x.leaves(), y.leaves()
    found = torch.einsum("bhij,bjhv->bihv", x.matrix(), x.v.repeat_interleave(2, dim=2))
    found = torch.autograd.grad((found * weight).sum(), leaves[:-1])
    same(found, torch.autograd.grad((y.recurrent(state=None)[0] * weight).sum(), others[:-1]))


@both
@case
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@pytest.mark.parametrize("at", [1, 16, 23, 36])
def test_any_split_is_the_whole(op, gate, form, at):
    x = Inputs(op, gate)
    options = {} if form == "recurrent" else {"chunk": 8}
    whole, last = getattr(x, form)(**options)
    first, between = getattr(x.cut(0, at), form)(**options)
    second, end = getattr(x.cut(at, 37), form)(state=between, **options)
    same([torch.cat([first, second], 1), end], [whole, last])


def _documents(x):
    """Row 0: the incoming document ends at 5, others at 6 and 20; row 1 starts a new document and skips a number."""
    numbers = torch.zeros(x.q.shape[:2], dtype=torch.long)
    numbers[0, 5:], numbers[0, 6:], numbers[0, 20:] = 1, 2, 5
    numbers[1], numbers[1, 16:] = 1, 3
    return numbers


@both
@case
@pytest.mark.parametrize("form", ["recurrent", "chunked-8", "chunked-64"])
def test_documents_do_not_see_each_other(op, gate, form):
    x = Inputs(op, gate)
    segments = _documents(x)
    name, _, chunk = form.partition("-")
    out, last = getattr(x, name)(segments=segments, **({"chunk": int(chunk)} if chunk else {}))
    for i in range(2):
        row = x.row(i)
        for number in segments[i].unique():
            where = (segments[i] == number).nonzero().squeeze(-1)
            start, stop = int(where[0]), int(where[-1]) + 1
            alone, end = row.cut(start, stop).recurrent(state=row.state if number == 0 else None)
            same([out[i : i + 1, start:stop]], [alone])
        same([last[i : i + 1]], [end])


@both
@case
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_documents_have_the_gradients_of_the_definition(op, gate, form):
    """Nothing may leak from one document into another backwards either, and masks must not bring NaN."""
    x, y = Inputs(op, gate), Inputs(op, gate)
    leaves, others = x.leaves(), y.leaves()
    out, _ = getattr(x, form)(segments=_documents(x))
    found = torch.autograd.grad(out[0, 6:20].sum(), leaves)
    wanted = torch.autograd.grad(y.row(0).cut(6, 20).recurrent(state=None)[0].sum(), others[:-1])
    same(found[:-1], wanted)
    assert found[-1].abs().max() == 0


@both
@cases(None, "scalar", "vector")  # a constant decay cannot pause
@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_no_op_tokens_leave_no_trace(op, gate, form):
    x = Inputs(op, gate)
    at = [0, 1, 9, 10, 11, 39]
    keep = [t for t in range(43) if t not in at]

    def padded(t):
        wide = t.new_zeros(t.shape[0], 43, *t.shape[2:])
        wide[:, keep] = t
        return wide

    out, last = getattr(x._times(padded), form)()
    plain, end = getattr(x, form)()
    same([out[:, keep], last], [plain, end], 1e-12)


@both
@cases(None, "scalar", "vector")
def test_no_op_tokens_keep_the_state_to_the_bit(op, gate):
    x = Inputs(op, gate, dtype=torch.float32)._times(torch.zeros_like)
    for form in (x.recurrent, x.chunked):
        assert torch.equal(form()[1], x.state)


@both
@case
def test_gradcheck(op, gate):
    x = Inputs(op, gate, batch=1, length=5, heads=2, groups=(1, 2), key=2, value=2)
    leaves = x.leaves()
    has_beta, has_gate = x.beta is not None, x.log_decay is not None

    def run(*inputs):
        given = iter(inputs)
        args = [next(given) for _ in range(3)]
        args += [next(given)] if has_beta else []
        args += [next(given)] if has_gate else [None]
        return op.chunked(*args, state=next(given), chunk=4)

    assert torch.autograd.gradcheck(run, leaves)


@both
@case
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("chunk", [8, 64])
def test_chunked_has_the_gradients_of_recurrent(op, gate, documents, chunk):
    grads = []
    make = torch.Generator().manual_seed(3)
    weights = torch.randn(2, 37, 4, 3, generator=make, dtype=torch.float64)
    state_weights = torch.randn(2, 4, 5, 3, generator=make, dtype=torch.float64)
    for form in ("recurrent", "chunked"):
        x = Inputs(op, gate)
        leaves = x.leaves()
        options = {"chunk": chunk} if form == "chunked" else {}
        out, last = getattr(x, form)(segments=_documents(x) if documents else None, **options)
        grads.append(torch.autograd.grad((out * weights).sum() + (last * state_weights).sum(), leaves))
    same(*grads, 1e-9)


@case
def test_one_token_at_a_time(op, gate):
    """A step neither writes to the state it is given nor differs from the loop, with and without gradients."""
    x = Inputs(op, gate, length=6)
    segments = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 2, 2, 3]])
    wanted, last = x.recurrent(segments=segments)
    with torch.no_grad():
        state, outputs = x.state, []
        for t in range(6):
            before = state.clone()
            # a step counts documents from the state it is given
            new = (segments[:, t : t + 1] != (segments[:, t - 1 : t] if t else 0)).long()
            out, after = x.cut(t, t + 1).recurrent(state=state, segments=new)
            assert torch.equal(state, before)
            state = after
            outputs.append(out)
    same([torch.cat(outputs, 1), state], [wanted, last])
    one = x.cut(0, 1)
    leaves = one.leaves()
    assert torch.autograd.gradcheck(lambda *_: one.recurrent(), leaves)


@cases("scalar", "vector")
@pytest.mark.parametrize("level", [-0.3, -0.9, -1.1, -3.0, -5.0])
def test_the_route_keeps_to_what_fp32_can_hold(op, gate, level, monkeypatch):
    """Shorter chunks for stronger decays, halvings for the strongest; all as near to fp64 as each other."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    results = []
    for dtype in (torch.float64, torch.float32):
        x = Inputs(op, gate, length=130, key=32, value=16, dtype=dtype)
        x.log_decay = (
            (x.log_decay.new_full(x.log_decay.shape, level) * (1 + 0.01 * x.log_decay.sin())).float().to(dtype)
        )
        leaves = x.leaves()
        out, last = x.chunked()
        results.append((out, last, *torch.autograd.grad(out.sum() + last.sum(), leaves)))
    log = x.log_decay if gate == "vector" else x.log_decay.unsqueeze(-1)
    found = cpu.plan_chunks(x.q, log, None)
    assert (found and found.chunk) == {-0.3: 64, -0.9: 64, -1.1: 32, -3.0: 16, -5.0: None}[level]
    for exact, a in zip(*results, strict=True):
        assert (a.double() - exact).norm() <= (2e-6 if a is out or a is last else 2e-5) * exact.norm()


@cases("scalar", "vector")
def test_decays_that_grow_take_the_general_path(op, gate):
    x = Inputs(op, gate)
    x.log_decay = -x.log_decay
    assert cpu.plan_chunks(x.q, x.log_decay if gate == "vector" else x.log_decay.unsqueeze(-1), 8) is None


@case
@pytest.mark.parametrize("rows", [1, 2])
def test_rows_are_handled_one_by_one_or_together(op, gate, rows, monkeypatch):
    grads = []
    for x in (Inputs(op, gate, batch=3), Inputs(op, gate, batch=3)):
        leaves = x.leaves()
        if grads:
            monkeypatch.setattr(cpu_chunk, "CACHE_BYTES", rows * 4 * 8 * 5 * 8 // torch.get_num_threads())
        out, last = x.chunked(chunk=8)
        grads.append((out, last, *torch.autograd.grad(out.square().sum() + last.sum(), leaves)))
    same(*grads)


@cases("scalar", "constant", "vector")
@pytest.mark.parametrize("level", [-50.0, -1e4, float("-inf")])
def test_extreme_gates(op, gate, level):
    """Values as the definition has them, in fp32; gradients finite. Strong gates come alone and in runs."""
    x = Inputs(op, gate, length=150, dtype=torch.float32)
    if gate == "constant":
        x.log_decay[1] = level
    else:
        x.log_decay[:, 3] = level
        x.log_decay[:, 70:140] = level
        x.log_decay[1, :, 1] = level
    exact = Inputs(op, gate, length=150)
    exact.log_decay = x.log_decay.double()
    wanted = definition(exact, exact.state)
    leaves = x.leaves()
    for out, last in (x.recurrent(), x.chunked()):
        same([out.double(), last.double()], wanted, 2e-5)
        grads = torch.autograd.grad(out.sum() + last.sum(), leaves)
        assert all(g.isfinite().all() for g in grads)
    assert x.matrix().isfinite().all()


@both
@case
def test_long_sequences(op, gate):
    """32k tokens in fp32 stay as near to fp64 as a short sequence does; gradients too."""
    results = []
    for dtype in (torch.float64, torch.float32):
        x = Inputs(op, gate, batch=1, length=32768, heads=1, groups=(1, 1), key=8, value=4, dtype=dtype)
        if gate == "constant":  # the gradient per token: what is left of their sum, a thousandth, is rounding
            x.log_decay = x.log_decay.expand(1, 32768, 1)
        leaves = x.leaves()
        out, last = x.chunked()
        weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype)
        results.append((out, last, *torch.autograd.grad((out * weights).sum(), leaves)))
    for exact, found in zip(*results, strict=True):
        assert found.isfinite().all()
        assert (found.double() - exact).norm() <= 2e-5 * exact.norm()


@both
@case
def test_fp32_error_bound(op, gate):
    exact, x = (Inputs(op, gate, length=300, key=32, value=16, dtype=d) for d in (torch.float64, torch.float32))
    for form in ("recurrent", "chunked"):
        for a, b in zip(getattr(x, form)(), getattr(exact, form)(), strict=True):
            assert a.dtype == torch.float32
            assert (a.double() - b).norm() <= 2e-6 * b.norm()
    m = exact.matrix()
    assert (x.matrix().double() - m).norm() <= 2e-6 * m.norm()


@both
@case
def test_autocast_changes_nothing(op, gate):
    plain = Inputs(op, gate, dtype=torch.float32)
    leaves = plain.leaves()
    for form in ("recurrent", "chunked"):
        results = []
        for enabled in (False, True):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                out, last = getattr(plain, form)()
            results.append((out, last, *torch.autograd.grad(out.sum() + last.sum(), leaves)))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain.matrix(), plain.matrix().float())


@both
@case
def test_bf16_in_bf16_out_fp32_state(op, gate):
    x = Inputs(op, gate, dtype=torch.bfloat16)
    x.log_decay = None if x.log_decay is None else x.log_decay.float()
    wide = Inputs(op, gate)._each(lambda name, _: getattr(x, name).double())
    for form in ("recurrent", "chunked"):
        out, last = getattr(x, form)()
        assert out.dtype == torch.bfloat16
        assert last.dtype == torch.float32
        exact, end = getattr(wide, form)()
        torch.testing.assert_close(out.double(), exact, atol=1e-6, rtol=2**-8)
        torch.testing.assert_close(last.double(), end, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
@pytest.mark.parametrize("peer", ["torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule"])
def test_gated_delta_rule_of_qwen3_next(form, peer):
    modeling = pytest.importorskip("transformers.models.qwen3_next.modeling_qwen3_next")
    x = Inputs(delta_rule, "scalar", groups=(4, 4), length=70, key=8, value=6, dtype=torch.float32)
    wanted = getattr(modeling, peer)(
        x.q * x.q.shape[-1] ** 0.5, x.k, x.v, x.log_decay, x.beta, initial_state=x.state, output_final_state=True
    )
    same(getattr(x, form)(), wanted, 1e-5)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_kimi_delta_attention(form):
    modeling = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    x = Inputs(delta_rule, "vector", groups=(4, 4), length=70, key=8, value=6, dtype=torch.float32)
    wanted = modeling.recurrent_kimi_delta_attention(
        x.q * x.q.shape[-1] ** 0.5, x.k, x.v, x.log_decay, x.beta, initial_state=x.state, output_final_state=True
    )
    same(getattr(x, form)(), wanted, 1e-5)


@pytest.mark.parametrize("form", ["recurrent", "chunked"])
def test_mlstm_of_xlstm(form):
    """mLSTM is scalar decay with the input gate in the keys and the normaliser as a further value."""
    modeling = pytest.importorskip("transformers.models.xlstm.modeling_xlstm")
    if not hasattr(modeling, "mlstm_recurrent_sequence_native"):
        pytest.skip("transformers takes mLSTM from the xlstm package here")
    x = Inputs(scalar_decay, None, groups=(4, 4), length=40, key=8, value=6, dtype=torch.float32)
    make = torch.Generator().manual_seed(5)
    write, forget = (torch.randn(2, 40, 4, generator=make) for _ in range(2))
    q, k, v, i, f = (t.transpose(1, 2) for t in (x.q * 8**0.5, x.k, x.v, write, forget + 2))
    peer = modeling.mlstm_recurrent_sequence_native(q, k, v, i, f)
    wanted = (peer[0] if isinstance(peer, tuple) else peer).transpose(1, 2)

    x.k, x.log_decay = x.k * write.exp().unsqueeze(-1), F.logsigmoid(forget + 2)
    x.v = F.pad(x.v, (0, 1), value=1.0)
    out = getattr(x, form)(state=None)[0]
    found = out[..., :-1] / out[..., -1:].abs().clamp(min=1)
    same([found], [wanted], 1e-4)


@case
def test_what_does_not_fit_is_refused(op, gate):
    x = Inputs(op, gate)
    with pytest.raises(LimbeckError, match="chunk is 48"):
        x.chunked(chunk=48)
    for form in (x.recurrent, x.chunked):
        with pytest.raises(LimbeckError, match="state has shape"):
            form(state=x.state[:, :1])
        with pytest.raises(LimbeckError, match="segments has shape"):
            form(segments=torch.zeros(2, 3))
    x.k = x.k[:, :, :1].expand(-1, -1, 3, -1)
    with pytest.raises(LimbeckError, match="k has shape"):
        x.chunked()
    x = Inputs(op, gate)
    if gate is not None:
        x.log_decay = x.log_decay[..., :-1]
        with pytest.raises(LimbeckError, match="log_decay has shape"):
            x.chunked()
