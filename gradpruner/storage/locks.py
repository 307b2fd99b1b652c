"""Locks between processes that work in one folder, on one machine or on several.

A lock is a file that its holder makes, and touches again and again while it works (`filelock.SoftFileLease`). It needs
nothing of the file system but that a file can be made by one process only. The system's own locks (flock) are not used,
because on some network file systems they hold on one machine alone, or are missing.

A lock of a process that died is taken over: at once on the same machine, and after `LEASE` seconds on another one.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import filelock

from gradpruner.errors import GradPrunerError

logger = logging.getLogger(__name__)

LEASE = 120.0  # seconds without a sign of life after which another machine takes a lock over
POLL = 0.2  # seconds between two attempts while a process waits


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Yield whether this process has the lock `path`.lock. It does not wait for another one.

    A lock that it has stays locked until the block ends. To find out that a holder on another machine has died, claim
    the same path again and again.
    """
    held = _lease(path)
    if held.is_locked:  # by this process
        yield False
        return
    try:
        held.acquire(blocking=False)
    except filelock.Timeout:
        yield False
        return
    with _holding(held):
        yield True


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock `path`.lock inside. Other processes wait."""
    held = _lease(path)
    held.acquire(poll_interval=POLL)
    with _holding(held):
        yield


def holder(path: Path) -> str | None:
    """Return who has the lock `path`.lock, as "process PID on HOST", or None if nobody has it."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = Path(f"{path}.lock").read_text(encoding="utf-8").splitlines()
        about = dict(line.split("=", 1) for line in lines if "=" in line)
        return f"process {about.get('pid', '?')} on {about.get('host', '?')}"
    return None


def _lease(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    return _lease_of(path.absolute())


@functools.cache  # it remembers since when another holder has given no sign of life
def _lease_of(path: Path) -> Any:
    return filelock.SoftFileLease(f"{path}.lock", lease_duration=LEASE, on_compromise=_lost)


@contextlib.contextmanager
def _holding(held: Any) -> Iterator[None]:
    """Release a lock at the end.

    Raises GradPrunerError if another process has taken it over meanwhile.
    """
    try:
        yield
    finally:
        lost = held.compromise
        held.release()
    if lost is not None:
        raise GradPrunerError(f"the lock {held.lock_file} was lost to another process; see the message before")


def _lost(loss: Any) -> None:
    """Stop this process: another one does the same work now."""
    logger.error(
        f"the lock {loss.lock_file} was lost ({loss.reason}): this process gave no sign of life for {LEASE:.0f} "
        "seconds, or its file was deleted. It stops, because another process may do the same work now"
    )
    os.kill(os.getpid(), signal.SIGINT)
