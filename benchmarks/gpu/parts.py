"""The parts of the evidence, the most valuable first, and what each may take."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.gpu import accuracy, correctness, environment, kernels, merging, one_run, probing, races, training
from benchmarks.gpu.session import Session


@dataclass(frozen=True)
class Part:
    """One function in a process of its own.

    Args:
        name: for `--only`, and the first column of its rows.
        run: writes rows; an exception is a failure.
        limit: seconds after which it is killed.
        least: seconds without which it is not begun.
        by_default: whether it runs without being named.
    """

    name: str
    run: Callable[[Session], None]
    limit: float
    least: float
    by_default: bool = True


PARTS = (
    Part("environment", environment.measure, 45, 10),
    Part("correctness", correctness.large, 90, 30),
    Part("tests", correctness.tests_of_ops, 150, 60),
    Part("kernels", kernels.beside_torch, 110, 30),
    Part("training", training.dense_and_pruned, 110, 45),
    Part("probe", probing.lora, 100, 30),
    Part("one_run", one_run.across_the_cut, 70, 30),
    Part("merge", merging.one_layer, 45, 15),
    Part("exact", probing.exact, 45, 20),
    Part("compiled", kernels.beside_compiled, 60, 25),
    Part("races", races.race_checker, 60, 25),
    Part("semi_structured", races.semi_structured, 40, 20),
    Part("sweep", training.sweep, 90, 30, by_default=False),
    Part("accuracy", accuracy.banking77, 480, 120, by_default=False),
)
