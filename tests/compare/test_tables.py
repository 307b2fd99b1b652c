"""Durations and quantities, as a table shows them."""

from __future__ import annotations

import pytest

from gradpruner.report.numbers import duration, quantity


@pytest.mark.parametrize(("seconds", "words"), [(0.5, "0.5 s"), (96, "96 s"), (444, "7.4 min"), (7500, "2 h 05 min")])
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(("value", "words"), [(0, "0 B"), (999, "999 B"), (999_900, "1 MB"), (3.41e9, "3.41 GB")])
def test_quantities(value, words):
    assert quantity(value, "B") == words
