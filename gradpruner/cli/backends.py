"""The command `backends`: which kernels this installation can run."""

from __future__ import annotations

import argparse
import os
import shutil
from typing import Any

from gradpruner.cli import options as given


def add_backends(commands: Any) -> None:
    """Add the command `backends`."""
    given.command(
        commands, "backends", _backends, "Show which kernels this installation can run.", "gradpruner backends"
    )


def _backends(options: argparse.Namespace) -> dict[str, Any]:
    from gradpruner.ops import available_backends
    from gradpruner.ops.backends import build_note

    states = available_backends()
    if states["cpp"] == "available":
        from gradpruner.ops.cpp import ISA

        states["cpp instruction set"] = ISA
    note = build_note()
    if note is not None:
        states["cpp build"] = note
    if states["triton"] == "available" and not _finds_c_compiler():
        states["triton on a GPU"] = "needs a C compiler, as Triton does: install gcc or clang, or name one in CC"
    return {"json": states, "line": "\n".join(f"{name}: {state}" for name, state in states.items())}


def _finds_c_compiler() -> bool:
    """Look where Triton looks, which compiles a small C file before the first kernel on a GPU."""
    return "CC" in os.environ or any(map(shutil.which, ("gcc", "clang")))
