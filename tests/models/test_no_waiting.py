"""On an accelerator a step asks the device for nothing: tried on the meta device, which cannot answer."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

import limbeck
from limbeck import mixers
from limbeck.data.dataset import BatchPrefetcher
from limbeck.data.packing import MIN_BOUNDARIES, Batch, DocumentBoundaries
from limbeck.models import find_attention_sites
from limbeck.models import varlen as documents
from limbeck.models.backbone import build_model_inputs, run_backbone, supports_packed_positions
from limbeck.models.hooks import DistillationPair
from limbeck.models.packed import force_attention_masks, supports_packed_attention
from limbeck.testing import make_tiny_model
from limbeck.training.alignment import HiddenStage, MatrixStage
from limbeck.training.logit_distillation import LogitsStage
from limbeck.training.losses import ObjectiveWeights
from limbeck.training.stage_protocol import accumulate_gradients
from limbeck.training.trainer import fetch_scalars

# their decays are looked at (limbeck.ops.common.has_bounded_decay) where no kernel takes the call
LOOKS = {"gsa", "rwkv7"}


def a_batch(length: int = 48, packed: bool = True) -> Batch:
    torch.manual_seed(0)
    ids = torch.randint(3, 90, (2, length))
    positions = torch.arange(length).repeat(2, 1)
    targets = ids.roll(-1, 1)
    targets[:, -1] = -100
    if packed:
        positions[0, 20:] -= 20
        positions[1, 40:] -= 40
        targets[0, 19] = targets[1, 39] = -100
    return Batch(ids, positions, targets)


def knowing(batch: Batch) -> Batch:
    """As it would be on an accelerator."""
    return replace(batch, position_ids=batch.position_ids.clone(), metadata=batch.get_metadata())


@pytest.fixture
def no_autocast(monkeypatch):
    """PyTorch has no autocast for the meta device."""
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    monkeypatch.setattr(torch, "autocast", lambda d, *a, **k: nullcontext() if d == "meta" else autocast(d, *a, **k))
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda d=None: d != "meta" and enabled(d))


def stages(teacher, student, sites):
    common = (teacher, student, sites, nullcontext)
    return {
        "logits": LogitsStage(DistillationPair(*common), ObjectiveWeights(ce=0.5, kl=0.5)),
        "again": LogitsStage(DistillationPair(*common), ObjectiveWeights(), checkpoint_activations=True),
        "hidden": HiddenStage(DistillationPair(*common)),
        "block": HiddenStage(DistillationPair(*common), target="block", train="block"),
        "rows": MatrixStage(DistillationPair(*common), sampled_queries=8),
    }


@pytest.mark.parametrize(
    ("mixer", "packed"),
    [*((name, True) for name in mixers.list_mixers() if name not in LOOKS), ("gated_deltanet", False)],
)
def test_nothing_is_asked_of_the_device_inside_a_step(mixer, packed, no_autocast):
    teacher = make_tiny_model("llama").eval().requires_grad_(False)
    sites = find_attention_sites(teacher)
    student = limbeck.convert(teacher, mixer).requires_grad_(False)
    for model in (teacher, student):
        supports_packed_positions(model)
        force_attention_masks(model, False)
    away = [copy.deepcopy(model).to("meta") for model in (teacher, student)]
    batch = a_batch(packed=packed).to("meta")
    for name, stage in stages(*away, sites).items():
        if name == "rows":  # its operator looks for the last row that is compared
            continue
        if name in ("block", "again") and mixer != "gated_deltanet":
            continue
        for parameter in stage.parameters().values():
            parameter.requires_grad_(True)
        if isinstance(stage, LogitsStage):  # found by trying, before the first step
            for head in (stage.student_head, stage.teacher_head):
                head.weight = head.model.get_output_embeddings().weight
        sums = accumulate_gradients(stage, [batch, batch])
        assert sums, name
        assert all(value.device.type == "meta" for key, value in sums.items() if key != "count")
        for parameter in stage.parameters().values():
            parameter.requires_grad_(False)


@pytest.mark.parametrize("mixer", ["gated_deltanet", "linear_attention", "sliding_window"])
def test_documents_that_the_host_knows_change_no_number(mixer):
    teacher = make_tiny_model("llama").eval().requires_grad_(False)
    student = limbeck.convert(teacher, mixer, softmax_layers=[1]).requires_grad_(False)
    sites = [site for site in find_attention_sites(teacher) if site.shape.layer != 1]
    for name, stage in stages(teacher, student, sites).items():
        found = []
        for parameter in stage.parameters().values():
            parameter.requires_grad_(True)
        for batch in (a_batch(), knowing(a_batch())):
            sums = accumulate_gradients(stage, [batch])
            gradients = {n: p.grad for n, p in stage.parameters().items() if p.grad is not None}
            found.append((sums, gradients))
            for parameter in stage.parameters().values():
                parameter.grad = None
        for one, two in zip(*found):
            assert one.keys() == two.keys()
            assert all(torch.equal(one[key], two[key]) for key in one), name
        for parameter in stage.parameters().values():
            parameter.requires_grad_(False)
    assert supports_packed_attention(teacher)
    assert supports_packed_attention(student)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "gpt2"])
@torch.no_grad()
def test_families_that_ask_for_more_keep_their_masks(family):
    """Windows and soft caps, and positions that are learnt: whatever the route, the numbers are those of the masks."""
    model = make_tiny_model(family).eval()
    if family == "mistral":
        model.config.sliding_window = 8
    batch = a_batch()
    want = model.get_decoder()(**build_model_inputs(model, batch), use_cache=False).last_hidden_state
    assert torch.allclose(run_backbone(model, knowing(batch)), want, atol=1e-5)
    if family != "gpt2":
        assert not supports_packed_attention(model)


@torch.no_grad()
def test_attention_by_documents_is_attention_inside_each(monkeypatch):
    """The kernel's arguments, with a stand-in for it that runs one document after the other."""

    def varlen_attn(q, k, v, cut_q, cut_k, longest_q, longest_k, *, scale, window_size, enable_gqa):
        assert torch.equal(cut_q, cut_k)
        assert window_size == (-1, 0)
        assert longest_q == longest_k >= int(cut_q.diff().max())
        parts = []
        for a, b in zip(cut_q[:-1].tolist(), cut_q[1:].tolist()):
            heads = [x[a:b].transpose(0, 1)[None] for x in (q, k, v)]
            y = torch.nn.functional.scaled_dot_product_attention(
                *heads, is_causal=True, scale=scale, enable_gqa=enable_gqa
            )
            parts.append(y[0].transpose(0, 1))
        return torch.cat(parts)

    from torch.nn.attention import varlen

    monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)
    monkeypatch.setattr(documents, "supports_flash_varlen", lambda query, value: True)
    teacher = make_tiny_model("llama").eval()
    force_attention_masks(teacher, False)
    want = run_backbone(teacher, a_batch())
    assert torch.allclose(run_backbone(teacher, knowing(a_batch())), want, atol=1e-5)


def test_documents_are_read_off_the_positions():
    found = DocumentBoundaries.from_position_ids(a_batch().position_ids)
    assert found.cu_seqlens_cpu.tolist() == [0, 20, 48, 88, 96]
    assert found.cu_seqlens.tolist() == [0, 20, 48, 88] + [96] * (MIN_BOUNDARIES - 3)
    assert found.segments[0].bincount().tolist() == [20, 28]
    assert found.segments[1].bincount().tolist() == [40, 8]
    assert DocumentBoundaries.from_position_ids(a_batch(packed=False).position_ids) == DocumentBoundaries()


def test_a_batch_knows_on_the_host_what_it_knew():
    batch = knowing(a_batch())
    assert batch.n_targets == a_batch().n_targets == 92
    assert torch.equal(batch.cpu_input_ids, a_batch().input_ids)
    assert a_batch().to("meta").n_targets == 92
    assert a_batch().to("cpu").metadata is None


def test_the_numbers_of_a_step_come_in_one_piece():
    norm, losses = fetch_scalars(
        torch.tensor(2.5), {"a": torch.tensor(0.1, dtype=torch.float64), "b": torch.tensor(3.0)}
    )
    assert norm == 2.5
    assert losses == {"a": 0.1, "b": 3.0}


def test_batches_are_made_ahead_and_are_those_of_their_step():
    made = []

    def make(step: int) -> list[Batch]:
        made.append(step)
        ids = torch.full((1, 4), step)
        return [Batch(ids, torch.arange(4)[None], ids)]

    ahead = BatchPrefetcher(make, torch.device("cpu"), enabled=True)
    for step in (0, 1, 5, 6):
        assert ahead.get_batches(step)[0].input_ids.unique().item() == step
    ahead.close()
    assert made[:2] == [0, 1]
    assert sorted(set(made)) == [0, 1, 2, 5, 6, 7][: len(set(made))]

    def broken(step: int) -> list[Batch]:
        raise ValueError("no text")

    ahead = BatchPrefetcher(broken, torch.device("cpu"), enabled=True)
    with pytest.raises(ValueError, match="no text"):
        ahead.get_batches(0)
    ahead.close()
