"""Softmax in some groups of a layer's heads: the mixer against its parts, conversion, cache, and what is refused."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import limbeck
from limbeck import LimbeckError, mixers
from limbeck.mixers import HeadShape, Tokens
from limbeck.models import cache_bytes, get_mixers
from limbeck.models.head_groups import describe_softmax_heads, resolve_softmax_heads
from limbeck.models.layers import group_layers_by_mixer
from limbeck.report.model_card import generate_model_card
from limbeck.report.teacher_info import TeacherInfo
from limbeck.testing.contract import left_pad, sample_ids
from limbeck.testing.tiny_models import make_tiny_model

SHAPE = HeadShape(hidden=24, heads=8, kv_heads=4, key_width=6, value_width=5, scale=0.4, layers=2)
BODIES = {"grouped": ("llama", {}), "one key head": ("llama", {"num_key_value_heads": 1}), "all": ("gpt2", {})}


def inputs(length: int = 30, seed: int = 0) -> tuple[torch.Tensor, ...]:
    make = torch.Generator().manual_seed(seed)
    shapes = ((8, 6), (4, 6), (4, 5), (24,))
    return tuple(torch.randn(2, length, *s, generator=make, dtype=torch.float64) for s in shapes)


@pytest.mark.parametrize("groups", [[0], [3], [1, 2], [2, 0], [0, 1, 2, 3], []])
@pytest.mark.parametrize("window", [0, 7])
def test_each_group_has_its_mixer(groups, window):
    torch.manual_seed(0)
    options = {"softmax_groups": groups, "softmax_window": window, "softmax_sinks": 2}
    split = mixers.build("head_split", SHAPE, {**options, "mixer": "retnet", "mixer_options": {"output_gate": "none"}})
    split = split.double()
    q, k, v, x = inputs()
    tokens = Tokens(torch.arange(30) >= torch.tensor([[3], [0]]))
    y, matrix = split(q, k, v, x, tokens=tokens)[0], split.forward_matrix(q, k, v, x, tokens=tokens)[1]
    name, given = ("sliding_window", {"window": 7, "sinks": 2}) if window else ("softmax", {})
    whole = mixers.build(name, SHAPE, given)
    kept = [h for g in groups for h in (2 * g, 2 * g + 1)]
    assert torch.allclose(y[:, :, kept], whole(q, k, v, x, tokens=tokens)[0][:, :, kept], atol=1e-12)
    assert torch.allclose(matrix[:, kept], whole.forward_matrix(q, k, v, x, tokens=tokens)[1][:, kept], atol=1e-12)
    others = [h for h in range(8) if h not in kept]
    if others:
        rest = [g for g in range(4) if g not in groups]
        expected = split.others(q[:, :, others], k[:, :, rest], v[:, :, rest], x, tokens=tokens)[0]
        assert torch.equal(y[:, :, others], expected)
    rows = torch.tensor([[4, 29], [0, 17]])
    picked = matrix.gather(2, rows[:, None, :, None].expand(-1, 8, -1, 30))
    assert torch.allclose(split.forward_rows(q, k, v, x, rows, tokens=tokens), picked, atol=1e-12)


def test_softmax_is_the_definition():
    """Against a loop over tokens, with padding, documents and a state, and a padded query that sees nothing."""
    q, k, v, x = inputs(12)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, :3] = valid[1, 5] = False
    segments = torch.tensor([[0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1], [0] * 4 + [1] * 8])
    mixer = mixers.build("softmax", SHAPE)
    outputs, state = [], None
    for begin, end in ((0, 2), (2, 6), (6, 7), (7, 12)):
        part = slice(begin, end)
        # a call counts its documents from that of the state
        number = segments[:, part] - segments[:, max(begin - 1, 0), None]
        tokens = Tokens(valid[:, part], number)
        y, state = mixer(q[:, part], k[:, part], v[:, part], x[:, part], tokens=tokens, state=state)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    assert torch.allclose(y, mixer(q, k, v, x, tokens=Tokens(valid, segments))[0], atol=1e-12)
    for b in range(2):
        for i in range(12):
            for h in range(8):
                seen = [j for j in range(i + 1) if valid[b, j] and segments[b, j] == segments[b, i]]
                expected = torch.zeros(5, dtype=torch.float64)
                if seen:
                    weights = (0.4 * k[b, seen, h // 2] @ q[b, i, h]).softmax(0)
                    expected = weights @ v[b, seen, h // 2]
                assert torch.allclose(y[b, i, h], expected, atol=1e-12), (b, i, h)


def test_whether_the_state_grows_is_the_options_matter():
    def grows(**options):
        module = mixers.build("head_split", SHAPE, options)
        assert module.grows == type(module).state_grows(module.options)
        return module.grows

    assert grows()
    assert not grows(softmax_window=5)
    assert not grows(softmax_groups=[])
    assert grows(softmax_window=5, mixer="softmax")
    # two branches, neither of which grows, may be a branch
    fixed = {"linear": "head_split", "linear_options": {"softmax_window": 5, "mixer": "gla"}}
    assert not mixers.build("hybrid", SHAPE, fixed).grows
    with pytest.raises(LimbeckError, match="cannot be the linear branch"):
        mixers.build("hybrid", SHAPE, {"linear": "head_split"})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"softmax_groups": [4]}, "the layer has 4 groups"),
        ({"softmax_groups": [-1]}, "the layer has 4 groups"),
        ({"softmax_groups": [1, 1]}, "different numbers from 0 to 3"),
        ({"softmax_groups": ["1"]}, "the layer has 4 groups"),
        ({"softmax_groups": 1}, "softmax_groups"),
        ({"mixer": "head_split"}, "cannot be the mixer of the other groups"),
        ({"mixer": "nothing"}, "unknown mixer"),
        ({"mixer": "deltanet"}, "q and k come to a layer in one form"),
        ({"softmax_window": -1}, "are -1 and 4"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(LimbeckError, match=message):
        mixers.build("head_split", SHAPE, options)


# ------------------------------------------------------- whole models


@pytest.mark.parametrize("body", BODIES)
@torch.no_grad()
def test_a_teacher_of_softmax_groups_alone_is_the_teacher(body):
    family, settings = BODIES[body]
    teacher = make_tiny_model(family, **settings).double()
    ids = sample_ids(2, 24)
    student = limbeck.convert(teacher, "head_split", options={"mixer": "softmax"})
    assert torch.allclose(student(ids).logits, teacher(ids).logits, atol=1e-10)


@pytest.mark.parametrize("window", [0, 6])
@pytest.mark.parametrize("body", BODIES)
@torch.no_grad()
def test_convert_save_load_generate(body, window, tmp_path):
    family, settings = BODIES[body]
    teacher = make_tiny_model(family, **settings).double()
    student = limbeck.convert(teacher, "gated_deltanet", softmax_heads=["1.0"], softmax_window=window)
    if body == "one key head":  # the group is the layer
        assert [e["mixer"] for e in student.config.limbeck["layers"]] == ["gated_deltanet", "sliding_window"][
            : 1 + (window > 0)
        ]
    else:
        assert [e["mixer"] for e in student.config.limbeck["layers"]] == ["gated_deltanet", "head_split"]
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    ids = sample_ids(2, 20)
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    padded = left_pad(ids, 5)
    del padded["position_ids"]
    new = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    together = loaded.generate(**padded, **new)
    alone = [loaded.generate(ids[:1, :15], **new)[0, 15:], loaded.generate(ids[1:], **new)[0, 20:]]
    assert torch.equal(together[:, 20:], torch.stack(alone))
    beams = loaded.generate(ids[1:], num_beams=3, use_cache=True, **new)
    assert torch.equal(beams, loaded.generate(ids[1:], num_beams=3, use_cache=False, **new))


@torch.no_grad()
def test_the_cache_holds_those_groups_and_the_others_states():
    teacher = make_tiny_model("llama", num_key_value_heads=3).double()
    student = limbeck.convert(teacher, "retnet", softmax_heads="0.0,0.2,1.1")
    fixed = sum(m.others.state_numel() for m in get_mixers(student).values())
    cache = DynamicCache(config=student.config)
    ids = sample_ids(1, 64)
    for begin, end in ((0, 20), (20, 63), (63, 64)):
        student(ids[:, begin:end], past_key_values=cache, use_cache=True)
        # three groups with keys and values of width 8; 8 bytes each, as in the states of a float64 student
        assert cache_bytes(cache) == 8 * (fixed + 3 * 2 * 8 * end)


@torch.no_grad()
def test_a_window_in_those_groups_keeps_the_cache_as_it_is():
    student = limbeck.convert(make_tiny_model("llama").double(), "retnet", softmax_heads="0.0,1.1", softmax_window=6)
    sizes = []
    for length in (10, 40):
        cache = DynamicCache(config=student.config)
        student(sample_ids(1, length), past_key_values=cache, use_cache=True)
        sizes.append(cache_bytes(cache))
    assert sizes[0] == sizes[1] == 8 * sum(m.state_numel() for m in get_mixers(student).values())


def test_layers_with_all_groups_and_rules():
    teacher = make_tiny_model("llama", num_hidden_layers=4)
    heads, rules = "0.1,1.0,1.1,3.0", [{"layers": "3", "mixer": "gla", "options": {"rank": 4}}]
    student = limbeck.convert(teacher, "kda", softmax_heads=heads, rules=rules)
    plan = student.config.limbeck
    assert [(e["layer"], e["mixer"]) for e in plan["layers"]] == [(0, "head_split"), (2, "kda"), (3, "head_split")]
    assert plan["layers"][2]["options"]["mixer_options"]["rank"] == 4
    # KDA has no RoPE by default, and in a layer with softmax it does
    assert [plan["layers"][0]["options"]["mixer_options"]["rope"], plan["layers"][1]["options"]["rope"]] == [
        True,
        False,
    ]
    assert group_layers_by_mixer(plan, 4) == {"kda": [0, 2], "gla": [3], "softmax": [1]}
    assert describe_softmax_heads(plan) == "softmax in 4 of 8 head groups: 0.1, 3.0 and all of layer 1"
    card = generate_model_card("me/it", plan, TeacherInfo("a teacher", None, {}, [], ""))
    assert "There is still softmax in 4 of 8 head groups" in card
    assert "`gla`, softmax in head groups 0" in card
    assert "subquadratic" not in card
    windowed = limbeck.convert(teacher, "gla", softmax_heads=heads, softmax_window=16).config.limbeck
    layers = {e["layer"]: e for e in windowed["layers"]}
    assert (layers[1]["mixer"], layers[1]["options"]["window"]) == ("sliding_window", 16)
    assert "over the last 16 tokens" in describe_softmax_heads(windowed)
    assert "subquadratic" in generate_model_card("me/it", windowed, TeacherInfo("a teacher", None, {}, [], ""))
    plain = limbeck.convert(teacher, "gla").config.limbeck
    assert describe_softmax_heads(plain) == ""


def test_a_mixer_of_ones_own_is_saved_with_the_groups(tmp_path):
    source = """
from limbeck.mixers import Inputs, Mixer, register
from limbeck.ops import scalar_decay

@register
class Mine(Mixer):
    name, summary, operator = "split_mine", "a sum of the past", scalar_decay

    def inputs(self, q, k, v, x, tokens, state):
        return Inputs(q, k, v)
"""
    (tmp_path / "mine.py").write_text(source, encoding="utf-8")
    student = limbeck.convert(make_tiny_model("llama"), str(tmp_path / "mine.py"), softmax_heads="0.0")
    student.save_pretrained(tmp_path / "student")
    assert student.config.limbeck["origins"]["split_mine"]["file"] == "mine.py"
    assert (tmp_path / "student" / "mixer_split_mine.py").read_text(encoding="utf-8") == source
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert torch.equal(loaded(sample_ids(1, 9)).logits, student(sample_ids(1, 9)).logits)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"softmax_heads": "2.0"}, "the teacher has 2 layers"),
        ({"softmax_heads": "1.2"}, "groups from 1.0 to 1.1"),
        ({"softmax_heads": ["1.0", "1.0"]}, "names 1.0 twice"),
        ({"softmax_heads": "1"}, "softmax_heads has '1'"),
        ({"softmax_heads": [1.1]}, "'1.1', in quotes"),
        ({"softmax_heads": "nothing.json"}, "cannot read softmax_heads"),
        ({"softmax_heads": "0.0,0.1,1.0,1.1"}, "leaves nothing to convert"),
        ({"softmax_heads": "1.0", "softmax_layers": "1"}, "layer 1 keeps softmax as a whole"),
        ({"softmax_heads": "1.0", "layers": "0"}, "layer 1 keeps softmax as a whole"),
        ({"softmax_window": 8}, "names no group"),
        ({"softmax_heads": "1.0", "softmax_window": -8}, "softmax_window is -8"),
        ({"softmax_heads": "1.0", "options": {"rope": False}}, "without the rotary embedding"),
        ({"softmax_heads": "1.0", "mixer": "head_split"}, "is named in softmax_heads too"),
    ],
)
def test_impossible_conversions(given, message):
    with pytest.raises(LimbeckError, match=message):
        limbeck.convert(make_tiny_model("llama"), **{"mixer": "gla", **given})


@pytest.mark.parametrize("content", ["{}", "[]", '{"softmax_heads": "0.0"}', "nothing"])
def test_files_that_are_no_selection(content, tmp_path):
    file = tmp_path / "heads.json"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(LimbeckError, match="cannot read softmax_heads"):
        resolve_softmax_heads(str(file), [2, 2])


def test_a_selection_is_read(tmp_path):
    file = tmp_path / "heads.json"
    file.write_text(json.dumps({"softmax_heads": ["1.1", "0.0", "1.0"]}), encoding="utf-8")
    assert resolve_softmax_heads(str(file), [2, 2]) == {0: [0], 1: [0, 1]}
    assert resolve_softmax_heads("none", [2, 2]) == {}
