"""The harness compares like with like, and gives a wrong answer no time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from benchmark_results import CPU, ODD
from wrong_implementations import Mine, OwnSums, Raising, Tiring, WrongMask, WrongTie

from benchmarks.ops.base import Implementation
from benchmarks.ops.cases import OPERATIONS, TOLERANCE, Shapes, product_tolerance
from benchmarks.ops.implementations import Ours, Reference, implementations
from benchmarks.ops.timing import measure

EAGER = implementations(skip=["compiled"])


@pytest.mark.parametrize("op", OPERATIONS)
def test_every_implementation_agrees_with_the_reference(op):
    for case in OPERATIONS[op](ODD):
        measured = measure(case, EAGER, 1, CPU)
        names = [each.name for each in measured]
        assert names[0] == "reference" and {"released", "ours"} <= set(names)
        assert any(each.kind == "torch" for each in measured)
        assert all(each.seconds and min(each.seconds) > 0 for each in measured)


@pytest.mark.slow
@pytest.mark.parametrize("op", OPERATIONS)
def test_compiled_torch_agrees_with_the_reference(op):
    classes = [each for each in implementations() if each.name in ("reference", "compiled", "ours")]
    for case in OPERATIONS[op](Shapes(((33, 70),), 2)):
        compiled = [each for each in measure(case, classes, 1, CPU) if each.name == "compiled"]
        assert len(compiled) == (op not in ("gram_norm", "threshold", "prune_groups_"))


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("wrong", [OwnSums, WrongMask, WrongTie])
def test_a_wrong_implementation_has_no_time(op, wrong):
    if not hasattr(wrong, op):
        pytest.skip("not wrong there")
    for case in OPERATIONS[op](ODD):
        reference, found, ours = measure(case, [Reference, wrong, Ours], 1, CPU)
        assert found.error.startswith("wrong: ") and not found.seconds and math.isnan(found.first_s)
        assert not reference.error and not ours.error and ours.seconds


def test_what_raises_has_no_time_and_the_others_go_on(capsys):
    case = next(OPERATIONS["threshold"](ODD))
    Tiring.calls = 0
    found = {each.name: each for each in measure(case, [Reference, Raising, Tiring, Ours], 3, CPU)}
    assert found["raising"].error == "RuntimeError: at 7:3: ... K >= 16"
    assert found["tiring"].error == "MemoryError: no more" and not found["tiring"].seconds
    assert len(found["ours"].seconds) == 3 and not found["ours"].error
    assert "tl.dot(a, b)" in capsys.readouterr().err


def test_nothing_is_timed_that_could_not_be_checked(capsys):
    class Failing(Raising):
        name, kind = "reference", "reference"

    case = next(OPERATIONS["threshold"](ODD))
    reference, ours = measure(case, [Failing, Ours], 1, CPU)
    assert reference.error.startswith("RuntimeError") and ours.error == "not run: the reference failed"
    no_data = replace(case, make=lambda normal: normal(-1))
    assert [each.error for each in measure(no_data, [Reference, Ours], 1, CPU)][1] == ours.error


def test_only_sums_over_tokens_on_a_gpu_may_be_further_off():
    assert product_tolerance(CPU) == TOLERANCE < product_tolerance(torch.device("cuda")) == 5e-5


def test_every_call_starts_from_the_same_state():
    """Wrong from the second call on would go unseen: but there is nothing to go wrong if the state is put back."""
    seen = []

    class Watching(Implementation):
        name = "watching"

        def square_accumulate_(self, igia, grad):
            seen.append(float(igia.sum()))
            igia += grad.float() ** 2

    measure(next(OPERATIONS["square_accumulate_"](ODD)), [Reference, Watching, Ours], 3, CPU)
    assert len(seen) == 5 and len(set(seen)) == 1


def test_memory_of_a_call_is_seen():
    class Hungry(Mine):
        name = "hungry"

        def threshold(self, igia, k):
            held = torch.ones(16 << 20)  # 64 MiB
            return super().threshold(igia, k) * held[0]

    case = next(OPERATIONS["threshold"](ODD))
    extra = {each.name: each.extra_bytes for each in measure(case, [Reference, Mine, Hungry, Ours], 1, CPU)}
    assert 60 << 20 < extra["hungry"] < 80 << 20 and extra["mine"] < 8 << 20
