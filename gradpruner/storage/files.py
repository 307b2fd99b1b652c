"""Files appear whole or not at all: written under a temporary name beside the target, then renamed."""

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

# in the folder beside a target where its successor grows: a lock that a living process holds, the successor, and
# the target itself while the two change places
LOCK, NEW, OLD = ".gradpruner-lock", "new", "old"


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
    temporary = _beside(target)
    try:
        temporary.touch(exist_ok=False)  # with the permissions that the process gives a new file
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {error}; nothing was written") from error
    permissions = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.chmod(permissions)  # safetensors puts a file of its own there, for the owner alone
        temporary.replace(target)
    except OSError as error:
        raise CheckpointError(f"could not write {target}: {error}; nothing was written") from error
    finally:
        temporary.unlink(missing_ok=True)


def need_free(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises InvalidArgument where `atomic_folder` would refuse what is there already; asked before long work."""
    target = Path(path)
    if target.exists() and not target.is_dir():
        raise InvalidArgument(f"folder {str(target)!r} is a file; expected a folder to write to")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise InvalidArgument(f"folder {str(target)!r} exists and is not empty; expected a new name, or overwrite")


def need_writable(path: str | os.PathLike[str]) -> None:
    """Raises what `atomic_path` would raise where no file can be written to `path`; asked before long work."""
    with contextlib.suppress(_Tried), atomic_path(path):
        raise _Tried


class _Tried(Exception):
    """Leaves `atomic_path` before it gives a file its name."""


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary folder to fill; on leaving without an error it becomes `path`.

    An existing folder is refused unless it is empty or `overwrite` is given; it is replaced only at the end.
    What a killed process left behind for the same `path` is removed first; a folder that only looks like it, in an
    unpacked archive say or another user's, is left alone. Files and folders get the permissions of new ones.
    Raises InvalidArgument, or CheckpointError if writing fails.
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
        temporary.mkdir()  # with the permissions that the process gives a new folder
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
    """A name beside the target that nothing has, for what is not finished."""
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")


def _claim(target: Path) -> tuple[Path, int]:
    """A folder beside the target for what is not finished, and a lock in it that ends with this process."""
    workplace = _beside(target)
    workplace.mkdir(mode=0o700)  # never one that is there already
    lock = os.open(workplace / LOCK, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with contextlib.suppress(OSError):  # a file system without locks: nobody can take it for a leftover either
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.write(lock, _proof(workplace, lock))  # only now can it be taken for a leftover
    return workplace, lock


def _proof(workplace: Path, lock: int) -> bytes:
    """What the lock of a folder says that was made here: an archive cannot know these numbers before it is unpacked."""
    return f"{workplace.lstat().st_ino} {os.fstat(lock).st_ino}".encode()


def _clear_leftovers(target: Path) -> None:
    """Remove what killed processes left for this target: folders of ours whose lock nobody holds."""
    ours = re.compile(re.escape(f".{target.name}.") + "[a-z0-9_]{8}")
    for workplace in target.parent.iterdir():
        if not ours.fullmatch(workplace.name):
            continue
        with contextlib.suppress(OSError):  # not ours, held by a living process, or gone already
            lock = os.open(workplace / LOCK, os.O_RDWR | os.O_NOFOLLOW)
            try:
                if not _is_private(workplace.lstat()) or os.read(lock, 100) != _proof(workplace, lock):
                    continue
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _restore(workplace, target)
                _discard(workplace, target)
            finally:
                os.close(lock)


def _is_private(found: os.stat_result) -> bool:
    """Whether this is a folder of this user that nobody else can write to."""
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022


def _restore(workplace: Path, target: Path) -> None:
    """Put back the folder that was to be replaced, if it was moved away and nothing has its name yet."""
    if (workplace / OLD).exists() and not target.exists():
        (workplace / OLD).replace(target)


def _discard(workplace: Path, target: Path) -> None:
    """Remove a work folder, its lock last; but never the only copy of what was to be replaced."""
    shutil.rmtree(workplace / NEW, ignore_errors=True)
    if target.exists():
        shutil.rmtree(workplace / OLD, ignore_errors=True)
    if not (workplace / OLD).exists():
        shutil.rmtree(workplace, ignore_errors=True)


def write_json(path: str | os.PathLike[str], content: Any) -> None:
    """Write `content` as JSON, atomically. Raises CheckpointError if the disk is full."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """Read a JSON object. Raises InvalidArgument if there is no such file, CheckpointError if it is damaged."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise InvalidArgument(f"{kind} file {str(path)!r} does not exist") from None
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read as a {kind} file: {error}") from None
    return parse_json(text, path, kind)


def parse_json(text: str, path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The JSON object in `text`, which came from the file `path`. Raises CheckpointError if it is none."""
    try:
        content = decode_json(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not a {kind} file: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a {kind} file: expected a JSON object")
    return content


def decode_json(text: str) -> Any:
    """What JSON `text` says. Raises ValueError, of which JSONDecodeError is one, or RecursionError.

    Refused beside broken text: a name that is given twice in one object, since nobody can tell which value counts;
    half a surrogate pair, which cannot be printed or written again; a number of thousands of digits; and lists in
    lists deeper than Python can follow.
    """
    content = json.loads(text, object_pairs_hook=_each_once)
    if "\\u" in text:
        json.dumps(content, ensure_ascii=False).encode()
    return content


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("an object has the same name twice")
    return found


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what goes wrong when a file's content is used into a CheckpointError that says it is damaged.

    what: the file, or the folder of files, that is read inside.
    """
    try:
        yield
    except GradPrunerError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{what} is damaged, or was written by another version: {error!r}") from error
