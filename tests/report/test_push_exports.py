"""limbeck push with exports: what is sent along, what the card says of it, and that its programs run."""

import contextlib
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

import limbeck
from helpers.exported import make_student, make_teacher, make_tokenizer
from helpers.hub_server import TOKEN, serve
from limbeck import LimbeckError
from limbeck.cli.push import print_upload_plan
from limbeck.evaluation.exported import ExportMeasurer, ExportText
from limbeck.models.export import get_exporter
from limbeck.models.export.record import RECORD_FILE, TextScore, load_record, save_record, write_export
from limbeck.report.engines import describe_engines
from limbeck.report.upload import push_to_hub
from limbeck.report.upload_plan import plan_upload


def write(folder: Path, student, target: str, quantization: str | None = None):
    """Save a student, and its export in the folder of exports; returns the record."""
    if not folder.exists():
        student.save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
    place = folder / "export" / (f"{target}-{quantization}" if quantization else target)
    return write_export(get_exporter(target), student, make_tokenizer(), place, quantization, source=folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A student's folder with two exports, one of them measured."""
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    folder = tmp_path_factory.mktemp("made") / "converted"
    student = make_student("tied", "gguf")
    record = write(folder, student, "gguf", "q8_0")
    write(folder, student, "gguf", "f32")
    text = ExportText("/home/ann/text.jsonl", [[1, 5, 7, 9] * 8, [3, 4] * 10])
    measurer = ExportMeasurer(get_exporter("gguf"), student, make_tokenizer(), text)
    measurer.measure(folder / "export" / "gguf-q8_0", record)
    return folder


@pytest.fixture
def converted(made, tmp_path) -> Path:
    shutil.copytree(made, tmp_path / "converted")
    return tmp_path / "converted"


def sent(plan) -> set[str]:
    return {item.path_in_repo for item in plan.files if item.path_in_repo.startswith("export/")}


def test_exports_are_sent_along_and_the_card_says_how_to_run_them(converted, capsys):
    plan = plan_upload(converted, "ann/tiny", license="mit")
    files = {"export/gguf-q8_0/student-q8_0.gguf", "export/gguf-f32/student-f32.gguf"}
    assert sent(plan) == files
    record = load_record(converted / "export" / "gguf-q8_0")
    difference = max(record.verification.prompt_difference, record.verification.step_difference)
    for words in (
        f"| `export/gguf-q8_0/student-q8_0.gguf` | q8_0 | {record.size / 1e6:.3g} MB | {difference:.2g}, typically ",
        f"| {record.score.perplexity:.2f} |",
        f"the student's own on the same tokens is {record.score.student_perplexity:.2f}",
        "50 tokens of `text.jsonl`, computed by the engine",
        "| f32 | ",
        "| not verified | not measured |",
        "hf download ann/tiny export/gguf-f32/student-f32.gguf --local-dir .",
        'llama-completion -m export/gguf-f32/student-f32.gguf -p "Once upon a time"',
    ):
        assert words in plan.model_card, words
    assert plan.exports_size == sum((converted / name).stat().st_size for name in files)
    print_upload_plan(plan)
    assert f"of which {plan.exports_size:,} bytes are exports; --no-exports" in capsys.readouterr().out
    without = plan_upload(converted, "ann/tiny", license="mit", exports=False)
    assert not sent(without)
    assert "Other engines" not in without.model_card


def test_an_export_of_other_weights_or_with_other_bytes_stays_here(converted, capsys):
    place = converted / "export" / "gguf-q8_0"
    record = load_record(place)
    failed = replace(record, verification=replace(record.verification, typical_difference=1e9))
    (converted / "export" / "notes").mkdir()

    def skipped() -> dict[str, str]:
        plan = plan_upload(converted, "ann/tiny", license="mit")
        print_upload_plan(plan)
        assert all(f"not uploaded: {name} {problem}" in capsys.readouterr().out for name, problem in [
            list(plan.skipped_exports.items())[-1]
        ])  # fmt: skip
        assert not any(name.startswith(f"{place}/") for name in sent(plan) for place in plan.skipped_exports)
        return plan.skipped_exports

    assert set(skipped()) == {"export/notes"}
    save_record(place, failed)
    assert "did not pass" in skipped()["export/gguf-q8_0"]
    save_record(place, record)
    file = place / "student-q8_0.gguf"
    raw = file.read_bytes()
    file.write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    assert "another student-q8_0.gguf" in skipped()["export/gguf-q8_0"]
    file.unlink()
    assert "lacks student-q8_0.gguf" in skipped()["export/gguf-q8_0"]
    file.write_bytes(raw)
    assert set(skipped()) == {"export/notes"}
    student = make_student("tied", "gguf")
    with torch.no_grad():
        student.base_model.norm.weight += 0.1
    student.save_pretrained(converted)
    found = skipped()
    assert "other weights" in found["export/gguf-q8_0"]
    assert "other weights" in found["export/gguf-f32"]
    (place / RECORD_FILE).write_text(json.dumps({"format": "gguf"}), encoding="utf-8")
    with pytest.raises(LimbeckError, match=r"export\.json cannot be read"):
        plan_upload(converted, "ann/tiny", license="mit")


def test_a_later_push_without_an_export_takes_it_away(converted, monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.address)
        plan = plan_upload(converted, "ann/tiny", license="mit")
        push_to_hub(plan)
        files = hub.repos["ann/tiny"].files
        assert len(sent(plan)) == 2
        assert (
            files["export/gguf-q8_0/student-q8_0.gguf"]
            == (converted / "export/gguf-q8_0/student-q8_0.gguf").read_bytes()
        )
        push_to_hub(plan_upload(converted, "ann/tiny", license="mit", exports=False))
        assert not [name for name in hub.repos["ann/tiny"].files if name.startswith("export/")]


@pytest.mark.parametrize("target", ["qwen3_5", "onnx"])
def test_the_cards_programs_run(target, tmp_path, monkeypatch):
    if target == "onnx":
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package)
    student = make_student("tied", "qwen3_5") if target == "qwen3_5" else limbeck.convert(make_teacher("tied"), "gla")
    record = write(tmp_path / "repo", student, target)
    assert sent(plan_upload(tmp_path / "repo", "ann/tiny", license="mit")) == {
        f"export/{target}/{name}" for name in record.files
    }
    secret = str(tmp_path).encode()
    assert not any(secret in path.read_bytes() for path in (tmp_path / "repo/export").rglob("*") if path.is_file())
    monkeypatch.chdir(tmp_path / "repo")
    section = describe_engines(".", [(f"export/{target}", replace(record, score=TextScore("wiki", 9, 2.5, 2.25)))])
    assert "2.50" in section
    assert "is 2.25" in section
    (program,) = re.findall(r"```python\n(.*?)\n```", section, re.S)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(program, {})
    tokenizer = make_tokenizer()
    ids = torch.tensor([tokenizer("Once upon a time").input_ids])
    wanted = student.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
    assert said.getvalue().startswith("Once upon a time")
    assert said.getvalue().strip("\n") == tokenizer.decode(wanted[0], skip_special_tokens=target == "onnx").strip("\n")
