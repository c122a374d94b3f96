"""Kernels for the operators: what goes to them and how, what is declined and why, what is left behind."""

import dataclasses
import json
import logging
from pathlib import Path

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import naive_kernels
from limbeck import LimbeckError, kernels, mixers, ops
from limbeck.data.known import Documents
from limbeck.kernels import adapters, catalogue, dispatch, verdicts
from limbeck.kernels.sequences import Sequences
from limbeck.mixers import HeadShape, Tokens

BY_NAME = {a.name: a for a in kernels.ADAPTERS}
WIDE = torch.float64


@pytest.fixture
def naive(monkeypatch, tmp_path):
    """The reference functions in the place of the kernels; verdicts in a folder of the test's own."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    naive_kernels.stand_in(monkeypatch)
    yield
    dispatch.forget()


def small(name: str, **changes) -> kernels.Call:
    """A call with widths that are no multiples of anything, for two rows."""
    one = BY_NAME[name]
    sizes = {"batch": 2, "time": 1 if one.form == "recurrent" else 11, "heads": 4, "key": 5, "value": 3, "slots": 16}
    return kernels.sample(one, **{**sizes, "dtype": WIDE, "device": "cpu", **changes})


def another_process(monkeypatch) -> None:
    """Nothing decided yet; what is on disk stays."""
    monkeypatch.setattr(verdicts, "_VERDICTS", {})
    dispatch.forget()


# ------------------------------------------------------------------ what is handed over


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_kernel_is_given_what_the_operator_means(naive, name, state, documents):
    """Outputs, states and gradients of all arguments, to the last digits of float64."""
    if documents > 1 and not BY_NAME[name].documents:
        assert kernels.declined(small(name, documents=3)) == "packed documents"
        return
    verdict = verdicts.check(BY_NAME[name], small(name, state=state, documents=documents))
    assert verdict.ok, verdict.reason
    assert {"o", "do"} & verdict.errors.keys()
    if BY_NAME[name].gradient and name != "convolution":
        assert {"dq", "dk", "dv"} < verdict.errors.keys()


@pytest.mark.parametrize("name", ["scalar_decay", "scalar_decay_step"])
@pytest.mark.parametrize("decay", ["none", "constant", "learnt constant"])
def test_decays_that_do_not_depend_on_the_token(naive, name, decay):
    call = small(name, state=True)
    constant = None if decay == "none" else -torch.rand(4, dtype=WIDE)
    call = dataclasses.replace(call, tensors={**call.tensors, "log_decay": constant})
    assert catalogue.find(call).name == name
    if decay == "constant":  # check() takes gradients of all; a constant has a kernel argument of its own
        for found, wanted in zip(kernels.run(call, "fla"), call.torch(), strict=True):
            torch.testing.assert_close(found, wanted)
    else:
        assert verdicts.check(BY_NAME[name], call).ok


@pytest.mark.parametrize("name", ["scalar_decay", "gated_delta_rule", "diagonal_plus_rank_one", "slot_attention"])
def test_grouped_keys_and_values_are_repeated(naive, name):
    call = small(name)
    grouped = {**call.tensors, "k": call["k"][:, :, :2], "v": call["v"][:, :, :1]}
    assert verdicts.check(BY_NAME[name], dataclasses.replace(call, tensors=grouped)).ok


def test_rows_that_begin_in_the_middle_of_things(naive):
    """A row whose first token belongs to a document of its own drops the incoming state; rows differ in number."""
    segments = torch.tensor([[0] * 4 + [1] * 7, [2] * 1 + [3] * 3 + [5] * 7])
    for name in ("scalar_decay", "slot_attention", "convolution"):
        call = dataclasses.replace(small(name, state=True), segments=segments.clone())
        verdict = verdicts.check(BY_NAME[name], call)
        assert verdict.ok, verdict.reason
    packed = Sequences.of(segments)
    assert packed.offsets.tolist() == [0, 4, 11, 12, 15, 22]
    assert (packed.first.tolist(), packed.last.tolist()) == ([0, 2], [1, 4])
    assert packed.goes_on.tolist() == [True, False]
    assert Sequences.of(segments) is packed  # found once for all layers


def test_documents_that_the_host_knows_are_not_looked_for(monkeypatch):
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [3, 4, 0, 0, 1, 2]])
    segments = Documents.of(positions).to(torch.device("cpu")).segments
    expected = Sequences.of(segments.clone())
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *_: pytest.fail("waits for the device"))
    found = Sequences.of(segments)
    for name in ("offsets", "first", "last", "goes_on"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert found.shape == expected.shape
    assert Sequences.of(segments) is found


SHAPE = HeadShape(hidden=24, heads=4, kv_heads=2, key_width=8, value_width=8, scale=8**-0.5, layers=2)


@pytest.mark.parametrize("name", [n for n in mixers.names() if n not in ("softmax", "sliding_window")])
def test_every_mixer_is_the_same_by_kernels(naive, name):
    """With its published switches, padding on the left, packed documents, and one more token after them."""
    options = {"slots": 16} if name == "gsa" else {}
    mixer = mixers.build(name, SHAPE, options, preset="published" if mixers.get(name).published else "default")
    torch.manual_seed(0)
    mixer = mixer.double()
    with torch.no_grad():  # away from its start, where gates are open and weights zero
        for parameter in mixer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = [torch.randn(2, 9, *s, dtype=WIDE) for s in ((4, 8), (2, 8), (2, 8), (24,))]
    valid = torch.ones(2, 9, dtype=torch.bool)
    valid[1, :3] = False
    segments = torch.tensor([[0] * 5 + [1] * 4, [0] * 9])
    results = []
    for backend in ("torch", "auto"):
        given = [z.clone().requires_grad_() for z in x]
        with kernels.using(backend):
            y, state = mixer(*given, tokens=Tokens(valid, segments))
            grads = torch.autograd.grad(y.square().sum(), [*given, *mixer.parameters()], allow_unused=True)
            with torch.no_grad():
                more, _ = mixer(*(z[:, -1:] for z in x), state={n: t.detach() for n, t in state.items()})
        results.append([y, *state.values(), *(g for g in grads if g is not None), more])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    assert any(one["backend"] == "fla" and one["form"] == "chunked" for one in kernels.used())
    assert any(one["backend"] == "fla" and one["form"] == "recurrent" for one in kernels.used())


# ------------------------------------------------------------------ what is declined


def test_reasons_without_a_gpu():
    call = small("scalar_decay", dtype=torch.bfloat16)
    assert kernels.declined(call) == "its tensors are on cpu"
    if not torch.cuda.is_available():
        assert kernels.missing() == "no CUDA device"
    with kernels.using("fla"), pytest.raises(LimbeckError, match=r"no kernel takes scalar_decay chunked .*on cpu"):
        ops.scalar_decay.chunked(**call.tensors)
    verdict = kernels.check(call)
    assert (verdict.ok, verdict.reason) == (False, "its tensors are on cpu")
    kernels.forget()


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("scalar_decay", {"dtype": torch.float32}, "float32 without TF32"),
        ("delta_rule", {"dtype": torch.float32}, "float32 is not among its dtypes"),
        ("kda", {"dtype": torch.bfloat16, "key": 272}, "K = 272 is wider than 256"),
        ("slot_attention", {"dtype": torch.bfloat16, "slots": 24}, "M = 24 is no multiple of 16"),
        ("vector_decay", {"dtype": torch.bfloat16, "time": 0}, "no tokens"),
        ("convolution", {"time": 1}, "one token"),
        ("delta_rule_step", {"dtype": torch.bfloat16, "documents": 2, "time": 4}, "packed documents"),
    ],
)
def test_reasons_of_adapters(naive, monkeypatch, name, changes, reason):
    monkeypatch.setattr(catalogue, "ADAPTERS", tuple(BY_NAME.values()))
    assert reason in kernels.declined(small(name, **changes))


def test_a_step_has_no_gradient(naive):
    call = small("kda_step", dtype=torch.float32)
    assert kernels.declined(call) is None
    assert "gradient" in kernels.declined(call.leaves())
    with torch.no_grad():
        assert kernels.declined(call.leaves()) is None


def test_float32_goes_to_tf32_kernels_where_that_is_allowed(naive):
    call = small("scalar_decay", dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert kernels.declined(call) is None
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_same_bits_are_torchs(naive):
    torch.use_deterministic_algorithms(True)
    try:
        assert "same bits" in kernels.declined(small("scalar_decay"))
    finally:
        torch.use_deterministic_algorithms(False)


def test_autocast_decides_the_dtype():
    call = small("scalar_decay", dtype=torch.float32)
    assert call.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call.dtype == torch.bfloat16
    assert call.rounded(torch.bfloat16)["q"].dtype == torch.bfloat16
    assert call.rounded(torch.bfloat16)["log_decay"].dtype == torch.float32


# ------------------------------------------------------------------ what runs, and what is left behind


def test_calls_go_to_a_kernel_and_are_noted_once(naive, caplog):
    call = small("scalar_decay", state=True)
    with caplog.at_level(logging.INFO, "limbeck.kernels"):
        for _ in range(2):
            o, state = ops.scalar_decay.chunked(**call.tensors)
    wanted, last = call.torch()
    torch.testing.assert_close(o, wanted)
    torch.testing.assert_close(state, last)
    [note] = kernels.used()
    assert note == {
        "operator": "scalar_decay",
        "form": "chunked",
        "shape": "K5 V3 scalar state",
        "dtype": "float64",
        "backend": "fla",
        "kernel": "fla.ops.simple_gla.chunk_simple_gla",
        "reason": None,
    }
    assert len(caplog.records) == 1
    with kernels.using("torch"):
        assert torch.equal(ops.scalar_decay.chunked(**call.tensors)[0], wanted)


@pytest.mark.parametrize("fault", ["wrong", "nan", "raises", "wrong gradient"])
def test_a_kernel_that_is_wrong_here_is_not_used(naive, monkeypatch, caplog, fault):
    kernel = naive_kernels.KERNELS["chunk_simple_gla"]

    def broken(**given):
        o, state = kernel(**given)
        if fault == "raises":
            raise RuntimeError("no such instruction\nin a long message")
        factor = {"wrong": 1.001, "nan": float("nan"), "wrong gradient": 1.0}[fault]
        shift = given["v"].sum() * 1e-3
        return o * factor + (shift - shift.detach() if fault == "wrong gradient" else 0), state

    monkeypatch.setattr(adapters, "kernel_function", lambda path: broken)
    call = small("scalar_decay")
    o, _ = ops.scalar_decay.chunked(**call.tensors)
    assert torch.equal(o, call.torch()[0])
    [note] = kernels.used()
    assert note["backend"] == "torch"
    assert "chunk_simple_gla is wrong here: " in note["reason"]
    assert ("no such instruction" if fault == "raises" else "is off by") in note["reason"]
    assert "\n" not in note["reason"]
    assert [r.levelname for r in caplog.records if r.name == "limbeck.kernels"] == ["WARNING"]
    with kernels.using("fla"), pytest.raises(LimbeckError, match="is wrong here"):
        ops.scalar_decay.chunked(**call.tensors)


def test_a_kernel_is_checked_once_for_a_shape_and_machine(naive, monkeypatch, tmp_path):
    checked = []
    real = verdicts.check
    monkeypatch.setattr(verdicts, "check", lambda *given: checked.append(given) or real(*given))
    call = small("scalar_decay", time=40)
    for shape in (call, small("scalar_decay", time=33), small("scalar_decay", time=33, seed=3)):
        ops.scalar_decay.chunked(**shape.tensors)
    assert len(checked) == 1
    assert checked[0][1]["q"].shape == (1, 40, 2, 5)  # a piece
    another_process(monkeypatch)
    ops.scalar_decay.chunked(**call.tensors)
    assert len(checked) == 1
    [file] = (tmp_path / "cache" / "kernels").iterdir()
    file.write_text("{", encoding="utf-8")
    another_process(monkeypatch)
    ops.scalar_decay.chunked(**call.tensors)
    assert len(checked) == 2
    assert json.loads(file.read_text(encoding="utf-8"))["ok"] is True
    ops.scalar_decay.chunked(**small("scalar_decay", time=40, key=6).tensors)
    assert len(checked) == 3


def test_a_check_does_not_disturb_checkpointing_or_inference(naive):
    call = small("gated_delta_rule").leaves()
    o = checkpoint(lambda *x: ops.delta_rule.chunked(*x)[0], *list(call.tensors.values())[:5], use_reentrant=False)
    wanted = call.torch()[0]
    pair = [torch.autograd.grad(y.square().sum(), call["k"], retain_graph=True)[0] for y in (o, wanted)]
    torch.testing.assert_close(*pair)
    with torch.inference_mode():
        ops.vector_decay.chunked(**small("vector_decay").tensors)
    assert {note["backend"] for note in kernels.used()} == {"fla"}


def test_matrices_are_torchs(naive):
    """Stage 1 multiplies the identity: wide, exact, and nothing for a kernel."""
    call = small("diagonal_plus_rank_one")
    q, k, _, a, b, log_decay, _ = call.tensors.values()
    ops.diagonal_plus_rank_one.matrix(q, k, a, b, log_decay)
    rows = torch.tensor([[0, 4], [2, 9]])
    ops.rows.matrix_rows(ops.diagonal_plus_rank_one, q, k, (a, b, log_decay), rows)
    assert kernels.used() == []


@pytest.mark.slow
def test_a_compiled_call_falls_back_to_the_kernel_outside_its_graph(naive):
    call = small("scalar_decay")
    compiled = torch.compile(lambda *x: ops.scalar_decay.chunked(*x)[0] + 1, backend="eager")
    given = list(call.tensors.values())[:4]
    torch.testing.assert_close(compiled(*given), call.torch()[0] + 1)
    assert [note["backend"] for note in kernels.used()] == ["fla"]
    step = small("scalar_decay_step")
    torch._dynamo.reset()
    whole = torch.compile(lambda *x: ops.scalar_decay.recurrent(*x)[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(*list(step.tensors.values())[:4]), step.torch()[0])
    assert len(kernels.used()) == 1  # a step stays in its graph


@pytest.mark.parametrize(
    ("name", "argument", "shape"),
    [
        ("scalar_decay", "k", (2, 11, 3, 5)),
        ("scalar_decay", "v", (2, 10, 4, 3)),
        ("scalar_decay", "log_decay", (2, 11)),
        ("scalar_decay", "state", (2, 4, 3, 5)),
        ("gated_delta_rule", "beta", (2, 11, 2)),
        ("diagonal_plus_rank_one", "a", (2, 11, 4, 3)),
        ("convolution", "weight", (4, 4, 3)),
    ],
)
def test_shapes_that_do_not_fit_are_told_by_torch(naive, name, argument, shape):
    """And never reach a kernel, which would read past their ends, nor a check, whose verdict is on others too."""
    call = small(name, state=True)
    wrong = dataclasses.replace(call, tensors={**call.tensors, argument: torch.zeros(shape, dtype=WIDE)})
    assert kernels.declined(wrong) == "its shapes do not fit together"
    with pytest.raises((LimbeckError, RuntimeError)):
        getattr(getattr(ops, call.operator), call.form)(**wrong.tensors)
    [note] = kernels.used()
    assert note["backend"] == "torch"
    assert not verdicts._VERDICTS


def test_the_document_lists_every_kernel():
    text = (Path(__file__).parent.parent / "docs" / "kernels.md").read_text(encoding="utf-8")
    for adapter in kernels.ADAPTERS:
        row = f"| `{adapter.operator}.{adapter.form}` |"
        assert any(row in line and adapter.kernel.removeprefix("fla.") in line for line in text.splitlines()), adapter


def test_settings(monkeypatch):
    with pytest.raises(LimbeckError, match=r"auto \| torch \| fla"), kernels.using("cuda"):
        pass
    kernels.forget()
    monkeypatch.setenv("LIMBECK_BACKEND", "torch")
    with kernels.using("auto"):
        assert kernels.report() == [{"operator": "all", "backend": "torch", "reason": "asked for"}]
    monkeypatch.setenv("LIMBECK_BACKEND", "triton")
    with pytest.raises(LimbeckError, match="'triton'"), kernels.using("auto"):
        pass


def test_the_manifest_says_what_ran(naive, tmp_path):
    from limbeck import Recipe
    from limbeck.stages.run import open_run

    recipe = Recipe.load("smoke", {"backend": "auto"})
    with open_run(tmp_path / "run", recipe) as run:
        run.finish(0, {"w": torch.zeros(1)}, {})
        ops.scalar_decay.chunked(**small("scalar_decay").tensors)
        run.finish(1, {"w": torch.zeros(1)}, {})
    backends = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))["backends"]
    assert backends == [*[b for b in backends if b["operator"] == "all"], *kernels.used()]
    assert backends[-1]["kernel"] == "fla.ops.simple_gla.chunk_simple_gla"
