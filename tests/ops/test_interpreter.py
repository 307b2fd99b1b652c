"""A few Triton kernels under the interpreter; `TRITON_INTERPRET=1 pytest tests/ops` runs all of this folder there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from on_device import DEVICE

CODE = """
import os
import torch
from gradpruner import ops

def results(backend):
    os.environ["GRADPRUNER_BACKEND"] = backend
    generator = torch.Generator().manual_seed(0)
    weight, donor, f = (torch.randn(33, 70, generator=generator) for _ in range(3))
    igia = torch.zeros(33, 70)
    ops.square_accumulate_(igia, f)
    value, index = ops.threshold(igia, 500)
    ops.sign_merge_(weight, [donor], [igia], [value], [index], [1.0])
    return igia, value, index, weight

for reference, triton in zip(results("reference"), results("triton"), strict=True):
    assert torch.equal(reference, triton)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.in_ci
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="all of this folder is being interpreted")
@pytest.mark.skipif(bool(DEVICE), reason="the kernels themselves run on the device")
def test_triton_interpreted_gives_the_reference():
    pytest.importorskip("triton", reason="no Triton wheel for this machine")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0 and "equal" in run.stdout, run.stderr[-3000:]
