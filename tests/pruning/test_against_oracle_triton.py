"""The whole of `apply` with the Triton kernels, in a process of its own (the interpreter is set at import)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.in_ci  # the slow ones among them

CODE = """
import sys, torch, test_against_oracle
for dtype in sys.argv[1:]:
    for stored in ("factors", "dense"):
        test_against_oracle.check_merged_weights(getattr(torch, dtype), stored)
print("bit exact")
"""


@pytest.mark.slow
def test_merged_weights_are_bit_exact_with_triton():
    pytest.importorskip("triton", reason="no Triton wheel for this machine")
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent / "support")])
    run = subprocess.run(
        [sys.executable, "-c", CODE, "float32", "bfloat16", "float16"],
        env={**os.environ, "TRITON_INTERPRET": "1", "GRADPRUNER_BACKEND": "triton", "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0 and "bit exact" in run.stdout, run.stderr[-3000:]
