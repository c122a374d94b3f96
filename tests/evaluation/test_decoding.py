"""What the next token costs: the caches that it is measured on, and the break-even length."""

import pytest
import torch

from limbeck import convert
from limbeck.core.errors import LimbeckError
from limbeck.evaluation.timing import (
    SEED_TOKENS,
    TimedModel,
    compute_drift,
    find_break_even,
    make_dummy_input_ids,
    prefill_cache,
    time_decoding,
)
from limbeck.models import cache_bytes
from limbeck.report.figures.speed import draw_decoding
from limbeck.testing import make_tiny_model

KINDS = [
    ("teacher", False),
    ("teacher", True),
    ("hybrid", False),
    ("hybrid", True),
    ("pure", False),
]  # and whether its cache is static
IDS = torch.randint(7, 90, (1, 40), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def models():
    teacher = make_tiny_model("llama").eval()
    return {
        "teacher": teacher,
        "hybrid": convert(teacher, "gated_deltanet", softmax_layers=[1]),
        "pure": convert(teacher, "gated_deltanet"),
    }


@pytest.mark.parametrize(
    ("name", "static"), [("teacher", False), ("teacher", True), ("hybrid", False), ("pure", False)]
)
@torch.no_grad()
def test_a_filled_cache_is_the_context(models, name, static):
    model = models[name]
    cache = prefill_cache(model, 39, extra_length=4, static=static, text=IDS)
    last = model(input_ids=IDS[:, 39:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(last, model(IDS).logits[:, -1], rtol=1e-4, atol=1e-4)


def test_beyond_the_seed_caches_have_the_length_that_was_asked_for(models):
    length = SEED_TOKENS + 300
    for name, static in KINDS:
        cache = prefill_cache(models[name], length, extra_length=1, static=static)
        assert int(cache.get_seq_length()) == length, name
        models[name](input_ids=IDS[:, :1], past_key_values=cache, use_cache=True)
        assert int(cache.get_seq_length()) == length + 1, name
    grown = prefill_cache(models["teacher"], length).layers[0].keys
    assert torch.equal(grown[:, :, SEED_TOKENS:], grown[:, :, :300])


@torch.no_grad()
def test_what_grows_in_a_state_is_extended_and_nothing_else(models):
    # windows of as many tokens as are read, so that lengths alone do not tell what grows
    options = {"window": SEED_TOKENS + 1, "sinks": 0}
    split = convert(models["teacher"], "sliding_window", options=options, softmax_heads=["1.0"])
    length = 2 * SEED_TOKENS + 300
    cache = prefill_cache(split, length)
    state = cache.layers[1].states[0]
    sizes = {name: z.shape[1] for name, z in state.items() if z.dim() > 1}
    assert sizes == {"softmax.k": length, "softmax.v": length, "others.k": SEED_TOKENS, "others.v": SEED_TOKENS}
    assert torch.equal(state["softmax.k"][:, SEED_TOKENS : 2 * SEED_TOKENS], state["softmax.k"][:, :SEED_TOKENS])
    split(input_ids=IDS[:, :1], past_key_values=cache, use_cache=True)
    assert cache.layers[1].states[0]["softmax.k"].shape[1] == length + 1


def test_memory_a_student_constant_a_hybrid_by_its_layers_and_time_for_all(models, tmp_path):
    timed_models = [TimedModel(name, model) for name, model in models.items()]
    points = {(p.name, p.length): p for n in (64, 128, 512) for p in time_decoding(timed_models, n, steps=2)}
    sizes = {name: [points[name, n].bytes for n in (64, 128, 512)] for name in models}
    per_token = sizes["teacher"][0] // 64
    assert sizes["teacher"] == [64 * per_token, 128 * per_token, 512 * per_token]
    assert len(set(sizes["pure"])) == 1
    layers = models["teacher"].config.num_hidden_layers
    assert sizes["hybrid"][2] - sizes["hybrid"][1] == (512 - 128) * per_token // layers
    assert all(0 < p.min_milliseconds <= p.milliseconds <= p.max_milliseconds for p in points.values())
    draw_decoding({name: [p for p in points.values() if p.name == name] for name in models}, tmp_path / "curves.svg")
    assert "tokens of context" in (tmp_path / "curves.svg").read_text(encoding="utf-8")


def test_break_even():
    lengths = [100, 200, 400]
    assert find_break_even(lengths, [1.0, 3.0, 9.0], [2.0, 2.0, 2.0]) == pytest.approx(150)
    assert find_break_even(lengths, [1.0, 1.5, 1.9], [2.0, 2.0, 2.0]) is None
    assert find_break_even(lengths, [3.0, 4.0, 5.0], [2.0, 2.0, 2.0]) == 100
    # noise below does not count: what matters is from where on it stays so
    assert find_break_even(lengths, [3.0, 1.0, 5.0], [2.0, 2.0, 2.0]) == pytest.approx(250)


def test_what_cannot_be_measured_says_why(models):
    with pytest.raises(LimbeckError, match="at least 1"):
        time_decoding([TimedModel("pure", models["pure"])], 0)


@torch.no_grad()
def test_a_cache_of_other_kinds_reads_its_context():
    window = make_tiny_model("mistral").eval()
    length = SEED_TOKENS + 5
    cache = prefill_cache(window, length)
    assert int(cache.get_seq_length()) == length
    ids = torch.cat([make_dummy_input_ids(window, SEED_TOKENS), make_dummy_input_ids(window, 6)], 1)
    last = window(input_ids=ids[:, -1:], past_key_values=cache, use_cache=True).logits[:, -1]
    torch.testing.assert_close(last, window(ids).logits[:, -1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_batch_is_so_many_sequences(models):
    for name, static in KINDS:
        one, three = (
            prefill_cache(models[name], SEED_TOKENS + 10, extra_length=1, static=static, batch=b) for b in (1, 3)
        )
        assert cache_bytes(three) == 3 * cache_bytes(one), name
    point = time_decoding([TimedModel("pure", models["pure"])], 40, steps=4, batch=3)[0]
    assert point.batch == 3
    assert point.drift > 0


def test_drift_is_the_later_half_over_the_earlier():
    assert compute_drift([1.0, 1.0, 3.0, 3.0]) == 3.0
    assert compute_drift([1.0, 2.0]) == 1.0
