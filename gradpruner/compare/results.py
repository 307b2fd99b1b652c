"""What `gradpruner compare` measures, one row a run and one row a size, as CSV files hold it. Pure data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from gradpruner.storage.csv_files import read_objects, write_objects


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


def write_results(path: str | os.PathLike[str], results: Sequence[Result]) -> None:
    """Write one line a result, atomically. Raises CheckpointError if the file cannot be written."""
    write_objects(path, Result, results)


def read_results(path: str | os.PathLike[str]) -> list[Result]:
    """The opposite of `write_results`. Raises InvalidArgument if there is no file, CheckpointError if a bad one."""
    return read_objects(path, Result)


def write_costs(path: str | os.PathLike[str], costs: Sequence[Cost]) -> None:
    """Write one line a size, atomically. Raises CheckpointError if the file cannot be written."""
    write_objects(path, Cost, costs)


def read_costs(path: str | os.PathLike[str]) -> list[Cost]:
    """The opposite of `write_costs`. Raises InvalidArgument if there is no file, CheckpointError if a bad one."""
    return read_objects(path, Cost)
