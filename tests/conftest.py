"""What every test run has in common."""

from __future__ import annotations

import atexit
import gc
import os
from typing import Any

import pytest

pytest_plugins = ["cli_home", "local_hub"]  # fixtures: home, hub

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported: of several workers, each computes on one thread
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish(session: Any) -> None:
    """Every training collects garbage, and would look at all that the imports have left each time."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else native libraries report leaks at the end


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: Any, nextitem: Any) -> None:
    """After each file, the same for what the file has imported."""
    if nextitem is not None and nextitem.path != item.path:
        gc.collect()
        gc.freeze()
