"""The instruction sets of the CPU backend against each other: where they agree to the bit, and how closely else."""

from __future__ import annotations

import os

import pytest
import torch

from gradpruner import ops

_cpu = pytest.importorskip("gradpruner._cpu")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the process of the interpreter is for Triton", allow_module_level=True)

OTHERS = ("avx2", "avx512", "avx512bf16", "amx")
# larger than a tile, than a span and than a sample, and no multiple of any vector
SHAPE, STEPS, RANK = (611, 1003), 3, 8


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def importance() -> torch.Tensor:
    f = normal(*SHAPE, seed=1).square()
    f[::7] = f[0]  # ties
    return f


def answers(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every op once, on the instruction set that is selected."""
    found: dict[str, torch.Tensor] = {}
    f, k = importance(), SHAPE[0] * SHAPE[1] // 5
    value, index = ops.threshold(f, k)
    found["threshold value"], found["threshold index"] = value, index
    weight, donors = normal(*SHAPE, seed=2).to(dtype), [normal(*SHAPE, seed=n).to(dtype) for n in (3, 4)]
    ops.sign_merge_(weight, donors, [f, f], [value] * 2, [index] * 2, [1.0, 0.3])
    found["sign_merge_"] = weight
    grad = normal(*SHAPE, seed=5).to(dtype)
    squares = torch.ones(SHAPE)
    ops.square_accumulate_(squares, grad)
    found["square_accumulate_"] = squares
    a, b = normal(STEPS, RANK, SHAPE[1], seed=6), normal(STEPS, SHAPE[0], RANK, seed=7)
    found["~factor_threshold"] = ops.factor_threshold(a, b, k)[0]
    outer = torch.zeros(SHAPE)
    ops.outer_square_accumulate_(outer, a[0], b[0])
    found["~outer_square_accumulate_"] = outer
    found["~gram_norm"] = ops.gram_norm([a[0]], [b[0]])
    product = torch.zeros(SHAPE)
    # more tokens than are packed at once, and an odd one
    x, dy = normal(603, SHAPE[1], seed=8).to(dtype), normal(603, SHAPE[0], seed=9).to(dtype)
    found["~wgrad sum"] = ops.wgrad_square_accumulate_(product, x, dy, None)
    found["~wgrad igia"] = product
    sizes = torch.zeros(SHAPE)
    ops.wgrad_abs_accumulate_(sizes, x, dy)
    found["~wgrad_abs_accumulate_"] = sizes
    norms, grads = normal(SHAPE[1], seed=10).abs(), normal(*SHAPE, seed=11)
    found["weight_importance"] = ops.weight_importance(weight, norms, grads, 0.3)
    for group in (SHAPE[1], 59, 17):  # its divisors on either side of what is ranked by counting
        pruned = normal(*SHAPE, seed=12).to(dtype)
        found[f"mask of {group}"] = ops.prune_groups_(pruned, norms, grads, 0.3, group // 2, group)
        found[f"pruned by {group}"] = pruned
    again = normal(*SHAPE, seed=13).to(dtype)
    ops.apply_mask_(again, found["mask of 17"])
    found["apply_mask_"] = again
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OTHERS)
def test_instruction_sets_agree(name, dtype, monkeypatch):
    monkeypatch.setenv("GRADPRUNER_BACKEND", "cpp")
    try:
        _cpu.select_variant("portable")
        expected = answers(dtype)
        try:
            _cpu.select_variant(name)
        except ValueError as error:
            pytest.skip(str(error))
        got = answers(dtype)
    finally:
        _cpu.select_variant("")
    for what, tensor in expected.items():
        if what.startswith("~"):  # sums in another order
            error = (got[what].double() - tensor.double()).square().mean().sqrt()
            assert error <= 1e-6 * tensor.double().square().mean().sqrt(), what
        else:
            assert torch.equal(got[what], tensor), what
