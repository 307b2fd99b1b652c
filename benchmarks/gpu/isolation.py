"""A function in a process of its own, with a time limit: what hangs is killed with all that it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

POLL = 0.05  # seconds


@dataclass(frozen=True)
class Ended:
    """How a process ended: "ok", "failed" or "killed at its limit". error: the last line of its traceback."""

    how: str
    seconds: float
    error: str = ""


def run_apart(work: Callable[[], None], limit: float, log: Path) -> Ended:
    """Run `work` in a forked process, whose output goes to the end of `log`.

    The process leads a session of its own, so that the limit ends its children too. A fork is chosen because every
    part needs the imports that this process has made; this process must not have touched a GPU.

    Args:
        work: called without arguments.
        limit: seconds after which it is killed.
        log: file for its output and its traceback.
    """
    began = time.monotonic()
    sys.stdout.flush()
    sys.stderr.flush()
    before = log.stat().st_size if log.exists() else 0
    child = os.fork()
    if child == 0:
        _as_child(work, log)
    status = None
    while status is None and time.monotonic() - began < limit:
        found, code = os.waitpid(child, os.WNOHANG)
        status = code if found else None
        time.sleep(POLL)
    with contextlib.suppress(ProcessLookupError):  # also what a part that has ended left behind
        os.killpg(child, signal.SIGKILL)
    seconds = time.monotonic() - began
    if status is None:
        os.waitpid(child, 0)
        return Ended("killed at its limit", seconds)
    if os.waitstatus_to_exitcode(status) == 0:
        return Ended("ok", seconds)
    with log.open(encoding="utf-8", errors="replace") as file:
        file.seek(before)
        lines = [line.strip() for line in file if line.strip()]
    return Ended("failed", seconds, lines[-1] if lines else f"exit status {os.waitstatus_to_exitcode(status)}")


def _as_child(work: Callable[[], None], log: Path) -> None:
    os.setsid()
    code = 1
    try:
        with log.open("a", encoding="utf-8") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            sys.stdout = sys.stderr = file
            try:
                work()
                code = 0
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)  # past this process's own exit handlers, which belong to the parent
