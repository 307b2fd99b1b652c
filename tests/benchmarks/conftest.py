"""Garbage is collected quickly while something is measured."""

from __future__ import annotations

import pytest

from benchmarks.ops.timing import quiet_collector


@pytest.fixture(scope="module", autouse=True)
def _quick_collections():
    """Each memory measurement collects garbage, which takes a while with all that pytest has loaded."""
    with quiet_collector():
        yield
