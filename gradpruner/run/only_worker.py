"""Let one command at a time work on a result."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from gradpruner.distributed.processes import first
from gradpruner.errors import InvalidArgument
from gradpruner.storage.locks import claim, holder


@contextlib.contextmanager
def only_worker(result: str | os.PathLike[str], place: str | os.PathLike[str] | None = None) -> Iterator[None]:
    """Inside, no other command that asks here for the same result works on it.

    Processes that a launcher started count as one. A lock file says who works. If that process dies, the lock is free.

    Args:
        result: the file or folder that is written.
        place: the lock file without its ending ".lock". Default: the lock is beside the result.

    Raises:
        InvalidArgument: another command works on it, or the lock file cannot be written.
    """
    name, path = os.fspath(result), Path(os.path.realpath(result if place is None else place))
    with contextlib.ExitStack() as stack:

        def take() -> None:
            try:
                free = stack.enter_context(claim(path))
            except OSError as error:
                raise InvalidArgument(f"{name!r} cannot be written: {error}") from error
            if not free:
                who = holder(path) or "another process"
                raise InvalidArgument(
                    f"{name!r}: {who} is working on it; expected another name, or the same command once it has ended"
                )

        first(take)
        yield
