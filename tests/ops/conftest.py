"""Every test in this folder runs on every backend this process can run.

The Triton interpreter has to be switched on before Triton is imported, so it has a process of its own:
`test_interpreter.py` starts this same folder there.
"""

from __future__ import annotations

import os

import pytest

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(params=["triton"] if INTERPRETING else ["reference", "cpp"])
def backend(request, monkeypatch):
    monkeypatch.setenv("GRADPRUNER_BACKEND", request.param)
    return request.param
