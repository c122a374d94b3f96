"""flash-linear-attention's Triton kernels themselves, on a CPU in Triton's interpreter: outputs and gradients."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from helpers.paths import ROOT
from limbeck.ops import fla

pytestmark = [
    pytest.mark.triton,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is missing: make test-triton"),
]


@pytest.mark.parametrize("adapter", fla.KERNEL_ADAPTERS, ids=lambda adapter: adapter.name)
def test_a_kernel_beside_the_operator(adapter):
    """Without a state, with one, and with packed documents where it takes them."""
    script = ROOT / "tests" / "helpers" / "triton_interpreter.py"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, script, adapter.name],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    verdicts = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(verdicts) == 2 + adapter.supports_varlen
    for verdict in verdicts:
        assert verdict["ok"], verdict
        assert "o" in verdict["errors"]
        assert len(verdict["errors"]) > 1
