"""Which implementation of an op runs: by device, or by force through `GRADPRUNER_BACKEND`."""

from __future__ import annotations

import importlib
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import torch

from gradpruner.errors import InvalidArgument

BACKENDS = ("reference", "triton", "cpp")
BUILD_NOTE = "_cpu_build.txt"  # in the package; setup.py writes it
_MODULES = {
    "reference": "gradpruner.ops.reference",
    "triton": "gradpruner.kernels.launch",
    "cpp": "gradpruner.ops.cpp",
}


@cache
def _load(name: str) -> ModuleType | ImportError:
    try:
        return importlib.import_module(_MODULES[name])
    except ImportError as error:  # no compiler at install time, or no Triton wheel for this machine
        return error


def available_backends() -> dict[str, str]:
    """What this installation can run: backend name to "available" or the reason it is not."""
    return {
        name: "available" if isinstance(_load(name), ModuleType) else f"not available: {_load(name)}"
        for name in BACKENDS
    }


def build_note() -> str | None:
    """What installing tried to build for the C++ extension and had to leave out, and why; None if it was nothing."""
    note = Path(__file__).parent.parent / BUILD_NOTE
    return note.read_text(encoding="utf-8").strip() if note.is_file() else None


def backend_for(device: torch.device) -> ModuleType:
    """The module that implements every op for tensors on `device`.

    Raises InvalidArgument if `GRADPRUNER_BACKEND` names an unknown or missing backend.
    """
    forced = os.environ.get("GRADPRUNER_BACKEND")
    if forced:
        if forced not in BACKENDS:
            raise InvalidArgument(f"GRADPRUNER_BACKEND={forced!r}: accepted are {', '.join(BACKENDS)}")
        module = _load(forced)
        if isinstance(module, ImportError):
            raise InvalidArgument(f"GRADPRUNER_BACKEND={forced!r} is not available here: {module}")
        if forced == "cpp" and device.type != "cpu":
            raise InvalidArgument(f"GRADPRUNER_BACKEND='cpp' runs on the CPU; the tensors are on {device}")
        return module
    preferred = {"cpu": "cpp", "cuda": "triton"}.get(device.type, "reference")
    module = _load(preferred)
    if isinstance(module, ImportError):
        module = _load("reference")
    assert isinstance(module, ModuleType)
    return module
