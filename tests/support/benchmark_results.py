"""Results of benchmarks that were never measured."""

from __future__ import annotations

import torch

from benchmarks.ops.cases import OPERATIONS, SHAPES, Shapes
from benchmarks.ops.timing import Measured
from benchmarks.records import Result, results

CPU = torch.device("cpu")
ODD = Shapes(((33, 70), (7, 129)), 2)


def some_results(op: str = "threshold") -> list[Result]:
    case = next(OPERATIONS[op](SHAPES["tiny"]))
    measured = [
        Measured("reference", "reference", (9.0,), 9.0, 4),
        Measured("released", "released", (4.0, 6.0, 8.0), 4.5, 3),
        Measured("in place", "torch", (2.0, 2.0, 2.0), 2.5, 2),
        Measured("compiled", "torch", (3.0, 3.0, 3.0), 33.0, 2),
        Measured("ours", "ours", (1.0, 2.0, 1.0), 1.5, 1),
    ]
    return results(case, measured, (0.5, "bytes"), CPU)
