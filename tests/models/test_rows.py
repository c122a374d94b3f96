"""Stage 1 on some rows: they are the rows of the matrices, of the student and of the teacher."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

import limbeck
from limbeck.data.packing import Batch
from limbeck.mixers import Tokens
from limbeck.models import find_attention_sites
from limbeck.models.attention_rows import output_attention_rows, supports_row_output
from limbeck.models.backbone import run_backbone, supports_packed_positions
from limbeck.models.hooks import DistillationPair, hook_modules
from limbeck.ops import delta_rule
from limbeck.ops.matrix_rows import gather_rows, matrix_rows, sample_query_positions
from limbeck.testing import FAMILIES, make_tiny_model
from limbeck.testing.contract import MixerVariant, sample_inputs
from limbeck.testing.tiny_models import VOCAB_SIZE
from limbeck.training.alignment import MatrixStage

MIXERS = ["retnet", "linear_attention", "mamba2", "mlstm", "gla", "gated_deltanet", "kda", "rwkv7", "rwkv6", "gsa"]
MIXERS += ["sliding_window", "softmax"]


def packed(*documents: int, rows: int = 2) -> Batch:
    positions = torch.cat([torch.arange(n) for n in documents])[None].expand(rows, -1)
    ids = torch.randint(3, VOCAB_SIZE, positions.shape, generator=torch.Generator().manual_seed(1))
    return Batch(ids, positions, ids)


@pytest.mark.parametrize("mixer", MIXERS)
def test_rows_are_those_of_the_matrix_with_its_gradients(mixer):
    module = MixerVariant(mixer).build_module()
    q, k, v, x = (z.requires_grad_(True) for z in sample_inputs(module, batch=2, length=70))
    segments = (torch.arange(70)[None] >= torch.tensor([[70], [40]])).long()
    rows = torch.stack([torch.tensor([0, 5, 41, 69]), torch.tensor([1, 39, 40, 68])])
    tokens = Tokens(segments=segments)
    wanted = gather_rows(module.forward_matrix(q, k, v, x, tokens=tokens)[1], rows, 2)
    found = module.forward_rows(q, k, v, x, rows, tokens=tokens)
    assert found.shape == wanted.shape == (2, 4, 4, 70)
    assert torch.allclose(found, wanted, atol=1e-9)
    weight, inputs = torch.rand_like(wanted), (q, k, x, *module.parameters())
    pair = [torch.autograd.grad((m * weight).sum(), inputs, allow_unused=True) for m in (wanted, found)]
    for a, b in zip(*pair):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, atol=1e-9)


@pytest.mark.parametrize("block", [16, 33, 128])
def test_blocks_of_columns_change_nothing(block):
    torch.manual_seed(0)
    q, k = torch.randn(2, 50, 4, 8).double(), torch.nn.functional.normalize(torch.randn(2, 50, 2, 8).double(), dim=-1)
    gates = torch.rand(2, 50, 4).double(), -torch.rand(2, 50, 4).double()
    rows = torch.tensor([[2, 30, 44], [0, 1, 40]])
    wanted = gather_rows(delta_rule.matrix(q, k, *gates), rows, 2)
    blind = SimpleNamespace(chunked=delta_rule.chunked)  # as an operator without rows of its own
    assert torch.allclose(matrix_rows(blind, q, k, gates, rows, block=block), wanted, atol=1e-12)
    assert torch.allclose(matrix_rows(delta_rule, q, k, gates, rows), wanted, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_teachers_rows_are_those_of_its_eager_matrices(family):
    """Windows, soft caps, sinks and packed documents included."""
    teacher, batch = make_tiny_model(family).double(), packed(9, 22)
    supports_packed_positions(teacher)
    names = [site.module for site in find_attention_sites(teacher)]
    assert supports_row_output(teacher, names)
    rows = torch.tensor([[0, 8, 9, 30], [1, 10, 20, 29]])
    seen = {"rows": {}, "eager": {}}
    for kind, context in (("rows", output_attention_rows(teacher, names, rows)), ("eager", contextlib.nullcontext())):

        def visitor(name, kind=kind):
            return lambda args, kwargs, output: seen[kind].update({name: output})

        with context, hook_modules(teacher, {name: visitor(name) for name in names}, eager=kind == "eager"):
            run_backbone(teacher, batch)
    for name in names:
        y, matrix = seen["rows"][name][:2]
        assert torch.allclose(y, seen["eager"][name][0], atol=1e-5)
        assert torch.allclose(matrix, gather_rows(seen["eager"][name][1], rows, 2), atol=1e-6), name
    assert not any(hasattr(module, "limbeck_rows") for module in teacher.modules())


@pytest.mark.parametrize("alone", [True, False])
def test_all_rows_give_the_loss_of_the_matrices(alone):
    teacher = make_tiny_model("llama").double().requires_grad_(False)
    student = limbeck.convert(teacher, "gated_deltanet").requires_grad_(False)
    pair = DistillationPair(teacher, student, find_attention_sites(teacher), contextlib.nullcontext)
    batch = packed(12, 19)
    whole, sampled, few = (MatrixStage(pair, sampled_queries=n) for n in (None, 500, 8))
    sampled.teacher_computes_rows, sampled.eager = alone, not alone
    wanted, found, rough = (stage.evaluate(batch) for stage in (whole, sampled, few))
    for name, loss in wanted.items():
        assert float(found[name]) == pytest.approx(float(loss), rel=1e-6)
        assert float(rough[name]) != float(loss)
        assert float(rough[name]) == pytest.approx(float(loss), rel=0.5)
    assert few.evaluate(batch) == rough, "drawn otherwise the second time"


def test_rows_do_not_depend_on_how_a_step_is_split():
    batch = packed(40, rows=3)
    rows = sample_query_positions(batch.input_ids, 7, seed=5)
    assert torch.equal(
        rows, torch.cat([sample_query_positions(batch.input_ids[i : i + 1], 7, seed=5) for i in range(3)])
    )
    assert not torch.equal(rows, sample_query_positions(batch.input_ids, 7, seed=6))
    assert all(len(set(row)) == 7 and row == sorted(row) for row in rows.tolist())
