"""Probe, plan, apply and save in several processes: the same as in one, stored once, and no hang where one dies."""

from __future__ import annotations

import signal
import time

import distributed_equality
import distributed_jobs
import pytest
import torch

from gradpruner.checks import exact_share
from gradpruner.probe.importance import Dense, Factors
from gradpruner.pruning.merge import merge_weight_

WORLDS = [pytest.param(2, marks=pytest.mark.in_ci), 4]


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("job", [distributed_jobs.equal, distributed_jobs.details], ids=["equal", "details"])
def test_several_processes(job, world, tmp_path):
    distributed_equality.check(job, world, tmp_path)


@pytest.mark.slow
def test_shards_with_replicas_and_as_accelerate_cuts_them(tmp_path):
    distributed_equality.check(distributed_jobs.other_shards, 4, tmp_path)


@pytest.mark.parametrize(
    ("job", "code"),
    [
        pytest.param(distributed_jobs.killed_in_training, -signal.SIGKILL, marks=pytest.mark.slow),
        (distributed_jobs.killed_at_the_end, -signal.SIGKILL),
        (distributed_jobs.failed_in_training, 1),
    ],
)
def test_a_process_that_dies_ends_the_others_with_a_clear_error(job, code, tmp_path):
    start = time.monotonic()
    codes, errors = distributed_equality.launch(job, 2, tmp_path, timeout=60)
    assert codes == [1, code]
    assert "gradpruner.errors.ProbeError: process 0 lost contact with another process" in errors[0]
    assert "ProbeError" not in errors[1] and ("of its own" in errors[1]) == (code == 1)
    assert time.monotonic() - start < 45  # before anything times out


@pytest.mark.parametrize("stored", ["factors", "dense", "experts"])
@pytest.mark.parametrize("cuts", [[7, 13], [5, 5, 5, 5], [19, 1, 0], [20]])
def test_rows_are_merged_as_in_the_whole(stored, cuts):
    """With ties that straddle the cut, and a threshold from all rows."""
    generator = torch.Generator().manual_seed(0)
    shape = (20, 6, 4) if stored == "experts" else (20, 17)
    weight, *donors = (torch.randn(shape, generator=generator) for _ in range(3))
    importance: list[Factors | Dense] = []
    for _ in donors:
        if stored == "factors":
            a = torch.randint(-1, 2, (3, 2, 17), generator=generator).float()
            importance.append(Factors(a, torch.randint(-1, 2, (3, 20, 2), generator=generator).float()))
        else:
            importance.append(Dense(torch.randint(0, 4, shape, generator=generator).float()))
    whole = weight.clone()
    merge_weight_(whole, donors, importance, exact_share("top", 0.3), 1.0)
    parts, first = [], 0
    for count in cuts:
        rows = slice(first, first + count)
        part = weight[rows].clone()
        merge_weight_(part, [d[rows] for d in donors], importance, exact_share("top", 0.3), 1.0, first=first)
        parts.append(part)
        first += count
    assert not torch.equal(whole, weight)
    assert torch.equal(torch.cat(parts), whole)
