"""Measure memory: the peak since a given moment, and how much is free.

The peak is that of the GPU if there is one, otherwise that of the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
from pathlib import Path

import torch


def reset_peak_memory() -> None:
    """Start to measure the peak anew. Memory that was freed before is returned to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps freed memory, which counts as used
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):  # on Linux, 5 resets the peak resident set size
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Return the most bytes that were in use since `reset_peak_memory`.

    Where the system cannot reset the peak, it is that since the process began.
    """
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def free_memory() -> int:
    """Return how many bytes this process may still use.

    It is the least of what the machine, the cgroup and the limits of the process leave.
    """
    limits = [_limit_left(resource.RLIMIT_DATA, "VmData"), _limit_left(resource.RLIMIT_AS, "VmSize"), _cgroup_left()]
    limits.append(_kilobytes(Path("/proc/meminfo"), "MemAvailable"))
    known = [amount for amount in limits if amount is not None]
    return max(0, min(known)) if known else int(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // 2


def _kilobytes(file: Path, name: str) -> int | None:
    """Return an entry of a file of /proc in bytes. The file has it in kB."""
    with contextlib.suppress(OSError):
        for line in file.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    return None


def _limit_left(limit: int, used: str) -> int | None:
    """Return half of the memory that a limit of the process leaves.

    Half, because a loader maps a file and copies it too.
    """
    soft, _ = resource.getrlimit(limit)
    if soft == resource.RLIM_INFINITY:
        return None
    return (soft - (_kilobytes(Path("/proc/self/status"), used) or 0)) // 2


def _cgroup_left(process: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return the memory that the limits of the process's cgroups leave.

    Cached files count as free if the system can drop them.
    """
    left: list[int] = []
    with contextlib.suppress(OSError):
        for line in process.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:  # version 2
                top, names = root, ("memory.max", "memory.current", "inactive_file")
            elif "memory" in controllers.split(","):
                top = root / "memory"
                names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            else:
                continue
            group = top / path.lstrip("/")
            # in a container, the path may be that of the host: then the root, as seen from inside, has the limit
            for folder in (group, *group.parents):
                if folder.is_relative_to(top):
                    left += _group_left(folder, *names)
    return min(left, default=None)


def _group_left(folder: Path, limit: str, usage: str, cached: str) -> list[int]:
    try:
        allowed, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        pairs = [line.split() for line in (folder / "memory.stat").read_text().splitlines()]
    except (OSError, ValueError):
        return []
    reclaimable = sum(int(pair[1]) for pair in pairs if pair[:1] == [cached])
    return [] if allowed == "max" else [int(allowed) - used + reclaimable]
