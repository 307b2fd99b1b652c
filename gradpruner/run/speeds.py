"""Measure how fast models generate, in turns, so that other load affects all of them."""

from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gradpruner.model.accelerator import to_accelerator
from gradpruner.model.load import Loaded
from gradpruner.run.summary import TURNS
from gradpruner.storage.files import read_json, write_json
from gradpruner.training.evaluate import generation_speed

logger = logging.getLogger(__name__)

DEFAULT_TURNS = 5


def speeds_in_turns(
    folders: Mapping[str, Path], load: Callable[[str], Loaded], *, turns: int = DEFAULT_TURNS
) -> dict[str, list[float]]:
    """Measure greedy generation of 64 tokens.

    In each turn every model is loaded, warmed up and timed once, one after the other, so only one is in memory. If
    something slows the machine down for longer than a turn, it hardly changes the ratio of two models within a turn.

    Args:
        folders: a checkpoint folder per model name.
        load: loads the model and the tokenizer of a folder.
        turns: how many turns. Default 5.

    Returns:
        Tokens per second by model name, one number per turn.
    """
    speeds: dict[str, list[float]] = {name: [] for name in folders}
    for _ in range(turns):
        for name, folder in folders.items():
            model, tokenizer = load(str(folder))
            to_accelerator(model)
            speeds[name].append(generation_speed(model, tokenizer, runs=1))
            del model
            gc.collect()
    return speeds


def rows_with_speeds(
    rows: Sequence[Mapping[str, Any]], folders: Mapping[str, Path], file: Path, load: Callable[[str], Loaded]
) -> list[dict[str, Any]]:
    """Add generation speeds to rows of results. They are measured once and kept in a file.

    Args:
        rows: results, each with the name of its model.
        folders: a checkpoint folder per model name.
        file: JSON file of the speeds.
        load: loads the model and the tokenizer of a folder.

    Returns:
        The rows with `tokens_per_second` (a median) and the number of each turn. Where the folder of a model is gone
        and nothing was measured before, `tokens_per_second` is None.
    """
    if not file.exists() or read_json(file, "speeds").keys() != folders.keys():
        if not all(folder.is_dir() for folder in folders.values()):
            return [{"tokens_per_second": None, **row} for row in rows]
        logger.info(f"generation: {' and '.join(folders)} in turns")
        write_json(file, speeds_in_turns(folders, load))
    speeds = read_json(file, "speeds")
    return [
        {**row, "tokens_per_second": statistics.median(speeds[row["name"]]), TURNS: speeds[row["name"]]} for row in rows
    ]
