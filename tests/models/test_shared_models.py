"""A model that others use too: threads beside each other, hooks of other libraries, settings inside settings."""

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn

import limbeck
from limbeck.data.packing import Batch
from limbeck.evaluation.mixing import extract_mixing_matrix
from limbeck.models import find_attention_sites
from limbeck.models.attention_rows import output_attention_rows
from limbeck.models.backbone import LMHead, run_backbone
from limbeck.models.hooks import hook_modules
from limbeck.models.packed import packed_attention
from limbeck.models.temporary import use_attn_implementation
from limbeck.ops.fla import use_backend
from limbeck.ops.fla.call import requested_backend
from limbeck.testing import make_tiny_model
from limbeck.testing.tiny_models import VOCAB_SIZE


def ids_of(length: int, rows: int = 1) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(length))


def batch_of(length: int, rows: int = 1) -> Batch:
    ids = ids_of(length, rows)
    return Batch(ids, torch.arange(length).expand(rows, -1), ids)


def at_once(*works: Callable[[], None]) -> None:
    """All in threads of their own; the first error is raised."""
    errors: list[BaseException] = []

    def run(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_models_are_converted_in_threads():
    def work() -> None:
        for _ in range(6):
            teacher = make_tiny_model("llama")
            sites = find_attention_sites(teacher)
            assert [site.module for site in sites] == [f"model.layers.{i}.self_attn" for i in range(2)]
            limbeck.convert(teacher, "gated_deltanet")

    at_once(*[work] * 6)


def test_one_teacher_is_looked_at_and_used_in_threads():
    teacher = make_tiny_model("llama")
    expected, stop = teacher(ids_of(20)).logits.detach(), threading.Event()

    def look() -> None:
        for _ in range(15):
            assert find_attention_sites(teacher)[1].output == "o_proj"
        stop.set()

    @torch.no_grad()
    def use() -> None:
        while not stop.is_set():
            assert torch.allclose(teacher(ids_of(20)).logits, expected, atol=1e-4)

    at_once(look, use, use)
    assert teacher.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("kind", ["softmax", "student"])
def test_a_head_runs_beside_whole_passes_and_other_heads(kind):
    model = (
        make_tiny_model("llama") if kind == "softmax" else limbeck.convert(make_tiny_model("llama"), "gated_deltanet")
    )
    hidden = torch.randn(200, 48)
    with torch.no_grad():
        expected, wanted = model(ids_of(20)).logits, LMHead(model)(hidden)
    stop = threading.Event()

    @torch.no_grad()
    def heads() -> None:
        while not stop.is_set():
            assert torch.allclose(LMHead(model)(hidden), wanted, atol=1e-4)

    @torch.no_grad()
    def passes() -> None:
        try:
            for _ in range(60):
                logits = model(ids_of(20)).logits
                assert logits.shape == expected.shape
                assert torch.allclose(logits, expected, atol=1e-4)
        finally:
            stop.set()

    at_once(heads, heads, passes)
    assert "forward" not in vars(model.get_decoder())


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@torch.no_grad()
def test_a_head_leaves_what_others_hung_on_the_decoder(family):
    accelerate = pytest.importorskip("accelerate.hooks")

    class Counts(accelerate.ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, hook = make_tiny_model(family), Counts()
    expected = LMHead(model)(torch.ones(3, 48))
    accelerate.add_hook_to_module(model.get_decoder(), hook)
    kept = model.get_decoder().forward
    assert torch.allclose(LMHead(model)(torch.ones(3, 48)), expected)
    assert model.get_decoder().forward is kept
    assert hook.calls == 0
    model(ids_of(4))
    assert hook.calls == 1
    with pytest.raises(RuntimeError):
        LMHead(model)(torch.ones(3, 7))
    assert model.get_decoder().forward is kept


@torch.no_grad()
def test_a_tap_sees_its_own_threads_passes_alone():
    teacher, seen = make_tiny_model("llama"), []
    name = "model.layers.0.self_attn"
    with hook_modules(teacher, {name: lambda args, kwargs, output: seen.append(output[0].shape[1])}, eager=True):
        at_once(lambda: run_backbone(teacher, batch_of(31)))
        run_backbone(teacher, batch_of(17))
    assert seen == [17]
    assert teacher.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_rows_are_given_to_the_thread_that_asked():
    teacher, found = make_tiny_model("llama"), []
    module = teacher.get_submodule("model.layers.0.self_attn")
    module.register_forward_hook(lambda m, args, output: found.append(output[1]))
    run_backbone(teacher, batch_of(9))  # tries the teacher first
    found.clear()
    with output_attention_rows(teacher, ["model.layers.0.self_attn"], torch.tensor([[1, 5]])):
        at_once(lambda: run_backbone(teacher, batch_of(9, rows=3)))
        run_backbone(teacher, batch_of(9))
    assert found[0] is None
    assert found[1].shape == (1, 6, 2, 9)


def switches(model):
    known = batch_of(12)
    known = Batch(known.input_ids, known.position_ids, known.targets, metadata=known.get_metadata())
    name = "model.layers.0.self_attn"
    return {
        "tap": lambda: hook_modules(model, {}, eager=True),
        "rows": lambda: output_attention_rows(model, [name], torch.tensor([[1]])),
        "documents": lambda: packed_attention(model, known),
        "implementation": lambda: use_attn_implementation(model, "eager"),
    }


@pytest.mark.parametrize("kind", ["tap", "rows", "documents", "implementation"])
def test_attention_is_put_back_as_it_was_whoever_came_between(kind):
    """Two threads, the first to come the first to go: neither leaves its own choice behind."""
    model = make_tiny_model("llama", attn_implementation="eager")
    before, inside, leave = model.config._attn_implementation, threading.Event(), threading.Event()

    def first() -> None:
        with switches(model)[kind]():
            inside.set()
            leave.wait(5)

    def second() -> None:
        inside.wait(5)
        threading.Timer(0.05, leave.set).start()
        with switches(model)["tap"]():
            pass

    at_once(first, second)
    assert model.config._attn_implementation == before
    with pytest.raises(ValueError, match="inside"), switches(model)[kind]():
        raise ValueError("inside")
    assert model.config._attn_implementation == before


def test_settings_inside_a_config_are_put_back_one_by_one():
    """Models of several parts give each part an attention function of its own."""
    from transformers import AutoConfig

    model = nn.Module()
    model.config = AutoConfig.for_model("llava")
    model.config._attn_implementation = {"": "sdpa", "text_config": "eager", "vision_config": "flash_attention_2"}

    def now() -> list[str]:
        config = model.config
        return [c._attn_implementation for c in (config, config.text_config, config.vision_config)]

    with use_attn_implementation(model, "limbeck_rows"):
        assert now() == ["limbeck_rows"] * 3
    assert now() == ["sdpa", "eager", "flash_attention_2"]


def test_a_model_is_left_in_the_modes_that_its_modules_were_in():
    teacher = make_tiny_model("llama").train()
    teacher.model.layers[1].eval()
    before = {name: module.training for name, module in teacher.named_modules()}
    limbeck.convert(teacher, "gla")
    assert {name: module.training for name, module in teacher.named_modules()} == before


@torch.no_grad()
def test_a_layers_matrix_is_asked_for_without_a_trace():
    student = limbeck.convert(make_tiny_model("llama"), "gla", [0])
    module, x = student.get_submodule("model.layers.1.self_attn"), torch.randn(1, 5, 48)
    rotary = student.model.rotary_emb(x, torch.arange(5)[None])
    before = module.config._attn_implementation
    assert (
        extract_mixing_matrix(module, (), {"hidden_states": x, "position_embeddings": rotary, "attention_mask": None})
        is not None
    )
    assert module.config._attn_implementation == before


def test_a_backend_does_not_outlive_those_who_asked_for_it():
    before, inside, leave = requested_backend(), threading.Event(), threading.Event()

    def first() -> None:
        with use_backend("torch"):
            inside.set()
            leave.wait(5)
        assert requested_backend() == "fla"  # of the other, which is still inside

    def second() -> None:
        inside.wait(5)
        with use_backend("fla"):
            leave.set()
            one.join()
        assert requested_backend() == before

    one = threading.Thread(target=first)
    one.start()
    at_once(second)
    assert requested_backend() == before
