"""Every op beside the authors' way and the best torch ways, at the largest weight of Llama-3.1-8B."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks.gpu.session import Session
from benchmarks.ops.cases import OPERATIONS, SHAPES, Shapes, cases
from benchmarks.ops.implementations import implementations
from benchmarks.ops.limits import Limits
from benchmarks.ops.timing import measure, quiet_collector
from benchmarks.records import results

COMPILED = ("square_accumulate_", "sign_merge_", "weight_importance")  # a product's compilation takes minutes to tune
REPEATS = 5
COLUMNS = (
    "op",
    "shape",
    "variant",
    "implementation",
    "kind",
    "median_s",
    "min_s",
    "max_s",
    "call_s",
    "late",
    "ratio_to_ours",
    "limit_s",
    "limit_by",
    "share_of_limit",
    "bytes",
    "operations",
    "extra_bytes",
    "error",
)


def beside_torch(session: Session) -> None:
    """All ops; the times are of the device alone, call_s is a call on an idle device."""
    _measure(session, tuple(OPERATIONS), skip=("compiled",))


def beside_compiled(session: Session) -> None:
    """The ops of one pass beside what torch.compile makes of them."""
    _measure(session, COMPILED[:1] if session.tiny else COMPILED, skip=("released",))


def _measure(session: Session, ops: Sequence[str], skip: Sequence[str]) -> None:
    limits = Limits(session.device, REPEATS, side=64 if session.tiny else None)
    classes = implementations((), skip)
    with quiet_collector():
        for op in ops:
            for case in cases(op, _shapes(session, op), session.device):
                measured = measure(case, classes, 1 if session.tiny else REPEATS, session.device)
                for result in results(case, measured, limits.of(case.count), session.device):
                    row = {name: value for name, value in dataclasses.asdict(result).items() if name in COLUMNS}
                    device_s = row.pop("median_s")
                    session.put(**row, device_s=device_s)


def _shapes(session: Session, op: str) -> Shapes:
    """Of one weight, the largest; a step's gram_norm is of all weights of all layers."""
    every = SHAPES["tiny" if session.tiny else "llama-8b"]
    return every if op == "gram_norm" else Shapes((every.layer[-2],), every.layers)
