"""What the machine can do, measured in the same run: bytes a second, and operations a second of torch's GEMM."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.ops.cases import Count, Normal
from benchmarks.ops.device_timing import Clock

SMALLEST, LARGEST = 4 << 20, 768 << 20  # bytes that the bandwidth is measured over; the largest is 3 x 64 Mi floats


class Limits:
    """The machine's peaks, each measured once, when first asked for. side: of the square GEMM."""

    def __init__(self, device: torch.device, repeats: int, side: int | None = None) -> None:
        self._device, self._repeats, self._clock = device, repeats, Clock(device)
        self._side = side or (2048 if device.type == "cpu" else 8192)
        self._bandwidths: dict[int, float] = {}
        self._peaks: dict[torch.dtype, tuple[float, str]] = {}

    def of(self, count: Count) -> tuple[float, str]:
        """The least seconds that `count` takes, and what takes them: "bytes", or "operations" and of which kind."""
        moving, computing = count.bytes / self.bandwidth(count.bytes), count.operations / self.peak(count.dtype)
        return (moving, "bytes") if moving >= computing else (computing, self._kind(count.dtype))

    def bandwidth(self, size: int) -> float:
        """Bytes a second over a working set of about `size` bytes: of a copy and a triad, the faster.

        On a GPU always over the largest one: calls are timed there with nothing of theirs in its cache.
        """
        bucket = min(LARGEST, max(SMALLEST, 1 << (size - 1).bit_length()))
        if self._device.type == "cuda":
            bucket = LARGEST
        if bucket not in self._bandwidths:
            x, y = (torch.rand(bucket // 8, device=self._device) for _ in range(2))
            copy = self._median(lambda: y.copy_(x))
            b, c, a = (torch.rand(bucket // 12, device=self._device) for _ in range(3))
            triad = self._median(lambda: torch.add(b, c, alpha=3.0, out=a))
            self._bandwidths[bucket] = max(8 * x.numel() / copy, 12 * a.numel() / triad)
        return self._bandwidths[bucket]

    def peak(self, dtype: torch.dtype) -> float:
        """Operations a second of torch.mm on square matrices of `dtype`.

        On a GPU float32 products can also be made of three TF32 ones (3xTF32, as our kernels do): the faster counts.
        """
        if dtype not in self._peaks:
            found = [(self._product(dtype), str(dtype).removeprefix("torch."))]
            if dtype == torch.float32 and self._device.type == "cuda":
                with _tf32():
                    found.append((self._product(dtype) / 3, "3xTF32"))
            self._peaks[dtype] = max(found)
        return self._peaks[dtype][0]

    def _kind(self, dtype: torch.dtype) -> str:
        return f"operations, {self._peaks[dtype][1]}" if self._device.type == "cuda" else "operations"

    def _product(self, dtype: torch.dtype) -> float:
        normal = Normal(self._device)  # of equal numbers a GPU draws less power, and clocks higher
        x, y, out = (normal(self._side, self._side, dtype=dtype) for _ in range(3))
        return 2 * self._side**3 / self._median(lambda: torch.mm(x, y, out=out))

    def _median(self, call: Callable[[], Any]) -> float:
        times = [self._clock.queued(call)[0] for _ in range(self._repeats + 1)]
        return statistics.median(times[1:])


@contextlib.contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
