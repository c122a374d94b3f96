"""Kernels for the operators: what goes to them and how, what is declined and why, what is left behind."""

import dataclasses
import json
import logging

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from helpers import naive_kernels
from helpers.paths import ROOT
from limbeck import LimbeckError, mixers, ops
from limbeck.data.packing import DocumentBoundaries
from limbeck.mixers import HeadShape, Tokens
from limbeck.ops import dplr, fla, matrix_rows
from limbeck.ops.fla import adapters, catalogue, dispatch, verify
from limbeck.ops.fla.adapters import VarlenLayout

BY_NAME = {a.name: a for a in fla.KERNEL_ADAPTERS}
WIDE = torch.float64


@pytest.fixture
def naive(monkeypatch, tmp_path):
    """The reference functions in the place of the kernels; verdicts in a folder of the test's own."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    naive_kernels.stand_in(monkeypatch)
    yield
    dispatch.clear_dispatch_log()


def small(name: str, **changes) -> fla.OperatorCall:
    """A call with widths that are no multiples of anything, for two rows."""
    one = BY_NAME[name]
    sizes = {"batch": 2, "time": 1 if one.form == "recurrent" else 11, "heads": 4, "key": 5, "value": 3, "slots": 16}
    return fla.make_sample_call(one, **{**sizes, "dtype": WIDE, "device": "cpu", **changes})


def another_process(monkeypatch) -> None:
    """Nothing decided yet; what is on disk stays."""
    monkeypatch.setattr(verify, "_KERNEL_CHECKS", {})
    dispatch.clear_dispatch_log()


# ------------------------------------------------------------------ what is handed over


@pytest.mark.parametrize("documents", [1, 3])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("name", BY_NAME)
def test_a_kernel_is_given_what_the_operator_means(naive, name, state, documents):
    """Outputs, states and gradients of all arguments, to the last digits of float64."""
    if documents > 1 and not BY_NAME[name].supports_varlen:
        assert "packed documents" in fla.unsupported_reason(small(name, documents=3))
        return
    verdict = verify.verify_kernel(BY_NAME[name], small(name, state=state, documents=documents))
    assert verdict.ok, verdict.reason
    assert {"o", "do"} & verdict.errors.keys()
    if BY_NAME[name].supports_backward and name != "convolution":
        assert {"dq", "dk", "dv"} < verdict.errors.keys()


@pytest.mark.parametrize("name", ["scalar_decay", "scalar_decay_step"])
@pytest.mark.parametrize("decay", ["none", "constant", "learnt constant"])
def test_decays_that_do_not_depend_on_the_token(naive, name, decay):
    call = small(name, state=True)
    constant = None if decay == "none" else -torch.rand(4, dtype=WIDE)
    call = dataclasses.replace(call, tensors={**call.tensors, "log_decay": constant})
    assert catalogue.find_adapter(call).name == name
    if decay == "constant":  # check() takes gradients of all; a constant has a kernel argument of its own
        for found, wanted in zip(fla.run_call(call, "fla"), call.run_torch(), strict=True):
            torch.testing.assert_close(found, wanted)
    else:
        assert verify.verify_kernel(BY_NAME[name], call).ok


@pytest.mark.parametrize("name", ["scalar_decay", "gated_delta_rule", "diagonal_plus_rank_one", "slot_attention"])
def test_grouped_keys_and_values_are_repeated(naive, name):
    call = small(name)
    grouped = {**call.tensors, "k": call["k"][:, :, :2], "v": call["v"][:, :, :1]}
    assert verify.verify_kernel(BY_NAME[name], dataclasses.replace(call, tensors=grouped)).ok


def test_rows_that_begin_in_the_middle_of_things(naive):
    """A row whose first token belongs to a document of its own drops the incoming state; rows differ in number."""
    segments = torch.tensor([[0] * 4 + [1] * 7, [2] * 1 + [3] * 3 + [5] * 7])
    for name in ("scalar_decay", "slot_attention", "convolution"):
        call = dataclasses.replace(small(name, state=True), segments=segments.clone())
        verdict = verify.verify_kernel(BY_NAME[name], call)
        assert verdict.ok, verdict.reason
    packed = VarlenLayout.from_segments(segments)
    assert packed.cu_seqlens.tolist() == [0, 4, 11, 12, 15, 22]
    assert (packed.first.tolist(), packed.last.tolist()) == ([0, 2], [1, 4])
    assert packed.continues_state.tolist() == [True, False]
    assert VarlenLayout.from_segments(segments) is packed  # found once for all layers


def test_documents_that_the_host_knows_are_not_looked_for(monkeypatch):
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5], [3, 4, 0, 0, 1, 2]])
    segments = DocumentBoundaries.from_position_ids(positions).to(torch.device("cpu")).segments
    expected = VarlenLayout.from_segments(segments.clone())
    monkeypatch.setattr(torch.Tensor, "nonzero", lambda *_: pytest.fail("waits for the device"))
    found = VarlenLayout.from_segments(segments)
    for name in ("cu_seqlens", "first", "last", "continues_state"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
        assert getattr(found, name).dtype == getattr(expected, name).dtype
    assert found.shape == expected.shape
    assert VarlenLayout.from_segments(segments) is found


SHAPE = HeadShape(hidden=24, heads=4, kv_heads=2, key_width=8, value_width=8, scale=8**-0.5, layers=2)


@pytest.mark.parametrize("name", [n for n in mixers.list_mixers() if n not in ("softmax", "sliding_window")])
def test_every_mixer_is_the_same_by_kernels(naive, name):
    """With its published switches, padding on the left, packed documents, and one more token after them."""
    split = {"mixer": "gated_deltanet", "mixer_options": {"rope": True}}
    options = {"gsa": {"slots": 16}, "head_split": split}.get(name, {})
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
        with fla.use_backend(backend):
            y, state = mixer(*given, tokens=Tokens(valid, segments))
            grads = torch.autograd.grad(y.square().sum(), [*given, *mixer.parameters()], allow_unused=True)
            with torch.no_grad():
                more, _ = mixer(*(z[:, -1:] for z in x), state={n: t.detach() for n, t in state.items()})
        results.append([y, *state.values(), *(g for g in grads if g is not None), more])
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-8)
    assert any(one["backend"] == "fla" and one["form"] == "chunked" for one in fla.list_dispatched_calls())
    assert any(one["backend"] == "fla" and one["form"] == "recurrent" for one in fla.list_dispatched_calls())


# ------------------------------------------------------------------ what is declined


def test_reasons_without_a_gpu():
    call = small("scalar_decay", dtype=torch.bfloat16)
    assert fla.unsupported_reason(call) == "its tensors are on cpu"
    if not torch.cuda.is_available():
        assert fla.unavailable_reason() == "no CUDA device"
    with fla.use_backend("fla"), pytest.raises(LimbeckError, match=r"no kernel takes scalar_decay chunked .*on cpu"):
        ops.scalar_decay.chunked(**call.tensors)
    verdict = fla.verify_call(call)
    assert (verdict.ok, verdict.reason) == (False, "its tensors are on cpu")
    fla.clear_dispatch_log()


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("scalar_decay", {"dtype": torch.float32}, "float32 without TF32"),
        ("delta_rule", {"dtype": torch.float32}, "does not support float32"),
        ("kda", {"dtype": torch.bfloat16, "key": 272}, "K = 272 is more than the kernel's limit of 256"),
        ("slot_attention", {"dtype": torch.bfloat16, "slots": 24}, "M = 24 is not a multiple of 16"),
        ("vector_decay", {"dtype": torch.bfloat16, "time": 0}, "the sequence is empty"),
        ("convolution", {"time": 1}, "one token"),
        ("delta_rule_step", {"dtype": torch.bfloat16, "documents": 2, "time": 4}, "packed documents"),
    ],
)
def test_reasons_of_adapters(naive, monkeypatch, name, changes, reason):
    monkeypatch.setattr(catalogue, "KERNEL_ADAPTERS", tuple(BY_NAME.values()))
    assert reason in fla.unsupported_reason(small(name, **changes))


def test_a_step_has_no_gradient(naive):
    call = small("kda_step", dtype=torch.float32)
    assert fla.unsupported_reason(call) is None
    assert "gradient" in fla.unsupported_reason(call.as_leaves())
    with torch.no_grad():
        assert fla.unsupported_reason(call.as_leaves()) is None


def test_float32_goes_to_tf32_kernels_where_that_is_allowed(naive):
    call = small("scalar_decay", dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert fla.unsupported_reason(call) is None
    finally:
        torch.set_float32_matmul_precision(before)


def test_the_same_bits_are_torchs(naive):
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in fla.unsupported_reason(small("scalar_decay"))
    finally:
        torch.use_deterministic_algorithms(False)


def test_autocast_decides_the_dtype():
    call = small("scalar_decay", dtype=torch.float32)
    assert call.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert call.dtype == torch.bfloat16
    assert call.cast_inputs(torch.bfloat16)["q"].dtype == torch.bfloat16
    assert call.cast_inputs(torch.bfloat16)["log_decay"].dtype == torch.float32


# ------------------------------------------------------------------ what runs, and what is left behind


def test_calls_go_to_a_kernel_and_are_noted_once(naive, caplog):
    call = small("scalar_decay", state=True)
    with caplog.at_level(logging.INFO, "limbeck.ops.fla"):
        for _ in range(2):
            o, state = ops.scalar_decay.chunked(**call.tensors)
    wanted, last = call.run_torch()
    torch.testing.assert_close(o, wanted)
    torch.testing.assert_close(state, last)
    [note] = fla.list_dispatched_calls()
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
    with fla.use_backend("torch"):
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

    monkeypatch.setattr(adapters, "import_kernel", lambda path: broken)
    call = small("scalar_decay")
    o, _ = ops.scalar_decay.chunked(**call.tensors)
    assert torch.equal(o, call.run_torch()[0])
    [note] = fla.list_dispatched_calls()
    assert note["backend"] == "torch"
    assert "chunk_simple_gla gives wrong results on this machine: " in note["reason"]
    assert ("no such instruction" if fault == "raises" else "is off by") in note["reason"]
    assert "\n" not in note["reason"]
    assert [r.levelname for r in caplog.records if r.name == "limbeck.ops.fla"] == ["WARNING"]
    with fla.use_backend("fla"), pytest.raises(LimbeckError, match="gives wrong results"):
        ops.scalar_decay.chunked(**call.tensors)


def test_a_kernel_is_checked_once_for_a_shape_and_machine(naive, monkeypatch, tmp_path):
    checked = []
    real = verify.verify_kernel
    monkeypatch.setattr(verify, "verify_kernel", lambda *given: checked.append(given) or real(*given))
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
    call = small("gated_delta_rule").as_leaves()
    o = checkpoint(lambda *x: ops.delta_rule.chunked(*x)[0], *list(call.tensors.values())[:5], use_reentrant=False)
    wanted = call.run_torch()[0]
    pair = [torch.autograd.grad(y.square().sum(), call["k"], retain_graph=True)[0] for y in (o, wanted)]
    torch.testing.assert_close(*pair)
    with torch.inference_mode():
        ops.vector_decay.chunked(**small("vector_decay").tensors)
    assert {note["backend"] for note in fla.list_dispatched_calls()} == {"fla"}


def test_matrices_are_torchs(naive):
    """Stage 1 multiplies the identity: wide, exact, and nothing for a kernel."""
    call = small("diagonal_plus_rank_one")
    q, k, _, a, b, log_decay, _ = call.tensors.values()
    dplr.matrix(q, k, a, b, log_decay)
    rows = torch.tensor([[0, 4], [2, 9]])
    matrix_rows.matrix_rows(dplr, q, k, (a, b, log_decay), rows)
    assert fla.list_dispatched_calls() == []


@pytest.mark.slow
def test_a_compiled_call_falls_back_to_the_kernel_outside_its_graph(naive):
    call = small("scalar_decay")
    compiled = torch.compile(lambda *x: ops.scalar_decay.chunked(*x)[0] + 1, backend="eager")
    given = list(call.tensors.values())[:4]
    torch.testing.assert_close(compiled(*given), call.run_torch()[0] + 1)
    assert [note["backend"] for note in fla.list_dispatched_calls()] == ["fla"]
    step = small("scalar_decay_step")
    torch._dynamo.reset()
    whole = torch.compile(lambda *x: ops.scalar_decay.recurrent(*x)[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(*list(step.tensors.values())[:4]), step.run_torch()[0])
    assert len(fla.list_dispatched_calls()) == 1  # a step stays in its graph


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
    assert fla.unsupported_reason(wrong) == "its shapes do not fit together"
    module = {"diagonal_plus_rank_one": "dplr", "convolution": "short_conv"}.get(call.operator, call.operator)
    with pytest.raises((LimbeckError, RuntimeError)):
        getattr(getattr(ops, module), call.form)(**wrong.tensors)
    [note] = fla.list_dispatched_calls()
    assert note["backend"] == "torch"
    assert not verify._KERNEL_CHECKS


def test_the_document_lists_every_kernel():
    text = (ROOT / "docs" / "reference" / "kernels.md").read_text(encoding="utf-8")
    for adapter in fla.KERNEL_ADAPTERS:
        row = f"| `{adapter.operator}.{adapter.form}` |"
        assert any(row in line and adapter.kernel.removeprefix("fla.") in line for line in text.splitlines()), adapter


def test_settings(monkeypatch):
    with pytest.raises(LimbeckError, match=r"auto \| torch \| fla"), fla.use_backend("cuda"):
        pass
    fla.clear_dispatch_log()
    monkeypatch.setenv("LIMBECK_BACKEND", "torch")
    with fla.use_backend("auto"):
        assert fla.summarize_dispatch() == [{"operator": "all", "backend": "torch", "reason": "requested"}]
    monkeypatch.setenv("LIMBECK_BACKEND", "triton")
    with pytest.raises(LimbeckError, match="'triton'"), fla.use_backend("auto"):
        pass


def test_the_manifest_says_what_ran(naive, tmp_path):
    from limbeck import Recipe
    from limbeck.training.run_directory import open_run

    recipe = Recipe.load("quickstart_smoke", {"backend": "auto"})
    with open_run(tmp_path / "run", recipe) as run:
        run.save_stage_result(0, {"w": torch.zeros(1)}, {})
        ops.scalar_decay.chunked(**small("scalar_decay").tensors)
        run.save_stage_result(1, {"w": torch.zeros(1)}, {})
    backends = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))["backends"]
    assert backends == [*[b for b in backends if b["operator"] == "all"], *fla.list_dispatched_calls()]
    assert backends[-1]["kernel"] == "fla.ops.simple_gla.chunk_simple_gla"
