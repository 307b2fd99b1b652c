"""Choose the implementation of an op: by device, or by `GRADPRUNER_BACKEND`.

A backend is a module with one function per op, named like the op and with its signature. By default "cpp" computes for
tensors on the CPU, and "triton" for tensors on a GPU. "reference" computes for all other devices, and where the backend
of a device is not available.
"""

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
    """Say which backends this installation can run.

    Returns:
        For each name in `BACKENDS` "available", or the reason why it is not available.

    Raises:
        InvalidArgument: the environment variable `GRADPRUNER_CPU_ISA` names an instruction set that is not known or
            cannot run here.

    Example:
        >>> available_backends()["reference"]
        'available'
    """
    return {
        name: "available" if isinstance(_load(name), ModuleType) else f"not available: {_load(name)}"
        for name in BACKENDS
    }


def build_note() -> str | None:
    """Return what could not be built of the C++ extension, and why. None if all was."""
    note = Path(__file__).parent.parent / BUILD_NOTE
    return note.read_text(encoding="utf-8").strip() if note.is_file() else None


def backend_for(device: torch.device) -> ModuleType:
    """Return the module that implements every op for tensors on `device`.

    Raises:
        InvalidArgument: `GRADPRUNER_BACKEND` names an unknown or missing backend, or one that is not for this device;
            or `GRADPRUNER_CPU_ISA` names an instruction set that cannot run here.
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
