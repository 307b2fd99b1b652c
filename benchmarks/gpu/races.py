"""The race checker of CUDA's compute-sanitizer on a selection, and 2:4 weights as torch's own sparse tensors."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

from benchmarks.gpu.correctness import ROOT
from benchmarks.gpu.session import Session

SELECTION = (
    "import torch; from gradpruner import ops; f = torch.randn(1024, 1024, device='cuda').square_(); "
    "value, index = ops.threshold(f, f.numel() // 5); assert int((f >= value).sum()) >= f.numel() // 5"
)


def race_checker(session: Session) -> None:
    """compute-sanitizer --tool racecheck on `threshold` of 1024 x 1024 entries."""
    tool = shutil.which("compute-sanitizer")
    if tool is None or not session.on_cuda:
        session.put(what="racecheck", ran=False, why="no card" if tool else "compute-sanitizer is not installed")
        return
    command = [tool, "--tool", "racecheck", "--error-exitcode", "9", sys.executable, "-c", SELECTION]
    run = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    said = [line for line in run.stdout.splitlines() if "RACECHECK SUMMARY" in line]
    print(run.stdout[-3000:], run.stderr[-3000:], flush=True)
    session.put(what="racecheck", ran=True, right=run.returncode == 0, said=said[-1:] or [run.stderr[-200:]])


def semi_structured(session: Session) -> None:
    """tests/sparsity/test_semi_structured.py on the card."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/sparsity/test_semi_structured.py", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(run.stdout[-3000:], flush=True)
    summary = run.stdout.strip().splitlines()[-1:] or [run.stderr[-200:]]
    session.put(what="2:4 as torch's tensors", right=run.returncode == 0, said=summary[0])
