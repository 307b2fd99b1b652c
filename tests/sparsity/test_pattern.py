"""Patterns: exact counts, ties by the lower index, what is accepted."""

from __future__ import annotations

import pytest
import torch

from gradpruner import ops
from gradpruner.checkpoint.mask_bits import pack, unpack
from gradpruner.errors import InvalidArgument
from gradpruner.sparsity.pattern import Pattern, largest


@pytest.mark.parametrize("width", [1, 7, 8, 9, 64, 100])
def test_bits_there_and_back(width):
    kept = torch.rand(5, width, generator=torch.Generator().manual_seed(width)) > 0.4
    bits = pack(kept)
    assert bits.shape == (5, (width + 7) // 8) and torch.equal(unpack(bits, width), kept)
    weight = torch.ones(5, width)
    ops.apply_mask_(weight, bits)  # the ops' own reading of them
    assert torch.equal(weight.bool(), kept)


@pytest.mark.parametrize("ratio", [0, 0.29, 0.5, 0.57, 0.999])
@pytest.mark.parametrize("within", ["row", "matrix"])
def test_counts_are_exact(ratio, within):
    weight = torch.randn(3, 100, generator=torch.Generator().manual_seed(0))
    mask = Pattern(within, ratio).prune_(weight, None, None, 1.0)
    gone = {0: 0, 0.29: 29, 0.5: 50, 0.57: 57, 0.999: 99}[ratio]  # int(0.57 * 100) is 56 in floats
    total = {0.999: 299}.get(ratio, 3 * gone) if within == "matrix" else 3 * gone
    assert int((weight == 0).sum()) == total == int((~unpack(mask, 100)).sum())
    if within == "row":
        assert (weight == 0).sum(1).tolist() == [gone] * 3


@pytest.mark.parametrize("within", ["row", "matrix", "2:4"])
def test_of_equals_the_lower_index_stays(within):
    weight = torch.ones(2, 8)
    Pattern(within, None if within == "2:4" else 0.5).prune_(weight, None, None, 1.0)
    half = [1.0] * 4 + [0.0] * 4
    expected = {"row": [half, half], "matrix": [[1.0] * 8, [0.0] * 8], "2:4": [[1.0, 1.0, 0.0, 0.0] * 2] * 2}[within]
    assert weight.tolist() == expected


def test_counts_are_exact_where_importance_is_zero():
    importance = torch.tensor([[0.0, 3.0, 0.0], [0.0, 0.0, 2.0]])
    assert largest(importance, 4).tolist() == [[True, True, True], [False, False, True]]
    assert largest(importance, 1).tolist() == [[False, True, False], [False, False, False]]
    assert not largest(importance, 0).any() and largest(importance, 6).all()


def test_n_of_m_in_every_group():
    weight = torch.randn(4, 24, generator=torch.Generator().manual_seed(0))
    dense = weight.clone()
    Pattern("4:8").prune_(weight, None, None, 1.0)
    groups = weight.view(-1, 8)
    assert (groups != 0).sum(1).tolist() == [4] * 12
    stays = dense.view(-1, 8).abs().topk(4).indices.sort().values
    assert torch.equal(groups.nonzero()[:, 1].view(-1, 4), stays)


@pytest.mark.parametrize(
    ("within", "ratio", "says"),
    [
        ("row", None, "ratio = None"),
        ("row", 1, "ratio = 1"),
        ("matrix", -0.1, "ratio = -0.1"),
        ("row", True, "ratio = True"),
        ("column", 0.5, "pattern = 'column'"),
        ("2:4", 0.6, "ratio = 0.6"),
        ("4:4", None, "pattern = '4:4'"),
        ("0:4", None, "pattern = '0:4'"),
        ("2:4 ", None, "pattern = '2:4 '"),
    ],
)
def test_what_is_refused(within, ratio, says):
    with pytest.raises(InvalidArgument, match=says.replace("'", ".")):
        Pattern(within, ratio)


def test_n_of_m_must_divide_and_has_its_own_share():
    assert Pattern("2:4", 0.5) and Pattern("2:4").share == Pattern("row", 0.5).share
    with pytest.raises(InvalidArgument, match="q_proj has 10 inputs; expected a multiple of 4"):
        Pattern("2:4").check("q_proj", 10)
    with pytest.raises(InvalidArgument, match="expected row or matrix"):
        Pattern("2:4").with_ratio(0.4)
