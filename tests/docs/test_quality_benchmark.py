"""benchmarks/quality.py builds the students that it names, keeps what it measured, and refuses what it cannot."""

import json
import math

import pytest
import torch

from helpers.paths import ROOT
from helpers.scripts import load_script
from limbeck.evaluation.exam import load_exam_documents, run_exam
from limbeck.models.loading import load_teacher

pytestmark = pytest.mark.usefixtures("own_cache")

CONTEXT = 256  # tokens, of the tiny teacher


@pytest.fixture(scope="module")
def quality():
    return load_script(ROOT / "benchmarks" / "quality.py")


@pytest.fixture
def run(quality, teacher_folder, corpus, tmp_path, capsys):
    """Run the script on the tiny teacher and a short text; returns the rows of its table, by name."""
    text = [
        f"teacher={teacher_folder}", f"data.source={corpus}", "data.seq_len=48", "data.held_out=0.2",
        "student.options.window=4",
    ]  # fmt: skip

    def call(*words: str) -> dict[str, list[str]]:
        out = str(tmp_path / "quality.json")
        quality.main([*words, "--documents", "2", "--text", str(corpus), "--out", out, "--set", *text])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith("| student | constant MB |")
        return {
            cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("| ").split("|")] for line in lines[2:])
        }

    return call


def test_rows_have_the_bytes_and_the_exam_of_what_they_name(run, teacher_folder, corpus):
    rows = run("--rows", "teacher", "window-4", "heads-1", "layers-1")
    growth = {name: cells[1] for name, cells in rows.items()}
    # of two layers with two groups each
    assert growth == {"teacher": "100.0", "window-4": "0.0", "heads-1": "25.0", "layers-1": "50.0"}
    model, tokenizer = load_teacher(str(teacher_folder), torch.device("cpu"))
    result = run_exam(model, load_exam_documents(str(corpus), tokenizer, 2, CONTEXT), CONTEXT)
    loss = torch.cat(result.documents).double().mean().item()
    assert rows["teacher"][5].split(" ± ")[0] == f"{math.exp(loss):.2f}"
    assert rows["window-4"][5] != rows["teacher"][5]


def test_what_was_measured_is_kept(run, quality, monkeypatch, tmp_path):
    first = run("--rows", "window-4", "layers-1")
    kept = (tmp_path / "quality.json").read_bytes()

    def fail(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(quality, "CacheGrowth", type("", (), {"measure": quality.CacheGrowth.measure}))
    monkeypatch.setattr(quality, "score_layers", fail)
    monkeypatch.setattr(quality, "EXAM", type("", (), {**vars(quality.EXAM), "run": fail}))
    assert run("--rows", "window-4", "layers-1") == first
    assert (tmp_path / "quality.json").read_bytes() == kept
    with pytest.raises(AssertionError, match="measured again"):
        run("--rows", "window-5")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--rows", "windows-64"], "unknown row 'windows-64'"),
        (["--rows", "heads-0"], "unknown row 'heads-0'"),
        (["--rows", "heads-4"], "cannot keep 4 of the teacher's 4 groups"),
        (["--rows", "--runs", "nowhere"], "nowhere has no readable eval.json"),
    ],
)
def test_what_cannot_be_measured_is_refused(run, words, said, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(*words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "quality.json").exists()


def test_tokens_and_minutes_of_a_run(quality, tmp_path):
    stages = [{"tokens": 4096, "seconds": 30.0}, {"tokens": 8192, "seconds": 90.0}]
    (tmp_path / "eval.json").write_text(json.dumps({"stages": stages}), encoding="utf-8")
    assert quality.read_training(tmp_path) == (12288, 2.0)
    values = {"constant_bytes": 2e6, "bytes_per_token": 4.0, "perplexity": 17.046, "repeat_loss@512": 1.5}
    row = quality.format_row("a", {"values": values, "errors": {"perplexity": 1.118}}, 40.0, 12288, 2.0, tasks=True)
    assert row == ["a", "2.0", "10.0", "12,288", "2", "–", "17.05 ± 1.12", "1.50", "–", "–", "–"]
