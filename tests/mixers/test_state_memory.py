"""What a cache keeps alive: storages are counted, since a view of a few numbers may hold a whole prompt."""

import copy
import itertools

import pytest
import torch
from transformers import DynamicCache, StaticCache

import limbeck
from limbeck.models import RecurrentLayer, cache_bytes, get_mixers
from limbeck.testing import MixerVariant, make_tiny_model
from limbeck.testing.tiny_models import VOCAB_SIZE

PRESETS = ("default", "published", "controlled")
LONG = 300  # tokens, several times as many as any state of a tiny student could pass for
FIXED = [name for name in limbeck.mixers.list_mixers() if not limbeck.mixers.get(name).grows]


def ids(rows: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCAB_SIZE, (rows, length), generator=torch.Generator().manual_seed(length))


def held(cache) -> int:
    """Bytes of all storages that the states of a cache refer to."""
    states = (state for layer in cache.layers if isinstance(layer, RecurrentLayer) for state in layer.states)
    storages = [t.untyped_storage() for state in states for t in state.values()]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def said(student, rows: int, cache) -> int:
    """Bytes that the mixers say their states take."""
    sizes = [m.state_numel() for m in get_mixers(student).values()]
    states = [layer.states[0] for layer in cache.layers if isinstance(layer, RecurrentLayer)]
    whole = sum(t.numel() * (t.element_size() - 4) for state in states for t in state.values())  # counts are int64
    return rows * 4 * sum(sizes) + whole


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("mixer", FIXED)
@torch.no_grad()
def test_a_prefill_leaves_the_state_and_nothing_else(mixer, preset):
    student = MixerVariant(mixer, preset=preset).build_student("llama", torch.float32, perturbation=0.0)
    mask = torch.ones(2, LONG, dtype=torch.long)
    mask[0, :40] = 0
    mask[1, 90:100] = 0
    sizes = set()
    for cuts, given in (((0, LONG), {}), ((0, 250, 251, LONG), {}), ((0, LONG), {"attention_mask": mask})):
        cache = DynamicCache(config=student.config)
        for begin, end in itertools.pairwise(cuts):
            student(ids(2, LONG)[:, begin:end], past_key_values=cache, use_cache=True, **given)
        assert held(cache) == said(student, 2, cache) == cache_bytes(cache)
        sizes.add(held(cache))
        for _ in range(2):
            student(ids(2, 1), past_key_values=cache, use_cache=True)
            assert held(cache) == cache_bytes(cache) == said(student, 2, cache)
        again = copy.deepcopy(cache)
        for change, rows in (
            (lambda c: c.reorder_cache(torch.tensor([1, 1])), 2),
            (lambda c: c.batch_select_indices(torch.tensor([0])), 1),
            (lambda c: c.batch_repeat_interleave(3), 3),
        ):
            change(again)
            assert held(again) == cache_bytes(again) == said(student, rows, again)
    assert len(sizes) == 1


@pytest.mark.parametrize("mixer", ["gated_deltanet", "mlstm", "sliding_window", "rwkv7"])
@torch.no_grad()
def test_a_static_cache_keeps_no_more(mixer):
    student = MixerVariant(mixer, preset="published").build_student("llama", torch.float32, perturbation=0.0)
    cache = StaticCache(config=student.config, max_cache_len=LONG + 4)
    for length in (LONG, 1, 1):
        student(ids(2, length), past_key_values=cache, use_cache=True)
        assert held(cache) == said(student, 2, cache)


@torch.no_grad()
def test_a_mixer_that_returns_views_keeps_no_more_than_they_show(monkeypatch):
    """Somebody's own: the cache copies what would hold more than it is."""
    student = MixerVariant("retnet").build_student("llama", torch.float32)
    for module in get_mixers(student).values():
        forward = module.forward

        def wasteful(q, k, v, x, forward=forward, **given):
            y, state = forward(q, k, v, x, **given)
            wide = torch.cat([state["memory"]] * 50)
            return y, {"memory": wide[: len(q)]}

        monkeypatch.setattr(module, "forward", wasteful)
    cache = student(ids(1, 20), use_cache=True).past_key_values
    assert held(cache) == said(student, 1, cache)


@torch.no_grad()
def test_the_size_of_a_cache_is_what_it_keeps_alive():
    """Of a softmax teacher with a window too, whose layers keep views."""
    teacher = make_tiny_model("mistral", sliding_window=8)
    cache = teacher(ids(1, LONG), use_cache=True).past_key_values
    tensors = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    storages = [x.untyped_storage() for x in tensors]
    assert cache_bytes(cache) == sum({s.data_ptr(): s.nbytes() for s in storages}.values())
    assert cache_bytes(cache) >= sum(x.numel() * 4 for x in tensors)
