"""Content decides, not names: teachers, tokenizers, texts, mixers and layers that change between two commands."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from test_job import limbeck
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers.hub_server import Repo, serve
from limbeck import LimbeckError
from limbeck.core.digests import compute_sha256
from limbeck.core.recipe import Recipe
from limbeck.data.offline import embedded
from limbeck.evaluation import lm_eval_tasks
from limbeck.evaluation.subject import Subject
from limbeck.models import loading
from limbeck.models.fingerprint import fingerprint_checkpoint, fingerprint_model, fingerprint_tokenizer_files
from limbeck.models.hub import split_revision
from limbeck.testing import make_tiny_model
from limbeck.training import pipeline
from limbeck.training.identity import check_same_teacher

pytestmark = pytest.mark.usefixtures("own_cache")

MIXER = """
from limbeck.mixers import register
from limbeck.mixers.retnet import RetNet

@register
class Mine(RetNet):
    name = "NAME"
    summary = "a copy"
"""


@pytest.fixture
def teacher(teacher_folder, tmp_path) -> Path:
    """A teacher's folder that a test may change."""
    return Path(shutil.copytree(teacher_folder, tmp_path / "teacher"))


@pytest.fixture
def recipe(teacher, corpus, tmp_path):
    """A recipe that takes a second, of a text and a teacher that a test may change."""
    text = Path(shutil.copy(corpus, tmp_path / "text.jsonl"))

    def make(**changes) -> Recipe:
        raw = {
            "name": "tiny",
            "teacher": str(teacher),
            "student": {"mixer": "gated_deltanet"},
            "data": {"source": str(text), "seq_len": 32, "held_out": 0.2},
            "stages": [
                {"stage": "calibrate", "tokens": 256, "ridge": 0.1},
                {"stage": "hidden", "tokens": 256, "batch_size": 4},
                {"stage": "logits", "tokens": 128, "batch_size": 2, "train": "all"},
            ],
            "evaluation": {"tokens": 128, "prompt": "the work", "new_tokens": 2},
            "out": str(tmp_path / "run"),
        }
        return Recipe.parse({**raw, **changes})

    return make


def content(folder: Path) -> dict[str, str]:
    """Hash of every file but the locks."""
    return {
        str(p.relative_to(folder)): compute_sha256(p) for p in folder.rglob("*") if p.is_file() and p.name != ".lock"
    }


def flip(path: Path, place: int) -> None:
    """Change one bit."""
    raw = bytearray(path.read_bytes())
    raw[place] ^= 0x10
    path.write_bytes(raw)


# ---------------------------------------------------------------------- fingerprints


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model of several MiB, as no test's teacher is: most of it lies neither at the beginning nor at the end."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=256, intermediate_size=640, num_hidden_layers=3, num_attention_heads=4
    )
    folder = tmp_path_factory.mktemp("large") / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    assert (folder / "model.safetensors").stat().st_size > 6 << 20
    return folder


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


@pytest.mark.parametrize(
    "change",
    [
        lambda folder: flip(folder / "model.safetensors", (folder / "model.safetensors").stat().st_size // 2),
        lambda folder: flip(folder / "model.safetensors", -1),
        lambda folder: flip(folder / "model.safetensors", (3 << 20) + 17),
        lambda folder: edit_config(folder, rms_norm_eps=1e-3),
        lambda folder: (folder / "mine.py").write_text("x = 1\n", encoding="utf-8"),
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"others"),
        lambda folder: os.truncate(folder / "model.safetensors", 5 << 20),
    ],
    ids=["middle", "last byte", "any byte", "a setting", "code", "other weights beside it", "cut short"],
)
def test_anything_that_counts_changes_a_fingerprint(large, tmp_path, change):
    folder = Path(shutil.copytree(large, tmp_path / "copy"))
    assert fingerprint_checkpoint(folder) == fingerprint_checkpoint(large)
    change(folder)
    assert fingerprint_checkpoint(folder) != fingerprint_checkpoint(large)


def test_the_same_tensors_in_other_files_are_the_same(large, tmp_path):
    model = LlamaForCausalLM.from_pretrained(large)
    model.save_pretrained(tmp_path / "shards", max_shard_size="2MB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert fingerprint_checkpoint(tmp_path / "shards") == fingerprint_checkpoint(large)
    shutil.copytree(large, tmp_path / "newer")
    edit_config(tmp_path / "newer", transformers_version="99.0")
    assert fingerprint_checkpoint(tmp_path / "newer") == fingerprint_checkpoint(large)


def test_a_model_in_memory_has_a_fingerprint_of_its_tensors_and_settings():
    model = make_tiny_model("llama")
    before = fingerprint_model(model)
    assert fingerprint_model(make_tiny_model("llama")) == before
    model.config.rms_norm_eps *= 10
    changed = fingerprint_model(model)
    assert changed != before
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert fingerprint_model(model) not in (before, changed)


def test_two_students_whose_files_begin_and_end_alike_share_no_scores(large, tmp_path):
    """Training what lies between the first and the last MiB must not hand one student the scores of the other."""
    other = Path(shutil.copytree(large, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    names = list(tensors)
    tensors[names[len(names) // 2]] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    model = LlamaForCausalLM.from_pretrained(large)
    subjects = [Subject("x", str(folder), tmp_path, model, None) for folder in (large, other)]
    assert subjects[0].fingerprint != subjects[1].fingerprint
    settings = lm_eval_tasks.TaskSettings()
    paths = [lm_eval_tasks._score_path(subject, "arc_easy", {}, settings) for subject in subjects]
    assert None not in paths
    assert paths[0] != paths[1]


# ---------------------------------------------------------------------- resuming, and what is finished


def other_weights(teacher: Path, tmp_path: Path) -> None:
    tensors = load_file(teacher / "model.safetensors")
    torch.manual_seed(1)
    tensors = {name: x + 0.1 * torch.randn_like(x) for name, x in tensors.items()}
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})


def one_bit(teacher: Path, tmp_path: Path) -> None:
    flip(teacher / "model.safetensors", -3)


def other_setting(teacher: Path, tmp_path: Path) -> None:
    edit_config(teacher, rms_norm_eps=1e-2)


def other_merges(teacher: Path, tmp_path: Path) -> None:
    path = teacher / "tokenizer.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    raw["model"]["merges"] = raw["model"]["merges"][:-1]
    path.write_text(json.dumps(raw), encoding="utf-8")


def other_template(teacher: Path, tmp_path: Path) -> None:
    (teacher / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!", encoding="utf-8")


def other_layers(teacher: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.json").write_text('{"keep": [0]}', encoding="utf-8")


def write_mixer(folder: Path, summary: str) -> None:
    """A file with a mixer whose name no other test's has."""
    text = MIXER.replace("NAME", folder.name).replace("a copy", summary)
    (folder / "mine.py").write_text(text, encoding="utf-8")


def other_code(teacher: Path, tmp_path: Path) -> None:
    write_mixer(tmp_path, "another")


def other_text(teacher: Path, tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text(path.read_text(encoding="utf-8").replace("the", "a"), encoding="utf-8")


CHANGES = {
    other_weights: "has changed: its weights differ",
    one_bit: "has changed: its weights differ",
    other_setting: ", rms_norm_eps: ",
    other_merges: "has changed: its tokenizer differs",
    other_template: "has changed: its tokenizer differs",
    other_layers: "the student.0.layers: was '0', now '1'",
    other_code: "the student.0.code: ",
    other_text: "the text has changed",
}


@pytest.mark.parametrize("finished", [True, False], ids=["finished", "killed"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_run_goes_on_only_with_what_it_was_begun_with(recipe, teacher, tmp_path, change, finished):
    (tmp_path / "keep.json").write_text('{"keep": [1]}', encoding="utf-8")
    write_mixer(tmp_path, "a copy")
    student = {"mixer": str(tmp_path / "mine.py"), "softmax_layers": str(tmp_path / "keep.json")}
    made = recipe(student=student, stages=[{"stage": "calibrate", "tokens": 256, "ridge": 0.1}])
    pipeline.distill(made)
    run = Path(made.out)
    if not finished:
        (run / "eval.json").unlink()
        shutil.rmtree(run / "student")
    before = content(run)
    change(teacher, tmp_path)
    with pytest.raises(LimbeckError) as refused:
        pipeline.distill(made)
    assert CHANGES[change] in refused.value.found
    assert refused.value.expected
    assert f"--out {run}-2" in refused.value.hint
    after = content(run)
    assert all(after.get(name) == before[name] for name in before if name.startswith(("stages", "student", "eval")))
    assert json.loads((run / "manifest.json").read_text(encoding="utf-8"))["teacher"]["tensors"]
    # what the hint says works
    pipeline.distill(made.model_copy(update={"out": f"{run}-2"}))


def test_the_same_teacher_saved_again_is_no_other(recipe, teacher, capsys):
    made = recipe()
    first = pipeline.distill(made)
    AutoModelForCausalLM.from_pretrained(teacher).save_pretrained(teacher, max_shard_size="60KB")
    os.remove(teacher / "model.safetensors")
    assert len(list(teacher.glob("*.safetensors"))) > 1
    assert pipeline.distill(made) == first
    assert "is already complete" in capsys.readouterr().err


def test_a_finished_run_whose_teacher_is_gone_says_so(recipe, teacher, capsys):
    made = recipe()
    first = pipeline.distill(made)
    shutil.rmtree(teacher)
    assert pipeline.distill(made) == first
    told = capsys.readouterr().err
    assert "not checked for changes" in told
    assert str(teacher) in told.replace("\n", "")


def test_a_teacher_in_memory_is_compared_too(recipe, teacher):
    made = recipe(stages=[{"stage": "calibrate", "tokens": 256, "ridge": 0.1}])
    loaded = loading.load_teacher(str(teacher), torch.device("cpu"))
    pipeline.distill(made, loaded=loaded)
    (Path(made.out) / "eval.json").unlink()
    pipeline.distill(made, loaded=loaded)
    (Path(made.out) / "eval.json").unlink()
    with torch.no_grad():
        loaded[0].model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(LimbeckError, match="has changed: its weights differ"):
        pipeline.distill(made, loaded=loaded)


def test_the_manifest_names_the_layers_that_a_file_has_chosen(recipe, tmp_path):
    (tmp_path / "keep.json").write_text('{"keep": [1]}', encoding="utf-8")
    made = recipe(student={"mixer": "gla", "softmax_layers": str(tmp_path / "keep.json")}, stages=recipe().stages[:1])
    pipeline.distill(made)
    manifest = json.loads((Path(made.out) / "manifest.json").read_text(encoding="utf-8"))
    assert [(one["mixer"], one["layers"]) for one in manifest["student"]] == [("gla", "0")]


def test_runs_of_one_table_have_one_teacher(recipe, teacher, tmp_path):
    stages = recipe().stages[:1]
    first, second = recipe(stages=stages), recipe(stages=stages, seed=1, out=str(tmp_path / "second"))
    pipeline.distill(first)
    both = {Path(one.out): one for one in (first, second)}
    check_same_teacher(both)
    other_weights(teacher, tmp_path)
    with pytest.raises(LimbeckError, match="different weights in the run run and now"):
        check_same_teacher(both)
    pipeline.distill(second)
    with pytest.raises(LimbeckError, match="different weights in the run run and"):
        check_same_teacher(both)


# ---------------------------------------------------------------------- students and stages that are gone or damaged


@pytest.mark.fast_cases(2)
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda student: shutil.rmtree(student), "does not exist"),
        (lambda student: flip(student / "model.safetensors", -9), "model.safetensors has been changed"),
        (lambda student: (student / "tokenizer.json").unlink(), "tokenizer.json is missing"),
        (lambda student: os.truncate(student / "config.json", 40), "config.json has been changed"),
    ],
    ids=["no folder", "a bit", "a file", "cut"],
)
def test_a_damaged_student_is_exported_again(recipe, capsys, damage, said):
    made = recipe()
    first = pipeline.distill(made)
    student = Path(made.out) / "student"
    before = content(student)
    damage(student)
    again = pipeline.distill(made)
    assert said in capsys.readouterr().err.replace("\n", " ")
    assert content(student) == before
    assert again["held_out"] == first["held_out"]


def test_what_somebody_put_beside_a_student_is_kept(recipe):
    made = recipe()
    pipeline.distill(made)
    student = Path(made.out) / "student"
    (student / "README.md").write_text("my notes", encoding="utf-8")
    flip(student / "model.safetensors", -9)
    pipeline.distill(made)
    assert (Path(made.out) / "student-before-1" / "README.md").read_text(encoding="utf-8") == "my notes"
    assert not (student / "README.md").exists()


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_damaged_result_of_a_stage_is_made_again(recipe, capsys, index):
    made = recipe()
    pipeline.distill(made)
    run = Path(made.out)
    before = content(run / "student")
    steps = [
        (line["stage_index"], line["step"], line["loss"])
        for line in map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    ]
    (run / "eval.json").unlink()
    shutil.rmtree(run / "student")
    folder = next((run / "stages").glob(f"{index}-*")) / "done"
    flip(folder / "model.safetensors", -3)
    pipeline.distill(made)
    told = capsys.readouterr().err.replace("\n", "")
    assert f"{folder} is damaged" in told
    assert told.count("already complete") == 2
    assert content(run / "student") == before
    again = [
        (line["stage_index"], line["step"], line["loss"])
        for line in map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    ]
    assert again == steps


def test_a_run_that_was_moved_says_where_it_is(recipe, tmp_path):
    made = recipe()
    pipeline.distill(made)
    shutil.move(made.out, tmp_path / "elsewhere")
    (tmp_path / "linked").symlink_to(tmp_path / "elsewhere")
    file = str(tmp_path / "elsewhere" / "recipe.yaml")
    for place in ("elsewhere", "linked"):
        told = limbeck("distill", file, "--out", str(tmp_path / place))
        assert told.returncode == 0, told.stderr
        assert f"written to {tmp_path / place}/" in told.stderr.replace("\n", "")


# ---------------------------------------------------------------------- revisions of the hub


@pytest.fixture
def hub_cache(teacher_folder, tmp_path, monkeypatch) -> Path:
    """ann/tiny in the hub's local cache with two commits, `main` and the tag v1."""
    kept = tmp_path / "hub" / "models--ann--tiny"
    commits = {"v1": "1" * 40, "main": "2" * 40}
    (kept / "refs").mkdir(parents=True)
    for name, commit in commits.items():
        shutil.copytree(teacher_folder, kept / "snapshots" / commit)
        (kept / "refs" / name).write_text(commit, encoding="utf-8")
    other_weights(kept / "snapshots" / commits["v1"], tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return kept


def test_a_teacher_at_a_revision(hub_cache, recipe):
    stages = recipe().stages[:1]
    found = {}
    for name in ("ann/tiny@v1", "ann/tiny", f"ann/tiny@{'1' * 40}"):
        made = recipe(teacher=name, stages=stages, out=f"{recipe().out}-{len(found)}")
        pipeline.distill(made)
        manifest = json.loads((Path(made.out) / "manifest.json").read_text(encoding="utf-8"))
        found[name] = manifest["teacher"]
    first, newest, same = found.values()
    assert (first["commit"], newest["commit"], same["commit"]) == ("1" * 40, "2" * 40, "1" * 40)
    assert first["tensors"] == same["tensors"] != newest["tensors"]
    assert first["files"] == same["files"] != newest["files"]


@pytest.mark.slow
def test_a_revision_is_downloaded_and_written_down(teacher_folder, corpus, tmp_path):
    """By the command line, from a hub: `main` has moved on since v1, and a run of v1 does not see it."""
    other = Path(shutil.copytree(teacher_folder, tmp_path / "other"))
    other_weights(other, tmp_path)
    old, new = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (teacher_folder, other))
    with serve() as server:
        states = {"v1": ("1" * 40, old), "1" * 40: ("1" * 40, old), "main": ("2" * 40, new), "2" * 40: ("2" * 40, new)}
        server.repos["ann/tiny"] = Repo(files=new, states=states)
        environment = {
            **os.environ,
            "HF_ENDPOINT": server.address,
            "HF_HUB_OFFLINE": "0",
            "HF_HOME": str(tmp_path / "hub"),
            "HF_HUB_DISABLE_XET": "1",
        }
        command = [sys.executable, "-m", "limbeck", "distill", "--teacher", "ann/tiny@v1", "--data", str(corpus)]
        command += ["--stages", "0", "--tokens", "256", "--set", "data.seq_len=32", "--set", "data.held_out=0.2"]
        command += ["--set", "evaluation.tokens=64", "--set", "evaluation.new_tokens=0", "--out", str(tmp_path / "run")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text(encoding="utf-8"))["teacher"]
    assert (manifest["name"], manifest["commit"]) == ("ann/tiny@v1", "1" * 40)
    assert manifest["files"]["weights"] == fingerprint_checkpoint(teacher_folder) != fingerprint_checkpoint(other)


def test_a_branch_that_moved_is_noticed(hub_cache, recipe):
    made = recipe(teacher="ann/tiny", stages=recipe().stages[:1])
    pipeline.distill(made)
    (hub_cache / "refs" / "main").write_text("1" * 40, encoding="utf-8")
    with pytest.raises(LimbeckError, match="has changed: its weights differ"):
        pipeline.distill(made)
    pipeline.distill(made.model_copy(update={"teacher": f"ann/tiny@{'2' * 40}", "out": f"{made.out}-2"}))


def test_revisions_are_read_off_names_and_not_off_folders(tmp_path, monkeypatch):
    assert split_revision("ann/tiny@refs/pr/3") == ("ann/tiny", "refs/pr/3")
    assert split_revision("ann/tiny") == ("ann/tiny", None)
    folder = tmp_path / "model@v1"
    folder.mkdir()
    assert split_revision(str(folder)) == (str(folder), None)
    for name in ("ann/tiny@", "@v1"):
        with pytest.raises(LimbeckError, match="is not a model with a revision"):
            split_revision(name)
    with pytest.raises(LimbeckError, match="embedded@v1"):
        loading.resolve_teacher("embedded@v1")
    assert loading.resolve_teacher("ann/tiny@refs/pr/3") == "ann/tiny@refs/pr/3"


# ---------------------------------------------------------------------- the embedded teacher


def test_a_damaged_embedded_teacher_is_made_again(teacher_folder, tmp_path, monkeypatch, capsys):
    """What makes it is a copy here; what keeps and checks it is the real thing."""
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))

    def make(folder: Path) -> dict:
        shutil.copytree(teacher_folder, folder, dirs_exist_ok=True)
        return {}

    monkeypatch.setattr(embedded, "_make_teacher", make)
    folder = Path(loading.resolve_teacher("embedded"))
    capsys.readouterr()
    flip(folder / "model.safetensors", -2)
    assert fingerprint_checkpoint(Path(loading.resolve_teacher("embedded"))) == fingerprint_checkpoint(teacher_folder)
    assert "embedded teacher: damaged, recreating it" in capsys.readouterr().err
    assert loading.resolve_teacher("embedded") == str(folder)
    assert "damaged" not in capsys.readouterr().err


def test_tokenizers_are_told_apart(teacher, tmp_path):
    before = fingerprint_tokenizer_files(teacher)
    assert fingerprint_tokenizer_files(shutil.copytree(teacher, tmp_path / "again")) == before
    other_merges(teacher, tmp_path)
    assert fingerprint_tokenizer_files(teacher) != before
