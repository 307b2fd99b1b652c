"""Every Triton kernel compiles ahead of time, without a GPU, for every target, as it is launched.

The block sizes, warps and options come from the tables that the launchers use, so this compiles what ships.
On NVIDIA the binary is read too: no register spills, 16-byte loads where a kernel only streams, tensor-core
instructions where it multiplies matrices of a half precision.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gradpruner.errors import InvalidArgument
from gradpruner.kernels import (
    device,
    factor_sign_merge,
    factor_threshold,
    gram_norm,
    outer_square_accumulate,
    selection,
    sign_merge,
    square_accumulate,
    threshold,
    wgrad_square_accumulate,
)
from gradpruner.kernels.factor_tile import TILE

if device.INTERPRETED:
    pytest.skip("the interpreter excludes compilation in one process", allow_module_level=True)

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}
# One address that the assembler parks, unasked, to fit a third block on the processor. Nothing else may spill.
ACCEPTED_SPILLS = {("factor_count_ties-fp32", "sm100"): 8, ("factor_locate-fp32", "sm100"): 8}
DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64}


@dataclass
class Case:
    """One variant of one kernel: argument types (None where an argument is absent), constants and options."""

    kernel: triton.JITFunction
    types: dict[str, str | None]
    launch: dict
    streams: bool = False
    tensor_cores: bool = False
    constants: dict = field(default_factory=dict)
    slow: bool = False

    def compile(self, target: GPUTarget):
        names = self.kernel.arg_names
        constants = {name: None for name, kind in self.types.items() if kind is None} | self.constants
        constants |= {name: value for name, value in self.launch.items() if name in names}
        options = {name: value for name, value in self.launch.items() if name not in names}
        signature = {name: "constexpr" if name in constants else self.types[name] for name in names}
        # What a launch knows of aligned tensors and of sizes that are multiples of 16.
        sized = ("entries", "n_out", "n_in", "tokens")
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*") or (name in sized and name not in constants)
        }
        return triton.compile(ASTSource(self.kernel, signature, constants, aligned), target, options)


def cases() -> dict[str, Case]:
    found = {}
    for dtype in DTYPES:
        weight = f"*{dtype}"
        rare = dtype in ("fp16", "fp64")  # the same code as bf16 and fp32 but for one conversion
        found[f"square_accumulate-{dtype}"] = Case(
            square_accumulate.square_accumulate_kernel,
            {"igia": "*fp32", "grad": weight, "entries": "i32"},
            square_accumulate.LAUNCH,
            streams=True,
        )
        for tile in gram_norm.RANK_TILES:
            found[f"gram_norm-{dtype}-{tile}"] = Case(
                gram_norm.gram_norm_kernel,
                {"table": "*i64", "partial": "*fp64", "tiles": "i32"},
                gram_norm.LAUNCH,
                constants={"DTYPE": DTYPES[dtype], "ALIGN": 16, "TILE": tile},
                slow=rare,
            )
        found[f"sign_merge-{dtype}"] = Case(
            sign_merge.sign_merge_kernel,
            {"weight": weight, "table": "*i64", "donors": "i32", "entries": "i32"},
            sign_merge.LAUNCH,
            streams=True,
            constants={"ALIGN": 16},
        )
        for factors, flags in {"fp32": (True, False), "bf16": (False, True), "both": (True, True)}.items():
            found[f"factor_sign_merge-{dtype}-{factors}"] = Case(
                factor_sign_merge.factor_sign_merge_kernel,
                {"weight": weight, "table": "*i64", "donors": "i32", "n_out": "i32", "n_in": "i32"},
                TILE,
                tensor_cores=factors != "fp32",
                constants={"FLOATS": flags[0], "HALVES": flags[1], "ALIGN": 16},
                slow=rare or (dtype, factors) == ("fp32", "both"),
            )
        for variant, (igia, grad) in {
            "sum": (None, None),
            "frozen": ("*fp32", None),
            "trainable": (None, weight),
            "trainable-igia": ("*fp32", weight),
            "trainable-igia-fp32": ("*fp32", "*fp32"),
        }.items():
            found[f"wgrad-{dtype}-{variant}"] = Case(
                wgrad_square_accumulate.wgrad_square_kernel,
                {"igia": igia, "grad": grad, "x": weight, "dy": weight, "limit": igia, "partial": "*fp64"}
                | {"tokens": "i32", "n_out": "i32", "n_in": "i32"},
                wgrad_square_accumulate.LAUNCH[BYTES[dtype]],
                tensor_cores=BYTES[dtype] == 2,
                slow=(rare and variant != "trainable-igia") or (dtype, variant) == ("fp32", "trainable-igia-fp32"),
            )

    sizes = {"steps": "i32", "rank": "i32", "n_out": "i32", "n_in": "i32"}
    for dtype in ("fp32", "bf16"):
        factors = {"a": f"*{dtype}", "b": f"*{dtype}"}
        halves = dtype == "bf16"
        found[f"outer_square_accumulate-{dtype}"] = Case(
            outer_square_accumulate.outer_square_accumulate_kernel,
            factors | {"igia": "*fp32"} | sizes,
            TILE,
            tensor_cores=halves,
        )
        for n, which in enumerate(selection.PASSES):
            found[f"factor_count-{dtype}-{n}"] = Case(
                factor_threshold.factor_count_kernel,
                factors | {"state": "*i64", "histogram": "*i64"} | sizes,
                TILE | which,
                tensor_cores=halves,
            )
        found[f"factor_count_ties-{dtype}"] = Case(
            factor_threshold.factor_count_ties_kernel,
            factors | {"state": "*i64", "ties": "*i32"} | sizes,
            TILE,
            tensor_cores=halves,
        )
        found[f"factor_locate-{dtype}"] = Case(
            factor_threshold.factor_locate_kernel,
            factors | {"state": "*i64", "value": "*fp32", "index": "*i64"} | sizes,
            TILE,
            tensor_cores=halves,
        )

    for n, which in enumerate(selection.PASSES):
        found[f"count-{n}"] = Case(
            threshold.count_kernel,
            {"f": "*fp32", "state": "*i64", "histogram": "*i64", "entries": "i32"},
            threshold.LAUNCH | which,
            streams=True,
        )
        found[f"pick_bucket-{n}"] = Case(
            selection.pick_bucket_kernel,
            {"histogram": "*i64", "state": "*i64", "k": "i32"},
            selection.PICK | which,
        )
    # A weight of more than 2 ** 31 entries: sizes arrive as 64 bits.
    found["pick_bucket-large"] = Case(
        selection.pick_bucket_kernel,
        {"histogram": "*i64", "state": "*i64", "k": "i64"},
        selection.PICK | selection.PASSES[0],
    )
    found["count-large"] = Case(
        threshold.count_kernel,
        {"f": "*fp32", "state": "*i64", "histogram": "*i64", "entries": "i64"},
        threshold.LAUNCH | selection.PASSES[0],
        streams=True,
    )
    found["count_ties"] = Case(
        threshold.count_ties_kernel,
        {"f": "*fp32", "state": "*i64", "ties": "*i32", "entries": "i32"},
        threshold.LAUNCH,
        streams=True,
    )
    found["locate"] = Case(
        threshold.locate_kernel,
        {"f": "*fp32", "state": "*i64", "value": "*fp32", "index": "*i64", "entries": "i32"},
        threshold.LAUNCH,
    )
    found["find_cell"] = Case(
        selection.find_cell_kernel, {"ties": "*i32", "state": "*i64", "cells": "i32"}, selection.FIND
    )
    return found


CASES = cases()


def spilled_bytes(cubin: bytes, folder: Path) -> int:
    """Local memory of a kernel in a cubin: the stack and whatever the registers could not hold."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], check=True, capture_output=True, text=True).stdout
    sizes = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)
    assert len(sizes) == 2, usage
    return sum(map(int, sizes))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow if case.slow else ()) for n, case in CASES.items()]
)
def test_kernel_compiles(name, target, tmp_path):
    case = CASES[name]
    asm = case.compile(TARGETS[target]).asm
    if target == "gfx942":
        text = asm["amdgcn"]
        wide_load, matrix = r"_load_dwordx4", r"v_mfma_"
    else:
        text = asm["ptx"]
        wide_load, matrix = (
            r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64",
            r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)",
        )
        assert spilled_bytes(asm["cubin"], tmp_path) <= ACCEPTED_SPILLS.get((name, target), 0)
    assert not case.streams or re.search(wide_load, text)
    assert not case.tensor_cores or re.search(matrix, text)


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100"])
def test_merge_rounds_the_product_before_the_sum(target, dtype):
    assert not re.search(r"\bfma\.", CASES[f"sign_merge-{dtype}"].compile(TARGETS[target]).asm["ptx"])


@pytest.mark.parametrize("target", ["sm80", "sm90", "sm100"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_selection_and_merge_rebuild_f_with_the_same_instructions(dtype, target):
    """Same matrix instructions, and the square is rounded before it is added, not fused with the sum."""
    selection_ptx = CASES[f"factor_count-{dtype}-0"].compile(TARGETS[target]).asm["ptx"]
    merge_ptx = CASES[f"factor_sign_merge-bf16-{dtype}"].compile(TARGETS[target]).asm["ptx"]
    used = [
        set(re.findall(r"\b(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma|fma\.)[\w.:]*", ptx))
        for ptx in (selection_ptx, merge_ptx)
    ]
    assert used[0] == used[1] and used[0]
    assert dtype == "fp32" or not any(instruction.startswith("fma") for instruction in used[0])


def test_every_kernel_has_a_case():
    """A kernel is a jitted function that no other jitted function calls."""
    jitted = {}
    for module in pkgutil.iter_modules([str(Path(device.__file__).parent)]):
        members = vars(importlib.import_module(f"gradpruner.kernels.{module.name}"))
        jitted |= {k: v for k, v in members.items() if isinstance(v, triton.JITFunction)}
    sources = {name: inspect.getsource(fn.fn) for name, fn in jitted.items()}
    kernels = {
        name
        for name in jitted
        if not any(re.search(rf"\b{name}\(", text) for other, text in sources.items() if other != name)
    }
    assert kernels == {case.kernel.__name__ for case in CASES.values()}


def test_cpu_tensors_are_refused_without_the_interpreter():
    with pytest.raises(InvalidArgument, match="TRITON_INTERPRET=1"):
        square_accumulate.square_accumulate_(torch.zeros(3), torch.ones(3))
