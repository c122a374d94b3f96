"""A teacher in few bits teaches a student of float weights; a finished student runs in int8."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import limbeck
from limbeck import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.data.offline import embedded
from limbeck.models import loading, quantization
from limbeck.testing import make_tiny_model
from limbeck.training import pipeline, setup
from limbeck.training.plan import make_plan

pytestmark = pytest.mark.usefixtures("own_cache")

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 9, 23, 4, 77, 31, 8, 60, 12, 3]])
STAGES = [
    {"stage": "calibrate", "tokens": 256},
    {"stage": "matrix", "tokens": 256},
    {"stage": "hidden", "tokens": 256, "target": "block", "train": "block"},
    {"stage": "logits", "tokens": 256, "batch_size": 2},
]


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory, shared_tokenizer) -> Path:
    """A tiny llama with all linear layers in multiples of 32 and 64, as 4-bit kernels of some CPUs need them."""
    folder = tmp_path_factory.mktemp("wide") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    shared_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def bitsandbytes():
    return pytest.importorskip("bitsandbytes")


@pytest.fixture
def recipe(teacher_folder, corpus, tmp_path):
    def make(**changes) -> Recipe:
        raw = {
            "teacher": str(teacher_folder),
            "teacher_bits": 8,
            "student": {"mixer": "gla"},
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": STAGES,
            "evaluation": {"tokens": 256, "prompt": "the work", "new_tokens": 2},
            "checkpoint_seconds": 1e-6,
            "device": "cpu",
            "out": str(tmp_path / "run"),
        }
        return Recipe.parse({**raw, **changes})

    return make


# ---------------------------------------------------------------------- the teacher


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_teacher_in_few_bits_runs_every_stage(recipe, bits, bitsandbytes):
    made = recipe(teacher_bits=bits)
    result = pipeline.distill(made)
    assert [stage["stage"] for stage in result["stages"]] == ["calibrate", "matrix", "hidden", "logits"]
    folder = Path(made.out) / "student"
    student = AutoModelForCausalLM.from_pretrained(folder)
    assert all(t.dtype == torch.float32 for t in load_file(folder / "model.safetensors").values())
    assert "quantization_config" not in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert student(IDS).logits.isfinite().all()


@pytest.mark.parametrize("bits", [8, 4])
def test_the_student_starts_from_the_unquantised_weights(recipe, bits, bitsandbytes, teacher_folder):
    """All of them: what only the attention stages touch, and what is shared with the teacher otherwise."""
    ready = setup.prepare_job(recipe(teacher_bits=bits))
    weight = ready.teacher.model.layers[0].self_attn.q_proj.weight
    assert weight.dtype == (torch.int8 if bits == 8 else torch.uint8)
    student, plain = setup.build_student(ready), setup.build_student(setup.prepare_job(recipe(teacher_bits=None)))
    assert {name for name, _ in student.named_parameters()} == {name for name, _ in plain.named_parameters()}
    assert all(torch.equal(p, plain.get_parameter(name)) for name, p in student.named_parameters())
    theirs = {p.data_ptr() for p in ready.teacher.parameters()}
    assert not [name for name, p in student.named_parameters() if p.data_ptr() in theirs]


def test_a_student_that_learns_nothing_outside_attention_keeps_the_checkpoints_weights(
    recipe, bitsandbytes, teacher_folder
):
    made = recipe(stages=[{"stage": "hidden", "tokens": 256}])
    pipeline.distill(made)
    ours, start = (load_file(Path(f) / "model.safetensors") for f in (f"{made.out}/student", teacher_folder))
    same = [name for name in start if "self_attn" not in name and name in ours]
    assert any("mlp" in name for name in same)
    assert all(torch.equal(ours[name], start[name]) for name in same)
    assert not torch.equal(
        ours["model.layers.0.self_attn.q_proj.weight"], start["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.slow
def test_killed_it_ends_bit_equal(recipe, bitsandbytes, tmp_path, monkeypatch):
    from limbeck.training import trainer

    stages = [{"stage": "logits", "tokens": 512, "batch_size": 2, "lora": {"rank": 2}}]
    whole, broken = (recipe(stages=stages, out=str(tmp_path / name)) for name in ("whole", "broken"))
    pipeline.distill(whole)
    original = trainer.Trainer.train_step

    def step(self):
        if self.state["step"] == 4:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        pipeline.distill(broken)
    monkeypatch.setattr(trainer.Trainer, "train_step", original)
    pipeline.distill(broken)
    ours, theirs = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("broken", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_plan_knows_how_much_there_is(recipe, bits, bitsandbytes):
    """Four-bit weights are stored two in a number; counts are of the weights that they stand for."""
    small, plain = recipe(teacher_bits=bits), recipe(teacher_bits=None)
    ready, whole = setup.prepare_job(small), setup.prepare_job(plain)
    assert quantization.count_unquantized_parameters(ready.teacher) == quantization.count_unquantized_parameters(
        whole.teacher
    )
    ours, theirs = make_plan(small, ready.teacher, ready.sites), make_plan(plain, whole.teacher, whole.sites)
    assert [row.trained_parameters for row in ours.stages] == [row.trained_parameters for row in theirs.stages]
    assert ours.memory_bytes < theirs.memory_bytes  # the last stage gives both students weights of their own


def test_quantised_weights_make_no_student(bitsandbytes, teacher_folder, tmp_path, tokenizer):
    teacher, _ = loading.load_teacher(str(teacher_folder), CPU, bits=8)
    with pytest.raises(LimbeckError, match="quantized weights"):
        limbeck.convert(teacher)
    teacher.save_pretrained(tmp_path / "int8")
    tokenizer.save_pretrained(tmp_path / "int8")
    for bits in (None, 4):
        with pytest.raises(LimbeckError, match="quantized weights"):
            loading.load_teacher(str(tmp_path / "int8"), CPU, bits=bits)


def test_without_bitsandbytes_the_extra_is_named(recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    made = recipe()
    with pytest.raises(LimbeckError, match=r"limbeck\[quantised\]"):
        pipeline.distill(made)
    assert not Path(made.out).exists()


def test_bits_that_there_are_not():
    with pytest.raises(LimbeckError, match="teacher_bits"):
        Recipe.parse({"teacher_bits": 3})


# ---------------------------------------------------------------------- the student

PACKERS = {"fp16": quantization.pack_float16, "int8": quantization.quantize_int8}


@pytest.mark.parametrize(("kind", "most"), [("fp16", 2e-3), ("int8", 0.1)])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_packed_weights_come_close_and_leave_the_student_alone(family, kind, most):
    """Also with biases (qwen2) and with a head that is tied to the embeddings (llama)."""
    student = limbeck.convert(make_tiny_model(family), mixer="gated_deltanet").eval()
    before = {name: p.clone() for name, p in student.named_parameters()}
    with torch.no_grad():
        expected = student(IDS).logits
        small = PACKERS[kind](student)
        logits = small(IDS).logits
    assert not torch.equal(logits, expected)
    assert (logits - expected).std() < most * expected.std()
    assert all(torch.equal(p, before[name]) for name, p in student.named_parameters())
    assert torch.equal(student(IDS).logits, expected)
    for name in ("model.layers.0.self_attn.mixer", "model.norm", "model.embed_tokens"):
        ours, theirs = small.get_submodule(name), student.get_submodule(name)
        assert all(p is q for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)), name
    numbers = student.model.layers[0].self_attn.k_proj.weight.numel()
    held = quantization.count_weight_bytes(small.model.layers[0].self_attn.k_proj)
    assert held < (2.5 if kind == "fp16" else 1.5) * numbers
    with pytest.raises(LimbeckError, match="could not load it again"):
        small.save_pretrained("small")


@pytest.mark.parametrize("kind", PACKERS)
def test_packed_weights_decode_with_their_cache_as_without(kind):
    """Weights alone: a pass over all tokens and one token at a time say the same."""
    small = PACKERS[kind](limbeck.convert(make_tiny_model("llama"), mixer="gla").eval())
    out = small.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert out.shape[1] == IDS.shape[1] + 5
    if kind == "fp16":
        again = small.generate(IDS, max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=False)
        assert torch.equal(out, again)


def test_float16_weights_say_the_same_on_one_thread_and_on_several():
    """One thread has a shorter way to the same product; copies share the packed weights, files do not get them."""
    student = limbeck.convert(make_tiny_model("qwen2"), mixer="gated_deltanet").eval()
    threads, logits, ways = torch.get_num_threads(), [], []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            small = quantization.pack_float16(student)
            twin = copy.deepcopy(small)
            linear = small.model.layers[0].self_attn.k_proj
            with pytest.raises(LimbeckError, match="cannot be saved"):
                pickle.dumps(linear)
            ways.append(linear.is_direct)
            del small, linear
            torch.set_num_threads(1)
            with torch.no_grad():
                logits.append(twin(IDS).logits)
    finally:
        torch.set_num_threads(threads)
    assert ways == [True, False]
    assert torch.equal(*logits)


def test_what_cannot_be_packed_is_refused(bitsandbytes, teacher_folder, monkeypatch):
    teacher, _ = loading.load_teacher(str(teacher_folder), CPU, bits=8)
    half, large = (limbeck.convert(make_tiny_model("llama"), mixer="gla") for _ in range(2))
    half = half.bfloat16()
    for pack in PACKERS.values():
        with pytest.raises(LimbeckError, match="quantized weights"):
            pack(teacher)
        with pytest.raises(LimbeckError, match="bfloat16"):
            pack(half)
    with torch.no_grad():
        large.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(LimbeckError, match="up_proj has weights up to 1e"):
        quantization.pack_float16(large)


@pytest.mark.parametrize(("switch", "packer"), [("--fp16", "pack_float16"), ("--int8-dynamic", "quantize_int8")])
def test_generate_with_packed_weights(switch, packer, tmp_path, capsys, monkeypatch, tokenizer):
    import sys

    from limbeck.cli import main

    limbeck.convert(make_tiny_model("llama"), mixer="gla").save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    made = []
    original = getattr(loading, packer)
    monkeypatch.setattr(loading, packer, lambda model: made.append(model) or original(model))
    monkeypatch.setattr(
        sys, "argv", ["limbeck", "generate", str(tmp_path / "student"), "copyright", "--new-tokens", "3", switch]
    )
    with pytest.raises(SystemExit) as code:
        main()
    assert code.value.code == 0
    assert len(made) == 1
    assert capsys.readouterr().out.strip()


@pytest.mark.assets
@pytest.mark.slow
@pytest.mark.parametrize(("bits", "most"), [(8, 0.1), (4, 1.0)])
def test_the_real_teacher_in_few_bits_says_nearly_the_same(bits, most, bitsandbytes, monkeypatch):
    monkeypatch.delenv("LIMBECK_CACHE", raising=False)
    if not any(a.present for a in embedded.list_assets() if a.name == "teacher"):
        pytest.skip("the embedded teacher is missing: limbeck assets")
    folder = loading.resolve_teacher("embedded")
    teacher, tokenizer = loading.load_teacher(folder, CPU)
    small, _ = loading.load_teacher(folder, CPU, bits=bits)
    ids = tokenizer("The history of science is the study of how people came to know the world.", return_tensors="pt")
    with torch.no_grad():
        p, q = (m(ids.input_ids).logits.log_softmax(-1) for m in (teacher, small))
    assert (p.exp() * (p - q)).sum(-1).mean() < most
