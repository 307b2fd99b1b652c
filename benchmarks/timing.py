"""Times of two backends, call by call in turn, so that both see the same machine."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.cases import Case


def compare(case: Case, op: str, backend: str, device: torch.device, repeats: int) -> dict[str, Any]:
    """One row: medians of both, their ratio, and the spread of the ratio over the pairs."""
    torch.manual_seed(0)
    call = case(device)
    pairs = [(_timed(call, "reference", device), _timed(call, backend, device)) for _ in range(repeats + 1)][1:]
    ratios = sorted(reference / ours for reference, ours in pairs)
    return {
        "op": op,
        "reference (ms)": f"{1e3 * statistics.median(r for r, _ in pairs):.2f}",
        f"{backend} (ms)": f"{1e3 * statistics.median(o for _, o in pairs):.2f}",
        "times faster": f"{statistics.median(ratios):.1f}",
        "spread": f"{ratios[0]:.1f} to {ratios[-1]:.1f}",
    }


def _timed(call: Callable[[], Any], backend: str, device: torch.device) -> float:
    os.environ["GRADPRUNER_BACKEND"] = backend
    _wait(device)
    began = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
