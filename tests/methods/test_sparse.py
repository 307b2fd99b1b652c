"""The method `sparse`: its options and what it refuses."""

from __future__ import annotations

import pytest

from gradpruner.errors import InvalidArgument
from gradpruner.methods import parse_method


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("sparse:layers=sparse", "layers = 'sparse'"),
        ("sparse:weights=wonda", "method = 'wonda'"),
        ("sparse:weights=igia", "weights = 'igia'"),
        ("sparse:pattern=4:2", "pattern = '4:2'"),
        ("sparse:ratio=2", "ratio = 2"),
        ("sparse:allocation=best", "allocation = 'best'"),
        ("sparse:allocation=alphapruning,pattern=2:4", "pattern = '2:4'"),
        ("sparse:weights=dsnot,pattern=matrix", "pattern = 'matrix'"),
    ],
)
def test_what_sparse_refuses(text, says):
    with pytest.raises(InvalidArgument, match=says):
        parse_method(text)


def test_options_of_sparse_are_those_of_both_its_methods():
    """A cell is found again by them: what a default means may change."""
    options = parse_method("sparse:layers=laco,weights=dsnot:cycles=9").options
    assert options["layers"] == {"name": "laco", **parse_method("laco").options}
    assert options["weights"] == {"name": "dsnot", "start": "wanda", "cycles": 9, "threshold": 0.1, "overshoot": False}
