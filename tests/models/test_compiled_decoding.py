"""Decoding through compiled blocks says what decoding without says; what is not compiled is said."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache

import limbeck
from limbeck.models import RecurrentLayer, compiled_decoding
from limbeck.models.compilation import CompileLog
from limbeck.models.compiled_decoding import compile_decoding, find_obstacle, list_compiled_modules
from limbeck.models.quantization import HalfLinear, count_weight_bytes, pack_float16
from limbeck.testing import MixerVariant, make_tiny_model
from limbeck.testing.contract import left_pad, sample_ids

GREEDY = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
# one of each kind of state: a matrix by delta rule or decay, with a normalizer, a window, two mixers, a memory
MIXERS = ["sliding_window", "gated_deltanet", "mamba2", "mlstm", "rwkv7", "hybrid", "window_memory"]


@pytest.fixture
def compilations(monkeypatch):
    """What is compiled, by the number of its tensors."""
    made, original = [], compiled_decoding.compile_function

    def count(function, tensors, backend):
        made.append(len(tensors))
        return original(function, tensors, backend)

    monkeypatch.setattr(compiled_decoding, "compile_function", count)
    return made


def padded_batch() -> dict[str, torch.Tensor]:
    inputs = left_pad(sample_ids(2, 20), 5)
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def read_states(model, ids: torch.Tensor) -> tuple[torch.Tensor, list]:
    """Read a prompt and two tokens more; return the last logits and all states."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for piece in (ids[:, :-2], ids[:, -2:-1], ids[:, -1:]):
            logits = model(piece, past_key_values=cache, use_cache=True).logits
    assert cache.get_seq_length() == ids.shape[1]
    return logits[:, -1], [layer.states for layer in cache.layers if isinstance(layer, RecurrentLayer)]


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize("mixer", MIXERS)
def test_tokens_and_states_are_those_of_the_uncompiled_step(mixer, compilations):
    """In float64, where rounding cannot hide a mistake; a batch with padding in its prompt."""
    compare(mixer, "eager")
    assert len(compilations) <= 4, "blocks of a kind were compiled one by one"


def compare(mixer: str, backend: str, family: str = "llama") -> None:
    model, notes = MixerVariant(mixer).build_student(family), CompileLog()
    inputs, ids = padded_batch(), sample_ids(2, 12)
    want, (logits, states) = model.generate(**inputs, **GREEDY), read_states(model, ids)
    with compile_decoding(model, notes, backend):
        assert torch.equal(model.generate(**inputs, **GREEDY), want)
        for _ in range(2):  # the first pass verifies, the second takes the compiled step alone
            found, new = read_states(model, ids)
            # mixers compute in float32 inside, and inductor in another order
            close = {"rtol": 1e-4, "atol": 1e-5} if backend == "inductor" else {"rtol": None, "atol": None}
            torch.testing.assert_close(found, logits, **close)
            torch.testing.assert_close(new, states, **close)
    assert notes.reasons == []
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_other_families(family):
    compare("gated_deltanet", "eager", family)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor writes C++, and there is no g++")
@pytest.mark.parametrize("mixer", ["sliding_window", "gated_deltanet"])
def test_blocks_of_inductor_say_the_same(mixer, tmp_path):
    """In a process of its own: inductor needs setuptools, which minds what else was imported before it."""
    code = f"import test_compiled_decoding; test_compiled_decoding.compare('{mixer}', 'inductor')"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command, here = [sys.executable, "-c", code], Path(__file__).parent
    done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr


def test_split_heads_compile_by_kind_and_softmax_layers_stay(compilations):
    """Windows in both parts of a layer: two kinds of blocks, one head. A growing part: said once, and not compiled."""
    teacher, ids, notes = make_tiny_model("llama"), sample_ids(1, 16), CompileLog()
    split = {"softmax_heads": "0.1", "options": {"window": 4}}
    bounded = limbeck.convert(teacher, "sliding_window", softmax_window=8, **split).eval()
    want = bounded.generate(ids, **GREEDY)
    with compile_decoding(bounded, notes, "eager"):
        assert torch.equal(bounded.generate(ids, **GREEDY), want)
    assert notes.reasons == []
    assert len(compilations) == 3

    growing = limbeck.convert(teacher, "sliding_window", **split).eval()
    want = growing.generate(ids, **GREEDY)
    with compile_decoding(growing, notes, "eager"):
        assert torch.equal(growing.generate(ids, **GREEDY), want)
    assert len(notes.reasons) == 1
    assert "cache of 1 layers grows" in notes.reasons[0]
    assert len(compilations) == 5


def test_what_is_no_plain_step_runs_as_before(compilations):
    """Prompts, gradients, a padded token, and a static cache."""
    model, ids = MixerVariant("sliding_window").build_student("llama"), sample_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    want = read_masked(model, ids, mask)
    with compile_decoding(model, notes := CompileLog(), "eager"):
        torch.testing.assert_close(read_masked(model, ids, mask), want)
        blocks = [n for n in compilations if n > 3]
        assert not blocks, "a padded token was compiled"
        static = model.generate(ids, cache_implementation="static", disable_compile=True, **GREEDY)
        assert torch.equal(static, model.generate(ids, **GREEDY))
        model(ids).logits.sum().backward()
    assert notes.reasons == []


def read_masked(model, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :-1], attention_mask=mask[:, :-1], past_key_values=cache, use_cache=True)
        return model(ids[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True).logits[1]


def test_a_step_that_differs_is_not_taken(monkeypatch):
    """Layers are verified one by one: here one has a weight that its kind's code does not know of."""
    model, ids = MixerVariant("gated_deltanet").build_student("llama"), sample_ids(1, 9)
    second = model.model.layers[1].mlp
    second.__dict__["_secret"] = 2.0  # what begins with _ is not compared
    second.__dict__["forward"] = lambda x, original=second.forward: second._secret * original(x)
    want = model.generate(ids, **GREEDY)
    with compile_decoding(model, notes := CompileLog(), "eager"):
        assert torch.equal(model.generate(ids, **GREEDY), want)
    assert notes.reasons == ["model.layers.1: the compiled step differs from the uncompiled one"]


def test_what_the_compiler_refuses_runs_as_it_is(monkeypatch):
    def refuse(*args):
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(compiled_decoding, "compile_function", refuse)
    model, ids = MixerVariant("gated_deltanet").build_student("llama"), sample_ids(1, 9)
    want = model.generate(ids, **GREEDY)
    with compile_decoding(model, notes := CompileLog(), "eager"):
        assert torch.equal(model.generate(ids, **GREEDY), want)
    assert len(notes.reasons) == 2  # the head, the first of all blocks
    assert all("no such instruction" in reason for reason in notes.reasons)


def test_what_cannot_be_compiled_at_all_is_said(monkeypatch):
    student, teacher = MixerVariant("gla").build_student("llama"), make_tiny_model("llama")
    assert "no layer with a state of fixed size" in find_obstacle(teacher)
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "found no C++ compiler 'no-such-compiler'; expected" in find_obstacle(student)
    with compile_decoding(student, notes := CompileLog()):
        assert "forward" not in student.model.layers[0].__dict__
    assert notes.reasons == [find_obstacle(student)]


def test_weights_in_float16_are_compiled_too(compilations):
    """Plain tensors of half the bytes instead of packed ones; the logits are those of packed ones to rounding."""
    student, ids = limbeck.convert(make_tiny_model("qwen2"), "sliding_window").eval(), sample_ids(1, 12)
    small = pack_float16(student, list_compiled_modules(student))
    assert isinstance(small.model.layers[0].mlp.up_proj, HalfLinear)
    assert count_weight_bytes(small.model.layers[0].mlp) == count_weight_bytes(student.model.layers[0].mlp) / 2
    want, _ = read_states(pack_float16(student), ids)
    with compile_decoding(small, notes := CompileLog(), "eager"):
        for _ in range(2):
            torch.testing.assert_close(read_states(small, ids)[0], want, rtol=1e-4, atol=1e-4)
    assert notes.reasons == []
    assert len(compilations) == 2


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_the_command_line(verb, tmp_path, capsys, monkeypatch, tokenizer):
    from limbeck.cli import main

    limbeck.convert(make_tiny_model("llama"), mixer="gla").save_pretrained(tmp_path / "student")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "student")
    monkeypatch.setattr("limbeck.models.compiled_decoding.find_obstacle", lambda model, backend="": None)
    monkeypatch.setattr(
        compiled_decoding,
        "compile_function",
        lambda f, tensors, backend, o=compiled_decoding.compile_function: o(f, tensors, "eager"),
    )
    monkeypatch.setattr("limbeck.cli.chat._read_message", iter(["copyright", ""]).__next__)
    texts = ["copyright"] if verb == "generate" else []
    command = ["limbeck", verb, str(tmp_path / "student"), *texts, "--new-tokens", "4", "--compile"]
    for more in ([], ["--fp16"]):
        monkeypatch.setattr("limbeck.cli.chat._read_message", iter(["copyright", ""]).__next__)
        monkeypatch.setattr(sys, "argv", command + more)
        with pytest.raises(SystemExit) as code:
            main()
        assert code.value.code == 0
        said = capsys.readouterr()
        assert "blocks like model.layers.0" in said.err + said.out
    monkeypatch.setattr(
        sys, "argv", command + (["--int8-dynamic"] if verb == "generate" else ["--engine", "llama.cpp"])
    )
    with pytest.raises(SystemExit) as code:
        main()
    assert code.value.code == 2
    assert "--compile" in capsys.readouterr().err
