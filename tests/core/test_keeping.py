"""What is kept on disk: written whole, found by number, locked without leaving locks behind, and told when damaged."""

import json
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from limbeck import LimbeckError
from limbeck.core.cache import ensure_cached_folder, load_valid_manifest
from limbeck.core.digests import compute_sha256
from limbeck.core.recipe import Recipe
from limbeck.core.storage import STALE_SECONDS, atomic_write_text, read_json
from limbeck.training.run_directory import RunDirectory, check_run, open_run

STAGES = [{"stage": "calibrate", "tokens": 256}, {"stage": "hidden", "tokens": 512, "batch_size": 4}]


def recipe(**changes) -> Recipe:
    return Recipe.parse({"name": "kept", "stages": STAGES, **changes})


def save(run: RunDirectory, step: int) -> None:
    run.save_checkpoint(1, step, {"x": torch.tensor([step])}, {}, {"step": step})


@pytest.mark.parametrize(
    "steps",
    [
        [999_990, 999_999, 1_000_100, 1_000_200, 1_000_300],
        [9, 99, 999_999, 1_000_000],
        [9_999_999, 10_000_000, 123_456_789],
    ],
)
def test_the_newest_checkpoint_is_the_one_with_the_highest_number(tmp_path, steps):
    run = RunDirectory(tmp_path, recipe(save_total_limit=2))
    for done, step in enumerate(steps, 1):
        save(run, step)
        tensors, _, facts = run.load_last_checkpoint(1)
        assert (facts["step"], int(tensors["x"])) == (step, step)
        kept = {int(path.name.removeprefix("step-")) for path in run.stage_folder(1).glob("step-*")}
        assert kept == set(steps[max(0, done - 2) : done])


def test_checkpoints_leave_no_locks(tmp_path):
    run = RunDirectory(tmp_path, recipe(save_total_limit=1))
    for step in (1, 2, 3):
        save(run, step)
    run.save_stage_result(1, {"x": torch.zeros(1)}, {"step": 3})
    assert sorted(path.name for path in run.stage_folder(1).iterdir()) == ["done"]


def test_a_damaged_checkpoint_is_told_and_the_one_before_taken(tmp_path, capsys):
    run = RunDirectory(tmp_path, recipe())
    save(run, 1)
    save(run, 2)
    path = run.stage_folder(1) / "step-000002" / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    _, _, facts = run.load_last_checkpoint(1)
    assert facts["step"] == 1
    assert "step-000002 is damaged" in capsys.readouterr().err.replace("\n", "")
    save(run, 2)  # it comes there again, and must not find the damaged one good enough
    assert run.load_last_checkpoint(1)[2]["step"] == 2


@pytest.mark.parametrize("damage", ["bit", "size", "manifest"])
def test_what_is_made_again_is_told(tmp_path, capsys, damage):
    def fill(folder: Path) -> dict:
        (folder / "a").write_text("content", encoding="utf-8")
        return {}

    def make():
        return ensure_cached_folder(tmp_path / "x", fill, what="tokens of mine", verify=True)

    make()
    make()
    assert "damaged" not in capsys.readouterr().err
    if damage == "bit":
        (tmp_path / "x" / "a").write_text("Content", encoding="utf-8")
    elif damage == "size":
        (tmp_path / "x" / "a").write_text("", encoding="utf-8")
    else:
        (tmp_path / "x" / "manifest.json").write_text("{", encoding="utf-8")
    make()
    assert "tokens of mine: damaged, recreating it" in capsys.readouterr().err.replace("\n", " ")
    assert (tmp_path / "x" / "a").read_text(encoding="utf-8") == "content"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x"]


def test_many_at_once_publish_one_folder_once(tmp_path):
    """The lock's file goes with its holder; one that waits must not take a deleted file for the lock."""
    made, inside, most = [], [], []

    def fill(folder: Path) -> dict:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        (folder / "a").write_text("content", encoding="utf-8")
        inside.pop()
        made.append(1)
        return {}

    def work(name: str) -> None:
        ensure_cached_folder(tmp_path / name, fill, what=name)

    for turn in range(5):
        threads = [threading.Thread(target=work, args=(f"x{turn}",)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert (len(made), max(most)) == (5, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"x{turn}" for turn in range(5)]


def write_often(path: Path, letter: str) -> None:
    for _ in range(150):
        atomic_write_text(path, json.dumps({"by": letter * 2000}))


def test_several_writers_of_one_file_never_leave_half_of_it(tmp_path):
    path = tmp_path / "eval.json"
    atomic_write_text(path, json.dumps({"by": "c" * 2000}))
    writers = [multiprocessing.get_context("fork").Process(target=write_often, args=(path, x)) for x in "ab"]
    for one in writers:
        one.start()
    seen = set()
    while any(one.is_alive() for one in writers):
        seen.add(json.loads(path.read_text(encoding="utf-8"))["by"])
    assert [one.exitcode for one in writers] == [0, 0]
    assert seen <= {letter * 2000 for letter in "abc"}
    assert [one.name for one in tmp_path.iterdir()] == ["eval.json"]


def test_what_killed_writers_left_goes_away_after_a_while(tmp_path):
    old, new, others = (tmp_path / name for name in (".a.json.1.tmp", ".a.json.2.tmp", ".ab.json.3.tmp"))
    for path in (old, new, others):
        path.touch()
    for path in (old, others):
        os.utime(path, (time.time() - 2 * STALE_SECONDS,) * 2)
    atomic_write_text(tmp_path / "a.json", "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == [new.name, others.name, "a.json"]
    with open_run(tmp_path / "run", recipe()):
        pass
    left = tmp_path / "run" / ".eval.json.1.tmp"
    left.touch()
    with open_run(tmp_path / "run", recipe()):
        assert not left.exists(), "nobody else works on a run that is held"


@pytest.mark.parametrize("text", ["", '{"a": 1', "[1, 2]", "null"])
def test_files_that_are_no_objects_say_what_helps(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LimbeckError) as error:
        read_json(path, "rm plan.json")
    assert str(path) in error.value.found
    assert error.value.hint == "rm plan.json"


def test_a_checksum_is_read_again_where_a_file_has_changed(tmp_path):
    path = tmp_path / "a"
    path.write_text("one", encoding="utf-8")
    os.utime(path, (1, 1))
    first = compute_sha256(path)
    assert compute_sha256(path) == first
    path.write_text("two", encoding="utf-8")
    os.utime(path, (1, 1))
    assert compute_sha256(path) != first
    assert load_valid_manifest(tmp_path) is None


def test_differences_of_recipes_are_short(tmp_path):
    """Whole stages are counted and named, long values are cut, and many differences are counted."""
    with open_run(tmp_path / "run", recipe()):
        pass
    long = [{"stage": "calibrate", "tokens": 256}]
    many = [
        STAGES[0],
        {**STAGES[1], "tokens": 1, "lr": 1.0, "warmup_ratio": 0.5, "min_lr_ratio": 0.5, "betas": [0.1, 0.2]},
    ]
    cases = {
        "stages: was 2 (calibrate, hidden), now 1 (calibrate)": {"stages": long},
        "stages: was 2 (calibrate, hidden), now 3 (calibrate, hidden, hidden)": {"stages": [*STAGES, STAGES[1]]},
        "stages.1.tokens: was 512, now 1": {"stages": many},
        "student.layers: was 'all'": {"student": {"layers": list(range(500))}},
        "data.sources: was None": {"data": {"sources": [{"source": f"{n}.jsonl"} for n in range(100)]}},
    }
    for expected, changes in cases.items():
        with pytest.raises(LimbeckError) as error:
            check_run(tmp_path / "run", recipe(**changes))
        assert expected in error.value.found
        assert len(error.value.found) < 700
