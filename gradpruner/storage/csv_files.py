"""CSV files with a header: of lines, of mappings, of dataclass objects."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import Any, TypeVar

from gradpruner.errors import CheckpointError, InvalidArgument
from gradpruner.storage.files import atomic_path

Row = TypeVar("Row")
# How `read_objects` reads a cell, by the type of the field.
READERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda cell: float(cell) if cell else None,
}


def write_lines(path: str | os.PathLike[str], names: Sequence[str], lines: Iterable[Sequence[Any]]) -> None:
    """Write a header and lines, atomically. None becomes an empty cell.

    Args:
        path: the file to write.
        names: the columns.
        lines: one value per column.

    Raises:
        InvalidArgument: the folder does not exist.
        CheckpointError: the file cannot be written.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        writer.writerows(lines)


def write_dicts(path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one line per mapping, atomically.

    The columns are all keys, in the order in which they appear.

    Args:
        path: the file to write.
        rows: what to write. A missing key becomes an empty cell.

    Raises:
        InvalidArgument: the folder does not exist.
        CheckpointError: the file cannot be written.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    write_lines(path, names, ([row.get(name, "") for name in names] for row in rows))


def write_objects(path: str | os.PathLike[str], kind: type[Row], rows: Iterable[Row]) -> None:
    """Write one line per dataclass object, atomically.

    Args:
        path: the file to write.
        kind: the dataclass, whose fields are the columns.
        rows: objects of that class.

    Raises:
        InvalidArgument: the folder does not exist.
        CheckpointError: the file cannot be written.
    """
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    write_lines(path, names, (astuple(row) for row in rows))  # type: ignore[call-overload]


def read_objects(path: str | os.PathLike[str], kind: type[Row]) -> list[Row]:
    """Read the objects that `write_objects` wrote.

    Args:
        path: the file to read.
        kind: the dataclass. Its fields are of the types in `READERS`.

    Returns:
        One object per line.

    Raises:
        InvalidArgument: there is no such file.
        CheckpointError: the file is damaged, or holds something else.
    """
    what = f"a {kind.__name__.lower()}s file"
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file, strict=True))
    except OSError as error:
        raise InvalidArgument(f"{str(path)!r} cannot be read as {what}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not {what}: {error}") from None
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    if not lines or lines[0] != names:
        raise CheckpointError(f"{path} is not {what}: expected the columns {','.join(names)}")
    return [_object(path, number, line, kind) for number, line in enumerate(lines[1:], 2)]


def _object(path: str | os.PathLike[str], number: int, line: Sequence[str], kind: type[Row]) -> Row:
    columns = fields(kind)  # type: ignore[arg-type]
    if len(line) != len(columns):
        raise CheckpointError(f"{path}, row {number}: {len(line)} cells; expected {len(columns)}")
    values: list[Any] = []
    for field, cell in zip(columns, line, strict=True):
        try:
            values.append(READERS[str(field.type)](cell))
        except ValueError:
            raise CheckpointError(f"{path}, row {number}: {field.name} = {cell!r}; expected {field.type}") from None
    return kind(*values)
