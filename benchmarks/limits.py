"""What the machine can do, measured in the same run: bytes a second, and operations a second of torch's GEMM."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.operations import Count
from benchmarks.timing import seconds

SMALLEST, LARGEST = 4 << 20, 768 << 20  # bytes that the bandwidth is measured over; the largest is 3 x 64 Mi floats


class Limits:
    """The machine's peaks, each measured once, when first asked for. side: of the square GEMM."""

    def __init__(self, device: torch.device, repeats: int, side: int | None = None) -> None:
        self._device, self._repeats = device, repeats
        self._side = side or (2048 if device.type == "cpu" else 8192)
        self._bandwidths: dict[int, float] = {}
        self._peaks: dict[torch.dtype, float] = {}

    def of(self, count: Count) -> tuple[float, str]:
        """The least seconds that `count` takes, and which of "bytes" and "operations" takes them."""
        moving, computing = count.bytes / self.bandwidth(count.bytes), count.operations / self.peak(count.dtype)
        return (moving, "bytes") if moving >= computing else (computing, "operations")

    def bandwidth(self, size: int) -> float:
        """Bytes a second over a working set of about `size` bytes: of a copy and a triad, the faster."""
        bucket = min(LARGEST, max(SMALLEST, 1 << (size - 1).bit_length()))
        if bucket not in self._bandwidths:
            x, y = (torch.ones(bucket // 8, device=self._device) for _ in range(2))
            copy = self._median(lambda: y.copy_(x))
            b, c, a = (torch.ones(bucket // 12, device=self._device) for _ in range(3))
            triad = self._median(lambda: torch.add(b, c, alpha=3.0, out=a))
            self._bandwidths[bucket] = max(8 * x.numel() / copy, 12 * a.numel() / triad)
        return self._bandwidths[bucket]

    def peak(self, dtype: torch.dtype) -> float:
        """Operations a second of torch.mm on square matrices of `dtype`."""
        if dtype not in self._peaks:
            x, y, out = (torch.ones(self._side, self._side, dtype=dtype, device=self._device) for _ in range(3))
            self._peaks[dtype] = 2 * self._side**3 / self._median(lambda: torch.mm(x, y, out=out))
        return self._peaks[dtype]

    def _median(self, call: Callable[[], Any]) -> float:
        times = [seconds(call, self._device)[0] for _ in range(self._repeats + 1)]
        return statistics.median(times[1:])
