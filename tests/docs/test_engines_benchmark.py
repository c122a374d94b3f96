"""benchmarks/engines.py on a tiny teacher: it runs, and its figures are of what they name."""

import json
import math

import pytest
import torch

from helpers.exported import make_student, make_teacher, make_tokenizer
from helpers.paths import ROOT
from helpers.scripts import load_script
from limbeck import LimbeckError
from limbeck.models.export.llama_cpp import LlamaCpp


@pytest.fixture(scope="module")
def engines():
    pytest.importorskip("gguf")
    pytest.importorskip("xllamacpp")
    return load_script(ROOT / "benchmarks" / "engines.py")


def test_a_student_and_its_teacher_side_by_side(engines, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engines, "SEED", 128)
    teacher, tokenizer = make_teacher("tied"), make_tokenizer()
    for name, model in (("teacher", teacher), ("student", make_student("tied", "gguf"))):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    words = (ROOT / "LICENSE").read_text(encoding="utf-8")
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": words}) + "\n", encoding="utf-8")
    options = ["--weights", "f32", "--contexts", "100,512", "--steps", "2", "--tokens", "200", "--threads", "1"]
    options += ["--text", str(tmp_path / "text.jsonl"), "--json", str(tmp_path / "found.json")]
    rows = engines.main([str(tmp_path / "student"), "--teacher", str(tmp_path / "teacher"), *options])
    found = {(row.name, row.weights): row for row in rows}
    assert len(found) == 4
    ids = torch.tensor([tokenizer(words).input_ids[:200]])
    with torch.no_grad():
        wanted = math.exp(teacher(ids, labels=ids).loss.item())
    for weights, rel in (("in transformers", 1e-5), ("f32", 1e-4)):
        assert found["teacher", weights].perplexity == pytest.approx(wanted, rel=rel)
    assert found["student", "f32"].perplexity == pytest.approx(found["student", "in Limbeck"].perplexity, rel=1e-4)
    assert found["student", "f32"].megabytes > found["student", "in Limbeck"].megabytes  # with the vocabulary
    for row in rows:
        assert set(row.milliseconds) == (set() if row.weights == "in transformers" else {100, 512})
    said = capsys.readouterr().out
    assert "| tokens/s at 512 |" in said
    assert "both in llama.cpp" in said
    assert len(json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["rows"]) == 4


def test_a_teachers_file_of_another_teacher_is_found_out(engines, tmp_path):
    engines.write_teacher(make_teacher("tied"), make_tokenizer(), tmp_path, "f32")
    file = tmp_path / "student-f32.gguf"
    engines.check_teacher(make_teacher("tied"), file, "f32", 1)
    with pytest.raises(LimbeckError, match="not the teacher"):
        engines.check_teacher(make_teacher("tied", rms_norm_eps=1e-2), file, "f32", 1)
    with pytest.raises(LimbeckError, match="no place in the layout"):
        engines.write_teacher(make_teacher("qwen3"), make_tokenizer(), tmp_path, "f32")
    with LlamaCpp(file, context=1024, exact=False) as engine:
        engine.decode(range(3, 103), last_only=True)
        size = engine.state_bytes
        engine.repeat_context(5)
        assert engine.state_bytes == pytest.approx(5 * size, rel=0.01)
        engine.decode([7], last_only=True)
        with pytest.raises(LimbeckError, match="1024 at most"):
            engine.repeat_context(20)
