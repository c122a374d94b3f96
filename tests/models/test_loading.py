"""What is given as a model and is none, or not a whole one: each is told as what it is, in one way for all verbs."""

import contextlib
import io
import json
import os
import pickle
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import limbeck
from limbeck import LimbeckError
from limbeck.cli import main
from limbeck.core.errors import summarize_error
from limbeck.data.documents import iter_documents
from limbeck.evaluation.subject import SubjectLoader
from limbeck.models.loading import is_student, load_model_and_tokenizer, load_teacher, resolve_teacher
from limbeck.testing import make_tiny_model

CPU = torch.device("cpu")
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 34\n"
# leaves a mark where it is executed
FOREIGN = """
open({mark!r}, "w").write("executed")
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class M(LlamaForCausalLM): pass
class C(LlamaConfig): model_type = "foreign"
class T(PreTrainedTokenizerFast): pass
"""


@pytest.fixture
def folder(teacher_folder, tmp_path, monkeypatch) -> Path:
    """A teacher's folder to be spoilt, below the current one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(teacher_folder, "model")
    return Path("model")


@pytest.fixture
def student(folder) -> Path:
    """A student's folder to be spoilt."""
    model, tokenizer = load_teacher(str(folder), CPU)
    limbeck.convert(model, "gla").save_pretrained("student")
    tokenizer.save_pretrained("student")
    return Path("student")


def weights(folder: Path, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def edit(path: Path, **changes) -> None:
    """Change a JSON file; None takes an entry out."""
    known = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    path.write_text(json.dumps({k: v for k, v in known.items() if v is not None}), encoding="utf-8")


def refused(path: Path, *said: str) -> str:
    """What all ways to open a model say of this one: the same, and each of `said`."""
    found = []
    for way in (
        lambda: load_teacher(resolve_teacher(str(path)), CPU),
        lambda: load_model_and_tokenizer(resolve_teacher(str(path))),
        lambda: SubjectLoader().load(str(path)),
    ):
        with pytest.raises(LimbeckError) as error:
            way()
        found.append(str(error.value))
        assert error.value.exit_code == 2
        assert error.value.expected
    for text in found:
        for one in said:
            assert one in text
    return found[0]


def run_hint(text: str) -> None:
    """Type the `python -c` line of a message, in this process: importing torch anew takes seconds."""
    line = next(line for line in text.splitlines() if line.startswith("try: "))
    words = shlex.split(line[line.index("python -c") :], comments=True)
    assert words[:2] == ["python", "-c"]
    exec(words[2], {})


# ---- tensors


@pytest.mark.parametrize("lost", ["model.layers.1.mlp.down_proj.weight", "model.embed_tokens.weight"])
def test_a_teacher_with_a_tensor_missing_teaches_nothing(folder, lost):
    weights(folder, lambda w: {k: v for k, v in w.items() if k != lost})
    refused(folder, "missing: ", lost)


@pytest.mark.parametrize(
    ("rename", "wrapper"),
    [
        (lambda k: f"module.{k}", "module."),
        (lambda k: f"_orig_mod.{k}", "_orig_mod."),
        (lambda k: k.replace("model.layers.1.", "model.layers.1._orig_mod."), "_orig_mod."),
        (lambda k: f"net.inner.{k}", "net.inner."),
    ],
    ids=["ddp", "compiled", "one compiled block", "own wrapper"],
)
def test_names_that_a_wrapper_has_left_are_told_and_taken_off(folder, rename, wrapper):
    right = load_file(folder / "model.safetensors")
    weights(folder, lambda w: {rename(k): v for k, v in w.items()})
    run_hint(refused(folder, f"'{wrapper}'"))
    assert load_file(folder / "model.safetensors").keys() == right.keys()
    load_model_and_tokenizer(str(folder))


def test_tied_weights_are_not_missing_and_what_is_left_over_is_said(folder, capsys):
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    load_teacher(str(folder), CPU)
    assert "not used" not in capsys.readouterr().err
    weights(folder, lambda w: {**w, "score.weight": torch.zeros(2, 48)})
    load_teacher(str(folder), CPU)
    assert "model: unused tensors in the file: score.weight" in capsys.readouterr().err


def test_other_shapes_are_named(folder):
    edit(folder / "config.json", intermediate_size=56)
    refused(folder, "of another shape: model.layers.0.mlp.down_proj.weight")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.down_proj.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_named(folder, name, value):
    def spoil(tensors):
        tensors[name].view(-1)[3] = value
        return tensors

    weights(folder, spoil)
    refused(folder, "not finite", name)


def test_a_students_weights_are_looked_at_as_well(student):
    weights(student, lambda w: {k: v * (float("nan") if ".mixer." in k else 1) for k, v in w.items()})
    with pytest.raises(LimbeckError, match="not finite"):
        load_model_and_tokenizer(str(student))


# ---- adapters


def adapted(base: Path, out: Path) -> torch.Tensor:
    """An adapter of `base` in a folder of its own; returns the logits with it."""
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    model.save_pretrained(out)
    return model(torch.arange(8)[None]).logits


def test_an_adapter_alone_is_told_as_one_and_the_hint_merges_it(folder):
    right = adapted(folder, Path("lora"))
    run_hint(refused(Path("lora"), "an adapter, not a model", "model"))
    merged, _ = load_model_and_tokenizer("lora-merged")
    assert torch.allclose(merged(torch.arange(8)[None]).logits, right, atol=1e-5)


def test_an_adapter_beside_a_model_is_not_put_on_top(folder, student):
    adapted(folder, Path("lora"))
    for place in (folder, student):
        for file in Path("lora").glob("adapter_*"):
            shutil.copy(file, place)
    text = refused(folder, "adapter lies beside", "rm model/adapter_config.json")
    with pytest.raises(LimbeckError, match="adapter lies beside"):
        load_model_and_tokenizer(str(student))
    line = next(line for line in text.splitlines() if line.startswith("try: "))
    subprocess.run(["bash", "-c", line.removeprefix("try: ")], check=True)
    load_teacher(str(folder), CPU)


# ---- folders


def lfs(name):
    return lambda path: (path / name).write_text(POINTER, encoding="utf-8")


def cut(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damaged(path):
    file = path / "model.safetensors"
    file.write_bytes(b"\xff" * 9 + file.read_bytes()[9:])


def a_shard_lost(path):
    model = LlamaForCausalLM.from_pretrained(path)
    (path / "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="20KB")
    sorted(path.glob("model-*.safetensors"))[1].unlink()


class Executes:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def a_pickle(path):
    (path / "model.safetensors").unlink()
    with open(path / "pytorch_model.bin", "wb") as file:
        pickle.dump(Executes(), file)


def a_torch_pickle(path):
    (path / "model.safetensors").unlink()
    torch.save(Executes(), path / "pytorch_model.bin")


def without(*patterns):
    def change(path):
        for pattern in patterns:
            for file in path.glob(pattern):
                file.unlink()

    return change


def a_trainers(path):
    shutil.copytree(path, path / "checkpoint-90")
    shutil.copytree(path, path / "checkpoint-500")
    without("*.json", "*.safetensors")(path)


def a_checkpoint_without_tokenizer(path):
    without("tokenizer*", "special_tokens_map.json")(path)


def a_run(path):
    without("*")(path)
    (path / "recipe.yaml").write_text("name: x\n", encoding="utf-8")


def of_the_original_release(path):
    without("*.json", "*.safetensors")(path)
    (path / "params.json").write_text("{}", encoding="utf-8")
    (path / "consolidated.00.pth").write_bytes(b"")


def gguf(path):
    without("*")(path)
    (path / "model.Q4.gguf").write_bytes(b"GGUF")


def other_weights(path):
    without("*.safetensors")(path)
    (path / "tf_model.h5").write_bytes(b"")


def config(**changes):
    return lambda path: edit(path / "config.json", **changes)


def text_in(name, text):
    return lambda path: (path / name).write_text(text, encoding="utf-8")


SPOILT = {
    "weights in LFS": (lfs("model.safetensors"), ["pointer of Git LFS", "lfs pull"]),
    "tokenizer in LFS": (lfs("tokenizer.json"), ["tokenizer.json is a pointer of Git LFS"]),
    "config in LFS": (lfs("config.json"), ["config.json is a pointer of Git LFS"]),
    "cut weights": (cut, ["truncated or damaged", "bytes"]),
    "damaged weights": (damaged, ["truncated or damaged", "header"]),
    "a lost shard": (a_shard_lost, ["weight files are missing in", "-00002-of-"]),
    "a pickle": (a_pickle, ["pickle", "not executed"]),
    "a pickle of torch": (a_torch_pickle, ["pickle", "not executed"]),
    "no weights": (without("*.safetensors"), ["no weights in model"]),
    "weights of another library": (other_weights, ["no weights in model", "TensorFlow"]),
    "no config": (without("config.json"), ["no config.json in model"]),
    "no tokenizer": (a_checkpoint_without_tokenizer, ["no tokenizer in model"]),
    "nothing": (without("*"), ["which is empty"]),
    "config no JSON": (text_in("config.json", "{"), ["config.json is not JSON"]),
    "config a list": (text_in("config.json", "[1]"), ["config.json holds a list"]),
    "config without type": (config(model_type=None), ["has no model_type"]),
    "config of the future": (config(model_type="llama99"), ["no model_type 'llama99'", "--upgrade transformers"]),
    "config with impossible sizes": (
        config(num_attention_heads="many"),
        ["cannot read the config", "num_attention_heads"],
    ),
    "tokenizer no JSON": (text_in("tokenizer.json", '{"version'), ["tokenizer.json is not JSON"]),
    "tokenizer of something else": (text_in("tokenizer.json", "{}"), ["cannot load the tokenizer"]),
    "a trainer's output": (a_trainers, ["a trainer's checkpoints", "checkpoint-500"]),
    "a run without student": (a_run, ["a run without a student yet", "limbeck distill model/recipe.yaml --out model"]),
    "the makers' checkpoint": (of_the_original_release, ["in its original format"]),
    "GGUF": (gguf, ["GGUF"]),
    "a classifier": (config(architectures=["LlamaForSequenceClassification"]), ["does not predict the next token"]),
    "sequence to sequence": (config(model_type="t5", is_encoder_decoder=True), ["sequence-to-sequence"]),
    "an encoder": (config(model_type="bert", architectures=["BertForMaskedLM"]), ["does not predict the next token"]),
    "vision": (config(model_type="vit", architectures=["ViTModel"]), ["family vit", "no causal language model"]),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_a_folder_is_told_as_what_it_is(kind, folder):
    spoil, said = SPOILT[kind]
    spoil(folder)
    refused(folder, *said)
    assert not Path("executed").exists()


def test_paths_that_are_no_folder(folder):
    Path("gone").symlink_to("/nowhere/model")
    Path("model.gguf").write_bytes(b"GGUF")
    refused(Path("gone"), "a link to /nowhere/model")
    refused(Path("model.gguf"), "a GGUF file")
    refused(folder / "model.safetensors", "a single file", "try: model")
    refused(Path("./modle"), "modle")


@pytest.mark.parametrize(
    "address",
    ["https://huggingface.co/owner/a-model", "huggingface.co/owner/a-model/tree/main", "http://hf.co/owner/a-model"],
)
def test_the_address_of_a_page_is_no_name_and_the_name_in_it_is_what_to_try(address):
    with pytest.raises(LimbeckError, match=r"try: owner/a-model$"):
        resolve_teacher(address)
    with pytest.raises(LimbeckError, match=r"try: --data owner/a-model$"):
        list(iter_documents(address.replace(".co/", ".co/datasets/")))


def test_a_checkpoint_without_tokenizer_takes_the_one_above_it(folder):
    shutil.copytree(folder, "out")
    shutil.move("model", "out/checkpoint-7")
    a_checkpoint_without_tokenizer(Path("out/checkpoint-7"))
    text = refused(Path("out/checkpoint-7"), "no tokenizer")
    command = re.search(r"try: (cp .*)", text)
    assert command
    subprocess.run(["bash", "-c", command[1]], check=True)
    load_teacher("out/checkpoint-7", CPU)


def test_an_honest_pickle_still_loads(folder):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    load_teacher(str(folder), CPU)


def test_whole_sentences_of_other_libraries():
    error = ValueError(
        "Couldn't instantiate it from one of: \n(1) a file, \n(2) e.g. a class. \nYou need both. A third."
    )
    assert summarize_error(error) == "Couldn't instantiate it from one of: (1) a file, (2) e.g. a class. You need both."
    assert summarize_error(KeyError()) == "KeyError"


# ---- code of others


@pytest.mark.parametrize("what", ["config", "model", "tokenizer"])
@pytest.mark.parametrize("command", [["generate"], ["eval", "--tokens", "64"], ["convert"]])
def test_foreign_code_is_not_run_though_somebody_says_yes(what, command, folder, monkeypatch):
    mark = Path("executed").absolute()
    (folder / "x.py").write_text(FOREIGN.format(mark=str(mark)), encoding="utf-8")
    if what == "tokenizer":
        edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.T", None]}, tokenizer_class="T")
    else:
        both = {"AutoConfig": "x.C", "AutoModelForCausalLM": "x.M"}
        edit(folder / "config.json", model_type="foreign", auto_map=both if what == "model" else {"AutoConfig": "x.C"})
    more = {"generate": ["hello"], "convert": ["out"]}.get(command[0], [])
    monkeypatch.setattr(sys, "argv", ["limbeck", command[0], str(folder), *more, *command[1:]])
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert "code of its own" in err.getvalue()
    assert "Do you wish" not in out.getvalue() + err.getvalue()
    assert not mark.exists()
    assert not Path("out").exists()


def test_code_beside_a_family_that_is_known_is_left_alone(folder, student):
    mark = Path("executed").absolute()
    for place in (folder, student):
        (place / "modeling_limbeck.py").write_text(FOREIGN.format(mark=str(mark)), encoding="utf-8")
    edit(folder / "config.json", auto_map={"AutoModelForCausalLM": "modeling_limbeck.M"})
    load_teacher(str(folder), CPU)
    load_model_and_tokenizer(str(student))
    assert not mark.exists()


# ---- settings of somebody's last session


LEFT = {
    "outputs": {"output_attentions": True, "output_hidden_states": True},
    "no classes": {"return_dict": False},
    "no cache": {"use_cache": False},
    "old names": {"torchscript": True, "torch_dtype": "float16"},
    "eager": {"_attn_implementation": "eager", "attn_implementation": "eager"},
    "a kernel of the hub": {"attn_implementation": "somebody/flash"},
    "recomputation": {"gradient_checkpointing": True},
    "no bits": {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": False, "load_in_4bit": False}},
}


@pytest.mark.parametrize("kind", LEFT)
def test_settings_of_a_last_session_change_nothing(kind, folder, teacher_folder):
    edit(folder / "config.json", **LEFT[kind])
    plain, _ = load_teacher(str(teacher_folder), CPU)
    teacher, tokenizer = load_teacher(str(folder), CPU)
    ids = torch.arange(9)[None]
    assert torch.equal(teacher(ids).logits, plain(ids).logits)
    assert teacher(ids).past_key_values is not None
    assert teacher(ids).hidden_states is None
    assert teacher.config._attn_implementation == plain.config._attn_implementation
    assert teacher.dtype == torch.float32
    limbeck.convert(teacher, "gla").save_pretrained("student")
    tokenizer.save_pretrained("student")
    again, _ = load_model_and_tokenizer("student")
    assert not again.config.output_attentions
    assert not again.is_gradient_checkpointing


def test_a_model_loaded_with_such_settings_by_hand_converts_too():
    for settings in (LEFT["no classes"], {"output_attentions": True, "attn_implementation": "eager"}, LEFT["no cache"]):
        model = LlamaForCausalLM(LlamaConfig(**{**make_tiny_model("llama").config.to_dict(), **settings}))
        student = limbeck.convert(model, "gla")
        assert student(torch.arange(9)[None]).logits.shape == (1, 9, model.config.vocab_size)
        for key in settings.keys() - {"attn_implementation"}:
            assert getattr(model.config, key) == settings[key], "the given model is left as it is"


@pytest.mark.parametrize(
    "settings",
    [
        {"return_dict_in_generate": True, "output_scores": True},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.9},
        {"early_stopping": True, "length_penalty": 2.0},
        {"num_return_sequences": 3},
        {"cache_implementation": "none of them"},
        {"max_new_tokens": -1},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_generation_settings_that_transformers_would_not_save(settings, folder, capsys):
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    (folder / "generation_config.json").write_text(json.dumps({**tokens, **settings}), encoding="utf-8")
    teacher, _ = load_teacher(str(folder), CPU)
    student = limbeck.convert(teacher, "gla")
    student.save_pretrained("student")
    assert student.generation_config.eos_token_id == 2
    ids = torch.arange(3, 9)[None]
    assert isinstance(student.generate(ids, max_new_tokens=2, do_sample=False), torch.Tensor)
    said = "generation_config.json" in capsys.readouterr().err
    assert said == (next(iter(settings)) in ("num_return_sequences", "cache_implementation", "max_new_tokens"))


# ---- wrapped models in Python


class Own(LlamaForCausalLM):
    """A class of the user's."""


def in_parts(model):
    from accelerate.hooks import ModelHook, add_hook_to_module

    add_hook_to_module(model.model.layers[0], ModelHook())
    return model


def with_lora(*targets):
    def wrap(model):
        peft = pytest.importorskip("peft")
        return peft.get_peft_model(model, peft.LoraConfig(target_modules=list(targets), task_type="CAUSAL_LM"))

    return wrap


def with_an_adapter(model):
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(target_modules=["up_proj"], task_type="CAUSAL_LM"))
    return model


def one_block_compiled(model):
    model.model.layers[0] = torch.compile(model.model.layers[0])
    return model


WRAPPED = {
    "peft, MLP": (with_lora("up_proj"), "adapters .*merge_and_unload"),
    "peft, outputs": (with_lora("o_proj"), "adapters .*merge_and_unload"),
    "the model inside peft": (lambda model: with_lora("q_proj")(model).base_model.model, "adapters"),
    "an adapter of transformers": (with_an_adapter, "adapters"),
    "compiled": (torch.compile, "torch.compile.*_orig_mod"),
    "one block compiled": (one_block_compiled, r"model.layers.0 went through torch.compile"),
    "parallel": (torch.nn.DataParallel, "DataParallel, around a model.*model.module"),
    "in parts": (in_parts, "accelerate's hooks"),
    "own class": (lambda model: Own(model.config), "Own is a class of test_loading"),
    "no model": (lambda model: torch.nn.Linear(2, 2), "this is a torch.nn.modules.linear.Linear"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_a_wrapped_teacher_is_refused_and_the_way_told(kind):
    wrap, said = WRAPPED[kind]
    with pytest.raises(LimbeckError, match=re.compile(said, re.DOTALL)) as error:
        limbeck.convert(wrap(make_tiny_model("llama")), "gla")
    assert "newer" not in str(error.value)


# ---- students


def plan(**changes):
    def change(path):
        known = json.loads((path / "config.json").read_text(encoding="utf-8"))["limbeck"]
        config(limbeck={k: v for k, v in {**known, **changes}.items() if v is not None})(path)

    return change


def layer(**changes):
    def change(path):
        known = json.loads((path / "config.json").read_text(encoding="utf-8"))["limbeck"]
        known["layers"][0] = {k: v for k, v in {**known["layers"][0], **changes}.items() if v is not None}
        config(limbeck=known)(path)

    return change


PLANS = {
    "a function": plan(base_architecture="pipeline"),
    "a module": plan(base_architecture="os"),
    "an auto class": plan(base_architecture="AutoModelForCausalLM"),
    "a body": plan(base_architecture="LlamaModel"),
    "text": plan(base_architecture="__version__"),
    "another family's class": plan(base_architecture="GPT2LMHeadModel"),
    "another family's type": plan(base_model_type="bert"),
    "a number for a class": plan(base_architecture=3),
    "format": plan(format="x"),
    "no shapes": plan(shapes=None),
    "shapes without heads": plan(shapes=[{"hidden": 48}]),
    "layers are text": plan(layers="all"),
    "no plan": config(limbeck=[1]),
    "another module": layer(module="model.layers.0.nothing"),
    "a module without attention": layer(module="model.layers.0.mlp"),
    "a shape that is not there": layer(shape=7),
    "a shape below zero": layer(shape=-1),
    "a shape as text": layer(shape="0"),
    "no mixer": layer(mixer=None),
    "options are a list": layer(options=[]),
    "an option of another type": layer(options={"conv": "x"}),
}


@pytest.mark.parametrize("kind", PLANS)
def test_a_damaged_plan_is_told(kind, student):
    PLANS[kind](student)
    with pytest.raises(LimbeckError):
        load_model_and_tokenizer(str(student))
    with pytest.raises(LimbeckError):
        AutoModelForCausalLM.from_pretrained(student)


@pytest.mark.parametrize("kind", ["cut weights", "a pickle", "weights in LFS", "config no JSON", "no tokenizer"])
def test_a_students_folder_is_told_as_what_it_is(kind, student):
    spoil, said = SPOILT[kind]
    spoil(student)
    with pytest.raises(LimbeckError) as error:
        load_model_and_tokenizer(str(student))
    for text in said:
        assert text.replace("in model", "in student") in str(error.value)
    assert not Path("executed").exists()


def test_a_run_whose_student_is_none_is_refused(folder, student, monkeypatch, capsys):
    Path("run").mkdir()
    Path("run/recipe.yaml").write_text(f"name: x\nteacher: {folder}\ndata: {{source: x}}\n", encoding="utf-8")
    shutil.copytree(folder, "run/student")
    with pytest.raises(LimbeckError, match="run/student is not a student"):
        SubjectLoader().load("run")
    monkeypatch.setattr(sys, "argv", ["limbeck", "generate", "run", "hello"])
    with pytest.raises(SystemExit):
        main()
    assert "run/student is not a student" in capsys.readouterr().err
    shutil.rmtree("run/student")
    shutil.copytree(student, "run/student")
    with pytest.raises(LimbeckError, match=r"run is a run, not a model(.|\n)*run/student"):
        resolve_teacher("run")
    assert is_student("run/student")


# ---- what belongs to others


@pytest.mark.slow
def test_importing_limbeck_changes_nothing_of_other_libraries():
    code = """
import json, logging, os, signal, sys, warnings
import torch, tqdm, transformers, datasets, huggingface_hub
from huggingface_hub import constants
def seen():
    return {
        "levels": {n: logging.getLogger(n).level for n in ("torchao", "torch", "torch.utils._pytree", "transformers",
                                                           "lm_eval", "datasets", "huggingface_hub", "bitsandbytes")},
        "root": [logging.getLogger().level, len(logging.getLogger().handlers)],
        "verbosity": [transformers.utils.logging.get_verbosity(), datasets.logging.get_verbosity()],
        "bars": [transformers.utils.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()],
        "denormal": bool((torch.full((1,), 1e-40) * 1).item()),
        "offline": constants.HF_HUB_OFFLINE,
        "tqdm": str(tqdm.tqdm.__init__),
        "warnings": [str(warnings.formatwarning), str(warnings.showwarning), len(warnings.filters)],
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "default": str(torch.get_default_dtype()),
        "signals": [str(signal.getsignal(s)) for s in (signal.SIGINT, signal.SIGTERM)],
        "hook": str(sys.excepthook),
        "environment": dict(os.environ),
    }
# transformers itself changes some of it where torchao is installed
from transformers import AutoModelForCausalLM, AutoConfig
import transformers.models.llama.modeling_llama
before = seen()
import limbeck
after = seen()
print(json.dumps([key for key in before if before[key] != after[key]]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_loading_a_teacher_leaves_denormal_numbers(folder):
    from limbeck.core.system import flush_denormals

    def kept() -> bool:
        return bool((torch.full((1,), 1e-40) * 1).item())

    assert kept()
    load_teacher(str(folder), CPU)
    assert kept()
    with flush_denormals():
        assert not kept()
        with flush_denormals():
            assert not kept()
        assert not kept()
    assert kept()
