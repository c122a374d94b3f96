"""The fault test of docs/project/reliability.md in its short form."""

import subprocess
import sys

import pytest

from helpers.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "reliability.py"


@pytest.mark.longest
@pytest.mark.slow
def test_a_run_broken_at_random_instants_loses_nothing():
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kills", "2", "--others", "8"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "WRONG" not in done.stdout
    assert "SIGKILL" in done.stdout
