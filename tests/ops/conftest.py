"""Every test in this folder runs on every backend this process can run, the CPU's in each instruction set.

By default only a diagonal of each test's parameters runs, on every backend: see `diagonal.py`. `-m "slow or not slow"`
runs the whole matrix of dtypes, shapes and special values.

The Triton interpreter has to be switched on before Triton is imported, so it is a command of its own:
`TRITON_INTERPRET=1 python -m pytest tests/ops`. GRADPRUNER_TEST_DEVICE=cuda runs the folder on a card, the whole
matrix, through the Triton backend alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from diagonal import thin_out
from on_device import DEVICE, on_device

from gradpruner import ops

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
BACKENDS = ["triton"] if INTERPRETING or DEVICE else ["reference", *(f"cpp-{name}" for name in INSTRUCTION_SETS)]


@pytest.hookimpl(tryfirst=True)  # before tests are deselected by their marks
def pytest_collection_modifyitems(items):
    if not DEVICE:
        own = [item for item in items if item.path.parent == Path(__file__).parent]
        thin_out(own)
        for item in own:
            item.add_marker(pytest.mark.in_ci)


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    name, _, instructions = request.param.partition("-")
    monkeypatch.setenv("GRADPRUNER_BACKEND", name)
    for op in ops.__all__ if DEVICE else ():
        if isinstance(getattr(ops, op), torch.library.CustomOpDef):
            monkeypatch.setattr(ops, op, on_device(getattr(ops, op), DEVICE))
    if not instructions:
        yield name
        return
    from gradpruner import _cpu  # imported here: the interpreter's process needs no extension

    try:
        _cpu.select_variant(instructions)
    except ValueError as error:
        pytest.skip(str(error))
    yield name
    _cpu.select_variant("")
