"""Time and memory of every implementation of a row, round by round, so that all see the same machine."""

from __future__ import annotations

import contextlib
import gc
import math
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.ops.base import Implementation
from benchmarks.ops.cases import Answer, Case, Normal
from benchmarks.ops.device_timing import SLEEP, Call, Clock
from gradpruner.errors import GradPrunerError
from gradpruner.memory import peak_memory, reset_peak_memory

UNCHECKED = "not run: the reference failed"


class WrongAnswer(GradPrunerError):
    """An implementation computes something else than the reference: its time would mean nothing."""


@dataclass(frozen=True)
class Measured:
    """seconds: one a round, on a GPU of the device alone. first_s: the first call, compilation included.

    extra_bytes: peak beyond the arguments. calls: on a GPU, a round's call on an idle device, the host's part
    included. late: on a GPU, in how many rounds the host was not ahead of the device, so that the time has waits in it.
    error: why there are no times, else "".
    """

    name: str
    kind: str
    seconds: tuple[float, ...]
    first_s: float
    extra_bytes: int
    calls: tuple[float, ...] = ()
    late: int = 0
    error: str = ""


@dataclass
class _Entry:
    """What is known so far of one implementation of a row."""

    implementation: Implementation
    first_s: float = math.nan
    extra_bytes: int = 0
    sleep: int = SLEEP
    seconds: list[float] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)
    late: int = 0
    error: str = ""

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Whatever goes wrong inside becomes this entry's error; the trace goes to stderr."""
        try:
            yield
        except WrongAnswer as error:
            self.error = f"wrong: {error}"
        except Exception as error:
            traceback.print_exc()
            self.error = _in_one_line(error)

    def measured(self) -> Measured:
        """Without times if something went wrong."""
        name, kind = self.implementation.name, self.implementation.kind
        if self.error:
            return Measured(name, kind, (), math.nan, 0, error=self.error)
        return Measured(name, kind, tuple(self.seconds), self.first_s, self.extra_bytes, tuple(self.calls), self.late)


def _in_one_line(error: Exception) -> str:
    """The first line and, of several, the last: a compiler's first line may hold no more than a place in the source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' ... '.join(lines[:1] + lines[1:][-1:])}"[:300]


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
        self._clock = Clock(device)
        self._written: Tensor | None = None if case.mutated is None else self.arguments[case.mutated]
        self._original = None if self._written is None else self._written.clone()

    def restore(self) -> None:
        """Undo what a call has written."""
        if self._written is not None and self._original is not None:
            self._written.copy_(self._original)

    def run(self, implementation: Implementation) -> tuple[float, Any]:
        """Seconds and result of one call."""
        self.restore()
        return self._clock.call(self._call(implementation))

    def run_round(self, entry: _Entry) -> None:
        """One more time of each kind that the device has."""
        took, _ = self.run(entry.implementation)
        if self.device.type != "cuda":
            entry.seconds.append(took)
            return
        entry.calls.append(took)
        self.restore()
        took, ahead = self._clock.queued(self._call(entry.implementation), entry.sleep)
        entry.seconds.append(took)
        entry.late += not ahead

    def sleep_for(self, implementation: Implementation) -> int:
        """Cycles for which a GPU sleeps before a queued call of this implementation."""
        return self._clock.sleep_for(self._call(implementation), self.restore)

    def _call(self, implementation: Implementation) -> Call:
        return partial(getattr(implementation, self.case.op), *self.arguments)

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

    def check(self, result: Any, expected: Answer) -> None:
        """Raises WrongAnswer unless the last call agrees with the reference."""
        reason = self.case.check(self.arguments, expected, Answer(result, self._written))
        if reason:
            raise WrongAnswer(reason)


@torch.no_grad()
def measure(case: Case, classes: Sequence[type[Implementation]], repeats: int, device: torch.device) -> list[Measured]:
    """Every implementation that has the op, in the order given; the first class is the reference.

    The reference is called once: that is its time (on a GPU, where a first call holds its start, a round follows). The
    others: a first call, whose answer is checked, most a second for the memory, then `repeats` rounds in which each is
    called once, in turn. One that raises or is wrong has no times, and the others go on.
    """
    able = [each for each in (every(device) for every in classes) if hasattr(each, case.op)]
    reference, *others = (_Entry(each) for each in able)
    with reference.recorded():
        runner = Runner(case, device)
        expected = _first_call(runner, reference)
    if reference.error:
        return [reference.measured(), *(_Entry(each.implementation, error=UNCHECKED).measured() for each in others)]
    entries = [each for each in others if _can(runner, each, expected)]
    del expected
    for _ in range(repeats):
        for each in entries:
            if not each.error:
                with each.recorded():
                    runner.run_round(each)
    return [each.measured() for each in (reference, *entries)]


def _first_call(runner: Runner, reference: _Entry) -> Answer:
    reference.first_s, result, reference.extra_bytes = runner.run_in_memory(reference.implementation)
    expected = runner.answer(result)
    if runner.device.type == "cuda":
        runner.run_round(reference)
    else:
        reference.seconds.append(reference.first_s)
    return expected


def _can(runner: Runner, entry: _Entry, expected: Answer) -> bool:
    """Call it, check it, and learn what it needs; False if it leaves this row out."""
    each = entry.implementation
    with entry.recorded():
        entry.first_s, result, entry.extra_bytes = runner.run_in_memory(each)
        if result is NotImplemented:
            return False
        if each.kind != "floor":
            runner.check(result, expected)
        del result
        if each.kind != "released":  # which is too slow to be called for nothing
            entry.extra_bytes = runner.run_in_memory(each)[2]  # what the compiler took is not the compiled code's
        entry.sleep = runner.sleep_for(each)
    return True
