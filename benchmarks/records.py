"""The results as a CSV in long form, one line an implementation of a row, and the table that a person reads."""

from __future__ import annotations

import csv
import math
import os
import platform
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

import torch

from benchmarks.ops.cases import Case
from benchmarks.ops.timing import Measured
from gradpruner.errors import CheckpointError, InvalidArgument
from gradpruner.storage.csv_files import write_lines

FOLDER = Path(__file__).parent / "results"
Record = TypeVar("Record")


@dataclass(frozen=True, kw_only=True)
class Timed:
    """What every line of every CSV ends with.

    Args:
        median_s: median of the rounds, in seconds.
        min_s: fastest round, in seconds.
        max_s: slowest round, in seconds.
        runs: number of rounds.
        extra_bytes: peak of the memory beyond what was in use before.
        machine: name of the processor or card.
        threads: number of CPU threads.
        torch: version of torch.
    """

    median_s: float
    min_s: float
    max_s: float
    runs: int
    extra_bytes: int
    machine: str
    threads: int
    torch: str


@dataclass(frozen=True, kw_only=True)
class Result(Timed):
    """One implementation of one op on one shape.

    On a GPU every time but `call_s` is the device's alone.

    Args:
        op: name of the op.
        shape: shape of the weight, for example "4096x14336".
        variant: rank, number of steps, dtype or the like.
        implementation: name of the implementation.
        kind: "reference", "released", "torch" or "ours".
        ratio_to_ours: its time over ours, median of the rounds.
        ratio_min: the least of these ratios.
        ratio_max: the largest of these ratios.
        first_s: seconds of the first call, compilation included.
        limit_s: least seconds that the machine's limits allow.
        limit_by: "bytes" or "operations", whichever takes longer.
        share_of_limit: `limit_s` over the median.
        bytes: bytes that the op must move.
        operations: floating-point operations that the op must do.
        call_s: median of calls on an idle device, the host's part included.
        late: rounds on a GPU in which the host was not ahead, so that the time has waits in it.
        error: why there is no time ("wrong: ..." for a wrong answer). Every measured figure is then NaN.
    """

    op: str
    shape: str
    variant: str
    implementation: str
    kind: str
    ratio_to_ours: float
    ratio_min: float
    ratio_max: float
    first_s: float
    limit_s: float
    limit_by: str
    share_of_limit: float
    bytes: int
    operations: int
    call_s: float | None = None
    late: int | None = None
    error: str = ""

    @property
    def row(self) -> tuple[str, str, str]:
        """What the implementations of one row share."""
        return self.op, self.shape, self.variant


def timed(seconds: Sequence[float], extra_bytes: int, device: torch.device) -> dict[str, Any]:
    """The fields of `Timed`."""
    return {
        "median_s": statistics.median(seconds),
        "min_s": min(seconds),
        "max_s": max(seconds),
        "runs": sum(not math.isnan(each) for each in seconds),
        "extra_bytes": extra_bytes,
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def ratios(mine: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and most of mine / base, round by round; a single time is set against every round."""
    mine = mine if len(mine) == len(base) else list(mine) * len(base)
    values = [x / y for x, y in zip(mine, base, strict=True)]
    return statistics.median(values), min(values), max(values)


def results(case: Case, measured: Sequence[Measured], limit: tuple[float, str], device: torch.device) -> list[Result]:
    """One row's measurements, as the CSV holds them."""
    ours, found = next(each.seconds for each in measured if each.kind == "ours"), []
    for each in measured:
        ratio, least, most = ratios(each.seconds, ours) if each.seconds and ours else (math.nan,) * 3
        seconds = each.seconds or (math.nan,)
        found.append(
            Result(
                op=case.op,
                shape=case.shape,
                variant=case.variant,
                implementation=each.name,
                kind=each.kind,
                ratio_to_ours=ratio,
                ratio_min=least,
                ratio_max=most,
                first_s=each.first_s,
                limit_s=limit[0],
                limit_by=limit[1],
                share_of_limit=limit[0] / statistics.median(seconds),
                bytes=case.count.bytes,
                operations=case.count.operations,
                call_s=statistics.median(each.calls) if each.calls else None,
                late=each.late if each.calls else None,
                error=each.error,
                **timed(seconds, each.extra_bytes, device),
            )
        )
    return found


def table_rows(found: Iterable[Result]) -> list[dict[str, Any]]:
    """One line a row: every implementation's time, what counts beside it, and ours over the two yardsticks.

    What was wrong or raised has no time; a column says what happened, if that happened to any.
    """
    found = list(found)
    rows = [[each for each in found if each.row == row] for row in dict.fromkeys(each.row for each in found)]
    failed, called = any(each.error for each in found), any(each.call_s is not None for each in found)
    return [_table_row(row, failed, called) for row in rows]


def _table_row(row: Sequence[Result], failed: bool, called: bool) -> dict[str, Any]:
    any_, valid = row[0], [each for each in row if not each.error]
    reference, released, ours = (
        next((each for each in valid if each.kind == kind), None) for kind in ("reference", "released", "ours")
    )
    best = min((each for each in valid if each.kind in ("torch", "released")), key=lambda e: e.median_s, default=None)
    errors = "; ".join(f"{each.implementation}: {each.error}" for each in row if each.error)
    return {
        "shape": any_.shape,
        "case": any_.variant,
        **({"failed": errors} if failed else {}),
        "reference": _time(reference) + " (once)" if reference else "",
        "released": _time(released),
        "best torch": _time(best),
        "which": best.implementation if best else "",
        **{each.implementation: _time(each) for each in valid if each.kind in ("floor", "other")},
        "ours": _time(ours),
        **({"best torch, call": _call(best), "ours, call": _call(ours)} if called else {}),
        "limit": shown(any_.limit_s),
        "by": any_.limit_by,
        "ours of limit": f"{ours.share_of_limit:.1%}" if ours else "",
        "released / ours": _ratio(released),
        "best torch / ours": _ratio(best),
        "released MB": _megabytes(released),
        "best torch MB": _megabytes(best),
        "ours MB": _megabytes(ours),
        "compile s": next((each.first_s - each.median_s for each in valid if each.implementation == "compiled"), None),
        "moved MB": any_.bytes / 1e6,
        "GFLOP": any_.operations / 1e9,
    }


def _time(result: Result | None) -> str:
    return "" if result is None else shown(result.median_s)


def _call(result: Result | None) -> str:
    return "" if result is None or result.call_s is None else shown(result.call_s)


def shown(seconds: float) -> str:
    """Three digits and a unit; values of one column may differ by many powers of ten."""
    for unit, name in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= unit:
            return f"{seconds / unit:.3g} {name}"
    return f"{seconds / 1e-9:.3g} ns"


def _ratio(result: Result | None) -> str:
    if result is None or math.isnan(result.ratio_to_ours):
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
    names = [field.name for field in fields(records[0])]
    last = [field.name for field in fields(Timed) if field.name in names]
    names = [name for name in names if name not in last] + last
    write_lines(path, names, ([getattr(record, name) for name in names] for record in records))


def read(path: str | os.PathLike[str], record: type[Record]) -> list[Record]:
    """Read what `write` wrote; a column that has a default may be missing, as in files older than it.

    Raises InvalidArgument if there is no file, CheckpointError if it is not one.
    """
    types = get_type_hints(record)
    optional = {each.name for each in fields(record) if each.default is not MISSING}  # type: ignore[arg-type]
    try:
        with open(path, newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            names = [name for name in types if name not in optional or name in (lines.fieldnames or ())]
            return [record(**{name: _value(line[name], types[name]) for name in names}) for line in lines]
    except FileNotFoundError:
        raise InvalidArgument(f"path {str(path)!r} does not exist; run the benchmark with --csv first") from None
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not hold {record.__name__} lines: {error!r}") from error


def _value(text: str, kind: Any) -> Any:
    """A cell; an empty one of an optional column is None."""
    of = [each for each in get_args(kind) if each is not type(None)]
    if not of:
        return kind(text)
    return None if text == "" else of[0](text)


def update(path: Path, new: Sequence[Result]) -> None:
    """Put `new` into the file; other rows in it stay if machine, threads and torch are the same."""
    old = read(path, Result) if path.exists() else []
    setting = {(each.machine, each.threads, each.torch) for each in new}
    done = {each.row for each in new}
    kept = [each for each in old if (each.machine, each.threads, each.torch) in setting and each.row not in done]
    write(path, [*kept, *new])
