"""Locks and files of a comparison whose models are made by several processes together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gradpruner.distributed.processes import first
from gradpruner.storage.files import write_json
from gradpruner.storage.locks import claim, lock


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """As `claim`, for all processes of a launch: the first one has the lock for all."""
    with contextlib.ExitStack() as stack:
        yield first(lambda: stack.enter_context(claim(path)))


@contextlib.contextmanager
def together(path: Path) -> Iterator[None]:
    """As `lock`, for all processes of a launch: the first one has the lock for all."""
    with contextlib.ExitStack() as stack:
        first(lambda: stack.enter_context(lock(path)))
        yield


def write_below(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON into a folder that may not be there yet.

    Args:
        path: the file.
        content: what JSON can hold.
    """
    path.parent.mkdir(exist_ok=True)
    write_json(path, content)
