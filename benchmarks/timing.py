"""Time and memory of every implementation of a row, round by round, so that all see the same machine."""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.implementations import Implementation
from benchmarks.operations import Answer, Case, Normal
from gradpruner.errors import GradPrunerError
from gradpruner.memory import peak_memory, reset_peak_memory


class WrongAnswer(GradPrunerError):
    """An implementation computes something else than the reference: its time would mean nothing."""


@dataclass(frozen=True)
class Measured:
    """seconds: one a round. first_s: the first call, compilation included. extra_bytes: peak beyond the arguments."""

    name: str
    kind: str
    seconds: tuple[float, ...]
    first_s: float
    extra_bytes: int


def seconds(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds that `call` takes, by CUDA events on a GPU, and its result."""
    if device.type != "cuda":
        began = time.perf_counter()
        result = call()
        return time.perf_counter() - began, result
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize(device)
    start.record()
    result = call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3, result


@contextlib.contextmanager
def quiet_collector() -> Iterator[None]:
    """Keeps the garbage collector off all that is loaded by now: its passes would fall on whoever is being timed."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class Runner:
    """One row's arguments, and calls on them that all begin from the same state."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device, self.arguments = case, device, case.make(Normal(device))
        self._written: Tensor | None = None if case.mutated is None else self.arguments[case.mutated]
        self._original = None if self._written is None else self._written.clone()

    def restore(self) -> None:
        """Undo what a call has written."""
        if self._written is not None and self._original is not None:
            self._written.copy_(self._original)

    def run(self, implementation: Implementation) -> tuple[float, Any]:
        """Seconds and result of one call."""
        self.restore()
        method = getattr(implementation, self.case.op)
        return seconds(lambda: method(*self.arguments), self.device)

    def run_in_memory(self, implementation: Implementation) -> tuple[float, Any, int]:
        """As `run`, and the bytes that the call needed at its peak, its result included."""
        self.restore()
        reset_peak_memory()
        before = peak_memory()
        took, result = self.run(implementation)
        return took, result, max(0, peak_memory() - before)

    def answer(self, result: Any) -> Answer:
        """The result of the last call with what it has written."""
        return Answer(result, None if self._written is None else self._written.clone())

    def check(self, implementation: Implementation, result: Any, expected: Answer) -> None:
        """Raises WrongAnswer unless the last call agrees with the reference."""
        reason = self.case.check(self.arguments, expected, Answer(result, self._written))
        if reason:
            row = f"{self.case.op} at {self.case.shape}, {self.case.variant}"
            raise WrongAnswer(f"{implementation.name!r} is wrong on {row}: {reason}")


@torch.no_grad()
def measure(case: Case, classes: Sequence[type[Implementation]], repeats: int, device: torch.device) -> list[Measured]:
    """Every implementation that has the op, in the order given; the first class is the reference.

    The reference is called once: that is its time. The others: a first call, whose answer is checked, most a second
    for the memory, then `repeats` rounds in which each is called once, in turn. Raises WrongAnswer.
    """
    runner = Runner(case, device)
    reference, *others = (each for each in (every(device) for every in classes) if hasattr(each, case.op))
    took, result, extra = runner.run_in_memory(reference)
    expected = runner.answer(result)
    able, first, memory = [], [], []
    for each in others:
        once, result, extra = runner.run_in_memory(each)
        if result is NotImplemented:
            continue
        if each.kind != "floor":
            runner.check(each, result, expected)
        del result
        able.append(each)
        first.append(once)
        # what the compiler took is not the compiled code's; the released way is too slow to be called for nothing
        memory.append(extra if each.kind == "released" else runner.run_in_memory(each)[2])
    del expected
    rounds = [[runner.run(each)[0] for each in able] for _ in range(repeats)]
    measured = [Measured(reference.name, reference.kind, (took,), took, extra)]
    for n, each in enumerate(able):
        measured.append(Measured(each.name, each.kind, tuple(times[n] for times in rounds), first[n], memory[n]))
    return measured
