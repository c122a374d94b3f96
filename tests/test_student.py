"""The contract of every student: all mixers on all families, in float64 where exactness is claimed."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
)
from transformers.masking_utils import sdpa_mask

import limbeck
from families import FAMILIES, VOCABULARY, tiny
from limbeck import LimbeckError, mixers
from limbeck.data.packing import Batch
from limbeck.mixers import HeadShape, Tokens
from limbeck.model import RecurrentLayer, attention, attention_sites, cache_bytes, mixers_of, parse_layers
from limbeck.model.attention import tokens_of
from limbeck.model.body import Head, inputs_of, packs_by_position, run_body

LENGTH = 37
EXACT = 1e-10
FULL = {"conv": 4, "output_norm": "rms", "output_gate": "silu", "rope": True}
# each mixer as it is by default, and one with every common switch turned
VARIANTS = {**{name: (name, {}) for name in mixers.names()}, "gated_deltanet-full": ("gated_deltanet", FULL)}
LINEAR = [name for name in VARIANTS if name != "softmax"]
every_mixer = pytest.mark.parametrize("mixer", VARIANTS)
every_linear_mixer = pytest.mark.parametrize("mixer", LINEAR)
every_family = pytest.mark.parametrize("family", FAMILIES)


def converted(model, variant: str, layers="all", **options):
    name, switches = VARIANTS[variant]
    return limbeck.convert(model, name, layers, {**switches, **options})


def built(variant: str, shape: HeadShape, **options) -> mixers.Mixer:
    name, switches = VARIANTS[variant]
    return mixers.build(name, shape, {**switches, **options})


def student_of(family: str, mixer: str, layers="all", **options):
    """A student in float64 whose new parameters are away from their start, so that every gate does something."""
    student = converted(tiny(family).double(), mixer, layers, **options)
    torch.manual_seed(1)
    with torch.no_grad():
        for module in mixers_of(student).values():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
    return student


def ids_of(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(2))


def left_padded(ids: torch.Tensor, padding: int) -> dict[str, torch.Tensor]:
    """Row 0 shortened and padded on the left, row 1 whole."""
    short = torch.cat([torch.zeros(1, padding, dtype=torch.long), ids[:1, : ids.shape[1] - padding]], 1)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return {"input_ids": torch.cat([short, ids[1:]]), "attention_mask": mask, "position_ids": positions}


@every_mixer
@every_family
@torch.no_grad()
def test_prefill_and_steps_equal_the_full_pass(family, mixer):
    student, ids = student_of(family, mixer), ids_of()
    full = student(ids).logits
    cache = DynamicCache(config=student.config)
    ends = [20, 29, *range(30, LENGTH + 1)]
    parts = [
        student(ids[:, begin:end], past_key_values=cache, use_cache=True).logits
        for begin, end in zip([0, *ends[:-1]], ends)
    ]
    assert torch.allclose(torch.cat(parts, 1), full, atol=EXACT)
    changed = ids.clone()
    changed[:, 0] = 5
    assert not torch.allclose(student(changed).logits[:, -1], full[:, -1], atol=1e-6), "the past makes no difference"


@every_mixer
@every_family
@torch.no_grad()
def test_a_left_padded_batch_equals_its_rows_alone(family, mixer):
    student, ids = student_of(family, mixer), ids_of()
    inputs = left_padded(ids, 5)
    if family == "opt":  # counts its positions from the mask
        del inputs["position_ids"]
    logits = student(**inputs).logits
    assert torch.allclose(logits[0, 5:], student(ids[:1, : LENGTH - 5]).logits[0], atol=EXACT)
    assert torch.allclose(logits[1], student(ids[1:]).logits[0], atol=EXACT)


@every_mixer
@every_family
@torch.no_grad()
def test_left_padded_generation_equals_unpadded(family, mixer):
    student, ids = student_of(family, mixer), ids_of(length=20)
    inputs = left_padded(ids, 5)
    del inputs["position_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for beams in (1, 3):
        both = student.generate(**inputs, num_beams=beams, **settings)
        alone = [student.generate(row, num_beams=beams, **settings) for row in (ids[:1, :15], ids[1:])]
        assert torch.equal(both[0, 5:], alone[0][0])
        assert torch.equal(both[1], alone[1][0])


@every_mixer
@every_family
@torch.no_grad()
def test_packed_documents_equal_separate_ones(family, mixer):
    student, ids = student_of(family, mixer), ids_of()
    positions = torch.cat([torch.arange(13), torch.arange(LENGTH - 13)])[None].expand(2, -1)
    packed = run_body(student, Batch(ids, positions, ids))
    for rows in (slice(0, 13), slice(13, LENGTH)):
        alone = student.base_model(ids[:, rows], use_cache=False).last_hidden_state
        assert torch.allclose(packed[:, rows], alone, atol=EXACT)


@every_mixer
@every_family
@torch.no_grad()
def test_save_and_reload_is_bit_equal(family, mixer, tmp_path):
    student = converted(tiny(family), mixer)
    for parameter in student.parameters():
        parameter.add_(0.01 * torch.randn_like(parameter))
    student.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    before, after = student.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert type(loaded).__mro__[2] is type(tiny(family))
    assert torch.equal(student(ids_of()).logits, loaded(ids_of()).logits)
    again = tmp_path / "again"
    loaded.save_pretrained(again)
    assert mixers_of(AutoModelForCausalLM.from_pretrained(again)).keys() == mixers_of(student).keys()


@every_linear_mixer
@torch.no_grad()
def test_the_cache_does_not_grow(mixer):
    student = converted(tiny("llama"), mixer)
    sizes = []
    for length in (8, 64):
        cache = DynamicCache(config=student.config)
        student(ids_of(1, length), past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == length
        sizes.append(cache_bytes(cache))
    assert sizes[0] == sizes[1] > 0
    mixer_states = sum(m.state_numel() for m in mixers_of(student).values())
    assert sizes[0] // 4 - mixer_states in (0, 2 * 6)  # mLSTM carries one number a head beside it


@every_mixer
@every_family
@torch.no_grad()
def test_the_mixing_matrix_times_v_is_the_output(family, mixer):
    student, ids = student_of(family, mixer), ids_of()
    sites, caught = list(mixers_of(student)), {}
    for name in sites:

        def catch(module, args, kwargs, output, name=name):
            caught[name] = (args, kwargs, output)

        student.get_submodule(name).register_forward_hook(catch, with_kwargs=True)
    student(**left_padded(ids, 4) if family != "opt" else {"input_ids": ids})
    for name in sites:
        args, kwargs, out = caught.pop(name)
        again, matrix = student.get_submodule(name)(*args, **kwargs, output_matrix=True)
        assert matrix.shape == (2, 6, LENGTH, LENGTH)
        assert torch.equal(matrix, matrix.tril()), "looks ahead"
        valid = slice(0, None) if family == "opt" else slice(4, None)
        assert torch.allclose(again[:, valid], out[0][:, valid], atol=EXACT)


@every_mixer
@every_family
def test_gradients_reach_every_parameter(family, mixer):
    student, ids = student_of(family, mixer).train(), ids_of()
    student(ids, labels=ids).loss.backward()
    missing = [n for n, p in student.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not missing
    for module in mixers_of(student).values():
        assert all(p.grad.abs().sum() > 0 for p in module.parameters())


@every_mixer
def test_gradcheck(mixer):
    torch.manual_seed(0)
    module = built(mixer, HeadShape(6, 2, 1, 3, 4, scale=0.5)).double()
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    shapes = ((2, 5, 2, 3), (2, 5, 1, 3), (2, 5, 1, 4), (2, 5, 6))
    given = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    valid = torch.ones(2, 5, dtype=torch.bool)
    valid[0, :2] = False
    tokens = Tokens(valid, torch.tensor([[0, 0, 0, 1, 1], [0, 0, 1, 1, 2]]))
    assert torch.autograd.gradcheck(lambda *a: module(*a, tokens=tokens)[0], given, atol=1e-6)


@every_family
@torch.no_grad()
def test_at_the_start_q_k_v_and_output_are_the_teachers(family):
    """Grouped heads, biases, fused projections and q/k norms included."""
    teacher = tiny(family)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    student = limbeck.convert(teacher, "gla", options={"rope": True})
    site, seen, given, call = attention_sites(teacher)[0], [], [], {}

    def spy(module, query, key, value, *args, **kwargs):
        seen.append([x.transpose(1, 2) for x in (query, key, value)])
        return attention.softmax_attention(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    teacher.config._attn_implementation = "spy"
    block = teacher.get_submodule(site.module)
    handle = block.register_forward_hook(lambda m, a, k, out: call.update(args=a, kwargs=k), with_kwargs=True)
    teacher(ids_of(), use_cache=False)
    handle.remove()
    module = student.get_submodule(site.module)
    forward = module.mixer.forward
    module.mixer.forward = lambda q, k, v, x, **kw: given.append((q, k, v)) or forward(q, k, v, x, **kw)
    module(*call["args"], **call["kwargs"])
    for theirs, ours in zip(seen[0], given[0]):
        assert torch.equal(theirs, ours)
    ours_out, theirs_out = (m.get_submodule(f"{site.module}.{site.output}") for m in (student, teacher))
    assert torch.equal(ours_out.weight, theirs_out.weight)


@torch.no_grad()
def test_the_given_model_is_left_alone_and_shared_tensors_can_be_parted():
    teacher = tiny("llama")
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    logits = teacher(ids_of()).logits
    own = limbeck.convert(teacher, "gated_deltanet")
    for parameter in own.parameters():
        parameter.add_(1)
    shared = limbeck.convert(teacher, "gated_deltanet", layers=[1], share=True)
    theirs = {id(p) for p in teacher.parameters()}
    apart = {n for n, p in shared.named_parameters() if id(p) not in theirs}
    assert apart == {n for n, _ in shared.named_parameters() if n.startswith("model.layers.1.self_attn.")}
    from limbeck.model import unshare

    unshare(shared)
    assert shared.lm_head.weight is shared.model.embed_tokens.weight, "tied weights came apart"
    for parameter in shared.parameters():
        parameter.add_(1)
    assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())
    assert torch.equal(teacher(ids_of()).logits, logits)


def test_fresh_projections_are_fresh_and_the_rest_is_the_teachers():
    teacher = tiny("llama")
    student = limbeck.convert(teacher, "gla", layers=[0], copy_projections=False)
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if name in theirs:
            fresh = name.startswith("model.layers.0.self_attn.")
            assert torch.equal(parameter, theirs[name]) != fresh, name
    gate = mixers_of(student)["model.layers.0.self_attn"].decay_up.weight
    assert torch.equal(gate, torch.zeros_like(gate)), "the mixer's own start was overwritten"


@every_family
@pytest.mark.parametrize("kept", [0, 1])
@torch.no_grad()
def test_layers_that_stay_softmax_stay_as_they_are(family, kept):
    """One layer of two is converted, either parity; the control arm in it must leave the model as it was."""
    plain = {"attn_logit_softcapping": None, "sliding_window": 64} if family == "gemma2" else {}
    teacher = tiny(family, **plain).double()
    student = limbeck.convert(teacher, "softmax", layers=[1 - kept])
    ids = ids_of()
    exact = 1e-5 if family == "gemma2" else 1e-10  # gemma2's own attention takes its softmax in float32
    assert torch.allclose(student(ids).logits, teacher(ids).logits, atol=exact)
    half = student_of(family, "gated_deltanet", layers=[1 - kept])
    cache = DynamicCache(config=half.config)
    parts = [
        half(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 20), (20, 21), (21, LENGTH))
    ]
    assert torch.allclose(torch.cat(parts, 1), half(ids).logits, atol=exact)
    assert isinstance(cache.layers[1 - kept], RecurrentLayer)
    assert not isinstance(cache.layers[kept], RecurrentLayer)
    inputs = left_padded(ids, 5)
    if family == "opt":
        del inputs["position_ids"]
    assert torch.allclose(half(**inputs).logits[0, 5:], half(ids[:1, : LENGTH - 5]).logits[0], atol=exact)


@every_family
@torch.no_grad()
def test_the_head_on_its_own_gives_the_models_logits(family):
    model, ids = tiny(family), ids_of()
    positions = torch.arange(LENGTH)[None].expand(2, -1)
    hidden = run_body(model, Batch(ids, positions, ids))
    assert torch.allclose(Head(model)(hidden[1]), model(ids).logits[1], atol=1e-5)


def test_which_families_keep_packed_documents_apart_is_found_out():
    assert packs_by_position(tiny("llama"))
    assert not packs_by_position(tiny("opt"))
    batch = Batch(ids_of(), torch.arange(LENGTH)[None].expand(2, -1), ids_of())
    assert inputs_of(tiny("opt"), batch)["attention_mask"].shape == (2, 1, LENGTH, LENGTH)


def test_padding_and_documents_are_read_from_any_mask():
    assert tokens_of(None, 4) == Tokens()
    padded = tokens_of(torch.tensor([[0, 1, 1], [1, 1, 1]]), 3)
    assert padded.valid.tolist() == [[False, True, True], [True, True, True]]
    assert padded.segments is None
    two = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool().tril()[None, None]
    assert tokens_of(two, 5).segments.tolist() == [[0, 0, 1, 1, 1]]
    additive = torch.zeros(two.shape).masked_fill(~two, torch.finfo(torch.float32).min)
    assert tokens_of(additive, 5).segments.tolist() == [[0, 0, 1, 1, 1]]
    assert tokens_of(two[:, :, 3:], 2).segments is None, "the document began before this piece"
    assert tokens_of(two[:, :, 1:], 4).segments.tolist() == [[0, 1, 1, 1]]


def test_a_recurrent_cache_refuses_to_be_cropped_and_a_used_one_to_be_taken_over():
    student = limbeck.convert(tiny("llama"), "retnet")
    cache = DynamicCache(config=student.config)
    student(ids_of(), past_key_values=cache, use_cache=True)
    with pytest.raises(LimbeckError, match="cannot be cropped"):
        cache.crop(1)
    cache.reset()
    assert cache.get_seq_length() == 0
    used = DynamicCache(config=student.config)
    tiny("llama")(ids_of(), past_key_values=used, use_cache=True)
    with pytest.raises(LimbeckError, match="already holds"):
        student(ids_of(), past_key_values=used, use_cache=True)


def test_a_student_never_runs_as_softmax(tmp_path):
    student = limbeck.convert(tiny("llama"), "retnet")
    student.save_pretrained(tmp_path)
    assert '"model_type": "limbeck"' in (tmp_path / "config.json").read_text()
    with pytest.raises(LimbeckError, match="would drop"):
        student.set_attn_implementation("sdpa")
    student.config._attn_implementation = "sdpa"
    with pytest.raises(LimbeckError, match="would drop"):
        student(ids_of())
    asked = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert len(mixers_of(asked)) == 2
    asked(ids_of())


def test_remote_code_loads_a_student_in_a_process_that_never_heard_of_limbeck(tmp_path):
    import subprocess
    import sys

    student = limbeck.convert(tiny("llama"), "gla")
    student.save_pretrained(tmp_path)
    code = (
        "from transformers import AutoModelForCausalLM as A; "
        f"m = A.from_pretrained({str(tmp_path)!r}, trust_remote_code=True); "
        "print(type(m).__name__, type(m.model.layers[0].self_attn.mixer).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"HF_HOME": str(tmp_path / "hf")}
    )
    assert done.stdout.split() == ["LimbeckLlamaForCausalLM", "GLA"], done.stderr


def test_the_tokenizer_loads_beside_a_student(tmp_path, tokenizer):
    limbeck.convert(tiny("llama"), "gla").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("copyright").input_ids == tokenizer("copyright").input_ids


@pytest.mark.parametrize(("spec", "layers"), [("all", [0, 1, 2, 3]), ("0,2-3", [0, 2, 3]), ([1], [1]), ("3", [3])])
def test_layers(spec, layers):
    assert parse_layers(spec, 4) == layers


@pytest.mark.parametrize("spec", ["", "4", "1-9", "first", [], [-1], "2-1"])
def test_impossible_layers(spec):
    with pytest.raises(LimbeckError, match="layers is"):
        parse_layers(spec, 4)


def test_what_cannot_be_converted_says_why():
    from transformers import AutoConfig

    with pytest.raises(LimbeckError, match="did you mean 'gated_deltanet'"):
        limbeck.convert(tiny("llama"), "gated_deltanet2")
    with pytest.raises(LimbeckError, match="no option 'ropes', did you mean 'rope'"):
        limbeck.convert(tiny("llama"), "gla", options={"ropes": True})
    with pytest.raises(LimbeckError, match="is 3"):
        limbeck.convert(tiny("llama"), "gla", options={"rope": 3})
    with pytest.raises(LimbeckError, match="student already"):
        limbeck.convert(limbeck.convert(tiny("llama"), "gla"), "gla")
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=48, n_layer=1, n_head=6)
    with pytest.raises(LimbeckError, match="code of its own"):
        limbeck.convert(AutoModelForCausalLM.from_config(config), "gla")


@every_linear_mixer
@torch.no_grad()
def test_finite_at_extreme_gates_and_long_inputs(mixer):
    torch.manual_seed(0)
    module = built(mixer, HeadShape(8, 2, 2, 8, 8, scale=0.3))
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(0).add_(30 * torch.randn_like(p))
    x = [torch.randn(1, 8192, *rest) for rest in ((2, 8), (2, 8), (2, 8), (8,))]
    y, state = module(*x)
    assert y.isfinite().all()
    assert all(s.isfinite().all() for s in state.values())


@every_linear_mixer
@torch.no_grad()
def test_at_the_start_a_mixer_is_a_linear_map_of_v(mixer):
    """Near linear attention: gates stand open and do not depend on the input yet."""
    torch.manual_seed(0)
    module = built(mixer, HeadShape(8, 2, 2, 4, 4, scale=0.5), output_norm="none").double()
    q, k, v, w = (torch.randn(1, 9, 2, 4, dtype=torch.float64) for _ in range(4))
    x, z = torch.randn(1, 9, 8, dtype=torch.float64), torch.randn(1, 9, 8, dtype=torch.float64)
    both = module(q, k, v + 2 * w, x)[0]
    assert torch.allclose(both, module(q, k, v, z)[0] + 2 * module(q, k, w, x)[0], atol=1e-9)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        student = student_of("llama", "gated_deltanet").train()
        if checkpointing:
            student.gradient_checkpointing_enable()
        positions = torch.cat([torch.arange(13), torch.arange(LENGTH - 13)])[None].expand(2, -1)
        student(ids_of(), position_ids=positions, labels=ids_of(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@every_mixer
@torch.no_grad()
def test_half_precision_stays_close(mixer):
    """A student in bfloat16, and one in float32 under autocast, beside float32."""
    student = converted(tiny("llama"), mixer)
    ids = ids_of()
    exact = student(ids).logits
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = student(ids).logits
    half = student.to(torch.bfloat16)(ids).logits
    for logits in (mixed, half):
        assert logits.isfinite().all()
        assert float((logits - exact).norm() / exact.norm()) < 0.1


def test_two_threads_may_use_one_student():
    from concurrent.futures import ThreadPoolExecutor

    student = student_of("qwen3", "mlstm")
    rows = [ids_of(1, n) for n in (9, 17, 23, 31)] * 4

    def run(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return student.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)

    alone = [run(ids) for ids in rows]
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(a, b) for a, b in zip(alone, pool.map(run, rows)))
