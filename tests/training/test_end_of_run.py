"""What a run needs at its end is tried before its first step, and what it exports is read back before it counts."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import limbeck
from helpers.exported import make_teacher, make_tokenizer
from limbeck import LimbeckError
from limbeck.core.recipe import Recipe
from limbeck.data.packing import Batch
from limbeck.mixers import registry
from limbeck.models.export import get_exporter
from limbeck.models.hooks import check_finite_loss
from limbeck.models.loading import load_teacher
from limbeck.models.saved_check import check_export
from limbeck.report.run_summary import format_summary
from limbeck.testing import make_tiny_model
from limbeck.training import pipeline
from limbeck.training.calibration import _best_ridge

pytestmark = pytest.mark.usefixtures("own_cache")
CPU = torch.device("cpu")
# a mixer whose output is no number where it learns
BAD_MIXER = """
from limbeck.mixers import Inputs, Mixer, register
from limbeck.ops import scalar_decay

@register
class Bad(Mixer):
    name, summary, operator = "bad", "not a number in training", scalar_decay

    def inputs(self, q, k, v, x, tokens, state):
        return Inputs(q, k, v * float("nan") if v.requires_grad else v)
"""


@pytest.fixture
def recipe(teacher_folder, corpus, tmp_path):
    """A recipe that takes a second; `recipe(key=value)` changes it."""

    def make(**changes) -> Recipe:
        raw = {
            "name": "tiny",
            "teacher": str(teacher_folder),
            "student": {"mixer": "gla"},
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": [{"stage": "calibrate", "tokens": 128}, {"stage": "hidden", "tokens": 128, "batch_size": 4}],
            "evaluation": {"tokens": 64, "prompt": "the work", "new_tokens": 2},
            "out": str(tmp_path / "run"),
        }
        return Recipe.parse({**raw, **changes})

    return make


def spoilt(teacher_folder: Path, to: Path, change) -> Path:
    """A copy of the teacher with other weights."""
    shutil.copytree(teacher_folder, to)
    file = to / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return to


# ---- the rehearsal


def no_tokenizer_is_saved(tokenizer, teacher):
    def refuse(*args, **kwargs):
        raise NotImplementedError("This tokenizer cannot be saved. It has no files.")

    tokenizer.save_pretrained = refuse


def another_tokenizer_is_saved(tokenizer, teacher):
    tokenizer.save_pretrained = lambda folder: type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template="another"
    ).save_pretrained(folder)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (no_tokenizer_is_saved, "cannot be saved and loaded again: This tokenizer cannot be saved. It has no files."),
        (another_tokenizer_is_saved, "tokenizer gives other tokens, or has another chat template"),
    ],
)
def test_what_would_fail_at_the_end_is_found_before_the_start(spoil, said, recipe, teacher_folder):
    teacher, tokenizer = load_teacher(str(teacher_folder), CPU)
    spoil(tokenizer, teacher)
    made = recipe()
    with pytest.raises(LimbeckError, match=said):
        pipeline.distill(made, loaded=(teacher, tokenizer))
    assert not Path(made.out).exists()


def test_the_rehearsal_leaves_nothing_and_changes_no_result(recipe, tmp_path, monkeypatch):
    """Rehearsed or resumed without one, the student is the same."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    first = pipeline.distill(recipe())
    assert not list((tmp_path / "tmp").iterdir())
    monkeypatch.setattr(pipeline, "dry_run_export", lambda *args: None)
    second = pipeline.distill(recipe(out=str(tmp_path / "again")))
    assert first["held_out"] == second["held_out"]
    assert first["samples"] == second["samples"]
    assert "--to gguf" not in format_summary(first)


def test_the_summary_of_a_student_that_fits_leads_to_llama_cpp(recipe, tmp_path):
    teacher = make_teacher("tied")
    teacher.save_pretrained(tmp_path / "teacher")
    make_tokenizer().save_pretrained(tmp_path / "teacher")
    fit = get_exporter("gguf").fit(teacher.config, None)
    student = {"mixer": fit.mixer, "options": fit.options}
    stages = [{"stage": "calibrate", "tokens": 128}]
    made = recipe(teacher=str(tmp_path / "teacher"), student=student, stages=stages)
    summary = format_summary(pipeline.distill(made))
    assert f"    limbeck export {made.out} --to gguf --quantization q8_0\n" in summary
    assert f"    limbeck chat {made.out} --engine llama.cpp\n" in summary


def test_a_run_that_goes_on_is_not_rehearsed_again(recipe, monkeypatch):
    made = recipe()
    pipeline.distill(made)
    (Path(made.out) / "eval.json").unlink()
    monkeypatch.setattr(pipeline, "dry_run_export", lambda *args: pytest.fail("rehearsed again"))
    pipeline.distill(made)


# ---- a teacher or a stage that says nothing


def too_large(tensors):
    for name in tensors:
        if "layers.0.mlp" in name:
            tensors[name] *= 1e30


def too_large_a_norm(tensors):
    tensors["model.norm.weight"][:] = 3e38


@pytest.mark.parametrize(
    ("change", "module"), [(too_large, "model.layers.0.mlp.down_proj"), (too_large_a_norm, "model.norm")]
)
def test_a_teacher_whose_loss_is_not_finite_is_refused_by_module(change, module, recipe, teacher_folder, tmp_path):
    made = recipe(teacher=str(spoilt(teacher_folder, tmp_path / "teacher", change)))
    with pytest.raises(LimbeckError, match=f"NaN or infinite is {module}\n") as error:
        pipeline.distill(made)
    assert "lr=" not in str(error.value), "no rate helps"
    assert not Path(made.out).exists()


def test_a_teacher_is_asked_once_for_each_precision():
    teacher, seen = make_tiny_model("llama"), []
    teacher.get_decoder().register_forward_hook(lambda *args: seen.append(1))
    ids = torch.arange(3, 11)[None]
    batch = Batch(ids, torch.arange(8)[None], ids)
    for _ in range(2):
        check_finite_loss(teacher, batch, torch.no_grad)
    once = len(seen)
    check_finite_loss(teacher, batch, lambda: torch.autocast("cpu", torch.bfloat16))
    assert len(seen) > once
    again = len(seen)
    check_finite_loss(teacher, batch, lambda: torch.autocast("cpu", torch.bfloat16))
    assert len(seen) == again


@pytest.mark.parametrize("tokens", [128, 1024], ids=["fewer steps than are tried", "more"])
def test_a_stage_that_learns_nothing_is_an_error(tokens, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    monkeypatch.setattr(registry, "_FILES", {})
    (tmp_path / "bad.py").write_text(BAD_MIXER, encoding="utf-8")
    stages = [{"stage": "hidden", "tokens": tokens, "batch_size": 1 if tokens > 128 else 4}]
    with pytest.raises(LimbeckError, match=r"stage hidden: .*steps") as error:
        pipeline.distill(recipe(student={"mixer": str(tmp_path / "bad.py")}, stages=stages))
    assert "lr=" not in str(error.value), "no step has been made, so no rate was too high"


def test_a_rate_is_blamed_where_steps_were_made(recipe):
    stages = [
        {"stage": "hidden", "tokens": 2048, "batch_size": 1, "lr": 1e30, "warmup_ratio": 0, "max_grad_norm": 1e30}
    ]
    with pytest.raises(LimbeckError, match=r"stages\.0\.lr="):
        pipeline.distill(recipe(stages=stages))


def test_a_ridge_without_a_loss_is_never_the_best():
    nan = {"loss": float("nan")}
    assert _best_ridge({"1e-05": nan, "0.1": {"loss": 3.0}, "1": {"loss": 4.0}}) == "0.1"
    with pytest.raises(LimbeckError, match="not finite with any ridge"):
        _best_ridge({"1e-05": nan, "1": nan})


def test_a_summary_takes_stages_without_a_step(recipe):
    result = pipeline.distill(recipe())
    for stage in result["stages"]:
        if stage["stage"] != "calibrate":
            stage |= {"loss": None, "first_loss": None}
    assert "no step" in format_summary(result)


# ---- what is exported


@pytest.fixture(scope="module")
def exported(teacher_folder, tmp_path_factory):
    """A student, its tokenizer, and the folder that they were saved in."""
    teacher, tokenizer = load_teacher(str(teacher_folder), CPU)
    student = limbeck.convert(teacher, "gla").eval()
    folder = tmp_path_factory.mktemp("exported") / "student"
    student.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    check_export(folder, student, tokenizer)
    return student, tokenizer, folder


def a_bit(folder):
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


def tensors(change):
    def spoil(folder):
        file = folder / "model.safetensors"
        found = load_file(file)
        change(found)
        save_file(found, file, {"format": "pt"})

    return spoil


def lose(found):
    found.pop(next(name for name in found if ".mixer." in name))


def round_all(found):
    for name in found:
        found[name] = found[name].bfloat16()


def another_mixer(folder):
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    for layer in config["limbeck"]["layers"]:
        layer["mixer"], layer["options"] = "retnet", {}
    file.write_text(json.dumps(config), encoding="utf-8")


def softmax(folder):
    make_tiny_model("llama").save_pretrained(folder)


def an_adapter(folder):
    (folder / "adapter_config.json").write_text("{}", encoding="utf-8")


def no_tokenizer(folder):
    for file in folder.glob("tokenizer*"):
        file.unlink()


@pytest.mark.parametrize(
    "spoil",
    [a_bit, tensors(lose), tensors(round_all), another_mixer, softmax, an_adapter, no_tokenizer],
    ids=["a bit", "a tensor", "type", "another mixer", "softmax", "an adapter", "no tokenizer"],
)
def test_a_folder_that_is_not_the_student_is_refused(spoil, exported, tmp_path):
    student, tokenizer, folder = exported
    shutil.copytree(folder, tmp_path / "student")
    spoil(tmp_path / "student")
    with pytest.raises(LimbeckError):
        check_export(tmp_path / "student", student, tokenizer)


def test_a_student_that_is_not_finite_is_not_handed_over(exported, tmp_path):
    student = limbeck.convert(make_tiny_model("llama"), "gla")
    with torch.no_grad():
        next(student.parameters())[0, 0] = float("nan")
    student.save_pretrained(tmp_path)
    exported[1].save_pretrained(tmp_path)
    with pytest.raises(LimbeckError, match="not finite"):
        check_export(tmp_path, student, exported[1])


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt2", "gemma2"])
def test_families_whose_files_are_laid_out_otherwise_come_back(family, tokenizer, tmp_path):
    student = limbeck.convert(make_tiny_model(family), "gla").eval()
    student.save_pretrained(tmp_path, max_shard_size="50KB")
    tokenizer.save_pretrained(tmp_path)
    check_export(tmp_path, student, tokenizer)


def test_the_student_before_stays_where_the_new_one_is_not_what_was_meant(recipe, monkeypatch):
    """An export that does not come back never takes the place of one that did."""
    made = recipe()
    pipeline.distill(made)
    file = Path(made.out) / "student/model.safetensors"
    before = file.read_bytes()
    (Path(made.out) / "eval.json").unlink()
    save = PreTrainedModel.save_pretrained

    def rounded(self, folder, **kwargs):
        half = {name: tensor.bfloat16() for name, tensor in self.state_dict().items() if name != "lm_head.weight"}
        save(self, folder, state_dict=half)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", rounded)
    with pytest.raises(LimbeckError, match="weights differ or are missing"):
        pipeline.distill(made)
    assert file.read_bytes() == before
