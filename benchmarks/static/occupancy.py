"""What one processor of each target can hold at a time, and the occupancy that a kernel's code allows: predicted.

Sources. NVIDIA: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (8.0, 9.0, 10.0), and for
what a block takes (registers by 256 a warp, shared memory by 128 bytes and 1 KiB for the system) the guide's and the
occupancy calculator's allocation rules; tensor memory: PTX ISA, tcgen05.alloc (512 columns). AMD: CDNA 3 Instruction
Set Architecture and the MI300X tuning guide (four SIMDs a compute unit, 512 vector registers a lane with the
accumulation registers, by 8, eight wavefronts a SIMD, 64 KiB of LDS).
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.static.binaries import Code


@dataclass(frozen=True)
class Limits:
    """Of one processor (SM, compute unit), whose warps are spread over `parts` register files."""

    threads_a_warp: int
    parts: int
    warps_a_part: int
    registers_a_part: int
    registers_a_grain: int  # a warp's registers are allocated in multiples of this
    blocks: int
    shared_bytes: int
    shared_bytes_a_block: int
    shared_bytes_for_the_system: int  # of each block
    tensor_columns: int


def _nvidia(shared_kib: int, tensor_columns: int) -> Limits:
    return Limits(32, 4, 16, 16384, 256, 32, shared_kib * 1024, (shared_kib - 1) * 1024, 1024, tensor_columns)


LIMITS = {
    "sm80": _nvidia(164, 0),
    "sm90": _nvidia(228, 0),
    "sm100": _nvidia(228, 512),
    "gfx942": Limits(64, 4, 8, 512 * 64, 8 * 64, 32, 65536, 65536, 0, 0),
}


@dataclass(frozen=True)
class Occupancy:
    """Blocks that fit one processor, the warps of those that it can hold, and what ends first."""

    blocks: int
    share: float
    limited_by: str


def occupancy(code: Code, limits: Limits) -> Occupancy:
    """How many blocks of this code fit a processor at once. Predicted from its resources, not measured."""
    grain = limits.registers_a_grain
    registers_a_warp = -(-max(code.registers, 1) * limits.threads_a_warp // grain) * grain
    shared = code.shared_bytes + limits.shared_bytes_for_the_system
    fits = {
        "registers": limits.parts * (limits.registers_a_part // registers_a_warp) // code.warps,
        "warps": limits.parts * limits.warps_a_part // code.warps,
        "blocks": limits.blocks,
        "shared memory": limits.shared_bytes // (-(-shared // 128) * 128) if shared else limits.blocks,
    }
    if code.tensor_columns:
        fits["tensor memory"] = limits.tensor_columns // code.tensor_columns
    limited_by = min(fits, key=lambda name: fits[name])
    blocks = fits[limited_by]
    return Occupancy(blocks, blocks * code.warps / (limits.parts * limits.warps_a_part), limited_by)
