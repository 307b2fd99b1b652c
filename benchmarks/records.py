"""The results as a CSV in long form, one line an implementation of a row, and the table that a person reads."""

from __future__ import annotations

import csv
import os
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import torch

from benchmarks.operations import Case
from benchmarks.timing import Measured
from gradpruner.errors import CheckpointError, InvalidArgument
from gradpruner.files import atomic_path

FOLDER = Path(__file__).parent / "results"
Record = TypeVar("Record")


@dataclass(frozen=True)
class Result:
    """One implementation of one row. ratio: its time over ours, median of the rounds, with the least and the most."""

    op: str
    shape: str
    variant: str
    implementation: str
    kind: str
    median_s: float
    min_s: float
    max_s: float
    runs: int
    ratio_to_ours: float
    ratio_min: float
    ratio_max: float
    first_s: float
    extra_bytes: int
    limit_s: float
    limit_by: str
    share_of_limit: float
    bytes: int
    operations: int
    machine: str
    threads: int
    torch: str

    @property
    def row(self) -> tuple[str, str, str]:
        """What the implementations of one row share."""
        return self.op, self.shape, self.variant


def results(case: Case, measured: Sequence[Measured], limit: tuple[float, str], device: torch.device) -> list[Result]:
    """One row's measurements, as the CSV holds them. ratio: round by round where both have as many rounds."""
    ours = next(each for each in measured if each.kind == "ours")
    found = []
    for each in measured:
        times = each.seconds if len(each.seconds) == len(ours.seconds) else each.seconds * len(ours.seconds)
        ratios = [other / own for other, own in zip(times, ours.seconds, strict=True)]
        median = statistics.median(each.seconds)
        found.append(
            Result(
                op=case.op,
                shape=case.shape,
                variant=case.variant,
                implementation=each.name,
                kind=each.kind,
                median_s=median,
                min_s=min(each.seconds),
                max_s=max(each.seconds),
                runs=len(each.seconds),
                ratio_to_ours=statistics.median(ratios),
                ratio_min=min(ratios),
                ratio_max=max(ratios),
                first_s=each.first_s,
                extra_bytes=each.extra_bytes,
                limit_s=limit[0],
                limit_by=limit[1],
                share_of_limit=limit[0] / median,
                bytes=case.count.bytes,
                operations=case.count.operations,
                machine=machine(device),
                threads=torch.get_num_threads(),
                torch=torch.__version__,
            )
        )
    return found


def table_rows(found: Iterable[Result]) -> list[dict[str, Any]]:
    """One line a row: every implementation's time, what counts beside it, and ours over the two yardsticks."""
    rows: dict[tuple[str, str, str], list[Result]] = {}
    for each in found:
        rows.setdefault(each.row, []).append(each)
    return [_table_row(row) for row in rows.values()]


def _table_row(row: Sequence[Result]) -> dict[str, Any]:
    ours = next(each for each in row if each.kind == "ours")
    by_kind = {kind: [each for each in row if each.kind == kind] for kind in ("reference", "released")}
    best = min((each for each in row if each.kind in ("torch", "released")), key=lambda e: e.median_s, default=None)
    released = next(iter(by_kind["released"]), None)
    return {
        "shape": ours.shape,
        "case": ours.variant,
        "reference": _time(next(iter(by_kind["reference"]), None)) + " (once)",
        "released": _time(released),
        "best torch": _time(best),
        "which": best.implementation if best else "",
        **{each.implementation: _time(each) for each in row if each.kind in ("floor", "other")},
        "ours": _time(ours),
        "limit": shown(ours.limit_s),
        "by": ours.limit_by,
        "ours of limit": f"{ours.share_of_limit:.1%}",
        "released / ours": _ratio(released),
        "best torch / ours": _ratio(best),
        "released MB": _megabytes(released),
        "best torch MB": _megabytes(best),
        "ours MB": _megabytes(ours),
        "compile s": next((each.first_s - each.median_s for each in row if each.implementation == "compiled"), None),
        "moved MB": ours.bytes / 1e6,
        "GFLOP": ours.operations / 1e9,
    }


def _time(result: Result | None) -> str:
    return "" if result is None else shown(result.median_s)


def shown(seconds: float) -> str:
    """Three digits and a unit; values of one column may differ by many powers of ten."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-9:.3g} ns"


def _ratio(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{result.ratio_to_ours:.2f} ({result.ratio_min:.2f} to {result.ratio_max:.2f})"


def _megabytes(result: Result | None) -> float | None:
    return None if result is None else result.extra_bytes / 1e6


def machine(device: torch.device) -> str:
    """The processor's or the GPU's name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def default_path(device: torch.device, shapes: str) -> Path:
    """results/<machine>-<shapes>.csv; the folder is made."""
    FOLDER.mkdir(exist_ok=True)
    return FOLDER / f"{re.sub('[^a-z0-9]+', '-', machine(device).lower()).strip('-')}-{shapes}.csv"


def write(path: str | os.PathLike[str], records: Sequence[Any]) -> None:
    """Write dataclass records of one type, atomically. Raises CheckpointError if the disk is full."""
    if not records:
        raise InvalidArgument("records is empty; expected at least one result")
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(records[0])])
        writer.writeheader()
        writer.writerows(asdict(record) for record in records)


def read(path: str | os.PathLike[str], record: type[Record]) -> list[Record]:
    """Read what `write` wrote. Raises InvalidArgument if there is no file, CheckpointError if it is not one."""
    types = get_type_hints(record)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [record(**{name: kind(line[name]) for name, kind in types.items()}) for line in csv.DictReader(file)]
    except FileNotFoundError:
        raise InvalidArgument(f"path {str(path)!r} does not exist; run the benchmark with --csv first") from None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold {record.__name__} lines: {error!r}") from error


def update(path: Path, new: Sequence[Result]) -> None:
    """Put `new` into the file; other rows in it stay if machine, threads and torch are the same."""
    old = read(path, Result) if path.exists() else []
    setting = {(each.machine, each.threads, each.torch) for each in new}
    done = {each.row for each in new}
    kept = [each for each in old if (each.machine, each.threads, each.torch) in setting and each.row not in done]
    write(path, [*kept, *new])
