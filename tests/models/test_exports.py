"""Exports: the same logits in the engine, refusals with every reason, nothing half-written."""

import errno
import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import limbeck
from helpers.exported import SIZES, VOCABULARY, disturb, make_student, make_teacher, make_tokenizer
from helpers.paths import ROOT
from limbeck import LimbeckError
from limbeck.core.recipe import Student
from limbeck.mixers.options import LATER_OPTIONS
from limbeck.models import export as exports
from limbeck.models.conversion import set_mixer_options
from limbeck.models.export import gguf_file, gguf_qwen35, gguf_rwkv7, gguf_tokenizer, qwen3_5
from limbeck.models.export.record import RECORD_FILE, write_export
from limbeck.models.export.verification import compare
from limbeck.testing import make_tiny_model
from limbeck.training.identity import summarize_student_layers

GGUF, QWEN3_5 = exports.get_exporter("gguf"), exports.get_exporter("qwen3_5")
EXACT = 4e-4  # a logit, in float32 through four layers of large weights; the logits' standard deviation is about 0.9


@pytest.fixture(scope="module")
def words():
    return make_tokenizer()


def engine():
    pytest.importorskip("gguf")
    return pytest.importorskip("xllamacpp")


def texts_of(reasons) -> str:
    return "\n".join(map(str, reasons))


# ------------------------------------------------------------------ the same model in the engine


CASES = [
    ("tied", "gguf", "none", {}),
    ("tied", "gguf", "none", {"output_norm": "none", "norm_bias": False}),
    ("untied", "gguf", "none", {"output_gate": "inner", "gate_rank": 8}),
    ("mistral", "gguf", "none", {"norm_bias": False, "rank": 16}),
    ("tied", "qwen3_5", "none", {}),
    ("untied", "qwen3_5", "none", {}),
    ("mistral", "qwen3_5", "none", {}),
    ("qwen3", "qwen3_5", "none", {}),
    ("qwen3", "qwen3_5", "every 2", {}),
]


@pytest.mark.parametrize(("body", "target", "softmax_layers", "options"), CASES)
def test_llama_cpp_computes_the_student(body, target, softmax_layers, options, words, tmp_path):
    engine()
    student = make_student(body, target, softmax_layers, options)
    write_export(GGUF, student, words, tmp_path / "out", "f32")
    result = GGUF.verify(student, words, tmp_path / "out")
    assert result.passed
    assert result.same_text_tokens
    assert result.same_token == 1
    assert max(result.prompt_difference, result.step_difference) < EXACT
    planned = GGUF.plan(student, words, "f32").files["student-f32.gguf"]
    written = (tmp_path / "out" / "student-f32.gguf").stat().st_size
    assert 0 < written - planned < 30_000  # the keys: vocabulary, merges, template


@pytest.mark.parametrize("quantization", ["f16", "q8_0"])
@pytest.mark.parametrize("target", ["gguf", "qwen3_5"])
def test_rounded_weights_stay_near(target, quantization, words, tmp_path):
    engine()
    student = make_student("tied", target)
    write_export(GGUF, student, words, tmp_path / "out", quantization)
    result = GGUF.verify(student, words, tmp_path / "out")
    assert result.prompt_difference > EXACT
    assert result.passed
    sizes = {kind: sum(GGUF.plan(student, words, kind).files.values()) for kind in GGUF.quantizations}
    assert sizes["q8_0"] < sizes["f16"] < sizes["f32"]


@pytest.mark.parametrize(
    ("body", "softmax_layers"),
    [
        ("tied", "none"),
        ("untied", "none"),
        ("mistral", "none"),
        ("qwen3", "none"),
        ("qwen3", "every 2"),
        ("qwen3", "0,2-3"),
    ],
)
def test_transformers_computes_the_student_as_qwen3_5(body, softmax_layers, words, tmp_path):
    student = make_student(body, "qwen3_5", softmax_layers)
    write_export(QWEN3_5, student, words, tmp_path / "out")
    result = QWEN3_5.verify(student, words, tmp_path / "out")
    assert result.passed
    assert max(result.prompt_difference, result.step_difference) < EXACT
    config = json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    assert config["model_type"] == "qwen3_5_text"
    assert not {"auto_map", "limbeck"} & set(config)
    assert not list((tmp_path / "out").glob("*.py"))
    assert config.get("full_attention_interval") == {"none": 5, "every 2": 2}.get(softmax_layers)
    null_layers = 0 if softmax_layers != "none" else 1
    assert config["num_hidden_layers"] == 4 + null_layers


def test_the_qwen3_5_folder_generates_what_the_student_does(words, tmp_path):
    student = make_student("tied", "qwen3_5")
    write_export(QWEN3_5, student, words, tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([words("The license").input_ids])
    settings = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **settings), student.generate(ids, **settings))
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == words.chat_template


def test_bfloat16_is_near_and_half_as_large(words, tmp_path):
    student = make_student("qwen3", "qwen3_5", "every 2")
    write_export(QWEN3_5, student, words, tmp_path / "out", "bf16")
    result = QWEN3_5.verify(student, words, tmp_path / "out")
    assert result.passed
    assert result.prompt_difference > EXACT
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto").dtype == torch.bfloat16


def test_a_file_with_one_changed_tensor_is_found_out(words, tmp_path):
    student = make_student("tied", "qwen3_5")
    write_export(QWEN3_5, student, words, tmp_path / "out")
    with torch.no_grad():
        student.base_model.layers[2].self_attn.mixer.decay.bias += 0.5
    assert not QWEN3_5.verify(student, words, tmp_path / "out").passed


def test_a_verification_of_numbers():
    reference = np.array([[0.0, 1.0], [2.0, 4.0]])
    common = {"engine": "e", "version": "1", "bound": 0.1}
    result = compare(reference, reference + 0.1, reference - 0.05, **common)
    assert result.prompt_difference == pytest.approx(0.1)
    assert result.step_difference == pytest.approx(0.05)
    assert result.logit_deviation == pytest.approx(np.std([0, 1, 2, 4]))
    assert result.same_token == 1
    assert result.passed
    assert not replace(result, step_difference=0.2).passed
    assert not replace(result, prompt_difference=math.nan).passed
    assert not replace(result, same_text_tokens=False).passed
    noisy = compare(reference, reference + 0.14, reference, own_steps=reference - 0.05, **common)
    assert noisy.own_difference == pytest.approx(0.05)
    assert noisy.limit == pytest.approx(0.15)
    assert noisy.passed
    assert not compare(reference, reference + 0.2, reference, own_steps=reference - 0.05, **common).passed
    assert compare(reference, reference[:, ::-1], reference, **common).same_token == 0
    far = reference + np.array([[0.4, 0.0], [0.0, 0.0]])
    assert compare(reference, reference, far, **common).typical_difference == pytest.approx(0.2)
    assert not compare(reference, far, reference, **common).passed
    rounded = {**common, "bound": 0.14, "rounded": True}
    assert compare(reference, far, reference, **rounded).passed
    assert not compare(reference, reference, reference + 0.3, **rounded).passed
    assert not compare(reference, reference + 0.3, reference, own_steps=reference + 1, **rounded).passed


# ------------------------------------------------------------------ refusals


def other_value(name: str, only) -> object:
    """A value of an option that a format does not hold."""
    others = {
        "conv": 2 if 2 not in only.values else 0, "conv_activation": "silu" if "none" in only.values else "none",
        "heads": 2, "state": 0.5, "output_norm": "rms" if "layer" in only.values else "none", "norm_over": "heads",
        "output_gate": "sigmoid", "gate_rank": 4, "norm_eps": 1e-3,
    }  # fmt: skip
    return others[name] if name in others else not only.values[0]


RWKV7_OPTIONS = gguf_rwkv7.OPTIONS | gguf_rwkv7.NORMED


@pytest.mark.parametrize(
    ("target", "name"),
    [("gguf", name) for name in RWKV7_OPTIONS] + [("qwen3_5", name) for name in [*qwen3_5.OPTIONS, "norm_eps"]],
)
def test_an_option_that_does_not_fit_is_named_with_its_switch(target, name, words):
    exporter = exports.get_exporter(target)
    options = RWKV7_OPTIONS if target == "gguf" else qwen3_5.OPTIONS
    value = 1e-3 if name == "norm_eps" else other_value(name, options[name])
    student = make_student("tied", target, options={name: value})
    (reason,) = exporter.check(student, words)
    assert reason.switch.startswith(f"student.options.{name}=")
    assert "all layers" in reason.problem
    with pytest.raises(LimbeckError, match=f"limbeck distill --for {target}"):
        exports.check_exportable(exporter, student, words)


@pytest.mark.parametrize(("mixer", "exporter"), [("rwkv7", GGUF), ("gated_deltanet", QWEN3_5)])
def test_an_option_that_comes_later_is_not_overlooked(mixer, exporter, words):
    """Every option is in the table or free; one that is in neither is refused away from its default."""
    student = make_student("tied", exporter.name)
    own = student.base_model.layers[1].self_attn.mixer
    assert own.name == mixer

    @dataclass(frozen=True)
    class Later(type(own.options)):
        shape_of_things: int = 0

    for value, told in ((0, False), (1, True)):
        own.options = Later(**vars(own.options) | {"shape_of_things": value})
        assert ("shape_of_things" in texts_of(exporter.check(student, words))) is told


def test_the_switches_make_it_fit(words):
    """Every reason against a default student, applied, leaves none."""
    for mixer, exporter in (("rwkv7", GGUF), ("gated_deltanet", GGUF), ("gated_deltanet", QWEN3_5)):
        teacher = make_teacher("tied")
        reasons = exporter.check(limbeck.convert(teacher, mixer), words)
        assert reasons
        options = {}
        for reason in reasons:
            key, _, value = reason.switch.removeprefix("student.options.").partition("=")
            options[key] = {"true": True, "false": False}.get(value, value)
            options[key] = type(getattr(limbeck.mixers.get(mixer).options_class(), key))(options[key])
        assert not exporter.check(limbeck.convert(teacher, mixer, options=options), words)


def test_all_reasons_are_told_at_once(words):
    student = limbeck.convert(make_teacher("tied"), "gated_deltanet", softmax_layers="1,3")
    said = texts_of(QWEN3_5.check(student, words))
    for name in ("conv", "output_norm", "output_gate", "gate_bias", "strength_bias", "norm_eps"):
        assert f"student.options.{name}=" in said
    assert "layers 0, 2" in said
    assert "layers 1, 3 keep softmax" in said
    assert "student.softmax_layers=none" in said


@pytest.mark.parametrize(
    ("family", "settings", "problem"),
    [
        ("qwen2", {}, "q_proj.bias"),
        ("gemma2", {}, "pre_feedforward_layernorm"),
        ("gpt2", {}, "no embed_tokens"),
        ("opt", {}, "no "),
        ("phi3", {}, "no self_attn.q_proj"),
        ("qwen3_moe", {}, "no mlp.gate_proj"),
        ("llama", {"attention_bias": True}, "o_proj.bias"),
        ("llama", {"mlp_bias": True}, "down_proj.bias"),
        ("llama", {"hidden_act": "gelu"}, "the MLP is not"),
    ],
)
def test_a_body_that_no_layout_has_is_named(family, settings, problem, words):
    student = limbeck.convert(make_tiny_model(family, **settings), "gated_deltanet")
    for exporter in (GGUF, QWEN3_5):
        reasons = exporter.check(student, words)
        assert problem in texts_of(reasons)
        with pytest.raises(LimbeckError, match="another teacher"):
            exports.check_exportable(exporter, student, words)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("embedding_multiplier", "embeddings go into the first layer changed"),
        ("residual_multiplier", "not added to the residual stream"),
        ("logits_scaling", "the logits are not"),
    ],
)
def test_a_multiplier_is_found_by_running_the_body(setting, problem, words):
    """Granite's tensors have Llama's names."""
    neutral = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logits_scaling": 1.0}
    found = []
    for settings in (neutral, {**neutral, setting: 2.0}):
        config = AutoConfig.for_model("granite", **SIZES, **settings)
        student = limbeck.convert(AutoModelForCausalLM.from_config(config).eval(), "gated_deltanet")
        found.append(problem in texts_of(QWEN3_5.check(student, words)))
    assert found == [False, True]


def test_reasons_that_only_rwkv7_has(words):
    student = make_student("tied", "gguf", "0")
    assert "student.softmax_layers=none" in texts_of(GGUF.check(student, words))
    narrow = limbeck.convert(make_teacher("tied", hidden_size=64, head_dim=16), "rwkv7", options={"unit_keys": False})
    assert "16 wide" in texts_of(GGUF.check(narrow, words))
    wide = limbeck.convert(make_teacher("qwen3", head_dim=64), "rwkv7", options={"unit_keys": False})
    said = texts_of(GGUF.check(wide, words))
    assert "4 × 64 wide together and the model 128" in said
    assert "student.options.qk_norm=false" in said
    other = limbeck.convert(make_teacher("tied"), "gla")
    assert "no layout with gla" in texts_of(GGUF.check(other, words))
    assert "the mixer is gla" in texts_of(QWEN3_5.check(other, words))


def test_softmax_layers_that_qwen3_5_does_not_have(words):
    options = make_student("qwen3", "qwen3_5").base_model.layers[0].self_attn.mixer.options
    options = {name: getattr(options, name) for name in (*qwen3_5.OPTIONS, "norm_eps", "qk_norm")}
    windowed = make_teacher("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=0)
    student = limbeck.convert(windowed, "gated_deltanet", options=options, softmax_layers="1")
    assert "sliding window" in texts_of(QWEN3_5.check(student, words))
    scaled = make_teacher("qwen3", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4})
    student = limbeck.convert(scaled, "gated_deltanet", options=options, softmax_layers="1")
    assert "scaled or partial" in texts_of(QWEN3_5.check(student, words))
    assert not QWEN3_5.check(limbeck.convert(scaled, "gated_deltanet", options=options), words)


def test_layers_of_different_sizes(words):
    teacher = make_teacher("tied")
    fit = GGUF.fit(teacher.config, None)
    rules = [{"layers": "1", "options": {**fit.options, "rank": 16}}]
    student = limbeck.convert(teacher, fit.mixer, options=fit.options, rules=rules)
    assert "differ in size" in texts_of(GGUF.check(student, words))


def test_unknown_names():
    with pytest.raises(LimbeckError, match="did you mean 'gguf'"):
        exports.get_exporter("guff")
    with pytest.raises(LimbeckError, match="f16, q8_0, q5_1"):
        exports.check_exportable(GGUF, None, None, "q4_k")


# ------------------------------------------------------------------ writing


def test_an_existing_folder_is_replaced_only_by_force(words, tmp_path):
    student = make_student("tied", "qwen3_5")
    folder = tmp_path / "out"
    folder.mkdir()
    write_export(QWEN3_5, student, words, folder)  # an empty one may stay
    (folder / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(LimbeckError, match="--force"):
        write_export(QWEN3_5, student, words, folder)
    assert (folder / "mine.txt").exists()
    write_export(QWEN3_5, student, words, folder, force=True)
    assert not (folder / "mine.txt").exists()
    with pytest.raises(LimbeckError, match="is a file"):
        write_export(QWEN3_5, student, words, folder / "config.json", force=True)
    # a run's folder, or the home of somebody, is no export: force would take all that is in it
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "model.safetensors").write_text("weights", encoding="utf-8")
    for force in (False, True):
        with pytest.raises(LimbeckError, match="none of them is the record of an export"):
            write_export(QWEN3_5, student, words, tmp_path, force=force)
    assert (tmp_path / "student" / "model.safetensors").read_text(encoding="utf-8") == "weights"


@pytest.mark.parametrize("target", ["gguf", "qwen3_5"])
def test_a_full_disk_leaves_nothing_behind(target, words, tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    exporter = exports.get_exporter(target)
    student = make_student("tied", target)
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / RECORD_FILE).write_text("before", encoding="utf-8")

    def fill(given, tokenizer, temporary: Path, quantization):
        exporter.write(given, tokenizer, temporary, quantization)
        raise OSError(errno.ENOSPC, "No space left on device", str(temporary))

    with pytest.raises(LimbeckError, match="space"):
        write_export(replace(exporter, write=fill), student, words, folder, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (folder / RECORD_FILE).read_text(encoding="utf-8") == "before"


def test_numbers_too_large_for_half_precision_are_refused(words, tmp_path):
    pytest.importorskip("gguf")
    student = make_student("tied", "gguf")
    with torch.no_grad():
        student.base_model.layers[0].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(LimbeckError, match="--quantization f32"):
        write_export(GGUF, student, words, tmp_path / "out", "f16")
    assert not (tmp_path / "out").exists()


def test_what_stands_in_the_file(words, tmp_path):
    gguf = pytest.importorskip("gguf")
    student = make_student("tied", "qwen3_5")
    student.generation_config.eos_token_id = [2, 5]
    student.generation_config.do_sample, student.generation_config.temperature = True, 0.7
    write_export(GGUF, student, words, tmp_path / "out", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "out" / "student-q8_0.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.architecture"] == "qwen35"
    assert keys["tokenizer.chat_template"] == words.chat_template
    assert keys["tokenizer.ggml.eos_token_id"] == 2
    assert keys["tokenizer.ggml.eot_token_id"] == 5
    assert keys["tokenizer.ggml.add_bos_token"] is False
    assert keys["general.sampling.temp"] == pytest.approx(0.7)
    assert keys["qwen35.attention.recurrent_layers"] == [True] * 4 + [False]
    tokens = keys["tokenizer.ggml.tokens"]
    assert len(tokens) == VOCABULARY
    assert tokens[len(words) :] == [f"[PAD{i}]" for i in range(len(words), VOCABULARY)]
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == kinds["blk.0.ssm_conv1d.weight"] == "F32"


def test_the_null_layer_adds_nothing():
    student = make_student("tied", "qwen3_5")
    tensors = qwen3_5.map_tensors(student)
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        assert not tensors[f"model.layers.4.{name}.weight"].any()
    assert set(gguf_qwen35.LAYER) == {name.split(".", 3)[3] for name in tensors if ".layers." in name}


@pytest.mark.parametrize(("width", "split"), [(64, [11, 11, 10]), (128, [22, 21, 21]), (16, [3, 3, 2])])
def test_every_channel_has_an_axis(width, split):
    assert qwen3_5.split_rotary(width) == split
    assert sum(split) == width // 2


# ------------------------------------------------------------------ tokenizers


def split_regex(pattern: str):
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


RULES = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    **{name: split_regex(pattern) for pattern, name in gguf_tokenizer.SPLITS.items()},
}


@pytest.mark.parametrize("rule", RULES)
def test_llama_cpp_splits_texts_by_the_same_rule(rule, tmp_path):
    engine()
    tokenizer = make_tokenizer(RULES[rule])
    raw = json.loads(tokenizer.backend_tokenizer.to_str())
    assert gguf_tokenizer.find_splitting_rule(raw) == rule
    check_split(tokenizer, tmp_path)


@pytest.mark.parametrize(("change", "refused"), [("NFC", None), ("Lowercase", "Lowercase"), ("both", "Lowercase")])
def test_a_tokenizer_that_changes_texts_is_refused(change, refused):
    """llama.cpp splits a text as it stands."""
    tokenizer = make_tokenizer()
    kinds = {"NFC": normalizers.NFC(), "Lowercase": normalizers.Lowercase()}
    both = normalizers.Sequence(list(kinds.values()))
    tokenizer.backend_tokenizer.normalizer = kinds.get(change, both)
    reasons = gguf_tokenizer.check_tokenizer(tokenizer, VOCABULARY)
    assert [f"({refused})" in str(reason) for reason in reasons] == ([True] if refused else [])


def check_split(tokenizer, folder: Path) -> None:
    from limbeck.models.export.llama_cpp import LlamaCpp

    student = make_student("tied", "qwen3_5")
    write_export(GGUF, student, tokenizer, folder / "out", "f16")
    text = gguf_file.SAMPLE_TEXT + (ROOT / "LICENSE").read_text(encoding="utf-8")[:3000] + "<s>user\nhi</s>"
    with LlamaCpp(folder / "out" / "student-f16.gguf") as opened:
        assert opened.tokenize(text, special=True) == tokenizer(text, add_special_tokens=False).input_ids


def test_a_tokenizer_over_characters_with_a_byte_fallback(tmp_path):
    engine()
    raw = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    raw.train_from_iterator((ROOT / "LICENSE").read_text(encoding="utf-8").split(), trainer)
    state = json.loads(raw.to_str())
    state["added_tokens"] = state["added_tokens"][:3]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    keys = gguf_tokenizer.describe_tokenizer(tokenizer, 400)
    assert keys["ggml.model"] == "llama"
    assert keys["ggml.token_type"][:4] == [
        gguf_tokenizer.UNKNOWN, gguf_tokenizer.CONTROL, gguf_tokenizer.CONTROL, gguf_tokenizer.BYTE
    ]  # fmt: skip
    from limbeck.models.export.llama_cpp import LlamaCpp

    student = make_student("tied", "qwen3_5", vocab_size=400)
    write_export(GGUF, student, tokenizer, tmp_path / "out", "f16")
    with LlamaCpp(tmp_path / "out" / "student-f16.gguf") as opened:
        for text in ("The license grants rights", "naïve 你好"):
            assert opened.tokenize(text) == tokenizer(text, add_special_tokens=False).input_ids


def test_tokenizers_that_llama_cpp_would_read_otherwise(words):
    student = make_student("tied", "qwen3_5")
    strange = make_tokenizer(split_regex(r"\w+|\W+"))
    assert "splits words" in texts_of(GGUF.check(student, strange))
    assert not QWEN3_5.check(student, strange)
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0)], unk_id=0))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=unigram, unk_token="<unk>")
    assert "type Unigram" in texts_of(GGUF.check(student, wrapped))
    small = make_student("tied", "qwen3_5", vocab_size=200)
    assert "300 tokens and the embeddings 200 rows" in texts_of(GGUF.check(small, words))


def test_a_beginning_of_text_is_announced(words):
    begun = make_tokenizer()
    begun.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", begun.bos_token_id)]
    )
    assert gguf_tokenizer.describe_tokenizer(begun, VOCABULARY)["ggml.add_bos_token"] is True
    assert gguf_tokenizer.describe_tokenizer(words, VOCABULARY)["ggml.add_bos_token"] is False


# ------------------------------------------------------------------ the engine


def test_a_file_that_is_none_is_an_error_and_not_an_abort(tmp_path):
    engine()
    from limbeck.models.export.llama_cpp_process import compare_in_process

    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(exports.EngineFailedError, match=r"bad\.gguf") as caught:
        compare_in_process(tmp_path / "bad.gguf", [1], "a", threads=1)
    assert caught.value.exit_code == 1


def test_a_conversation_longer_than_the_context_is_refused(words, tmp_path):
    engine()
    from limbeck.models.export.llama_cpp import LlamaCpp

    write_export(GGUF, make_student("tied", "qwen3_5"), words, tmp_path / "out", "f16")
    with LlamaCpp(tmp_path / "out" / "student-f16.gguf", context=16) as opened:
        last = opened.decode(range(3, 250), last_only=True)
        assert last.shape == (1, VOCABULARY)
        with pytest.raises(LimbeckError, match="do not fit"):
            opened.decode([1] * 10)
        opened.reset()
        assert np.allclose(opened.decode(range(3, 250))[-1:], last, rtol=0, atol=1e-5)


# ------------------------------------------------------------------ options that exports need


def test_runs_of_before_these_options_go_on():
    (plain,) = summarize_student_layers(Student(mixer="gated_deltanet"), groups=[2] * 4, length=64)
    assert not set(LATER_OPTIONS) & set(plain["options"])
    assert set(plain["options"]) | set(LATER_OPTIONS) == set(vars(limbeck.mixers.resolve_options("gated_deltanet")))
    for name, value in LATER_OPTIONS.items():
        other = 1e-5 if isinstance(value, float) else not value
        (told,) = summarize_student_layers(
            Student(mixer="gated_deltanet", options={name: other}), groups=[2] * 4, length=64
        )
        assert told["options"] == {**plain["options"], name: other}


@pytest.mark.parametrize("gate", ["silu", "sigmoid"])
def test_a_gate_without_a_bias_is_open_for_gradients(gate):
    shape = limbeck.mixers.HeadShape(hidden=64, heads=4, kv_heads=2, key_width=16, value_width=16)
    mixer = limbeck.mixers.build(
        "gated_deltanet", shape, {"output_gate": gate, "gate_bias": False, "strength_bias": False}
    )
    assert mixer.gate.bias is None
    assert mixer.strength.bias is None
    assert mixer.gate.weight.std().item() == pytest.approx(64**-0.5, rel=0.1)


def test_the_norms_epsilon():
    shape = limbeck.mixers.HeadShape(hidden=64, heads=4, kv_heads=2, key_width=16, value_width=16)
    mixer = limbeck.mixers.build("gated_deltanet", shape, {"output_norm": "rms", "norm_eps": 0.5}).double()
    o = torch.randn(1, 3, 4, 16, dtype=torch.float64)
    assert torch.allclose(
        mixer._apply_norm(o), o / (o.square().mean(-1, keepdim=True) + 0.5).sqrt(), rtol=0, atol=1e-12
    )
    with pytest.raises(LimbeckError, match="norm_eps"):
        limbeck.mixers.build("gated_deltanet", shape, {"norm_eps": -1.0})


def test_a_mixer_takes_q_and_k_before_the_teachers_norms(tmp_path):
    teacher = make_teacher("qwen3").double()
    ids = torch.arange(12)[None]
    seen = {}

    def record(name):
        return lambda module, args: seen.__setitem__(name, args)

    for before in (True, False):
        student = disturb(limbeck.convert(teacher, "gated_deltanet", options={"qk_norm": before}))
        attention = student.base_model.layers[1].self_attn
        attention.mixer.register_forward_pre_hook(record(before))
        student(ids)
        q, k, _, x = seen[before][:4]
        plain = (attention.q_proj(x), attention.k_proj(x))
        normed = (attention.q_norm.weight, attention.k_norm.weight)
        for got, projected, weight in zip((q, k), plain, normed):
            heads = projected.unflatten(-1, (-1, 16))
            rms = (heads.square().mean(-1, keepdim=True) + teacher.config.rms_norm_eps).sqrt()
            wanted = weight * heads / rms if before else heads
            assert torch.allclose(got, wanted, rtol=0, atol=1e-5 if before else 0)  # the norm computes in float32
    student = student.float()
    student.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, student(ids).logits)
    with pytest.raises(LimbeckError, match="when the teacher is converted"):
        set_mixer_options(loaded, {"qk_norm": True})
