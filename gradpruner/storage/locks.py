"""Locks between processes that work in one folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import filelock


@contextlib.contextmanager
def claim(path: Path) -> Iterator[bool]:
    """Yield whether this process has the lock `path`.lock. It does not wait for another one.

    A lock that it has stays locked until the block ends.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(f"{path}.lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock `path`.lock inside. Other processes wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{path}.lock"):
        yield
