"""The merge of one layer with one donor: ours beside the authors' way, and how many entries differ."""

from __future__ import annotations

import time
from fractions import Fraction

import torch

from benchmarks.gpu.session import Session
from benchmarks.ops.cases import SHAPES
from benchmarks.ops.device_timing import time_call
from benchmarks.ops.released import Released
from gradpruner.probe.importance import Factors
from gradpruner.pruning.merge import merge_weight_

RANK = 8


def one_layer(session: Session) -> None:
    """The seven weights of a layer of Llama-3.1-8B, 40 steps of LoRA factors of rank 8, the largest fifth."""
    steps, released = 3 if session.tiny else 40, Released(session.device)
    totals = dict.fromkeys(("ours_s", "released_s", "factors_to_device_s"), 0.0)
    for shape in SHAPES["tiny" if session.tiny else "llama-8b"].layer:
        row = _one_weight(session, shape, steps, released)
        totals = {name: totals[name] + row[name] for name in totals}
    session.put(shape="the layer", **totals, released_over_ours=totals["released_s"] / totals["ours_s"])


def _one_weight(session: Session, shape: tuple[int, int], steps: int, released: Released) -> dict[str, float]:
    n_out, n_in = shape
    kept = Factors(torch.randn(steps, RANK, n_in), torch.randn(steps, n_out, RANK))
    weight, donor = (session.normal(n_out, n_in, dtype=torch.bfloat16) for _ in range(2))
    session.wait()
    began = time.perf_counter()
    factors = kept.to(session.device)
    session.wait()
    row = {"factors_to_device_s": time.perf_counter() - began}
    ours, theirs = weight.clone(), weight.clone()

    def merge() -> None:
        merge_weight_(ours, [donor], [factors], Fraction(1, 5), 1.0)

    def as_released() -> None:
        released.factor_merge(theirs, donor, factors.a, factors.b, weight.numel() // 5)

    row["ours_s"] = time_call(merge, lambda: ours.copy_(weight), 5, session.device).call_s
    row["released_s"] = time_call(as_released, lambda: theirs.copy_(weight), 3, session.device).call_s
    for target, call in ((ours, merge), (theirs, as_released)):
        target.copy_(weight)
        call()
    session.put(shape=f"{n_out}x{n_in}", **row, differ=int((ours != theirs).sum()), of=weight.numel())
    return row
