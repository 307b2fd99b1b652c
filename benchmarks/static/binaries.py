"""Read what a compiled kernel holds: registers, spilled bytes, shared memory, loads and matrix instructions."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton


@dataclass(frozen=True)
class Code:
    """What one binary holds.

    Args:
        registers: per thread.
        spilled_bytes: stack and local memory per thread.
        shared_bytes: shared memory per block.
        tensor_columns: columns of tensor memory (Blackwell), 0 elsewhere.
        warps: warps per block.
        loads: number of load instructions from global memory, by bytes per thread.
        matrix: names of the matrix instructions.
        text: PTX or assembly.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_columns: int
    warps: int
    loads: dict[int, int]
    matrix: tuple[str, ...]
    text: str = field(repr=False)

    @property
    def widest_load(self) -> int:
        """Bytes of the widest load, 0 if there is none."""
        return max(self.loads, default=0)

    @property
    def wide_share(self) -> float:
        """Share of the load instructions that take 16 bytes or more."""
        total = sum(self.loads.values())
        return sum(count for size, count in self.loads.items() if size >= 16) / total if total else 0.0


def read_nvidia(compiled: Any) -> Code:
    """Read the PTX, and the resource usage that cuobjdump finds in the cubin."""
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        usage = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    loads: Counter[int] = Counter()
    for vector, bits in re.findall(r"\bld\.global(?:\.[a-zA-Z]\w*(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx):
        loads[int(vector or 1) * int(bits) // 8] += 1
    for size in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?,\s*(0x[0-9a-f]+|\d+)\s*[,;]", ptx):
        loads[int(size, 0)] += 1
    return Code(
        registers=numbers["REG"],
        spilled_bytes=numbers["STACK"] + numbers["LOCAL"],
        shared_bytes=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
        warps=compiled.metadata.num_warps,
        loads=dict(loads),
        matrix=tuple(sorted(set(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]*", ptx)))),
        text=ptx,
    )


def read_amd(compiled: Any) -> Code:
    """Read the assembly of an AMD kernel."""
    text = compiled.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the assembly of {compiled.metadata.name} names no .{name}")
        return int(found.group(1))

    loads: Counter[int] = Counter()
    for kind in re.findall(r"\b(?:global|buffer)_load_(\w+)", text):
        loads[_amd_bytes(kind)] += 1
    return Code(
        registers=number("vgpr_count"),  # with the accumulation registers, which are of the same file
        spilled_bytes=4 * number("vgpr_spill_count"),
        shared_bytes=compiled.metadata.shared,
        tensor_columns=0,
        warps=compiled.metadata.num_warps,
        loads=dict(loads),
        matrix=tuple(sorted(set(re.findall(r"\bv_mfma_\w+", text)))),
        text=text,
    )


def _amd_bytes(kind: str) -> int:
    """Bytes per thread of a load such as `dwordx4` or `ubyte`."""
    words = re.match(r"dword(?:x(\d))?", kind)
    if words:
        return 4 * int(words.group(1) or 1)
    return 1 if "byte" in kind else 2
