"""What one call costs on a device: seconds with the host and without it, launches, and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from gradpruner.memory import peak_memory, reset_peak_memory

WARM_UP = 3
SLEEP = 4_000_000  # cycles, about 2 ms at 2 GHz: the host issues the call meanwhile
LONGEST_SLEEP = 16 * SLEEP
FLUSHED = 256 << 20  # bytes written before each timed call: five times the second-level cache of an H100

Call = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Medians of seconds. call_s: on an idle device, the host's part included. device_s: the device's part alone.

    On the CPU both are the same. queued: whether all that the call does was issued before the device began on it. If
    not, because the call waits for the device itself or issues more than a queue holds, device_s has waits in it.
    """

    call_s: float
    device_s: float
    queued: bool


def default_device() -> torch.device:
    """A GPU where torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Clock:
    """Single timed calls on one device. On a GPU each finds it idle and its second-level cache overwritten."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._overwritten = torch.empty(FLUSHED, dtype=torch.uint8, device=device) if device.type == "cuda" else None

    def call(self, fn: Call) -> tuple[float, Any]:
        """Seconds from the moment the host begins until the device is done, and the result."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            result = fn()
            return time.perf_counter() - began, result
        seconds, result, _ = self._on_cuda(fn, 0)
        return seconds, result

    def queued(self, fn: Call, sleep: int = SLEEP) -> tuple[float, bool]:
        """Seconds of the device behind a sleep of so many cycles, and whether the host had finished by its end."""
        if self.device.type != "cuda":
            return self.call(fn)[0], True
        seconds, _, ahead = self._on_cuda(fn, sleep)
        return seconds, ahead

    def sleep_for(self, fn: Call, before: Call | None = None) -> int:
        """Cycles of sleep during which the host issues the whole of `fn`; SLEEP if there are none (it waits itself)."""
        sleep = SLEEP
        while self.device.type == "cuda" and sleep <= LONGEST_SLEEP:
            if before is not None:
                before()
            if self.queued(fn, sleep)[1]:
                return sleep
            sleep *= 2
        return SLEEP

    def _on_cuda(self, fn: Call, sleep: int) -> tuple[float, Any, bool]:
        assert self._overwritten is not None
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._overwritten.zero_()
        torch.cuda.synchronize(self.device)
        if sleep:
            torch.cuda._sleep(sleep)
        start.record()
        result = fn()
        end.record()
        ahead = not start.query()
        end.synchronize()
        return start.elapsed_time(end) / 1e3, result, ahead


def time_call(fn: Call, before: Call | None = None, repeats: int = 15, device: torch.device | None = None) -> Times:
    """Time `fn`, warmed up; `before` runs ahead of every call, untimed.

    Args:
        fn: what to time, without arguments.
        before: puts back what `fn` writes.
        repeats: timed calls of each kind; the medians are returned.
        device: where `fn` computes; by default a GPU where torch sees one.

    Returns:
        Times; on the CPU one measurement, twice.
    """
    clock, prepare = Clock(device or default_device()), before or (lambda: None)
    for _ in range(WARM_UP):
        prepare()
        fn()
    calls = []
    for _ in range(repeats):
        prepare()
        calls.append(clock.call(fn)[0])
    call_s = statistics.median(calls)
    if clock.device.type != "cuda":
        return Times(call_s, call_s, True)
    sleep, queued = clock.sleep_for(fn, before), []
    for _ in range(repeats):
        prepare()
        queued.append(clock.queued(fn, sleep))
    device_s = statistics.median(seconds for seconds, _ in queued)
    return Times(call_s, device_s, 2 * sum(ahead for _, ahead in queued) > repeats)


def launches(fn: Call, device: torch.device | None = None) -> int | None:
    """Kernels, copies and fills that a warm call of `fn` puts on the GPU; None on the CPU or if nothing is seen."""
    device = device or default_device()
    if device.type != "cuda":
        return None
    fn()
    torch.cuda.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        fn()
        torch.cuda.synchronize(device)
    return sum(each.device_type == DeviceType.CUDA for each in seen.events()) or None


def peak_bytes(fn: Call) -> int:
    """Bytes that a call of `fn` needs at its peak beyond what is there before, its result included."""
    reset_peak_memory()
    before = peak_memory()
    fn()
    return max(0, peak_memory() - before)
