"""Saving and loading students: every way that Hugging Face offers, and what is refused.

That saving and reloading gives every tensor back bit for bit is checked on every mixer and family by `limbeck check`.
"""

import copy
import dataclasses
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline

import limbeck
from helpers.paths import ROOT
from limbeck import LimbeckError, mixers
from limbeck.models import get_mixers
from limbeck.testing import MixerVariant, make_tiny_model
from limbeck.testing.contract import sample_ids

IDS = sample_ids(1, 9)
GATE = "model.layers.1.self_attn.mixer.decay.weight"
load = AutoModelForCausalLM.from_pretrained


def student(mixer: str = "gated_deltanet", dtype: torch.dtype = torch.float32, layers="all"):
    return MixerVariant(mixer).build_student("llama", dtype, layers=layers).eval()


@pytest.fixture(scope="module")
def original():
    return student()


@pytest.fixture
def folder(tmp_path, original) -> Path:
    original.save_pretrained(tmp_path / "student")
    return tmp_path / "student"


@torch.no_grad()
def same(loaded, original) -> None:
    """Every parameter and buffer, saved or not, and what comes of them; the family computes rotary frequencies anew."""
    assert type(loaded) is type(original)
    for kind in ("named_parameters", "named_buffers"):
        theirs, ours = dict(getattr(original, kind)()), dict(getattr(loaded, kind)())
        assert theirs.keys() == ours.keys()
        for name in (n for n in theirs if not n.endswith("inv_freq")):
            assert theirs[name].dtype == ours[name].dtype, name
            assert torch.equal(theirs[name], ours[name]), name
    assert torch.equal(loaded(IDS).logits, original(IDS).logits)


def in_new_process(*expressions: str, folder: Path, tmp_path: Path) -> list[str]:
    """What a process that never heard of limbeck makes of expressions, one after the other: values, or errors."""
    code = (
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline\n"
        f"d, shown = {str(folder)!r}, []\n"
        f"for expression in {expressions!r}:\n"
        "    try:\n        shown.append(str(eval(expression)))\n"
        "    except Exception as error:\n        shown.append(repr(error))\n"
        "import json\nprint()\nprint(json.dumps(shown))"
    )
    environment = {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": ":".join(p for p in sys.path if p),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.stdout.strip(), done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- files


def test_shards_hold_every_tensor_once_and_come_back(original, tmp_path):
    assert original.config.tie_word_embeddings
    original.save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    names = [name for file in files for name in safe_open(file, "pt").keys()]  # noqa: SIM118
    assert len(names) == len(set(names))
    assert "lm_head.weight" not in names, "the tied head was written beside the embedding"
    loaded = load(tmp_path)
    same(loaded, original)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    (tmp_path / files[1].name).unlink()
    with pytest.raises((LimbeckError, OSError)):
        load(tmp_path)


def test_the_config_beside_the_weights_is_read_alone(original, folder):
    config = AutoConfig.from_pretrained(folder)
    assert config.model_type == "limbeck"
    assert config.limbeck == original.config.limbeck
    assert json.loads(original.config.to_json_string())["limbeck"] == config.limbeck


def test_only_the_main_process_writes_config_and_code(original, tmp_path):
    original.save_pretrained(tmp_path / "a", is_main_process=False)
    original.save_pretrained(tmp_path / "b", False)  # by place, too
    # weights in shards are written by every process in older transformers
    assert not [file for file in tmp_path.glob("*/*") if file.suffix in (".json", ".py")]


def test_a_state_dict_may_be_given_to_save_and_to_load(original, tmp_path):
    doubled = {name: 2 * tensor for name, tensor in original.state_dict().items()}
    original.save_pretrained(tmp_path, state_dict=dict(doubled))
    loaded = load(tmp_path)
    assert all(torch.equal(doubled[name], tensor) for name, tensor in loaded.state_dict().items())
    given = type(original).from_pretrained(None, config=original.config, state_dict=original.state_dict())
    same(given, original)


def test_what_is_uploaded_holds_the_code_that_loads_it(original, tmp_path, monkeypatch):
    from transformers.utils.hub import PushToHubMixin

    sent = []
    monkeypatch.setattr(
        PushToHubMixin,
        "_upload_modified_files",
        lambda self, folder, *args, **kwargs: sent.append({p.name for p in Path(folder).iterdir()}),
    )
    import transformers.modeling_utils
    import transformers.utils.hub

    class Hub:
        def create_repo(self, name, **kwargs):
            return type("Repository", (), {"repo_id": name})

    for module in (transformers.modeling_utils, transformers.utils.hub):
        if hasattr(module, "hf_api"):
            monkeypatch.setattr(module, "hf_api", Hub)
        if hasattr(module, "create_repo"):
            monkeypatch.setattr(module, "create_repo", Hub().create_repo)
    original.push_to_hub("someone/student")
    original.save_pretrained(str(tmp_path), push_to_hub=True, repo_id="someone/student")
    assert len(sent) == 2
    for names in sent:
        assert {"config.json", "model.safetensors", "modeling_limbeck.py"} <= names


# ---- number types


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_a_student_comes_back_in_the_type_that_it_was_saved_in(dtype, tmp_path):
    half = student(dtype=torch.float32).to(dtype)
    half.save_pretrained(tmp_path)
    for loaded in (load(tmp_path), load(tmp_path, dtype="auto")):
        assert loaded.dtype == dtype
        same(loaded, half)
    wide = load(tmp_path, dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert all(torch.equal(p.float(), q) for p, q in zip(half.parameters(), wide.parameters()))
    assert torch.allclose(wide(IDS).logits, half(IDS).logits.float(), atol=0.1)


def test_old_names_of_arguments_still_do_something(folder, original):
    assert load(folder, torch_dtype=torch.bfloat16).dtype == torch.bfloat16
    same(load(folder, low_cpu_mem_usage=True), original)


@torch.no_grad()
def test_half_and_to_leave_a_student_working():
    for turned in (student().half(), student().to(torch.bfloat16), student().bfloat16().float()):
        assert turned(IDS).logits.isfinite().all()


# ---- ways to load


def test_a_pipeline_and_the_auto_classes(folder, tokenizer):
    tokenizer.save_pretrained(folder)
    made = pipeline("text-generation", model=str(folder))
    assert len(get_mixers(made.model)) == 2
    assert made("copyright", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("copyright")


@pytest.mark.slow
def test_a_process_that_never_imported_limbeck(folder, tokenizer, tmp_path):
    tokenizer.save_pretrained(folder)
    refused, tokens, config = in_new_process(
        "AutoModelForCausalLM.from_pretrained(d)",
        "AutoTokenizer.from_pretrained(d)('copyright').input_ids",
        "AutoConfig.from_pretrained(d, trust_remote_code=True).model_type",
        folder=folder,
        tmp_path=tmp_path,
    )
    assert "ValueError" in refused
    assert "trust_remote_code=True" in refused
    assert json.loads(tokens) == AutoTokenizer.from_pretrained(folder)("copyright").input_ids
    assert config == "limbeck"
    trusted = "pipeline('text-generation', model=d, trust_remote_code=True)('copyright', max_new_tokens=2)"
    (said,) = in_new_process(trusted, folder=folder, tmp_path=tmp_path)
    assert "generated_text" in said


def test_the_base_model_is_refused_and_says_how(folder, original):
    with pytest.raises(LimbeckError, match="base_model"):
        AutoModel.from_pretrained(folder)
    with pytest.raises(LimbeckError, match="base_model"):
        AutoModel.from_config(original.config)
    assert len(get_mixers(load(folder).base_model)) == 2


def test_the_familys_own_class_does_not_load_it_as_softmax(folder):
    with pytest.raises(ValueError, match="limbeck_only"):
        LlamaForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("device_map", ["cpu", {"": "cpu"}, "auto"])
def test_device_maps(folder, original, device_map):
    same(load(folder, device_map=device_map), original)


@pytest.mark.parametrize("preset", ["default", "switched on"])
@pytest.mark.parametrize("mixer", mixers.list_mixers())
@torch.no_grad()
def test_a_student_whose_layers_lie_on_disk(mixer, preset, tmp_path):
    """accelerate wraps the forward pass of every module with parameters and brings them when it runs."""
    has = {field.name for field in dataclasses.fields(mixers.get(mixer).options_class)}
    wanted = {"conv": 4, "output_gate": "silu", "gate_rank": 4, "output_norm": "rms"} if preset != "default" else {}
    options = {name: value for name, value in wanted.items() if name in has}
    whole = MixerVariant(mixer, options).build_student("llama", torch.float32).eval()
    whole.save_pretrained(tmp_path / "student")
    places = dict.fromkeys(["model.embed_tokens", "lm_head", "model.norm", "model.rotary_emb", "model.layers.0"], "cpu")
    places["model.layers.1"] = "disk"
    loaded = load(tmp_path / "student", device_map=places, offload_folder=tmp_path / "disk")
    assert loaded.model.layers[1].self_attn.q_proj.weight.is_meta
    assert torch.equal(loaded(IDS).logits, whole(IDS).logits)
    settings = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(loaded.generate(IDS, **settings), whole.generate(IDS, **settings))


def test_a_layer_is_never_split_between_devices(original):
    assert original._no_split_modules
    parents = {name.rpartition(".self_attn")[0] for name in get_mixers(original)}
    assert {type(original.get_submodule(name)).__name__ for name in parents} <= set(original._no_split_modules)


def test_a_model_made_without_memory_takes_a_state_dict(original):
    """What stays behind is what stays behind in the family itself: its rotary frequencies, which no file holds."""

    def empty(config):
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    def left(model):
        return {n for n, t in (*model.named_parameters(), *model.named_buffers()) if t.is_meta}

    made, teacher = empty(original.config), make_tiny_model("llama")
    assert all(p.is_meta for p in made.parameters())
    made.load_state_dict(original.state_dict(), assign=True)
    made.tie_weights()
    plain = empty(teacher.config)
    plain.load_state_dict(teacher.state_dict(), assign=True)
    assert left(made) == left(plain)
    made.model.rotary_emb = original.model.rotary_emb
    same(made.eval(), original)


# ---- what does not fit


def change_file(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def cut(tensors):
    tensors[GATE] = tensors[GATE][:-1].clone()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop(GATE), f"missing: {re.escape(GATE)}"),
        (lambda t: t.pop("model.norm.weight"), "missing: model.norm.weight"),
        (lambda t: t.update({"model.layers.0.self_attn.mixer.gate": torch.ones(3)}), "left over: .*mixer.gate"),
        (cut, rf"of another shape: {re.escape(GATE)} \[5, 48\] for \[6, 48\]"),
    ],
    ids=["gate missing", "norm missing", "left over", "cut"],
)
@pytest.mark.parametrize("device_map", [None, "auto"])
def test_tensors_that_do_not_fit_are_refused(folder, change, said, device_map):
    change_file(folder, change)
    with pytest.raises(LimbeckError, match=said):
        load(folder, device_map=device_map)
    with pytest.raises(LimbeckError, match=said):
        load(folder, output_loading_info=True, ignore_mismatched_sizes=True)


def test_sizes_may_differ_outside_the_mixers_where_the_caller_says_so(folder):
    longer = AutoConfig.from_pretrained(folder, vocab_size=101)
    with pytest.raises(LimbeckError, match=r"of another shape: model\.embed_tokens"):
        load(folder, config=longer)
    loaded, info = load(folder, config=longer, ignore_mismatched_sizes=True, output_loading_info=True)
    assert loaded.lm_head.weight.shape[0] == 101
    assert info["mismatched_keys"]


def test_loading_info_is_given_where_asked_for(folder, original):
    loaded, info = load(folder, output_loading_info=True)
    assert not info["missing_keys"]
    same(loaded, original)


def test_a_changed_plan_is_refused(folder):
    for entry, value in (("mixer", "gla"), ("options", {"rope": True})):
        config = AutoConfig.from_pretrained(folder)
        layer = config.limbeck["layers"][1]
        layer[entry] = {**layer[entry], **value} if isinstance(value, dict) else value
        with pytest.raises(LimbeckError, match=r"in: layers \(first difference: model.layers.1.self_attn\)"):
            load(folder, config=config)
    same_plan = AutoConfig.from_pretrained(folder, use_cache=False)
    assert load(folder, config=same_plan).config.use_cache is False


def test_a_teachers_folder_is_no_student(original, teacher_folder):
    with pytest.raises(LimbeckError, match=r"missing: .*mixer"):
        type(original).from_pretrained(teacher_folder, config=original.config)


# ---- copies


@torch.no_grad()
def test_copies_and_pickles_are_students(original, tmp_path):
    torch.save(original, tmp_path / "whole.pt")
    for made in (
        copy.deepcopy(original),
        pickle.loads(pickle.dumps(original)),
        torch.load(tmp_path / "whole.pt", weights_only=False),
    ):
        same(made, original)
        assert made.lm_head.weight is made.model.embed_tokens.weight
        for parameter in made.parameters():
            parameter.zero_()
    assert original(IDS).logits.abs().sum() > 0, "the copy shares tensors with what it was copied from"
    for config in (copy.deepcopy(original.config), pickle.loads(pickle.dumps(original.config))):
        assert type(config) is type(original.config)
        assert config.to_dict() == original.config.to_dict()


@pytest.mark.slow
def test_a_pickle_is_read_where_no_student_was_made_yet(original, tmp_path):
    (tmp_path / "student.pkl").write_bytes(pickle.dumps(original))
    code = "type(__import__('pickle').load(open(d, 'rb'))).__name__"
    assert in_new_process(code, folder=tmp_path / "student.pkl", tmp_path=tmp_path) == [type(original).__name__]


def test_more_tokens_are_saved_and_loaded(tmp_path):
    longer = student()
    longer.resize_token_embeddings(105)
    longer.save_pretrained(tmp_path)
    loaded = load(tmp_path)
    assert loaded.config.vocab_size == 105
    same(loaded, longer)


def test_a_hybrid_saved_in_shards_keeps_its_softmax_layers(tmp_path):
    half = limbeck.convert(make_tiny_model("llama"), "gla", layers=[0]).eval()
    half.save_pretrained(tmp_path, max_shard_size="20KB")
    loaded = load(tmp_path)
    assert list(get_mixers(loaded)) == ["model.layers.0.self_attn"]
    same(loaded, half)


def test_the_oldest_transformers_tested_is_the_oldest_allowed():
    root = ROOT
    tested = re.search(r"transformers==(\d+\.\d+)\.0", (root / "Makefile").read_text(encoding="utf-8"))
    allowed = re.search(r'"transformers>=(\d+\.\d+)"', (root / "pyproject.toml").read_text(encoding="utf-8"))
    assert tested[1] == allowed[1]
