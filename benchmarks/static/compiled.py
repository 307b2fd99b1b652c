"""Every kernel compiled ahead of time, without a GPU, as it is launched: the cases, and what the binaries say.

The block sizes, warps and options come from the tables that the launchers use, so this compiles what ships. The static
table and the tests read the same cases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from benchmarks.static.binaries import Code, read_amd, read_nvidia
from gradpruner.kernels import (
    factor_sign_merge,
    factor_threshold,
    gram_norm,
    outer_square_accumulate,
    prune_by_boundary,
    prune_by_rank,
    sign_merge,
    square_accumulate,
    threshold,
    weight_importance,
    weight_mask,
    wgrad_square_accumulate,
)
from gradpruner.kernels.factor_tile import tile_launch

TARGETS = {
    "sm80": GPUTarget("cuda", 80, 32),
    "sm90": GPUTarget("cuda", 90, 32),
    "sm100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


DTYPES = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32, "fp64": tl.float64}
TORCH_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
RANKS = (8, 64)  # one slice of the rank, and several
SIZES = ("entries", "n_out", "n_in", "group")  # multiples of 16 in every model of interest


@dataclass(frozen=True)
class Case:
    """One variant of one kernel.

    Args:
        kernel: the Triton function.
        types: Triton types of the arguments, None where an argument is absent.
        launch: block sizes, warps and options, as the launcher passes them.
        streams: whether its large loads must be 16 bytes wide.
        matrix: whether it must use tensor cores.
        constants: further compile-time constants.
        on_hip: what an AMD launch has instead.
        slow: whether it differs from another variant by little. The default tests leave it out.
    """

    kernel: triton.JITFunction
    types: Mapping[str, str | None]
    launch: dict[str, Any]
    streams: bool = False
    matrix: bool = False
    constants: dict[str, Any] = field(default_factory=dict)
    on_hip: dict[str, Any] = field(default_factory=dict)
    slow: bool = False

    def compile(self, target: str) -> Code:
        """Compile for one of TARGETS and read the binary."""
        gpu = TARGETS[target]
        launch = self.launch | (self.on_hip if gpu.backend == "hip" else {})
        names = self.kernel.arg_names
        constants = {name: None for name, kind in self.types.items() if kind is None} | self.constants
        constants |= {name: value for name, value in launch.items() if name in names}
        options = {name: value for name, value in launch.items() if name not in names}
        signature = {name: "constexpr" if name in constants else self.types[name] for name in names}
        # What a launch knows of aligned tensors and of sizes that are multiples of 16.
        aligned = {
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if str(signature[name]).startswith("*")
            or (name in SIZES and name not in constants and not self.kernel.params[i].do_not_specialize)
        }
        compiled = triton.compile(ASTSource(self.kernel, signature, constants, aligned), gpu, options)
        return read_amd(compiled) if gpu.backend == "hip" else read_nvidia(compiled)


def cases() -> dict[str, Case]:
    """Every variant that ships, by name."""
    return _streaming() | _gram() | _selection() | _factors() | _wgrad() | _pruning()


def _rare(dtype: str) -> bool:
    """The same code as bf16 and fp32 but for one conversion."""
    return dtype in ("fp16", "fp64")


def _streaming() -> dict[str, Case]:
    found = {}
    for dtype in DTYPES:
        found[f"square_accumulate-{dtype}"] = Case(
            square_accumulate.square_accumulate_kernel,
            {"igia": "*fp32", "grad": f"*{dtype}", "entries": "i32"},
            square_accumulate.LAUNCH,
            streams=True,
        )
        found[f"sign_merge-{dtype}"] = Case(
            sign_merge.sign_merge_kernel,
            {"weight": f"*{dtype}", "table": "*i64", "donors": "i32", "entries": "i32"},
            sign_merge.LAUNCH,
            streams=True,
            constants={"ALIGN": 16},
        )
    return found


def _gram() -> dict[str, Case]:
    found = {}
    for dtype in DTYPES:
        size = TORCH_DTYPES[dtype].itemsize
        if size == 2 and not gram_norm.WIDENED_IN_KERNEL:
            continue  # the launcher widens such factors before
        sizes = gram_norm.RANK_TILES[size]
        for name, tile, one_tile in [*((f"{tile}", tile, True) for tile in sizes), ("several", sizes[-1], False)]:
            found[f"gram-{dtype}-{name}"] = Case(
                gram_norm.gram_kernel,
                {"table": "*i64", "grams": "*fp64", "tiles": "i32", "splits": "i32"},
                gram_norm.LAUNCH[tile] | {"TILE": tile},
                streams=True,
                matrix=True,
                constants={"DTYPE": DTYPES[dtype], "ALIGN": 16, "RANK_STEP": 8, "ONE_TILE": one_tile},
                on_hip=gram_norm.ON_HIP,
                slow=_rare(dtype) or not one_tile,
            )
    for tile in gram_norm.LAUNCH:
        found[f"gram_sum-{tile}"] = Case(
            gram_norm.gram_sum_kernel,
            {"grams": "*fp64", "partial": "*fp64", "splits": "i32"},
            gram_norm.SUM | {"TILE": tile},
            streams=True,
        )
    return found


def _selection() -> dict[str, Case]:
    state, counted = {"state": "*i64"}, {"state": "*i64", "histogram": "*i64"}
    keys, boundary = {"keys": "*i64", "few_keys": "*i64"}, {"value": "*fp32", "index": "*i64"}
    aligned = {"ALIGN": 16}
    found: dict[str, Case] = {}
    for name, size in {"": "i32", "-large": "i64"}.items():  # more than 2 ** 31 entries: 64 bits
        f, k = {"f": "*fp32", "entries": size}, {"k": size}
        room, bits = {"capacity": "i32"}, {"index_bits": "i32"}
        found |= {
            f"sample{name}": Case(
                threshold.sample_kernel, f | counted | k | room | {"log_stretch": "i32"}, threshold.SAMPLE
            ),
            f"collect{name}": Case(
                threshold.collect_kernel,
                f | state | {"keys": "*i64"} | room | bits,
                threshold.COLLECT,
                streams=True,
                constants=aligned,
            ),
            f"narrow{name}": Case(
                threshold.narrow_kernel,
                f | counted | keys | boundary | k | room | bits,
                threshold.LAUNCH,
                streams=True,
                constants=aligned,
            ),
            f"settle{name}": Case(
                threshold.settle_kernel,
                f | state | {"ties": "*i32"} | boundary,
                threshold.LAUNCH,
                streams=True,
                constants=aligned,
            ),
        }
    return found


def _factors() -> dict[str, Case]:
    sizes = {"steps": "i32", "rank": "i32", "n_out": "i32", "n_in": "i32"}
    hip = {"PRECISION": "ieee"}
    state = {"state": "*i64"}
    found = {}
    for rank in RANKS:
        for dtype in ("fp32", "bf16"):
            ab = {"a": f"*{dtype}", "b": f"*{dtype}"}
            launch = tile_launch([(rank, TORCH_DTYPES[dtype])])

            def case(
                kernel: triton.JITFunction, types: dict, slow: bool = False, launch: dict = launch, **more: Any
            ) -> Case:
                return Case(kernel, types, launch, matrix=True, streams=True, constants=more, on_hip=hip, slow=slow)

            counted = ab | state | {"histogram": "*i64", "k": "i32", "capacity": "i32"} | sizes
            boundary = {"value": "*fp32", "index": "*i64"}
            named = f"{dtype}-r{rank}"
            found[f"outer_square_accumulate-{named}"] = case(
                outer_square_accumulate.outer_square_accumulate_kernel,
                ab | {"igia": "*fp32", "rank": "i32", "n_out": "i32", "n_in": "i32"},
            )
            found[f"factor_sample-{named}"] = case(factor_threshold.factor_sample_kernel, counted)
            found[f"factor_collect-{named}"] = case(
                factor_threshold.factor_collect_kernel,
                ab | state | {"keys": "*i64", "capacity": "i32", "index_bits": "i32"} | sizes,
            )
            found[f"factor_narrow-{named}"] = case(
                factor_threshold.factor_narrow_kernel,
                counted | {"keys": "*i64", "few_keys": "*i64", "index_bits": "i32"} | boundary,
            )
            found[f"factor_settle-{named}"] = case(
                factor_threshold.factor_settle_kernel, ab | state | {"ties": "*i32"} | boundary | sizes
            )
        for weight in DTYPES:
            for factors in ("fp32", "bf16", "both"):
                dtypes = ("fp32", "bf16") if factors == "both" else (factors,)
                for sums in ("", "-before", "-after"):
                    if sums and (factors, rank) != ("bf16", 8):
                        continue  # more donors than one launch takes: the same but for one load or store
                    found[f"factor_sign_merge-{weight}-{factors}-r{rank}{sums}"] = Case(
                        factor_sign_merge.factor_sign_merge_kernel,
                        {"weight": f"*{weight}", "table": "*i64", "donors": "i32", "n_out": "i32", "n_in": "i32"}
                        | {
                            side: ("*fp64" if weight == "fp64" else "*fp32") if sums == f"-{side}" else None
                            for side in ("before", "after")
                        },
                        tile_launch((rank, TORCH_DTYPES[dtype]) for dtype in dtypes),
                        matrix=True,
                        streams=True,
                        constants={"FLOATS": factors != "bf16", "HALVES": factors != "fp32", "ALIGN": 16},
                        on_hip=hip,
                        slow=_rare(weight) or bool(sums) or (weight, factors) == ("fp32", "both"),
                    )
    return found


def _wgrad() -> dict[str, Case]:
    found = {}
    for dtype in DTYPES:
        x = f"*{dtype}"
        size = TORCH_DTYPES[dtype].itemsize
        found[f"finite-{dtype}"] = Case(
            wgrad_square_accumulate.finite_kernel,
            {"x": x, "dy": x, "bounds": "*fp32", "tokens": "i32", "n_out": "i32", "n_in": "i32"},
            wgrad_square_accumulate.FINITE,
            streams=True,
        )
        for variant, (igia, grad) in {
            "sum": (None, None),
            "frozen": ("*fp32", None),
            "trainable": (None, x),
            "trainable-igia": ("*fp32", x),
            "trainable-igia-fp32": ("*fp32", "*fp32"),
            "absolute": ("*fp32", None),
        }.items():
            absolute = variant == "absolute"
            found[f"wgrad-{dtype}-{variant}"] = Case(
                wgrad_square_accumulate.wgrad_kernel,
                {"igia": igia, "grad": grad, "x": x, "dy": x, "bounds": igia, "partial": None if absolute else "*fp64"}
                | {"programs": "i32", "tokens": "i32", "n_out": "i32", "n_in": "i32"},
                wgrad_square_accumulate.LAUNCH[size] | wgrad_square_accumulate.OPTIONS,
                streams=True,
                matrix=dtype != "fp64",
                constants={"ABSOLUTE": absolute},
                on_hip={"PRECISION": "ieee"} | wgrad_square_accumulate.ON_HIP[size],
                slow=(_rare(dtype) and variant != "trainable-igia")
                or (dtype, variant) == ("fp32", "trainable-igia-fp32"),
            )
    return found


GROUPS = {"4096": 4096, "14336": 14336, "long": 28672}
SMALL_GROUPS = (4, 8, 32, 5)  # the last is not a power of two


def _pruning() -> dict[str, Case]:
    found = {
        "pack_mask": Case(weight_mask.pack_kernel, {"mask": "*u8", "keep": "*u8", "n_in": "i32"}, weight_mask.LAUNCH)
    }
    for dtype in DTYPES:
        weight, n_in = {"weight": f"*{dtype}"}, {"n_in": "i32"}
        found[f"apply_mask-{dtype}"] = Case(
            weight_mask.apply_mask_kernel, weight | {"mask": "*u8"} | n_in, weight_mask.LAUNCH, streams=True
        )
        for judged, (norms, grads) in {
            "magnitude": (None, None),
            "norms": ("*fp32", None),
            "grads": (None, "*fp32"),
            "both": ("*fp32", "*fp32"),
        }.items():
            by = {"norms": norms, "grads": grads, "alpha": "fp32"}
            slow = _rare(dtype) or judged in ("norms", "grads") or (dtype, judged) == ("fp32", "magnitude")
            found[f"weight_importance-{dtype}-{judged}"] = Case(
                weight_importance.weight_importance_kernel,
                weight | {"found": "*fp32"} | by | n_in,
                weight_importance.LAUNCH,
                streams=True,
                slow=slow,
            )
            counts = {"mask": "*u8", "kept": "i32"}
            for group in SMALL_GROUPS:
                found[f"prune_by_rank-{dtype}-{judged}-{group}"] = Case(
                    prune_by_rank.prune_by_rank_kernel,
                    weight | by | counts | n_in,
                    prune_by_rank.launch_of(group),
                    streams=group != 5,
                    slow=slow or group == 8,
                )
            for name, group in GROUPS.items():
                launch = prune_by_boundary.launch_of(group)
                found[f"prune_by_boundary-{dtype}-{judged}-{name}"] = Case(
                    prune_by_boundary.prune_by_boundary_kernel,
                    weight | by | counts | {"group": "i32"} | n_in,
                    launch,
                    streams=True,
                    constants={"PACKED": True},
                    slow=slow or name == "4096",
                    on_hip={"num_warps": min(16, launch["num_warps"])},
                )
    by = {"norms": None, "grads": None, "alpha": "fp32"}
    found["prune_by_boundary-bf16-magnitude-unpacked"] = Case(
        prune_by_boundary.prune_by_boundary_kernel,
        {"weight": "*bf16"} | by | {"mask": "*u8", "kept": "i32", "group": "i32", "n_in": "i32"},
        prune_by_boundary.launch_of(100),
        constants={"PACKED": False},
    )
    return found


CASES = cases()
