"""benchmarks/steps.py runs through with the tiny teacher, and gives speeds, floors and shares of every part."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from helpers.paths import ROOT

PARTS = ["calibrate", "matrix", "hidden", "logits", "mixer", "prefill", "decode", "family"]


def steps(*args: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "benchmarks" / "steps.py"), "--teacher", "tiny", "--rounds", "1"]
    sizes = ["--length", "24", "--prompt", "24", "--context", "24"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run([*command, *sizes, *args], capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.parametrize("before", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_part_has_its_floors(before, tmp_path):
    path = tmp_path / "steps.json"
    comparison = ["--before", str(ROOT)] if before else []
    parts = ["--parts", ",".join(PARTS)]
    done = steps("--student", "gated_deltanet", "--json", str(path), *parts, *comparison)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["part"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    assert list(rows) == ["operations", "bytes", *PARTS]
    for part in PARTS:
        row = rows[part]
        assert row["tokens"] == (8 if part in ("decode", "family") else 24)
        assert min(row[name] for name in ("floor_operations", "floor_bytes", "min", "share")) > 0, row
        assert ("ratio" in row) == before
        assert part in done.stdout


@pytest.mark.parametrize("wrong", [("--parts", "decode,dream"), ("--before", "no-such-dream")])
def test_what_it_does_not_know_is_refused(wrong):
    done = steps(*wrong)
    assert done.returncode == 2
    assert "dream" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor writes C++, and there is no g++")
def test_compiled_decoding_stands_beside_decoding(tmp_path):
    """Both benchmarks of it: a token in turns, and what compiling takes at two starts."""
    path = tmp_path / "steps.json"
    done = steps("--student", "gla", "--parts", "decode,compiled", "--json", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {row["part"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    assert rows["compiled"]["tokens"] == rows["decode"]["tokens"] == 8
    command = [sys.executable, str(ROOT / "benchmarks" / "compiling.py"), "--teacher", "tiny", "--student", "gla"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout.split()[-4]) < 1
