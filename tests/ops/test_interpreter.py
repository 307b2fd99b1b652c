"""The Triton kernels, under the interpreter, on the same cases as the other backends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from on_device import DEVICE


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the process it starts")
@pytest.mark.skipif(bool(DEVICE), reason="the kernels themselves run on the device")
def test_triton_passes_the_same_tests():
    pytest.importorskip("triton", reason="no Triton wheel for this machine")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", str(Path(__file__).parent)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert " passed" in run.stdout
