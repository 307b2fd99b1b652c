"""How calls are timed on a GPU, with the GPU played by a few lines: what is issued when, and which time goes where."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import records
from benchmarks.ops import device_timing, limits, timing
from benchmarks.ops.base import Implementation
from benchmarks.ops.cases import OPERATIONS, SHAPES, Count, Normal
from benchmarks.ops.device_timing import LONGEST_SLEEP, SLEEP, Clock, launches, peak_bytes, time_call
from benchmarks.ops.implementations import Reference
from benchmarks.ops.limits import Limits
from benchmarks.ops.plain_torch import _weight_gradient
from benchmarks.ops.timing import measure
from benchmarks.records import results, table_rows

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


class Card:
    """Notes what it is asked to do. It reaches the start event only after a sleep shorter than the host takes."""

    def __init__(self, monkeypatch, host_cycles: int) -> None:
        self.host_cycles, self.slept, self.done = host_cycles, 0, []
        card = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                card.done.append("event")

            def query(self) -> bool:
                return card.slept < card.host_cycles

            def synchronize(self) -> None:
                card.done.append("wait")

            def elapsed_time(self, other: Event) -> float:
                return 8.0 if card.slept else 20.0  # milliseconds

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: self.done.append("idle"))
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch, "empty", lambda *shape, **options: self)

    def zero_(self) -> None:
        self.done.append("overwrite the cache")
        self.slept = 0

    def sleep(self, cycles: int) -> None:
        self.done.append("sleep")
        self.slept = cycles


def test_a_call_finds_an_idle_card_and_a_cold_cache(monkeypatch):
    card = Card(monkeypatch, SLEEP)
    assert Clock(CUDA).call(lambda: card.done.append("call") or 5) == (0.020, 5)
    assert card.done == ["overwrite the cache", "idle", "event", "call", "event", "wait"]


def test_a_queued_call_is_issued_while_the_card_sleeps(monkeypatch):
    card = Card(monkeypatch, SLEEP)
    assert Clock(CUDA).queued(lambda: card.done.append("call")) == (0.008, True)
    assert card.done == ["overwrite the cache", "idle", "sleep", "event", "call", "event", "wait"]


@pytest.mark.parametrize(
    ("host", "sleep", "queued"), [(1, SLEEP, True), (3 * SLEEP, 4 * SLEEP, True), (LONGEST_SLEEP + 1, SLEEP, False)]
)
def test_the_sleep_is_as_long_as_the_host_needs_if_any_is(monkeypatch, host, sleep, queued):
    card = Card(monkeypatch, host)
    assert Clock(CUDA).sleep_for(lambda: None) == sleep
    times = time_call(lambda: None, before=lambda: card.done.append("before"), repeats=3, device=CUDA)
    assert (times.call_s, times.device_s, times.queued) == (0.020, 0.008, queued)
    assert card.done[-7:-4] == ["before", "overwrite the cache", "idle"] and card.slept == sleep


def test_a_call_is_timed_after_what_it_needs_was_put_back():
    order = []
    times = time_call(lambda: order.append("call"), before=lambda: order.append("before"), repeats=4, device=CPU)
    assert order == ["before", "call"] * (device_timing.WARM_UP + 4)
    assert times.call_s == times.device_s > 0 and times.queued
    assert launches(lambda: torch.ones(1), CPU) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="then the GPU's memory is meant")
def test_bytes_of_a_call():
    assert peak_bytes(lambda: None) < 4 << 20 and 60 << 20 < peak_bytes(lambda: torch.ones(16 << 20)) < 80 << 20


class Played:
    """A clock on whose card a call takes 4 seconds, 1 of them the device's; ours half of that."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def call(self, fn):
        return 4.0 * self._share(fn), fn()

    def queued(self, fn, sleep=SLEEP):
        fn()
        return 1.0 * self._share(fn), True

    def sleep_for(self, fn, before):
        return SLEEP

    @staticmethod
    def _share(fn) -> float:
        return 0.5 if isinstance(fn.func.__self__, Quick) else 1.0


class Theirs(Implementation):
    name, kind = "theirs", "torch"

    def apply_mask_(self, weight, mask):
        Reference(CPU).apply_mask_(weight, mask)


class Quick(Theirs):
    name, kind = "quick", "ours"


class Oracle(Theirs):
    name, kind = "reference", "reference"


def test_on_a_gpu_ratios_are_of_the_device_and_both_times_are_kept(monkeypatch):
    monkeypatch.setattr(timing, "Clock", Played)
    monkeypatch.setattr(timing, "Normal", lambda device: Normal(CPU))
    monkeypatch.setattr(records, "machine", lambda device: "a card")
    case = next(OPERATIONS["apply_mask_"](SHAPES["tiny"]))
    found = results(case, measure(case, [Oracle, Theirs, Quick], 3, CUDA), (0.25, "bytes"), CUDA)
    assert [(each.median_s, each.call_s, each.runs) for each in found] == [(1.0, 4.0, 1), (1.0, 4.0, 3), (0.5, 2.0, 3)]
    assert [each.ratio_to_ours for each in found] == [2.0, 2.0, 1.0] and found[2].share_of_limit == 0.5
    (row,) = table_rows(found)
    assert (row["ours"], row["ours, call"], row["best torch, call"]) == ("500 ms", "2 s", "4 s")
    assert "failed" not in row
    (row,) = table_rows([replace(each, call_s=None) for each in found])
    assert "ours, call" not in row


def test_the_limit_of_float32_on_a_gpu_is_the_faster_way_and_says_which(monkeypatch):
    monkeypatch.setattr(limits, "Clock", Played)

    class Known(Limits):
        tf32 = 600e9

        def bandwidth(self, size):
            return 10e9

        def _product(self, dtype):
            if dtype == torch.float32:
                return self.tf32 if torch.get_float32_matmul_precision() == "high" else 100e9
            return 400e9

    assert Known(CUDA, 1).of(Count(1, 10**9)) == (pytest.approx(1 / 200), "operations, 3xTF32")
    assert Known(CUDA, 1).of(Count(1, 10**9, torch.bfloat16)) == (pytest.approx(1 / 400), "operations, bfloat16")
    assert Known(CPU, 1).of(Count(1, 10**9)) == (pytest.approx(1 / 100), "operations")
    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(Known, "tf32", 200e9)
    assert Known(CUDA, 1).of(Count(1, 10**9)) == (pytest.approx(1 / 100), "operations, float32")


def test_sixteen_bit_products_on_a_gpu_are_not_widened_first():
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    for dtype, product in ((torch.bfloat16, "aten.mm.dtype"), (torch.float32, "aten.mm.default")):
        names: list[str] = []
        with FakeTensorMode():
            x, dy = (torch.empty(8, n, dtype=dtype, device="cuda") for n in (4, 6))
            with Seen():
                found = _weight_gradient(x, dy)
        assert found.dtype == torch.float32 and found.shape == (6, 4)
        assert product in names and "aten._to_copy.default" not in names
