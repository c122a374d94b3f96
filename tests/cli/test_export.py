"""limbeck export, limbeck chat and limbeck distill --for, from the command line."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch

import limbeck
from helpers.command_line import run_limbeck
from helpers.exported import make_student, make_teacher, make_tokenizer
from helpers.paths import ROOT
from limbeck import LimbeckError, Recipe
from limbeck.cli.distill import build_recipe
from limbeck.core import extras
from limbeck.evaluation import exported
from limbeck.models import export as exports
from limbeck.models.export import gguf_file, llama_cpp, qwen3_5
from limbeck.models.export.record import RECORD_FILE, find_export_folders, load_record
from limbeck.models.fingerprint import fingerprint_checkpoint


def run(words: list[str], capsys) -> tuple[int, str]:
    """Run a command; its exit code, and all it printed on one line."""
    code, out, err = run_limbeck(words, capsys)
    return code, " ".join((out + err).split())


@pytest.fixture(scope="module")
def students(tmp_path_factory) -> Path:
    """Run directories with a student that fits a format each, and one that fits none."""
    folder = tmp_path_factory.mktemp("runs")
    made = {
        "gguf": make_student("tied", "gguf"),
        "qwen3_5": make_student("tied", "qwen3_5"),
        "plain": limbeck.convert(make_teacher("tied"), "gla"),
    }
    for name, student in made.items():
        student.save_pretrained(folder / name / "student")
        make_tokenizer().save_pretrained(folder / name / "student")
    return folder


@pytest.fixture
def runs(students, tmp_path) -> Path:
    shutil.copytree(students, tmp_path / "runs")
    return tmp_path / "runs"


def test_a_plan_writes_nothing(runs, capsys):
    code, said = run(["export", str(runs / "gguf"), "--to", "gguf", "--plan"], capsys)
    assert code == 0
    assert "layout arwkv7" in said
    assert "student-f16.gguf" in said
    assert "MB" in said
    assert [path.name for path in (runs / "gguf").iterdir()] == ["student"]


@pytest.fixture
def text(tmp_path) -> Path:
    """Three documents, two of them long."""
    words = (ROOT / "LICENSE").read_text(encoding="utf-8")
    rows = [{"text": words[begin : begin + 3000]} for begin in (0, 4000)] + [{"text": "short"}]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path / "text.jsonl"


def read_records(run: Path) -> dict:
    return {folder: load_record(folder) for folder in find_export_folders(run / "student")}


def compute_perplexity(student, text: Path, length: int) -> float:
    """Of the beginnings of the two long documents, by transformers' own loss."""
    tokenizer = make_tokenizer()
    rows = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()[:2]]
    ids = torch.tensor([tokenizer(row).input_ids[:length] for row in rows])
    with torch.no_grad():
        return math.exp(student(ids, labels=ids).loss.item())


def test_an_export_is_verified_and_measured_and_the_result_kept(runs, text, capsys):
    words = ["export", str(runs / "qwen3_5"), "--to", "qwen3_5", "--data", str(text), "--tokens", "128"]
    code, said = run(words, capsys)
    assert code == 0, said
    assert "verified: transformers" in said
    ((folder, kept),) = read_records(runs / "qwen3_5").items()
    assert folder == runs / "qwen3_5" / "export" / "qwen3_5"
    assert kept.verification.passed
    assert kept.verification.tokens == 64
    assert kept.score.targets == 127
    assert kept.score.perplexity == pytest.approx(kept.score.student_perplexity, rel=1e-4)
    assert kept.rates is None
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(kept.files)
    assert kept.find_problem(folder, fingerprint_checkpoint(runs / "qwen3_5" / "student")) is None
    assert "written from other weights" in kept.find_problem(folder, "other")
    code, said = run(words, capsys)
    assert code == 2
    assert "--force" in said
    code, _ = run([*words, "--force", "--no-verify"], capsys)
    assert code == 0
    (kept,) = read_records(runs / "qwen3_5").values()
    assert kept.verification is kept.score is None


def test_several_precisions_are_measured_in_the_engine(runs, text, capsys):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    words = ["export", str(runs / "gguf"), "--to", "gguf", "--quantization", "f32,q4_0", "--data", str(text)]
    code, said = run([*words, "--tokens", "1024"], capsys)
    assert code == 0, said
    student = make_student("tied", "gguf")
    wanted = compute_perplexity(student, text, 512)
    records = {record.quantization: record for record in read_records(runs / "gguf").values()}
    assert records["f32"].score.perplexity == pytest.approx(wanted, rel=1e-4)
    assert records["q4_0"].score.student_perplexity == pytest.approx(wanted, rel=1e-4)
    assert records["q4_0"].score.perplexity != pytest.approx(wanted, rel=1e-5)
    assert records["q4_0"].size < records["f32"].size / 2
    for record in records.values():
        assert record.rates.engine > 0
        assert record.rates.student == records["f32"].rates.student  # measured once
        assert f"{record.score.perplexity:.2f}" in said
    assert said.count("Once upon a time") == 2
    assert said.count("tokens/s (transformers: ") == 2


def test_a_text_that_is_not_there(runs, capsys, monkeypatch):
    words = ["export", str(runs / "qwen3_5"), "--to", "qwen3_5"]
    code, said = run([*words, "--data", "no-such-file.jsonl"], capsys)
    assert code == 2
    assert "no-such-file.jsonl" in said
    assert not (runs / "qwen3_5" / "export").exists()
    code, said = run([*words, "--tokens", "1"], capsys)
    assert code == 2

    def missing(*arguments):
        raise LimbeckError("the embedded text is not here")

    monkeypatch.setattr(exported, "load_exam_documents", missing)
    code, said = run(words, capsys)
    assert code == 0, said
    assert "no perplexity: the embedded text is not here" in said


def test_a_difference_above_the_bound_is_exit_code_1(runs, capsys, monkeypatch):
    monkeypatch.setattr(exports, "OWN_FACTOR", 0)
    monkeypatch.setattr(qwen3_5, "BOUNDS", dict.fromkeys(qwen3_5.BOUNDS, 0.0))
    code, said = run(
        ["export", str(runs / "qwen3_5" / "student"), "--to", "qwen3_5", "--out", str(runs / "out"), "--tokens", "0"],
        capsys,
    )
    assert code == 1
    assert "NOT the same model" in said
    assert json.loads((runs / "out" / RECORD_FILE).read_text(encoding="utf-8"))["verification"]["passed"] is False


def test_a_package_that_writes_is_asked_for_before_any_work(runs, capsys, monkeypatch):
    find = extras.importlib.util.find_spec
    missing = {"gguf": None}
    monkeypatch.setattr(
        extras.importlib.util, "find_spec", lambda name, *rest: missing[name] if name in missing else find(name, *rest)
    )
    monkeypatch.setattr("limbeck.models.loading.load_model_and_tokenizer", lambda *_, **__: pytest.fail("work"))
    code, said = run(["export", str(runs / "gguf"), "--to", "gguf", "--out", str(runs / "never")], capsys)
    assert code == 2
    assert "pip install 'limbeck[export]'" in said
    assert not (runs / "never").exists()


def test_without_the_engine(runs, capsys, monkeypatch):
    pytest.importorskip("gguf")
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_package")
    words = ["export", str(runs / "gguf"), "--to", "gguf", "--quantization", "q8_0"]
    code, said = run(words, capsys)
    assert code == 0
    assert "not verified" in said
    assert "pip install 'limbeck[export]'" in said
    assert (runs / "gguf" / "export" / "gguf-q8_0" / gguf_file.file_name("q8_0")).is_file()
    code, said = run([*words, "--force", "--verify"], capsys)
    assert code == 2
    assert "not installed" in said


def test_a_student_that_does_not_fit(runs, capsys):
    for target in ("gguf", "qwen3_5"):
        code, said = run(["export", str(runs / "plain"), "--to", target], capsys)
        assert code == 2
        assert "gla" in said
        assert "student.mixer=" in said
    code, said = run(["export", str(runs / "gguf"), "--to", "ggfu"], capsys)
    assert code == 2
    assert "did you mean 'gguf'" in said
    code, said = run(["export", str(runs), "--to", "gguf"], capsys)
    assert code == 2
    assert "holds no student" in said
    assert not list(runs.glob("*/export"))


# ------------------------------------------------------------------ limbeck distill --for


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("teachers")
    made = {"tied": make_teacher("tied"), "qwen3": make_teacher("qwen3")}
    for name, model in made.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return {name: folder / name for name in made}


def recipe_for(teacher: Path, target: str, student=None, settings=()) -> Recipe:
    options = dict.fromkeys(("layers", "stages", "tokens", "data", "out"))
    return build_recipe(
        "quickstart", teacher=str(teacher), student=student, settings=list(settings), target=target, **options
    )


@pytest.mark.parametrize(
    ("body", "target", "student", "mixer"),
    [
        ("tied", "gguf", None, "rwkv7"),
        ("tied", "gguf", "gated_deltanet", "gated_deltanet"),
        ("tied", "qwen3_5", None, "gated_deltanet"),
        ("qwen3", "gguf", None, "gated_deltanet"),
        ("qwen3", "qwen3_5", None, "gated_deltanet"),
    ],
)
def test_a_recipe_made_to_fit_fits(body, target, student, mixer, teachers):
    recipe = recipe_for(teachers[body], target, student)
    assert recipe.student.mixer == mixer
    assert recipe.name.endswith(f"-{target}")
    made = limbeck.convert(make_teacher(body), recipe.student.mixer, options=recipe.student.options)
    assert not exports.get_exporter(target).check(made, make_tokenizer())


def test_settings_come_after_the_fit(teachers):
    assert recipe_for(teachers["tied"], "gguf", settings=["student.options.rank=16"]).student.options["rank"] == 16


@pytest.mark.parametrize(
    ("body", "target", "student", "says"),
    [
        ("qwen3", "gguf", "rwkv7", "--student gated_deltanet"),
        ("tied", "gguf", "gla", "rwkv7 or gated_deltanet"),
        ("tied", "qwen3_5", "rwkv7", "gated_deltanet"),
        ("tied", "ggfu", None, "did you mean"),
    ],
)
def test_what_cannot_be_made_to_fit(body, target, student, says, teachers):
    with pytest.raises(LimbeckError, match=says):
        recipe_for(teachers[body], target, student)


def test_a_teacher_that_no_layout_has(teacher_folder, tmp_path):
    from limbeck.testing import make_tiny_model

    make_tiny_model("qwen2").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    for target in ("gguf", "qwen3_5"):
        with pytest.raises(LimbeckError, match=r"q_proj\.bias"):
            recipe_for(tmp_path, target)


def test_the_named_recipes_fit():
    rwkv7 = Recipe.load("rwkv7_gguf").student
    teacher = make_teacher("tied")
    assert not exports.get_exporter("gguf").check(
        limbeck.convert(teacher, rwkv7.mixer, options=rwkv7.options), make_tokenizer()
    )
    hybrid = Recipe.load("qwen3_5").student
    teacher = make_teacher("qwen3", head_dim=128, rms_norm_eps=1e-6)
    student = limbeck.convert(teacher, hybrid.mixer, options=hybrid.options, softmax_layers=hybrid.softmax_layers)
    for target in ("gguf", "qwen3_5"):
        assert not exports.get_exporter(target).check(student, make_tokenizer())


# ------------------------------------------------------------------ limbeck chat


def talk(words: list[str], messages: list[str], capsys, monkeypatch) -> tuple[int, str]:
    lines = iter(messages)

    def read(prompt: str = "") -> str:
        try:
            return next(lines)
        except StopIteration as end:
            raise EOFError from end

    monkeypatch.setattr("builtins.input", read)
    return run(["chat", *words], capsys)


def test_a_conversation_in_the_terminal(runs, capsys, monkeypatch):
    words = [str(runs / "gguf"), "--tokens", "4", "--temperature", "0.8", "--top-p", "0.9"]
    code, said = talk(words, ["Hello", "Again"], capsys, monkeypatch)
    assert code == 0, said
    assert said.count("tokens/s") == 2
    assert "read again" not in said
    code, said = talk(words, ["Hello", "", "never"], capsys, monkeypatch)
    assert said.count("tokens/s") == 1


def test_a_conversation_with_llama_cpp(runs, capsys, monkeypatch):
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    words = [str(runs / "gguf"), "--engine", "llama.cpp", "--tokens", "4"]
    code, said = talk(words, ["Hello"], capsys, monkeypatch)
    assert code == 2
    assert f"limbeck export {runs / 'gguf'} --to gguf" in said
    assert run(["export", str(runs / "gguf"), "--to", "gguf", "--no-verify"], capsys)[0] == 0
    code, said = talk(words, ["Hello", "Again"], capsys, monkeypatch)
    assert code == 0, said
    assert said.count("tokens/s") == 2


@pytest.mark.parametrize("wrong", [["--engine", "vllm"], ["--tokens", "0"], ["--top-p", "0"], ["--temperature", "-1"]])
def test_a_wrong_setting_of_a_conversation(wrong, runs, capsys, monkeypatch):
    code, said = talk([str(runs / "gguf"), *wrong], ["Hello"], capsys, monkeypatch)
    assert code == 2
    assert "expected" in said
