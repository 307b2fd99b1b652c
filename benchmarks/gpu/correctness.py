"""The kernels against float64 on the device, at sizes no interpreter reaches and twice, then the tests of all ops."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.gpu.session import Session
from gradpruner import ops

ROOT = Path(__file__).parents[2]
STEPS, RANK = 40, 8
WGRAD_BAR = 5e-5  # relative RMS of g ** 2: Hopper's tensor cores truncate when they add
NEAR = 1e-5  # relative distance from the threshold at which F may fall on either side (the contract of the ops)


def large(session: Session) -> None:
    """Every op on one weight of Llama-3.1-8B, twice and to the bit, against float64."""
    shape = (96, 64) if session.tiny else (14336, 4096)
    tokens = 64 if session.tiny else 1024
    for dtype in (torch.float32, torch.bfloat16):
        _weight_gradient(session, shape, tokens, dtype)
        _merge(session, shape, 3 if session.tiny else STEPS, dtype)
    for seed in range(10):
        _threshold(session, shape, seed)
    _gram_norms(session, shape)


def _say(session: Session, what: str, right: bool, **more: object) -> None:
    session.put(what=what, right=bool(right), **more)


def _relative_rms(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).norm() / y.norm())


def _weight_gradient(session: Session, shape: tuple[int, int], tokens: int, dtype: torch.dtype) -> None:
    n_out, n_in = shape
    x, dy = session.normal(tokens, n_in, dtype=dtype), session.normal(tokens, n_out, dtype=dtype)
    found = [torch.zeros(shape, device=session.device) for _ in range(2)]
    sums = [ops.wgrad_square_accumulate_(igia, x, dy, None) for igia in found]
    exact = (dy.double().T @ x.double()).square()
    gap, sum_gap = _relative_rms(found[0], exact), abs(float(sums[0]) / float(exact.sum()) - 1)
    _say(
        session,
        f"wgrad_square_accumulate_ {dtype}",
        gap < WGRAD_BAR and sum_gap < WGRAD_BAR,
        twice_the_same=torch.equal(*found) and torch.equal(*sums),
        relative_rms=gap,
        sum_off_by=sum_gap,
    )


def _merge(session: Session, shape: tuple[int, int], steps: int, dtype: torch.dtype) -> None:
    n_out, n_in = shape
    a, b = session.normal(steps, RANK, n_in, dtype=dtype), session.normal(steps, n_out, RANK, dtype=dtype)
    exact = torch.zeros(shape, device=session.device, dtype=torch.float64)
    for step in range(steps):
        exact += (b[step].double() @ a[step].double()).square()
    k = exact.numel() // 5
    values, indices = zip(*(ops.factor_threshold(a, b, k) for _ in range(2)), strict=True)
    flat = exact.flatten()
    wanted = float(flat.topk(k, sorted=False)[0].min())
    off_by = float(values[0]) / wanted - 1
    _say(
        session,
        f"factor_threshold {dtype}",
        abs(off_by) < NEAR,
        twice_the_same=torch.equal(*values) and torch.equal(*indices),
        off_by=off_by,
    )
    weight, donor = (session.normal(*shape, dtype=torch.bfloat16) for _ in range(2))
    merged = [weight.clone() for _ in range(2)]
    for target in merged:
        ops.factor_sign_merge_(target, [donor], [a], [b], [values[0]], [indices[0]], [1.0])
    kept = (weight.float() * donor.float() > 0) & (exact >= wanted)
    expected = torch.where(kept, (weight.float() + donor.float()).bfloat16(), weight)
    wrong = (merged[0] != expected) & ~((exact / wanted - 1).abs() < NEAR)
    _say(
        session,
        f"factor_sign_merge_ {dtype}",
        not bool(wrong.any()),
        twice_the_same=torch.equal(*merged),
        changed=int((merged[0] != weight).sum()),
        of=weight.numel(),
    )


def _threshold(session: Session, shape: tuple[int, int], seed: int) -> None:
    torch.manual_seed(seed)
    f = session.normal(*shape).square_()
    if seed % 2:
        f = (f * 4).round() / 4  # ties by the hundred thousand
    k = max(1, f.numel() * (1 + seed) // 11)
    (value, index), again = ops.threshold(f, k), ops.threshold(f, k)
    at = torch.arange(f.numel(), device=f.device).view(f.shape)
    kept = (f > value) | ((f == value) & (at <= index))
    _say(
        session,
        f"threshold of the {k} largest{', ties' if seed % 2 else ''}",
        int(kept.sum()) == min(k, int((f > 0).sum())) and float(f[kept].min()) == float(value),
        twice_the_same=torch.equal(value, again[0]) and torch.equal(index, again[1]),
    )


def _gram_norms(session: Session, shape: tuple[int, int]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        a = [session.normal(rank, shape[1], dtype=dtype) for rank in (8, 16, 64)]
        b = [session.normal(shape[0], rank, dtype=dtype) for rank in (8, 16, 64)]
        found = [ops.gram_norm(a, b) for _ in range(2)]
        exact = torch.stack([(q.double() @ p.double()).square().sum() for p, q in zip(a, b, strict=True)])
        gap = float((found[0] / exact - 1).abs().max())
        _say(session, f"gram_norm {dtype}", gap < 1e-9, twice_the_same=torch.equal(*found), off_by=gap)


def tests_of_ops(session: Session) -> None:
    """`tests/ops` on the device: every dtype, odd shapes, views, NaN and Inf. A dry run takes a few, interpreted."""
    command = [sys.executable, "-m", "pytest", "-q", "tests/ops", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["--import-mode=importlib", "-m", "not slow"]
    environment = {**os.environ, "GRADPRUNER_TEST_DEVICE": session.device.type}
    if session.on_cuda:
        command += ["-n", str(min(12, os.cpu_count() or 1)), "--dist", "worksteal"]
    else:
        command += ["-k", "square_accumulate_into_and_from_views"]
        environment["TRITON_INTERPRET"] = "1"
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(run.stdout[-20000:], run.stderr[-2000:], sep="\n", flush=True)
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|errors?)\b", run.stdout[-500:])}
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", run.stdout, re.MULTILINE)
    _say(session, "tests/ops", run.returncode == 0 and counts.get("passed", 0) > 0, **counts, names=failed)
