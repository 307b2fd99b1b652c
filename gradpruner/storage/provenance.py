"""Record what a file or folder was made from, and refuse one made from something else."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gradpruner.errors import InvalidArgument
from gradpruner.storage.files import read_json

MADE_FROM = "made_from"  # the key in a JSON file
RECORD = "made_from.json"  # the file in a folder


def digest(content: Any) -> str:
    """Return 16 hexadecimal digits that identify JSON-like content.

    The order of dictionary keys does not matter.
    """
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


def is_made(path: Path, made_from: Mapping[str, str], *, stale: Iterable[Path] = ()) -> bool:
    """Return whether `path` was finished earlier, from the same inputs.

    A JSON file is finished if it exists. A folder is finished if it holds its record. An empty folder is not finished.

    Args:
        path: a JSON file or a folder.
        made_from: the digest of every input, by the input's name.
        stale: files and folders that were made from `path`. The error names those that exist.

    Raises:
        InvalidArgument: `path` was made from other inputs, or does not record its inputs.
        CheckpointError: the record cannot be read.
    """
    if path.is_dir():
        if not any(path.iterdir()):
            return False
        before = read_json(path / RECORD, "record") if (path / RECORD).is_file() else None
    elif path.exists():
        before = read_json(path, "stage").get(MADE_FROM)
    else:
        return False
    need_same(path, before, made_from, delete=[path, *stale])
    return True


def need_same(path: Path, before: Any, made_from: Mapping[str, str], *, delete: Iterable[Path]) -> None:
    """Raise InvalidArgument unless `path` was made from the same inputs as now.

    Args:
        path: the file or folder.
        before: the record that it has. None if it has none.
        made_from: the digest of every input now, by the input's name.
        delete: what must be deleted to make `path` again. The error names those that exist.
    """
    if before == made_from:
        return
    if isinstance(before, Mapping):
        changed = [name for name in made_from if before.get(name) != made_from[name]]
        names = ", ".join(changed or sorted(before.keys() - made_from.keys()))
        reason = f"{str(path)!r} was made from another {names}"
    else:
        reason = f"{str(path)!r} does not record what it was made from, so it may belong to another run"
    existing = list(dict.fromkeys(str(path) for path in delete if path.exists()))
    raise InvalidArgument(
        f"{reason}; expected the same inputs as before. To make it again, delete {', '.join(map(repr, existing))}"
    )
