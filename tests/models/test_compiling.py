"""Blocks and losses through torch.compile give the numbers that they give without."""

import os
import shutil
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from test_no_waiting import a_batch

import limbeck
from limbeck.models import find_attention_sites
from limbeck.models.compilation import CompileLog, compile_blocks, list_decoder_blocks, should_compile
from limbeck.models.hooks import DistillationPair
from limbeck.testing import make_tiny_model
from limbeck.training.chunked_losses import TeacherLogitsFromHidden, logit_losses
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.stage_protocol import accumulate_gradients


@pytest.fixture
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize(("mixer", "again"), [("gla", False), ("gated_deltanet", True)])
def test_compiled_blocks_give_the_same_gradients(mixer, again, fresh):
    compare(mixer, again, "aot_eager")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor writes C++, and there is no g++")
def test_blocks_of_inductor_give_the_same_gradients():
    """In a process of its own: inductor needs setuptools, which minds what else was imported before it."""
    code = "import test_compiling; test_compiling.compare('mlstm', False, 'inductor')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command, here = [sys.executable, "-c", code], Path(__file__).parent
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr


def compare(mixer: str, again: bool, compiler: str) -> None:
    """The gradients of a step with and without a compiler; `again`: blocks are run again in the backward pass."""
    teacher = make_tiny_model("llama").eval().requires_grad_(False)
    student = limbeck.convert(teacher, mixer).requires_grad_(False)
    sites = find_attention_sites(teacher)
    stage = LogitsStage(
        DistillationPair(teacher, student, sites, nullcontext),
        ObjectiveWeights(ce=0.5, kl=0.5),
        train="body",
        checkpoint_activations=again,
    )
    blocks, notes, found = list_decoder_blocks(student, sites[0].block), CompileLog(), []
    for parameter in stage.parameters().values():
        parameter.requires_grad_(True)
    for backend in (None, compiler):
        with compile_blocks(student, blocks, notes, backend) if backend else nullcontext():
            sums = accumulate_gradients(stage, [a_batch()])
        found.append((float(sums["loss"]), {n: p.grad.clone() for n, p in stage.parameters().items()}))
        for parameter in stage.parameters().values():
            parameter.grad = None
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0, "nothing was compiled"
    assert notes.reasons == []
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    for name, gradient in found[0][1].items():
        assert torch.allclose(gradient, found[1][1][name], rtol=1e-3, atol=1e-5), name
    assert all("forward" not in student.get_submodule(name).__dict__ for name in blocks)


def test_what_the_compiler_refuses_runs_as_it_is(fresh):
    teacher = make_tiny_model("llama").eval().requires_grad_(False)
    blocks, notes = list_decoder_blocks(teacher, find_attention_sites(teacher)[0].block), CompileLog()

    def refuses(graph, inputs):
        raise RuntimeError("no such card")

    batch = a_batch(packed=False)
    want = teacher(batch.input_ids, use_cache=False).logits
    with compile_blocks(teacher, blocks, notes, refuses):
        found = teacher(batch.input_ids, use_cache=False).logits
    assert torch.equal(found, want)
    assert len(notes.reasons) == 1
    assert "no such card" in notes.reasons[0]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("weights", [ObjectiveWeights(ce=0.5, kl=0.5), ObjectiveWeights(kl=0, jsd=1.0)])
def test_the_compiled_loss_is_the_loss(weights, fresh, monkeypatch):
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **more: compile_(function, backend="aot_eager", **more))
    torch.manual_seed(0)
    head, other = torch.nn.Linear(8, 31, bias=False), torch.nn.Linear(8, 31, bias=False)
    h, t, targets = torch.randn(2, 9, 8), torch.randn(2, 9, 8), torch.randint(0, 31, (2, 9))
    found = []
    for fused in (False, True):
        head.weight.grad = None
        sums, gradient = logit_losses(
            head, h, TeacherLogitsFromHidden(other, t), targets, weights, chunk_size=7, compiled=fused
        )
        found.append((float(sums["loss"]), gradient, head.weight.grad))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)
    assert torch.allclose(found[0][2], found[1][2], atol=1e-5)


def test_the_loss_under_autocast_is_that_of_autograd_under_autocast():
    torch.manual_seed(0)
    head, other = torch.nn.Linear(16, 31, bias=False), torch.nn.Linear(16, 31, bias=False)
    h, t, targets = torch.randn(1, 20, 16), torch.randn(1, 20, 16), torch.randint(0, 31, (1, 20))
    leaf = h.clone().requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = torch.nn.functional.cross_entropy(head(leaf)[0].float(), targets[0], reduction="sum")
        want_h, want_w = torch.autograd.grad(loss, [leaf, head.weight])
        sums, gradient = logit_losses(
            head, h, TeacherLogitsFromHidden(other, t), targets, ObjectiveWeights(ce=1, kl=0), chunk_size=20
        )
    assert gradient.dtype == torch.float32
    assert float(sums["loss"]) == pytest.approx(float(loss.detach()), rel=1e-5)
    assert torch.allclose(gradient, want_h, rtol=2e-2, atol=1e-3)
    assert torch.allclose(head.weight.grad, want_w, rtol=2e-2, atol=2e-2)


def test_compiling_is_for_gpus_unless_asked_for():
    assert not should_compile("auto", torch.device("cpu"))
    assert should_compile("auto", torch.device("cuda"))
    assert should_compile(True, torch.device("cpu"))
    assert not should_compile(False, torch.device("cuda"))
