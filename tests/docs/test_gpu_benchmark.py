"""benchmarks/gpu.py runs through on a CPU, merges its rows, and writes its figures where they belong."""

import json
import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT

SECTIONS = {"correctness", "operators", "stages", "mfu", "decoding", "loss", "peers"}


def gpu(*args: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *args]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.mark.slow
def test_every_section_runs_through_on_a_cpu(tmp_path):
    path = tmp_path / "gpu.json"
    done = gpu("all", "--dry", "--json", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(path.read_text(encoding="utf-8"))
    assert set(found) == SECTIONS
    expected = ("liger", "declined", "no CUDA")
    for name, section in found.items():
        told = [row["told"] for row in section["rows"] if row.get("told")]
        assert all(any(word in text for word in expected) for text in told), (name, told)
        assert section["rows"] or section["notes"], name
    # dry figures are no figures
    report = tmp_path / "gpu.md"
    report.write_text((ROOT / "docs" / "guides" / "gpu.md").read_text(encoding="utf-8"), encoding="utf-8")
    refused = gpu("report", "--json", str(path), "--report", str(report))
    assert refused.returncode == 1
    assert "mean nothing" in refused.stderr
    for section in found.values():
        section["dry"] = False
    path.write_text(json.dumps(found), encoding="utf-8")
    for _ in range(2):  # the second time over the first
        assert gpu("report", "--json", str(path), "--report", str(report)).returncode == 0
    text = report.read_text(encoding="utf-8")
    assert text.count("### stages") == 1
    assert "| tiny | gated_deltanet | logits, KL |" in text


@pytest.mark.slow
def test_a_section_whose_seconds_are_over_says_so(tmp_path):
    path = tmp_path / "gpu.json"
    done = gpu("loss", "--dry", "--seconds", "0", "--json", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    assert all("not reached" in row["told"] for row in json.loads(path.read_text(encoding="utf-8"))["loss"]["rows"])


def test_without_a_gpu_it_says_so():
    done = gpu("mfu")
    assert done.returncode == 1
    assert "--dry" in done.stderr
