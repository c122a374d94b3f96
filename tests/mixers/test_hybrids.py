"""Layers that keep softmax, other mixers in some layers, two branches inside a layer, and which layers to keep."""

import contextlib
import json

import pytest
import torch

import limbeck
from limbeck import LimbeckError, mixers
from limbeck.data.packing import Batch, PackedDataset
from limbeck.mixers import HeadShape
from limbeck.models import find_attention_sites, get_mixers, parse_softmax_layers
from limbeck.testing.tiny_models import VOCAB_SIZE, make_tiny_model
from limbeck.training import layer_selection

SHAPE = HeadShape(hidden=48, heads=6, kv_heads=2, key_width=8, value_width=8, scale=8**-0.5, layers=2)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("none", []),
        ("0,2-3", [0, 2, 3]),
        ([1], [1]),
        ("every 4", [3, 7]),
        ("uniform 2", [2, 6]),
        ("uniform 8", list(range(8))),
    ],
)
def test_keep(text, kept):
    assert parse_softmax_layers(text, 8) == kept


@pytest.mark.parametrize("text", ["8", "every 0", "every x", "uniform 9", "some", [-1], "missing.json"])
def test_impossible_keeps(text):
    with pytest.raises(LimbeckError, match=r"softmax_layers is|cannot read"):
        parse_softmax_layers(text, 8)


@pytest.mark.parametrize("key", ["softmax_layers", "keep"])  # the second one is that of earlier versions
def test_a_file_of_select_is_read(tmp_path, key):
    file = tmp_path / "layers.json"
    file.write_text(json.dumps({key: [1, 5], "by": "kl"}), encoding="utf-8")
    assert parse_softmax_layers(str(file), 8) == [1, 5]


def test_kept_layers_and_rules(tmp_path):
    teacher = make_tiny_model("llama", num_hidden_layers=6)
    rules = [{"layers": "0-1", "mixer": "retnet"}, {"layers": [1], "mixer": "gla", "options": {"rank": 4}}]
    student = limbeck.convert(teacher, "kda", softmax_layers="every 3", rules=rules)
    found = {name.split(".")[2]: mixer.name for name, mixer in get_mixers(student).items()}
    assert found == {"0": "retnet", "1": "gla", "3": "kda", "4": "kda"}
    assert get_mixers(student)["model.layers.1.self_attn"].options.rank == 4
    student.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    ids = torch.arange(20)[None]
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, student(ids).logits)
    with pytest.raises(LimbeckError, match="keeps softmax"):
        limbeck.convert(teacher, "kda", softmax_layers="0", rules=[{"layers": "0", "mixer": "gla"}])
    with pytest.raises(LimbeckError, match="a rule has"):
        limbeck.convert(teacher, "kda", rules=[{"layer": "0"}])
    with pytest.raises(LimbeckError, match="nothing to convert"):
        limbeck.convert(teacher, "kda", softmax_layers="uniform 6")


def inputs() -> tuple[torch.Tensor, ...]:
    make = torch.Generator().manual_seed(0)
    shapes = ((6, 8), (2, 8), (2, 8), (48,))
    return tuple(torch.randn(2, 30, *s, generator=make, dtype=torch.float64) for s in shapes)


def test_the_branches_of_a_hybrid_are_the_mixers_alone():
    options = {"linear": "gla", "linear_options": {"rank": 4}, "window": 8, "sinks": 2}
    torch.manual_seed(0)
    both = mixers.build("hybrid", SHAPE, options).double()
    alone = {}
    for branch in ("linear", "window"):
        arm = mixers.build("hybrid", SHAPE, {**options, "branches": branch}).double()
        arm.load_state_dict(both.state_dict())
        alone[branch] = arm(*inputs())[0]
    assert torch.allclose(both(*inputs())[0], alone["linear"] + alone["window"])
    assert torch.allclose(alone["linear"], 0.5 * both.linear(*inputs())[0])
    assert torch.allclose(alone["window"], 0.5 * both.window(*inputs())[0])


@pytest.mark.parametrize("options", [{"linear": "softmax"}, {"linear": "hybrid"}, {"share": 1.0}])
def test_impossible_hybrids(options):
    with pytest.raises(LimbeckError):
        mixers.build("hybrid", SHAPE, options)


@pytest.fixture(scope="module")
def scores():
    teacher = make_tiny_model("llama", num_hidden_layers=4).requires_grad_(False)
    student = limbeck.convert(teacher, "retnet", share_weights=True).requires_grad_(False)

    class Text(PackedDataset):
        length, n_sequences = 48, 8

        def __init__(self, seed: int):
            self.seed = seed

        def batch(self, position: int, size: int) -> Batch:
            make = torch.Generator().manual_seed(100 * self.seed + position)
            ids = torch.randint(3, VOCAB_SIZE, (size, 49), generator=make)
            return Batch(ids[:, :-1], torch.arange(48).expand(size, -1), ids[:, 1:])

    before = teacher(torch.arange(20)[None]).logits
    sites = find_attention_sites(teacher)
    found = layer_selection.score_layers(
        teacher, student, sites, Text(0), Text(1), contextlib.nullcontext, tokens=192, eval_tokens=96
    )
    assert torch.equal(teacher(torch.arange(20)[None]).logits, before), "the teacher was left changed"
    return found


def test_every_layer_has_its_price(scores):
    assert [p.layer for p in scores] == [0, 1, 2, 3]
    assert all(p.kl > 0 for p in scores)
    assert all(0 < p.unexplained < 1 for p in scores)


def test_the_dearest_layers_are_kept(scores):
    dearest = max(scores, key=lambda p: p.kl).layer
    assert layer_selection.select_layers(scores, 1, "kl") == [dearest]
    assert layer_selection.select_layers(scores, 1, "recall") == [max(scores, key=lambda p: p.recall).layer]
    assert layer_selection.select_layers(scores, 2, "uniform") == [1, 3]
    assert len(layer_selection.select_layers(scores, 3, "halo")) == 3
    made = [
        layer_selection.LayerScore(i, kl, recall, 0.1)
        for i, (kl, recall) in enumerate([(1, 0), (0.3, -9), (0.1, 2), (0.4, 1.5)])
    ]
    assert layer_selection.select_layers(made, 3, "both") == [0, 2, 3]  # 1.0, 0.3, 1.1, 1.15
    assert layer_selection.select_layers(made, 1, "both") == [3]
    # what text cannot tell apart (a window in shorter documents) is rounding, and does not outvote recall
    silent = [layer_selection.LayerScore(i, kl, recall, 0.1) for i, (kl, recall) in enumerate([(1e-7, 0), (1e-9, 0.5)])]
    assert layer_selection.select_layers(silent, 1, "both") == [1]
    for wrong in ((0, "kl"), (4, "kl"), (1, "kll")):
        with pytest.raises(LimbeckError):
            layer_selection.select_layers(scores, *wrong)


def test_the_control_arm_costs_nothing():
    teacher = make_tiny_model("llama").requires_grad_(False)
    student = limbeck.convert(teacher, "softmax", share_weights=True)
    ids = torch.arange(20)[None]
    for site in find_attention_sites(teacher):
        with layer_selection.swap_module(teacher, site.module, student.get_submodule(site.module)):
            swapped = teacher(ids).logits
        assert torch.allclose(swapped, teacher(ids).logits, atol=1e-5)


def test_repeated_text_is_to_be_predicted_once():
    ids = torch.arange(3, 33)[None]
    batch = layer_selection.make_repeated_batch(Batch(ids, torch.arange(30)[None], ids))
    assert batch.input_ids[0, 20:].tolist() == ids[0, :10].tolist()
    assert batch.n_targets == 9
    assert batch.targets[0, 20:29].tolist() == ids[0, 1:10].tolist()
