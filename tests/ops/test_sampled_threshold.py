"""A selection that samples: what it does where the sample helps, and where it misleads."""

from __future__ import annotations

import oracle
import pytest
import torch
from on_device import DEVICE
from op_inputs import INTERPRETING, check_threshold, mask_from, normal

from gradpruner import ops

pytestmark = pytest.mark.usefixtures("backend")


@pytest.fixture
def answered_from_the_bracket(monkeypatch):
    """Whether the last selection needed no pass but one over all entries; None on a backend that does not sample.

    The sample is as small a part as that of a large matrix.
    """
    if not INTERPRETING and not DEVICE:
        return lambda: None
    from gradpruner.kernels import selection, threshold
    from gradpruner.kernels.selection_state import DONE, new_state

    states = []

    def kept(device):
        state, histogram = new_state(device)
        states.append(state)
        return state, histogram

    monkeypatch.setattr(selection, "new_state", kept)
    monkeypatch.setattr(threshold, "SAMPLED", 3600)
    return lambda: bool(states[-1][DONE.value])


def sampled_entries(entries: int) -> torch.Tensor:
    """Flat indices that the dense selection samples in these tests: 128 of each 4096, at a place that wanders."""
    blocks = torch.arange(-(-entries // 4096))
    at = (blocks * 4096 + blocks * 7919 % 32 * 128)[:, None] + torch.arange(128)
    return at[at < entries]


def factors_that_differ_in_the_sample(n_out: int, n_in: int, low: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One step a row of 64 x 64 tiles: F is `low` of what it is elsewhere in the tiles that the selection samples."""
    rows, cols = -(-n_out // 64), -(-n_in // 64)
    a = normal(rows, 1, n_in).abs() + 0.1
    b = torch.zeros(rows, n_out, 1)
    for n in range(2 * max(rows, cols)):
        row, col = n % rows, (n % rows * 7919 + n // rows) % cols
        a[row, 0, col * 64 : col * 64 + 64] *= low
    for row in range(rows):
        b[row, row * 64 : row * 64 + 64, 0] = normal(n_out, seed=1)[row * 64 : row * 64 + 64].abs() + 0.1
    return a, b


@pytest.mark.parametrize("share", [0.001, 0.2, 0.7])
def test_threshold_of_many_entries_is_answered_from_the_bracket(share, answered_from_the_bracket):
    f = normal(300, 401).square()
    check_threshold(f, int(share * f.numel()))
    assert answered_from_the_bracket() in (None, True)


@pytest.mark.parametrize(("rows", "last_bits"), [(300, 0xFFF), (700, 0x7FFF)])  # Triton's buckets, and C++'s
@pytest.mark.parametrize("filled", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.7])
def test_threshold_of_entries_at_the_ends_of_the_bracket(share, filled, rows, last_bits, answered_from_the_bracket):
    # a bracket ends where a bucket of the sample does, and so do these
    bits = normal(rows, 401).square().view(torch.int32) & ~last_bits
    f = (bits | last_bits if filled else bits).view(torch.float32)
    k = int(share * f.numel())
    value, index = ops.threshold(f, k)
    kept = torch.zeros(f.numel(), dtype=torch.bool)
    kept[f.flatten().argsort(descending=True, stable=True)[:k]] = True
    assert torch.equal(mask_from(f, value, index), kept.view(f.shape))
    if rows == 300:
        assert answered_from_the_bracket() in (None, True)


def test_threshold_is_exact_where_the_sample_lies(answered_from_the_bracket):
    f = normal(300, 400).square()
    f.view(-1)[sampled_entries(f.numel())] *= 1e-6
    check_threshold(f, f.numel() // 5)
    assert answered_from_the_bracket() in (None, False)


def test_threshold_is_exact_where_too_many_entries_tie(answered_from_the_bracket):
    check_threshold(torch.full((90, 100), 7.0), 5000)
    assert answered_from_the_bracket() in (None, False)


@pytest.mark.parametrize(("few", "scattered"), [(4096, False), (512, False), (64, True), (64, False)])
def test_threshold_is_exact_however_many_rounds_the_candidates_need(
    few, scattered, answered_from_the_bracket, monkeypatch
):
    """The boundary lies among 100 ties: after no round, one or two the candidates left are few, or never."""
    if INTERPRETING:
        import triton.language as tl

        from gradpruner.kernels import candidates

        monkeypatch.setattr(candidates, "FEW", tl.constexpr(few))
    if INTERPRETING or DEVICE:
        from gradpruner.kernels import threshold

        monkeypatch.setattr(threshold, "SAMPLED", 1 << 20)  # all
    steps = torch.arange(600).repeat(100) if scattered else torch.arange(600).repeat_interleave(100)
    f = torch.cat([1 + steps * 2.0**-12, normal(60300).square() % 1.0])
    check_threshold(f, 31050)
    assert answered_from_the_bracket() in (None, True)


@pytest.mark.parametrize(("low", "answered"), [(1.0, True), (1e-3, False)])
def test_factor_threshold_keeps_exactly_k_whatever_the_sample_says(low, answered, answered_from_the_bracket):
    shape = (200, 300)
    a, b = factors_that_differ_in_the_sample(*shape, low)
    k = 12000
    value, index = ops.factor_threshold(a, b, k)
    assert answered_from_the_bracket() in (None, answered)
    weight = torch.ones(shape)
    ops.factor_sign_merge_(weight, [torch.ones(shape)], [a], [b], [value], [index], [1.0])
    assert int((weight == 2).sum()) == k
    f = oracle.importance(a, b)
    wrong = (weight == 2) != oracle.mask_of(f, k)
    assert not (wrong & ((f - float(value)).abs() > 1e-5 * float(value))).any()


def test_factor_threshold_where_too_many_entries_tie(answered_from_the_bracket):
    a, b = torch.ones(1, 1, 100), torch.ones(1, 90, 1)
    value, index = ops.factor_threshold(a, b, 5000)
    assert (float(value), int(index)) == (1.0, 4999)
    assert answered_from_the_bracket() in (None, False)
