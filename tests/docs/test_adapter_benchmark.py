"""benchmarks/adapter.py: an adapter that lowers the task's loss on a teacher, and a row for each way to a student."""

import pytest
import torch

from helpers.paths import ROOT
from helpers.scripts import load_script
from limbeck.models.loading import load_teacher

pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture(scope="module")
def adapter():
    return load_script(ROOT / "benchmarks" / "adapter.py")


def test_the_adapter_learns_and_is_put_on_what_has_the_same_layers(adapter, teacher_folder, tmp_path):
    teacher, tokenizer = load_teacher(str(teacher_folder), torch.device("cpu"))
    task = adapter.ReversedWords(tokenizer, 2)
    ids, labels = task.draw(3, torch.Generator().manual_seed(0))
    start = len(task.prefix)
    assert torch.equal(ids[:, start : start + 2], ids[:, -2:].flip(1))
    assert (labels[:, :-2] == -100).all()
    assert torch.equal(labels[:, -2:], ids[:, -2:])
    before = task.evaluate(teacher)
    adapted = adapter.train_adapter(teacher, task, tmp_path / "adapter", steps=12, lr=3e-2, seed=0)
    after = task.evaluate(adapted)
    assert after < before - 0.1
    assert task.evaluate(teacher) == before  # the teacher itself is left alone
    assert task.evaluate(adapter.put_on(teacher, tmp_path / "adapter")) == pytest.approx(after, abs=1e-4)


@pytest.mark.slow
def test_the_table_has_a_row_for_each_model(adapter, teacher_folder, corpus, capsys):
    words = ["--teacher", str(teacher_folder), "--data", str(corpus), "--students", "gla", "--tokens", "384"]
    settings = ["data.seq_len=32", "data.held_out=0.2", "evaluation.tokens=64", "evaluation.prompt=null"]
    adapter.main([*words, "--steps", "4", "--words", "2", *(word for one in settings for word in ("--set", one))])
    rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [row[0] for row in rows[1:]] == ["teacher", "gla, start", "gla, distilled", "gla, of the adapted"]
    assert all(float(row[1]) > 0 for row in rows[1:])
