"""Every test in this folder runs on every backend this process can run, the CPU's in each instruction set.

The Triton interpreter has to be switched on before Triton is imported, so it has a process of its own:
`test_interpreter.py` starts this same folder there. GRADPRUNER_TEST_DEVICE=cuda runs the folder's cases on a card,
through the Triton backend alone.
"""

from __future__ import annotations

import os

import pytest
import torch
from on_device import DEVICE, on_device

from gradpruner import ops

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512bf16", "amx")
BACKENDS = ["triton"] if INTERPRETING or DEVICE else ["reference", *(f"cpp-{name}" for name in INSTRUCTION_SETS)]


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
