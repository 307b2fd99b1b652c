"""Which card and which versions, and the ceilings that everything else is held against."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import time
from pathlib import Path

import torch

from benchmarks.gpu.session import Session
from benchmarks.ops.device_timing import time_call

KERNELS = Path(__file__).parents[2] / "kernels"
PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate")
PAIRS = 224  # LoRA pairs of a model of 32 layers


def measure(session: Session) -> None:
    """Versions; bytes a second of a copy; operations a second of products of random matrices; pinned memory."""
    row = {
        "what": "environment",
        "kernels": kernels_digest(),
        "python": platform.python_version(),
        "processor": _processor(),
    }
    for package in PACKAGES:
        try:
            row[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            row[package] = "not installed"
    if session.on_cuda:
        card = torch.cuda.get_device_properties(session.device)
        session.put(
            **row,
            card=card.name,
            processors=card.multi_processor_count,
            memory_bytes=card.total_memory,
            cache_bytes=card.L2_cache_size,
            cuda=torch.version.cuda,
        )
    else:
        session.put(**row, card="none")
    size = 1 << (16 if session.tiny else 28)
    source, target = session.normal(size), session.normal(size)
    seconds = time_call(lambda: target.copy_(source), device=session.device).device_s
    session.put(what="copy", bytes_per_s=8 * size / seconds)
    side = 128 if session.tiny else 8192
    for dtype in (torch.bfloat16, torch.float32):
        a, b = session.normal(side, side, dtype=dtype), session.normal(side, side, dtype=dtype)
        seconds = time_call(lambda a=a, b=b: torch.mm(a, b), device=session.device, repeats=7).device_s  # type: ignore[misc]
        session.put(
            what=f"product of {str(dtype).removeprefix('torch.')} matrices", operations_per_s=2 * side**3 / seconds
        )
    if session.on_cuda:
        _pinned(session)


def kernels_digest(folder: Path = KERNELS) -> str:
    """Of the sources of the kernels, so that a report says which ones it has run."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _pinned(session: Session) -> None:
    """What a pinned buffer for every LoRA factor would cost per step, beside one for all of them."""
    gradient = session.normal(8, 4096)
    session.wait()
    began = time.perf_counter()
    buffers = [torch.empty(8, 4096, pin_memory=True) for _ in range(2 * PAIRS)]
    allocated = time.perf_counter()
    for buffer in buffers:
        buffer.copy_(gradient, non_blocking=True)
    issued = time.perf_counter()
    session.wait()
    session.put(
        what=f"{2 * PAIRS} pinned buffers of 128 KiB",
        allocate_s=allocated - began,
        issue_copies_s=issued - allocated,
        until_copied_s=time.perf_counter() - allocated,
    )
    began = time.perf_counter()
    torch.empty(2 * PAIRS, 8, 4096, pin_memory=True)
    session.put(what="one pinned buffer as large as all of them", allocate_s=time.perf_counter() - began)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
