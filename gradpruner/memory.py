"""Peak memory of a stretch of work: the GPU's where there is one, else the process's."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from pathlib import Path

import torch


def reset_peak_memory() -> None:
    """Begin a new stretch, with what earlier ones left behind given back to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed memory, which would count as used
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # Linux: 5 resets the peak resident set size
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes at the highest point since `reset_peak_memory` (since the process began, where that cannot be reset)."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
