"""What `gradpruner compare` measures, as its CSV files hold it. Pure data."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from gradpruner.storage.csv_files import read_objects, write_objects


@dataclass(frozen=True)
class Result:
    """One model, trained and scored.

    Args:
        method: what removed the layers, "dense" for the uncut model.
        count: how many layers were removed, 0 for the dense model.
        ratio: their share of all decoder layers.
        seed: the training seed.
        exact_match: share of the answers that are right, None without answers.
        macro_f1: mean F1 over the classes, None with more than 10 of them.
        perplexity: of the test examples, None where it was not measured.
        examples: how many test examples there were.
        layers: how many decoder layers remain.
        parameters: how many parameters remain.
        removed: the removed layers, "5 6 8".
        merged: those of them that were merged first, and into which, "6>5 8>4".
        steps: optimizer steps, those of a probe included.
        first_loss: mean training loss of the first 10 steps after the cut.
        last_loss: mean training loss of the last 20 steps.
        seconds: wall time of everything, from the probe to the end of training.
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
    """What a model of so many layers costs, measured alone.

    Args:
        layers: how many decoder layers remain.
        count: how many were removed.
        train_step_seconds: median time of a training step.
        train_peak_bytes: peak memory in training, beyond what the process held before the model was loaded.
        generate_seconds: time to generate 64 tokens.
        generate_peak_bytes: peak memory in generation, likewise.
        checkpoint_bytes: size of the parameters on disk.
        train_flops: floating-point operations of a training step.
    """

    layers: int
    count: int
    train_step_seconds: float
    train_peak_bytes: int
    generate_seconds: float
    generate_peak_bytes: int
    checkpoint_bytes: int
    train_flops: float


def write_results(path: str | os.PathLike[str], results: Sequence[Result]) -> None:
    """Write one line per result, atomically.

    Args:
        path: the CSV file.
        results: what to write.

    Raises:
        CheckpointError: the file cannot be written.
    """
    write_objects(path, Result, results)


def read_results(path: str | os.PathLike[str]) -> list[Result]:
    """Read what `write_results` wrote.

    Raises:
        InvalidArgument: there is no such file.
        CheckpointError: it is damaged.
    """
    return read_objects(path, Result)


def write_costs(path: str | os.PathLike[str], costs: Sequence[Cost]) -> None:
    """Write one line per number of removed layers, atomically.

    Args:
        path: the CSV file.
        costs: what to write.

    Raises:
        CheckpointError: the file cannot be written.
    """
    write_objects(path, Cost, costs)


def read_costs(path: str | os.PathLike[str]) -> list[Cost]:
    """Read what `write_costs` wrote.

    Raises:
        InvalidArgument: there is no such file.
        CheckpointError: it is damaged.
    """
    return read_objects(path, Cost)
