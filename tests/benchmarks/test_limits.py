"""Operations and bytes of each case, and the time that a machine needs for them at least."""

from __future__ import annotations

import torch
from benchmark_results import CPU

from benchmarks.ops.cases import OPERATIONS, SHAPES, Count, cases
from benchmarks.ops.limits import Limits


def test_weights_too_large_for_a_cpu_are_merged_on_a_gpu():
    def merged(device):
        return {(c.shape, c.variant) for c in cases("factor_merge", SHAPES["llama-8b"], torch.device(device))}

    left_out = {(shape, f"r={r}, t=40") for shape in ("14336x4096", "4096x14336") for r in (8, 64)}
    left_out.add(("4096x4096", "r=64, t=40"))
    assert merged("cuda") - merged("cpu") == left_out and len(merged("cuda")) == 8


def test_counts():
    """14336 x 4096 at r = 8, t = 40 is 42 GFLOP a rebuild (docs/method.md, section 3); a merge is two."""
    cases = {(c.op, c.shape, c.variant): c.count for op in OPERATIONS.values() for c in op(SHAPES["llama-8b"])}
    entries = 14336 * 4096
    merge = cases["factor_merge", "4096x4096", "r=8, t=40"]
    assert merge.operations == 2 * 42_278_584_320 * 4096 // 14336
    assert merge.bytes == 6 * 4096 * 4096 + 4 * 40 * 8 * (4096 + 4096)
    assert cases["gram_norm", "224 pairs", "r=8"] == Count(32 * 81920 * 32, 72 * 81920 * 32, torch.float64)
    assert cases["sign_merge_", "4096x14336", "n=3"].bytes == 22 * entries
    assert cases["square_accumulate_", "14336x4096", "bf16"].bytes == 10 * entries
    assert cases["wgrad_square_accumulate_", "1024x4096", "bf16, T=1024"].operations == 2 * 1024 * 1024 * 4096
    assert cases["outer_square_accumulate_", "1024x4096", "r=64"].operations == 130 * 1024 * 4096
    assert cases["weight_importance", "1024x4096", "norms, grads"].bytes == 10 * 1024 * 4096
    assert cases["prune_groups_", "1024x4096", "2:4"].bytes == 33 * 1024 * 4096 // 8
    assert cases["apply_mask_", "4096x14336", "bf16"].bytes == 33 * entries // 8
    assert cases["wgrad_abs_accumulate_", "1024x4096", "bf16, T=1024"].operations == 2 * 1024 * 1024 * 4096


def test_the_limit_is_whichever_takes_longer():
    class Known(Limits):
        def bandwidth(self, size):
            return 10e9

        def peak(self, dtype):
            return {torch.float32: 100e9, torch.float64: 50e9}[dtype]

    limits = Known(CPU, 1)
    assert limits.of(Count(10**9, 10**9)) == (0.1, "bytes")
    assert limits.of(Count(10**9, 20 * 10**9)) == (0.2, "operations")
    assert limits.of(Count(10**9, 20 * 10**9, torch.float64)) == (0.4, "operations")


def test_the_machine_is_measured_once():
    limits = Limits(CPU, 1, side=64)
    assert 1e8 < limits.bandwidth(5 << 20) < 1e13 and limits.bandwidth(5 << 20) == limits.bandwidth(6 << 20)
    assert 1e7 < limits.peak(torch.float64) < 1e14 and limits.peak(torch.float64) == limits.peak(torch.float64)
