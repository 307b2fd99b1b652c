"""`pytest benchmarks/`: every implementation of every op on SmolLM2's smallest weight, through pytest-benchmark."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.ops.base import Implementation
from benchmarks.ops.cases import OPERATIONS, SHAPES, Shapes
from benchmarks.ops.implementations import implementations
from benchmarks.ops.timing import Runner

DEVICE = torch.device("cpu")
SMALL = Shapes(((192, 576),), SHAPES["smollm2"].layers)
CASES = [pytest.param(case, id=f"{op}-{case.variant}") for op, rows in OPERATIONS.items() for case in rows(SMALL)]
CLASSES = implementations()


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.name)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_op(benchmark: Any, case: Any, kind: type[Implementation]) -> None:
    runner, implementation, reference = Runner(case, DEVICE), kind(DEVICE), CLASSES[0](DEVICE)
    if not hasattr(implementation, case.op):
        pytest.skip(f"{kind.name} has no {case.op}")
    expected = runner.answer(runner.run(reference)[1])
    _, result = runner.run(implementation)
    if result is NotImplemented:
        pytest.skip(f"{kind.name} does not do {case.variant}")
    if kind.kind != "floor":
        runner.check(result, expected)
    benchmark.group = f"{case.op}, {case.shape}, {case.variant}"
    method = getattr(implementation, case.op)
    benchmark.pedantic(lambda: method(*runner.arguments), setup=runner.restore, rounds=5, warmup_rounds=1)
