"""Groups of heads that a run chooses itself: stored, found again, and the same without the cache."""

import json
import shutil
from pathlib import Path

import pytest

from limbeck import LimbeckError, convert
from limbeck.core.cache import cache_dry_run
from limbeck.core.recipe import Recipe
from limbeck.core.storage import cache_root, read_manifest
from limbeck.testing import make_tiny_model
from limbeck.training import head_selection, pipeline
from limbeck.training.setup import prepare_job

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def recipe(teacher_folder, corpus, tmp_path):
    def make(heads=1, out="run", **changes) -> Recipe:
        raw = {
            "teacher": str(teacher_folder),
            "student": {
                "mixer": "sliding_window",
                "options": {"window": 6, "sinks": 1},
                "softmax_heads": heads,
                "softmax_window": 20,
            },
            "data": {"source": str(corpus), "seq_len": 32, "held_out": 0.2},
            "stages": [{"stage": "logits", "tokens": 128, "batch_size": 1}],
            "evaluation": {"tokens": 128, "new_tokens": 0},
            "out": str(tmp_path / out),
        }
        return Recipe.parse({**raw, **changes})

    return make


def test_a_run_chooses_its_heads_once_and_finds_them_again(recipe, monkeypatch, capsys):
    made = recipe()
    result = pipeline.distill(made)
    chosen = json.loads((Path(made.out) / "softmax_heads.json").read_text())["softmax_heads"]
    assert len(chosen) == 1
    assert chosen[0] in result["softmax_heads"]
    options = [group["options"] for group in read_manifest(Path(made.out))["student"] if group["mixer"] == "head_split"]
    assert [o["softmax_groups"] for o in options] == [[int(chosen[0].split(".")[1])]]

    def fail(*args, **kwargs):
        raise AssertionError("heads were chosen a second time")

    monkeypatch.setattr(head_selection, "select_heads", fail)
    assert pipeline.distill(made)["run"] == made.out  # already complete
    other = recipe(out="other")
    pipeline.distill(other)  # the same teacher and text: from the cache
    shutil.rmtree(cache_root() / "selections")
    (Path(other.out) / "eval.json").unlink()
    pipeline.distill(other)  # goes on without the cache
    with pytest.raises(AssertionError, match="a second time"):
        pipeline.distill(recipe(out="third"))


def test_a_plan_chooses_nothing(recipe, tmp_path, capsys):
    pipeline.distill(recipe(out="first"))
    shutil.rmtree(cache_root() / "selections")
    with cache_dry_run() as notes:
        job = prepare_job(recipe(out="planned"))
    assert any("would be chosen first, once: 1 of" in note for note in notes)
    assert job.student.softmax_heads == ["0.0"]
    assert not (tmp_path / "planned").exists()
    assert not (cache_root() / "selections").exists()


def test_more_heads_than_there_are(recipe, tmp_path):
    with pytest.raises(LimbeckError, match="cannot keep 99 of the teacher's"):
        pipeline.distill(recipe(99))
    assert not (tmp_path / "run").exists()
    for value in (18.2, ["18.2", 3], 0):
        with pytest.raises(LimbeckError):
            recipe(value)


def test_a_number_alone_converts_nothing():
    with pytest.raises(LimbeckError, match="softmax_heads is 2, a number of groups"):
        convert(make_tiny_model("llama"), "sliding_window", softmax_heads=2)
