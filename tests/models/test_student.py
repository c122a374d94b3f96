"""Conversion and students as Hugging Face models; what every mixer has to fulfil is in test_contract.py."""

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
from limbeck import LimbeckError
from limbeck.data.packing import Batch
from limbeck.mixers import Tokens
from limbeck.models import RecurrentLayer, attention, cache_bytes, find_attention_sites, get_mixers, parse_layers
from limbeck.models.attention import token_mask_from_attention_mask
from limbeck.models.backbone import LMHead, build_model_inputs, run_backbone, supports_packed_positions
from limbeck.testing import FAMILIES, MixerVariant, make_tiny_model
from limbeck.testing.contract import SEQ_LEN, left_pad, sample_ids

every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
@torch.no_grad()
def test_at_the_start_q_k_v_and_output_are_the_teachers(family):
    """Grouped heads, biases, fused projections and q/k norms included."""
    teacher = make_tiny_model(family)
    with torch.no_grad():
        for name, parameter in teacher.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    student = limbeck.convert(teacher, "gla", options={"rope": True})
    site, seen, given, call = find_attention_sites(teacher)[0], [], [], {}

    def spy(module, query, key, value, *args, **kwargs):
        seen.append([x.transpose(1, 2) for x in (query, key, value)])
        return attention.softmax_attention_forward(module, query, key, value, *args, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    teacher.config._attn_implementation = "spy"
    block = teacher.get_submodule(site.module)
    handle = block.register_forward_hook(lambda m, a, k, out: call.update(args=a, kwargs=k), with_kwargs=True)
    teacher(sample_ids(), use_cache=False)
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
    teacher = make_tiny_model("llama")
    before = {name: p.clone() for name, p in teacher.named_parameters()}
    logits = teacher(sample_ids()).logits
    own = limbeck.convert(teacher, "gated_deltanet")
    for parameter in own.parameters():
        parameter.add_(1)
    shared = limbeck.convert(teacher, "gated_deltanet", layers=[1], share_weights=True)
    theirs = {id(p) for p in teacher.parameters()}
    apart = {n for n, p in shared.named_parameters() if id(p) not in theirs}
    assert apart == {n for n, _ in shared.named_parameters() if n.startswith("model.layers.1.self_attn.")}
    from limbeck.models import unshare_weights

    unshare_weights(shared)
    assert shared.lm_head.weight is shared.model.embed_tokens.weight, "tied weights came apart"
    for parameter in shared.parameters():
        parameter.add_(1)
    assert all(torch.equal(before[name], p) for name, p in teacher.named_parameters())
    assert torch.equal(teacher(sample_ids()).logits, logits)


def test_fresh_projections_are_fresh_and_the_rest_is_the_teachers():
    teacher = make_tiny_model("llama")
    student = limbeck.convert(teacher, "gla", layers=[0], copy_projections=False)
    theirs = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if name in theirs:
            fresh = name.startswith("model.layers.0.self_attn.")
            assert torch.equal(parameter, theirs[name]) != fresh, name
    gate = get_mixers(student)["model.layers.0.self_attn"].decay_up.weight
    assert torch.equal(gate, torch.zeros_like(gate)), "the mixer's own start was overwritten"


@every_family
@pytest.mark.parametrize("kept", [0, 1])
@torch.no_grad()
def test_layers_that_stay_softmax_stay_as_they_are(family, kept):
    """One layer of two is converted, either parity; the control arm in it must leave the model as it was."""
    plain = {"gemma2": {"attn_logit_softcapping": None, "sliding_window": 64}, "mistral": {"sliding_window": 64}}
    teacher = make_tiny_model(family, **plain.get(family, {})).double()
    student = limbeck.convert(teacher, "softmax", layers=[1 - kept])
    ids = sample_ids()
    exact = 1e-5 if family == "gemma2" else 1e-10  # gemma2's own attention takes its softmax in float32
    assert torch.allclose(student(ids).logits, teacher(ids).logits, atol=exact)
    half = MixerVariant("gated_deltanet").build_student(family, layers=[1 - kept])
    cache = DynamicCache(config=half.config)
    parts = [
        half(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in ((0, 20), (20, 21), (21, SEQ_LEN))
    ]
    assert torch.allclose(torch.cat(parts, 1), half(ids).logits, atol=exact)
    assert isinstance(cache.layers[1 - kept], RecurrentLayer)
    assert not isinstance(cache.layers[kept], RecurrentLayer)
    inputs = left_pad(ids, 5, family)
    assert torch.allclose(half(**inputs).logits[0, 5:], half(ids[:1, : SEQ_LEN - 5]).logits[0], atol=exact)


@torch.no_grad()
def test_the_cache_does_not_grow():
    student = limbeck.convert(make_tiny_model("llama"), "gla", options={"conv": 4})
    for length in (8, 64):
        cache = DynamicCache(config=student.config)
        student(sample_ids(1, length), past_key_values=cache, use_cache=True)
        assert cache.get_seq_length() == length
        assert cache_bytes(cache) == 4 * sum(m.state_numel() for m in get_mixers(student).values())


@every_family
@torch.no_grad()
def test_the_head_on_its_own_gives_the_models_logits(family):
    model, ids = make_tiny_model(family), sample_ids()
    positions = torch.arange(SEQ_LEN)[None].expand(2, -1)
    hidden = run_backbone(model, Batch(ids, positions, ids))
    assert torch.allclose(LMHead(model)(hidden[1]), model(ids).logits[1], atol=1e-5)


@pytest.mark.parametrize(("family", "plain"), [("llama", True), ("gemma2", False), ("gpt2", True)])
def test_a_head_that_is_a_product_is_told_from_one_that_is_more(family, plain):
    model = make_tiny_model(family)  # gemma2 has a soft cap
    assert (LMHead(model).weight is model.get_output_embeddings().weight) == plain


def test_which_families_keep_packed_documents_apart_is_found_out():
    assert supports_packed_positions(make_tiny_model("llama"))
    assert not supports_packed_positions(make_tiny_model("opt"))
    batch = Batch(sample_ids(), torch.arange(SEQ_LEN)[None].expand(2, -1), sample_ids())
    assert build_model_inputs(make_tiny_model("opt"), batch)["attention_mask"].shape == (2, 1, SEQ_LEN, SEQ_LEN)


def test_padding_and_documents_are_read_from_any_mask():
    assert token_mask_from_attention_mask(None, 4) == Tokens()
    padded = token_mask_from_attention_mask(torch.tensor([[0, 1, 1], [1, 1, 1]]), 3)
    assert padded.valid.tolist() == [[False, True, True], [True, True, True]]
    assert padded.segments is None
    two = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3)).bool().tril()[None, None]
    assert token_mask_from_attention_mask(two, 5).segments.tolist() == [[0, 0, 1, 1, 1]]
    additive = torch.zeros(two.shape).masked_fill(~two, torch.finfo(torch.float32).min)
    assert token_mask_from_attention_mask(additive, 5).segments.tolist() == [[0, 0, 1, 1, 1]]
    assert token_mask_from_attention_mask(two[:, :, 3:], 2).segments is None, "the document began before this piece"
    assert token_mask_from_attention_mask(two[:, :, 1:], 4).segments.tolist() == [[0, 1, 1, 1]]


def test_a_recurrent_cache_refuses_to_be_cropped_and_a_used_one_to_be_taken_over():
    student = limbeck.convert(make_tiny_model("llama"), "retnet")
    cache = DynamicCache(config=student.config)
    student(sample_ids(), past_key_values=cache, use_cache=True)
    with pytest.raises(LimbeckError, match="cannot be cropped"):
        cache.crop(1)
    cache.reset()
    assert cache.get_seq_length() == 0
    used = DynamicCache(config=student.config)
    make_tiny_model("llama")(sample_ids(), past_key_values=used, use_cache=True)
    with pytest.raises(LimbeckError, match="already holds"):
        student(sample_ids(), past_key_values=used, use_cache=True)


def test_a_student_never_runs_as_softmax(tmp_path):
    student = limbeck.convert(make_tiny_model("llama"), "retnet")
    student.save_pretrained(tmp_path)
    assert '"model_type": "limbeck"' in (tmp_path / "config.json").read_text(encoding="utf-8")
    with pytest.raises(LimbeckError, match="would drop"):
        student.set_attn_implementation("sdpa")
    student.config._attn_implementation = "sdpa"
    with pytest.raises(LimbeckError, match="would drop"):
        student(sample_ids())
    asked = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert len(get_mixers(asked)) == 2
    asked(sample_ids())


def test_remote_code_loads_a_student_in_a_process_that_never_heard_of_limbeck(tmp_path):
    import subprocess
    import sys

    student = limbeck.convert(make_tiny_model("llama"), "gla")
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
    limbeck.convert(make_tiny_model("llama"), "gla").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("copyright").input_ids == tokenizer("copyright").input_ids


@pytest.mark.parametrize(("spec", "layers"), [("all", [0, 1, 2, 3]), ("0,2-3", [0, 2, 3]), ([1], [1]), ("3", [3])])
def test_layers(spec, layers):
    assert parse_layers(spec, 4) == layers


@pytest.mark.parametrize("spec", ["", "4", "1-9", "first", [], [-1], "2-1", "0,3-2"])
def test_impossible_layers(spec):
    with pytest.raises(LimbeckError, match="layers is"):
        parse_layers(spec, 4)


def test_what_cannot_be_converted_says_why():
    from transformers import AutoConfig

    with pytest.raises(LimbeckError, match="did you mean 'gated_deltanet'"):
        limbeck.convert(make_tiny_model("llama"), "gated_deltanet2")
    with pytest.raises(LimbeckError, match="no option 'ropes', did you mean 'rope'"):
        limbeck.convert(make_tiny_model("llama"), "gla", options={"ropes": True})
    with pytest.raises(LimbeckError, match="is 3"):
        limbeck.convert(make_tiny_model("llama"), "gla", options={"rope": 3})
    with pytest.raises(LimbeckError, match="student already"):
        limbeck.convert(limbeck.convert(make_tiny_model("llama"), "gla"), "gla")
    config = AutoConfig.for_model("bloom", vocab_size=97, hidden_size=48, n_layer=1, n_head=6)
    with pytest.raises(LimbeckError, match="code of its own"):
        limbeck.convert(AutoModelForCausalLM.from_config(config), "gla")


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        student = MixerVariant("gated_deltanet").build_student("llama").train()
        if checkpointing:
            student.gradient_checkpointing_enable()
        positions = torch.cat([torch.arange(13), torch.arange(SEQ_LEN - 13)])[None].expand(2, -1)
        student(sample_ids(), position_ids=positions, labels=sample_ids(), use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in student.named_parameters()})
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_two_threads_may_use_one_student():
    from concurrent.futures import ThreadPoolExecutor

    student = MixerVariant("mlstm").build_student("qwen3")
    rows = [sample_ids(1, n) for n in (9, 17, 23, 31)] * 4

    def run(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return student.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)

    alone = [run(ids) for ids in rows]
    with ThreadPoolExecutor(2) as pool:
        assert all(torch.equal(a, b) for a, b in zip(alone, pool.map(run, rows)))
