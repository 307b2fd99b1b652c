"""What `gradpruner compare` measures, one row a run and one row a size, as CSV files hold it. Pure data."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from gradpruner.errors import CheckpointError, InvalidArgument
from gradpruner.storage.files import atomic_path


@dataclass(frozen=True)
class Result:
    """One model, trained and scored.

    method: "dense" for the uncut model, whose count is 0. count, ratio: layers removed, and their share. layers: left.
    removed: "5 6 8", the layers that went; merged: "6>5 8>4", those of them that were folded, and into which.
    steps: optimizer steps, a probe's included. first_loss, last_loss: means of the first 10 steps' after the cut and
    of the last 20. seconds: wall time of everything, from the probe to the end of training.
    """

    method: str
    count: int
    ratio: float
    seed: int
    exact_match: float | None
    macro_f1: float | None
    perplexity: float | None
    examples: int
    layers: int
    parameters: int
    removed: str
    merged: str
    steps: int
    first_loss: float
    last_loss: float
    seconds: float


@dataclass(frozen=True)
class Cost:
    """What a model of so many layers costs, measured alone. layers: left; count: removed."""

    layers: int
    count: int
    train_step_seconds: float
    train_peak_bytes: int
    generate_seconds: float
    generate_peak_bytes: int
    checkpoint_bytes: int
    train_flops: float


Row = TypeVar("Row", Result, Cost)
READERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda cell: float(cell) if cell else None,
}


def write_results(path: str | os.PathLike[str], results: Sequence[Result]) -> None:
    """Write one line a result, atomically. Raises CheckpointError if the file cannot be written."""
    _write(path, Result, results)


def read_results(path: str | os.PathLike[str]) -> list[Result]:
    """The opposite of `write_results`. Raises InvalidArgument if there is no file, CheckpointError if a bad one."""
    return _read(path, Result)


def write_costs(path: str | os.PathLike[str], costs: Sequence[Cost]) -> None:
    """Write one line a size, atomically. Raises CheckpointError if the file cannot be written."""
    _write(path, Cost, costs)


def read_costs(path: str | os.PathLike[str]) -> list[Cost]:
    """The opposite of `write_costs`. Raises InvalidArgument if there is no file, CheckpointError if a bad one."""
    return _read(path, Cost)


def _write(path: str | os.PathLike[str], kind: type[Row], rows: Sequence[Row]) -> None:
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(kind))
        writer.writerows(astuple(row) for row in rows)


def _read(path: str | os.PathLike[str], kind: type[Row]) -> list[Row]:
    what = f"a {kind.__name__.lower()}s file"
    try:
        with Path(path).open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file, strict=True))
    except OSError as error:
        raise InvalidArgument(f"{str(path)!r} cannot be read as {what}: {error.strerror}") from None
    except (csv.Error, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not {what}: {error}") from None
    names = [field.name for field in fields(kind)]
    if not lines or lines[0] != names:
        raise CheckpointError(f"{path} is not {what}: expected the columns {','.join(names)}")
    return [_row(path, number, line, kind) for number, line in enumerate(lines[1:], 2)]


def _row(path: str | os.PathLike[str], number: int, line: Sequence[str], kind: type[Row]) -> Row:
    columns = fields(kind)
    if len(line) != len(columns):
        raise CheckpointError(f"{path}, row {number}: {len(line)} cells; expected {len(columns)}")
    values: list[Any] = []
    for field, cell in zip(columns, line, strict=True):
        try:
            values.append(READERS[str(field.type)](cell))
        except ValueError:
            raise CheckpointError(f"{path}, row {number}: {field.name} = {cell!r}; expected {field.type}") from None
    return kind(*values)
