"""Of a matrix of parameters, one readable diagonal runs by default; the rest is marked slow."""

from __future__ import annotations

import collections
from typing import Any

import pytest


def thin_out(items: list[Any]) -> None:
    """Mark as slow what is not on the diagonal of its test's `parametrize` marks.

    Case i of the diagonal takes value i of every mark, counted round: with shapes (a, b, c) and dtypes (x, y), these
    are ax, by, cx. So each value runs at least once, but not each pair. Parameters of fixtures are not part of it:
    every one of them runs with the whole diagonal.
    """
    tests = collections.defaultdict(list)
    for item in items:
        if any(item.iter_markers("parametrize")):
            tests[item.path, item.originalname].append(item)
    for cases in tests.values():
        marks = [(_names(mark), _rows(mark)) for mark in cases[0].iter_markers("parametrize")]
        longest = max(len(values) for _, values in marks)
        diagonal = [tuple(i % len(values) for _, values in marks) for i in range(longest)]
        for case in cases:
            place = tuple(_index(values, [case.callspec.params[name] for name in names]) for names, values in marks)
            if place not in diagonal:
                case.add_marker(pytest.mark.slow)


def _names(mark: pytest.Mark) -> list[str]:
    names = mark.args[0]
    return [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)


def _rows(mark: pytest.Mark) -> list[tuple[Any, ...]]:
    """One tuple per value of the mark, with an entry for each of its names."""
    rows = [value.values if hasattr(value, "marks") else value for value in mark.args[1]]  # of pytest.param
    alone = len(_names(mark)) == 1
    return [
        (row,) if alone and not hasattr(value, "marks") else tuple(row)
        for row, value in zip(rows, mark.args[1], strict=True)
    ]


def _index(rows: list[tuple[Any, ...]], wanted: list[Any]) -> int:
    """By identity first: NaN is equal to nothing."""
    return next(i for i, row in enumerate(rows) if all(a is b or a == b for a, b in zip(row, wanted, strict=True)))
