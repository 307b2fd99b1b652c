"""Write files and folders whole or not at all, and read JSON.

Content is written under a temporary name beside the target, which is renamed at the end.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gradpruner.errors import CheckpointError, GradPrunerError, InvalidArgument

# Names in the work folder beside a target folder: a lock that a living process holds, the new content, and the old
# content while the two are exchanged.
LOCK, NEW, OLD = ".gradpruner-lock", "new", "old"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Inside, write to a temporary path. Without an error it is synced and renamed to `path`.

    Raises:
        InvalidArgument: the folder of `path` does not exist, or `path` is a folder.
        CheckpointError: writing fails, e.g. because the disk is full.
    """
    target = Path(path)
    if not target.parent.is_dir():
        raise InvalidArgument(f"path {str(target)!r}: the folder {str(target.parent)!r} does not exist")
    if target.is_dir():
        raise InvalidArgument(f"path {str(target)!r} is a folder; expected a file name")
    temporary = _beside(target)
    try:
        temporary.touch(exist_ok=False)  # it gets the permissions of a new file
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {error}; nothing was written") from error
    permissions = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(permissions)  # safetensors may have put a file there that only its owner can read
        temporary.replace(target)
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {error}; nothing was written") from error
    finally:
        temporary.unlink(missing_ok=True)


def need_free(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raise InvalidArgument where `atomic_folder` would refuse. Call it before long work.

    Args:
        path: the folder to write.
        overwrite: whether a folder with content may be replaced.
    """
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise InvalidArgument(f"folder {str(target)!r} is a file; expected a folder to write to")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise InvalidArgument(f"folder {str(target)!r} exists and is not empty; expected a new name, or overwrite")


def need_writable(path: str | os.PathLike[str]) -> None:
    """Raise now what `atomic_path` would raise later. Call it before long work."""
    with contextlib.suppress(_TriedOnly), atomic_path(path):
        raise _TriedOnly


class _TriedOnly(Exception):
    """Leaves `atomic_path` before it gives a file its name."""


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Inside, fill a temporary folder. Without an error it becomes `path`.

    Before, the leftovers of killed processes for the same `path` are removed. A folder that only looks like a
    leftover, for example in an unpacked archive or of another user, is left alone. Files and folders get the
    permissions of new ones.

    Args:
        path: the folder to write. Folders above it are made.
        overwrite: whether an existing folder with content is replaced. It is replaced only at the end.

    Yields:
        The temporary folder.

    Raises:
        InvalidArgument: `path` is a file, or a folder with content and `overwrite` is False.
        CheckpointError: writing fails, e.g. because the disk is full.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_leftovers(target)
        need_free(target, overwrite)
        workplace, lock = _claim(target)
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {error}; nothing was written") from error
    temporary = workplace / NEW
    try:
        temporary.mkdir()  # it gets the permissions of a new folder
        permissions = stat.S_IMODE(temporary.stat().st_mode) & 0o666
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file() and not file.is_symlink():
                with file.open("rb") as stream:
                    os.fsync(stream.fileno())
                file.chmod(permissions)
        if overwrite and target.exists():
            target.replace(workplace / OLD)
        try:
            temporary.replace(target)
        except OSError:
            _restore(workplace, target)
            raise
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {error}; nothing was written") from error
    finally:
        _discard(workplace, target)
        os.close(lock)


def _beside(target: Path) -> Path:
    """Return an unused name beside the target, for content that is not finished."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def _claim(target: Path) -> tuple[Path, int]:
    """Make a work folder beside the target, and a lock in it that ends with this process."""
    workplace = _beside(target)
    workplace.mkdir(mode=0o700)  # fails if it exists
    lock = os.open(workplace / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks, where nobody can take it for a leftover either
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(lock, _proof(workplace, lock))  # only now can it be taken for a leftover
    return workplace, lock


def _proof(workplace: Path, lock: int) -> bytes:
    """Return the content of a lock in a work folder that was made here.

    These are numbers that an archive cannot know before it is unpacked.
    """
    return f"{workplace.lstat().st_ino} {os.fstat(lock).st_ino}".encode()


def _clear_leftovers(target: Path) -> None:
    """Remove the work folders of killed processes for this target: their locks are free."""
    names = re.compile(re.escape(f".{target.name}.") + "[a-z0-9_]{8}")
    for workplace in target.parent.iterdir():
        if not names.fullmatch(workplace.name):
            continue
        with contextlib.suppress(OSError):  # no work folder, held by a living process, or removed by another one
            lock = os.open(workplace / LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if not _is_private(workplace.lstat()) or os.read(lock, 100) != _proof(workplace, lock):
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _restore(workplace, target)
                _discard(workplace, target)
            finally:
                os.close(lock)


def _is_private(status: os.stat_result) -> bool:
    """Whether this is a folder of this user that nobody else can write to."""
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022


def _restore(workplace: Path, target: Path) -> None:
    """Put the old content back, if it was moved away and nothing has its name yet."""
    if (workplace / OLD).exists() and not target.exists():
        (workplace / OLD).replace(target)


def _discard(workplace: Path, target: Path) -> None:
    """Remove a work folder, its lock last, but never the only copy of the old content."""
    shutil.rmtree(workplace / NEW, ignore_errors=True)
    if target.exists():
        shutil.rmtree(workplace / OLD, ignore_errors=True)
    if not (workplace / OLD).exists():
        shutil.rmtree(workplace, ignore_errors=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write JSON, atomically.

    Args:
        path: the file to write.
        content: what JSON can hold.

    Raises:
        InvalidArgument: the folder does not exist.
        CheckpointError: the file cannot be written, e.g. because the disk is full.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read a JSON object.

    Args:
        path: the file to read.
        kind: what the error calls it, e.g. "plan".

    Raises:
        InvalidArgument: there is no such file.
        CheckpointError: it is damaged, or holds something other than an object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise InvalidArgument(f"{kind} file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as a {kind} file: {error}") from None
    return parse_json(text, path, kind)


def parse_json(text: str, path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Decode a JSON object.

    Args:
        text: the content of a file.
        path: the file, for the error.
        kind: what the error calls it, e.g. "plan".

    Raises:
        CheckpointError: the text is not a JSON object.
    """
    try:
        content = decode_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a {kind} file: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a {kind} file: expected a JSON object")
    return content


def decode_json(text: str) -> Any:
    """Decode JSON more strictly than Python does.

    Three more things are refused. A name that is given twice in one object, because it is not clear which value counts.
    Half a surrogate pair, because it cannot be printed or written again. A number of thousands of digits.

    Raises:
        ValueError: the text is refused. JSONDecodeError is a ValueError.
        RecursionError: lists are nested deeper than Python can follow.
    """
    content = json.loads(text, object_pairs_hook=_unique_names)
    if "\\u" in text:
        json.dumps(content, ensure_ascii=False).encode()
    return content


def decode_json_at(text: str, start: int) -> tuple[Any, int]:
    """Decode one JSON value in a text as `decode_json` does.

    Args:
        text: a text with a value and anything after it.
        start: where the value begins.

    Returns:
        The value, and where it ends.

    Raises:
        ValueError: the value is refused.
        RecursionError: lists are nested deeper than Python can follow.
    """
    content, end = json.JSONDecoder(object_pairs_hook=_unique_names).raw_decode(text, start)
    if text.find("\\u", start, end) >= 0:
        json.dumps(content, ensure_ascii=False).encode()
    return content, end


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        raise ValueError("an object has the same name twice")
    return content


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Inside, turn errors from wrong content into a CheckpointError: the file is damaged.

    Args:
        what: the file or folder that is read inside.
    """
    try:
        yield
    except GradPrunerError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{what} is damaged, or was written by another version: {error!r}") from error
