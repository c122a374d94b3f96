"""Generation with students: strategies, several turns, padding, static caches, compiled steps, and what is refused."""

import copy
import functools
import time

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, StaticCache
from transformers.generation import CompileConfig

import limbeck
from helpers.tiers import FAST_MIXERS
from limbeck import LimbeckError, mixers
from limbeck.models import RecurrentLayer, cache_bytes, get_mixers
from limbeck.models.attention import token_mask_from_attention_mask
from limbeck.testing import MixerVariant, make_tiny_model
from limbeck.testing.contract import left_pad, sample_ids

FAMILIES = ("llama", "qwen3", "gpt2")
GREEDY = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
OWN = [name for name in mixers.list_mixers() if mixers.get(name).__module__.startswith("limbeck.")]
every_family = pytest.mark.parametrize("family", FAMILIES)
every_mixer = pytest.mark.parametrize("mixer", OWN)
hybrids = pytest.mark.parametrize("layers", ["all", [0], [1]])


@functools.cache
def student_of(family: str, mixer: str = "gated_deltanet", layers: str | tuple[int, ...] = "all"):
    """A student in float64, its gates away from their start; tests do not change it."""
    return MixerVariant(mixer).build_student(family, layers=layers if isinstance(layers, str) else list(layers))


def student(family: str, mixer: str = "gated_deltanet", layers="all"):
    return student_of(family, mixer, layers if isinstance(layers, str) else tuple(layers))


def prompts(lengths: list[int]) -> list[torch.Tensor]:
    """One row of ids for each length, all different."""
    ids = torch.randint(3, 97, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(3))
    return [row[None, :n] for row, n in zip(ids, lengths)]


def together(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The rows as a batch, padded on the left."""
    longest = max(row.shape[1] for row in rows)
    padded = [torch.nn.functional.pad(row, (longest - row.shape[1], 0)) for row in rows]
    mask = [torch.nn.functional.pad(torch.ones_like(row), (longest - row.shape[1], 0)) for row in rows]
    return {"input_ids": torch.cat(padded), "attention_mask": torch.cat(mask)}


def forward_only(model, ids: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy generation without any cache: the whole text anew for each token."""
    for _ in range(count):
        ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    return ids


@every_mixer
@torch.no_grad()
def test_eight_prompts_of_different_lengths_say_together_what_they_say_alone(mixer, tmp_path):
    """And again after saving and loading; one mixer of each operator in three families."""
    rows = prompts([1, 2, 3, 5, 8, 13, 17, 23])
    for family in FAMILIES if mixer in FAST_MIXERS else FAMILIES[:1]:
        model = student(family, mixer)
        alone = [model.generate(row, **GREEDY)[:, row.shape[1] :] for row in rows]
        assert len({tuple(a[0].tolist()) for a in alone}) > 4, "all say the same: nothing is tested"
        model.save_pretrained(tmp_path / family)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / family, dtype=torch.float64)
        for which in (model, loaded):
            batch = together(rows)
            said = which.generate(**batch, **GREEDY)[:, batch["input_ids"].shape[1] :]
            for row, got, expected in zip(rows, said, alone):
                assert torch.equal(got, expected[0]), f"{family}, prompt of {row.shape[1]}: {got} for {expected[0]}"


@every_family
@torch.no_grad()
def test_greedy_sampling_and_beams_need_no_cache_to_say_the_same(family):
    model, ids = student(family), sample_ids(1, 12)
    assert torch.equal(model.generate(ids, **GREEDY), forward_only(model, ids, 8))
    for settings in (
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"num_beams": 3, "do_sample": True},
    ):
        said = []
        for use_cache in (True, False, True):
            torch.manual_seed(7)
            said.append(model.generate(ids, **{**GREEDY, **settings, "use_cache": use_cache}))
        assert torch.equal(said[0], said[1]), f"{settings}: the cache makes a difference"
        assert torch.equal(said[0], said[2]), f"{settings}: the same seed says something else"


@every_family
@hybrids
@torch.no_grad()
def test_several_turns_on_one_cache(family, layers):
    """Each turn says what a fresh run over all that was said before says."""
    model = student(family, layers=layers)
    cache, text = DynamicCache(config=model.config), sample_ids(1, 9)
    for turn in range(3):
        fresh = model.generate(text, **GREEDY)
        text = model.generate(text, past_key_values=cache, **GREEDY)
        assert torch.equal(text, fresh), f"turn {turn}"
        assert cache.get_seq_length() == text.shape[1] - 1, "the last token is said, not read"
        user = sample_ids(1, 30)[:, turn * 5 : turn * 5 + 5]
        text = torch.cat([text, user], 1)


@torch.no_grad()
def test_turns_of_a_padded_batch_on_one_cache():
    """New tokens that are padded in the middle of the text, too."""
    model, rows = student("llama"), prompts([4, 9])
    cache = DynamicCache(config=model.config)
    batch = together(rows)
    first = model.generate(**batch, past_key_values=cache, **GREEDY)
    users = together([row[:, :n] for row, n in zip(prompts([6, 6]), (2, 6))])
    ids = torch.cat([first, users["input_ids"]], 1)
    said = torch.ones_like(first[:, batch["input_ids"].shape[1] :])
    mask = torch.cat([batch["attention_mask"], said, users["attention_mask"]], 1)
    second = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    for row in (0, 1):
        alone = ids[row : row + 1, mask[row].bool()]
        expected = model.generate(alone, **GREEDY)[:, alone.shape[1] :]
        assert torch.equal(second[row : row + 1, ids.shape[1] :], expected), f"row {row}"


@every_family
@hybrids
@pytest.mark.parametrize("size", [1, 7, 64])
@torch.no_grad()
def test_prefill_in_pieces(family, layers, size):
    model = student(family, layers=layers)
    inputs = left_pad(sample_ids(2, 20), 5)
    del inputs["position_ids"]
    expected = model.generate(**inputs, **GREEDY)
    for cache in ("dynamic", "static"):
        got = model.generate(**inputs, prefill_chunk_size=size, cache_implementation=cache, **GREEDY)
        assert torch.equal(got, expected), f"{cache}: {got[:, 20:]} for {expected[:, 20:]}"


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2", "mistral", "gemma2"])
@hybrids
@torch.no_grad()
def test_a_static_cache_says_what_a_dynamic_one_says(family, layers):
    """Softmax layers beside converted ones included; padded or not; with beams."""
    model = student(family, layers=layers)
    padded = left_pad(sample_ids(2, 20), 5)
    del padded["position_ids"]
    whole = {"input_ids": sample_ids(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    for inputs in (padded, whole):
        for beams in (1, 3):
            settings = {**GREEDY, "num_beams": beams}
            got = model.generate(**inputs, cache_implementation="static", **settings)
            assert torch.equal(got, model.generate(**inputs, **settings)), f"{beams} beams"


@every_mixer
@torch.no_grad()
def test_a_static_cache_keeps_its_tensors(mixer):
    model, cls = student("llama", mixer), mixers.get(mixer)
    cache = StaticCache(config=model.config, max_cache_len=40)
    ids, where = sample_ids(1, 20), []
    for begin, end in ((0, 9), (9, 10), (10, 11), (11, 20)):
        logits = model(ids[:, begin:end], past_key_values=cache, use_cache=True).logits
        assert torch.allclose(logits, model(ids[:, :end]).logits[:, begin:], atol=1e-10)
        layer = cache.layers[0]
        assert isinstance(layer, RecurrentLayer)
        assert int(layer.get_seq_length()) == end
        where.append([t.data_ptr() for t in layer.states[0].values()] + [layer.length.data_ptr()])
    if not cls.grows:
        assert all(w == where[0] for w in where)
        assert cache_bytes(cache) == 8 * sum(m.state_numel() for m in get_mixers(model).values())
    cache.reset()
    again = model(ids, past_key_values=cache, use_cache=True).logits
    assert torch.allclose(again, model(ids).logits, atol=1e-10), "a reset cache remembers something"
    assert cache.get_max_length() == 40


@torch.no_grad()
def test_a_static_cache_made_ready_beforehand_holds_no_keys():
    model = student("llama", layers=[1])
    cache = StaticCache(config=model.config, max_cache_len=64)
    cache.early_initialization(batch_size=1, num_heads=2, head_dim=8, dtype=torch.float64, device=torch.device("cpu"))
    logits = model(sample_ids(1, 20), past_key_values=cache, use_cache=True).logits
    assert torch.allclose(logits, model(sample_ids(1, 20)).logits, atol=1e-10)
    softmax = 2 * 2 * 8 * 64 * 8
    assert cache_bytes(cache) == softmax + 8 * sum(m.state_numel() for m in get_mixers(model).values())


@every_mixer
@torch.no_grad()
def test_the_cache_is_as_large_after_256_tokens_as_after_16(mixer):
    cls = mixers.get(mixer)
    for layers in ("all", [1]):
        model = student("llama", mixer, layers)
        cache, converted, softmax = DynamicCache(config=model.config), [], []
        ids = sample_ids(1, 256)
        for begin, end in ((0, 16), (16, 64), (64, 255), (255, 256)):
            model(ids[:, begin:end], past_key_values=cache, use_cache=True)
            kept = [layer for layer in cache.layers if not isinstance(layer, RecurrentLayer)]
            softmax.append(sum(t.numel() * t.element_size() for layer in kept for t in (layer.keys, layer.values)))
            converted.append(cache_bytes(cache) - softmax[-1])
        expected = [n * 2 * 2 * 8 * 8 for n in (16, 64, 255, 256)]  # keys and values of 2 heads of 8, 8 bytes each
        assert softmax == ([0] * 4 if layers == "all" else expected)
        assert (len(set(converted)) == 1) != cls.grows, f"{mixer}: {converted}"


def _compile_config(backend) -> CompileConfig:
    config = CompileConfig(fullgraph=True, dynamic=False, backend=backend, mode=None)
    config._compile_all_devices = True  # generate() compiles by itself on accelerators only
    return config


# one of each kind of state: a matrix by delta rule or decay, with a normalizer, a ring of keys, two mixers, a memory
COMPILED = ["gated_deltanet", "mamba2", "mlstm", "sliding_window", "hybrid", "window_memory"]


@pytest.mark.parametrize(
    "mixer", [m if m == "gated_deltanet" else pytest.param(m, marks=pytest.mark.slow) for m in COMPILED]
)
@torch.no_grad()
def test_generate_compiles_the_step_once_and_whole(mixer):
    """fullgraph=True: nothing in a step stops the compiler; one graph serves all lengths, and the next call."""
    torch._dynamo.reset()
    model = MixerVariant(mixer).build_student("llama")
    inputs = left_pad(sample_ids(2, 20), 5)
    del inputs["position_ids"]
    expected = model.generate(**inputs, **GREEDY)
    torch._dynamo.utils.counters.clear()
    for _ in range(2):
        got = model.generate(
            **inputs, cache_implementation="static", compile_config=_compile_config("aot_eager"), **GREEDY
        )
        assert torch.equal(got, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@torch.no_grad()
def test_a_hybrid_compiles_too(family):
    torch._dynamo.reset()
    model = MixerVariant("gated_deltanet").build_student(family, layers=[1])
    inputs = {"input_ids": sample_ids(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    torch._dynamo.utils.counters.clear()
    got = model.generate(**inputs, cache_implementation="static", compile_config=_compile_config("aot_eager"), **GREEDY)
    assert torch.equal(got, model.generate(**inputs, **GREEDY))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@torch.no_grad()
def test_a_compiled_step_on_a_dynamic_cache():
    """By hand: the count of tokens is a number there, so the second step compiles once more, and no later one does."""
    torch._dynamo.reset()
    model, ids = MixerVariant("gated_deltanet").build_student("llama"), sample_ids(1, 12)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.forward, backend=counter, fullgraph=True)
    cache = DynamicCache(config=model.config)
    token = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    said = [ids, token]
    for position in range(12, 24):
        out = step(input_ids=token, position_ids=torch.tensor([[position]]), past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        said.append(token)
    assert torch.equal(torch.cat(said, 1), forward_only(model, ids, 13))
    assert counter.frame_count == 2


def test_what_would_take_tokens_back_is_refused_before_any_work():
    model, teacher, ids = student("llama"), make_tiny_model("llama"), sample_ids(1, 8)
    assistant, calls = limbeck.convert(teacher, "gla"), []
    handles = [m.register_forward_pre_hook(lambda *_: calls.append(1)) for m in (model, assistant)]
    try:
        for settings, what in (
            ({"assistant_model": teacher}, "assisted decoding"),
            ({"prompt_lookup_num_tokens": 3}, "prompt lookup"),
            ({"generation_config": GenerationConfig(prompt_lookup_num_tokens=3)}, "prompt lookup"),
            ({"assistant_early_exit": 1}, "assisted decoding"),
            ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ):
            asked = settings if "generation_config" in settings else {**GREEDY, **settings}
            with pytest.raises(LimbeckError, match=f"{what} drops tokens again.*"):
                model.generate(ids, **asked)
        with pytest.raises(LimbeckError, match="as the assistant"):
            teacher.generate(ids, assistant_model=assistant, **GREEDY)
        with pytest.raises(LimbeckError, match="continuous batching"):
            model.generate(ids, cache_implementation="paged", **GREEDY)
    finally:
        for handle in handles:
            handle.remove()
    assert not calls, "something ran before it was refused"


def test_the_teacher_may_still_be_assisted():
    """Only students refuse; nothing global changed."""
    teacher, ids = make_tiny_model("llama"), sample_ids(1, 8)
    student("llama")
    said = teacher.generate(ids, prompt_lookup_num_tokens=2, **GREEDY)
    assert torch.equal(said, teacher.generate(ids, **GREEDY))


def test_a_mask_that_is_given_again_is_read_again():
    """The same mask for two pieces of a text: their columns differ."""
    mask = torch.tensor([[0, 1, 1, 1]])
    assert token_mask_from_attention_mask(mask, 2, mask_offset=0).valid.tolist() == [[False, True]]
    assert token_mask_from_attention_mask(mask, 2, mask_offset=2).valid is None
    full = mask[:, None, None].bool() & torch.ones(4, 4, dtype=torch.bool).tril()
    for begin in (0, torch.tensor(0)):
        assert token_mask_from_attention_mask(full[:, :, :2], 2, mask_offset=begin).valid.tolist() == [[False, True]]
    for begin in (2, torch.tensor(2)):
        assert token_mask_from_attention_mask(full[:, :, 2:], 2, mask_offset=begin).valid is None
        assert token_mask_from_attention_mask(full[:, :, 2:3], 1, mask_offset=begin).valid is None


@torch.no_grad()
def test_a_token_costs_the_same_late_as_early():
    """Roughly: a step after 1500 tokens takes no longer than thrice one after 15."""
    model = limbeck.convert(make_tiny_model("llama", max_position_embeddings=2048), "gated_deltanet")
    cache, took = DynamicCache(config=model.config), []
    for length in (15, 1500):
        model(sample_ids(1, length), past_key_values=cache, use_cache=True)
        best = 1.0
        for _ in range(10):
            start = time.perf_counter()
            model(sample_ids(1, 1), past_key_values=cache, use_cache=True)
            best = min(best, time.perf_counter() - start)
        took.append(best)
    assert took[1] < 3 * took[0]


def test_a_mask_of_texts_that_branch_is_refused():
    """Tokens 2 and 3 both follow token 1: one state cannot be in both texts."""
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    mask[..., 3, 2] = False
    for given in (mask, torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, float("-inf"))):
        with pytest.raises(LimbeckError, match="branch from a shared beginning"):
            student("llama")(sample_ids(1, 4), attention_mask=given, position_ids=torch.tensor([[0, 1, 2, 2]]))


@torch.no_grad()
def test_a_copy_of_the_cache_is_a_point_to_go_on_from():
    model, text = student("llama"), sample_ids(1, 12)
    cache = DynamicCache(config=model.config)
    model(text, past_key_values=cache, use_cache=True)
    for token in (5, 6):
        longer = torch.cat([text, torch.tensor([[token]])], 1)
        got = model.generate(longer, past_key_values=copy.deepcopy(cache), **GREEDY)
        assert torch.equal(got, model.generate(longer, **GREEDY))
    assert cache.get_seq_length() == 12


@pytest.mark.slow
@hybrids
@torch.no_grad()
def test_a_step_compiled_by_hand_on_a_static_cache(layers):
    """As docs/guides/generation.md has it: one graph."""
    torch._dynamo.reset()
    model, ids = MixerVariant("gated_deltanet").build_student("llama", layers=layers), sample_ids(1, 12)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(model.forward, backend=counter, fullgraph=True)
    cache = StaticCache(config=model.config, max_cache_len=64)
    token = model(ids, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
    said = [ids, token]
    for position in range(12, 24):
        out = step(token, position_ids=torch.tensor([[position]]), past_key_values=cache, use_cache=True)
        token = out.logits[:, -1:].argmax(-1)
        said.append(token)
    assert torch.equal(torch.cat(said, 1), forward_only(model, ids, 13))
    assert counter.frame_count == 1
