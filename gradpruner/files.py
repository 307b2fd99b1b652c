"""Files appear whole or not at all: written under a temporary name beside the target, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradpruner.errors import CheckpointError, InvalidArgument


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary path to write to; on leaving without an error it is synced and renamed to `path`.

    Raises InvalidArgument if the folder does not exist, CheckpointError if writing fails (a full disk, say).
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise InvalidArgument(f"path {str(target)!r}: the folder {str(target.parent)!r} does not exist")
    if target.is_dir():
        raise InvalidArgument(f"path {str(target)!r} is a folder; expected a file name")
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {error}; nothing was written") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to fill; on leaving without an error it becomes `path`.

    An existing folder is refused unless it is empty or `overwrite` is given; it is replaced only at the end.
    Raises InvalidArgument, or CheckpointError if writing fails.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise InvalidArgument(f"folder {str(target)!r} is a file; expected a folder to write to")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise InvalidArgument(f"folder {str(target)!r} exists and is not empty; expected a new name, or overwrite")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {error}; nothing was written") from error
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
        temporary.chmod(0o755)
        if target.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            target.replace(old / "folder")
            try:
                temporary.replace(target)
            except OSError:
                (old / "folder").replace(target)
                raise
            finally:
                shutil.rmtree(old, ignore_errors=True)
        else:
            temporary.replace(target)
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {error}; nothing was written") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` as JSON, atomically. Raises CheckpointError if the disk is full."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read a JSON object. Raises InvalidArgument if there is no such file, CheckpointError if it is damaged."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        raise InvalidArgument(f"{kind} file {str(path)!r} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not a {kind} file: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a {kind} file: expected a JSON object")
    return content
