"""Scores of a run's models on tasks of lm-evaluation-harness, kept in a file of the run."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gradpruner.errors import InvalidArgument
from gradpruner.model.load import Loaded
from gradpruner.storage.files import read_json, write_json
from gradpruner.training.harness import Harness

logger = logging.getLogger(__name__)

TASK_SCORES = "tasks.json"


def task_scores(
    harness: Harness,
    folders: Mapping[str, Path],
    folder: Path,
    load: Callable[[str], Loaded],
    *,
    batch_size: int,
    made_from: Mapping[str, str],
) -> dict[str, Any]:
    """Score each model, unless the file of the run has its scores already.

    Scores of other tasks, of other settings or of other models in the file are replaced.

    Args:
        harness: the tasks and how they are scored.
        folders: a checkpoint folder per model name.
        folder: the folder of the run, which gets tasks.json.
        load: loads the model and the tokenizer of a folder.
        batch_size: requests of one forward pass.
        made_from: the digests of what the models were made from. Scores of others are not taken.

    Returns:
        What `Harness.evaluate` returned, by the name of the model.

    Raises:
        InvalidArgument: the folder of a model is gone, or see `Harness.evaluate`.
    """
    path = folder / TASK_SCORES
    same = {"settings": harness.identity(), "made_from": dict(made_from)}
    kept = read_json(path, "task scores") if path.exists() else {}
    scores = kept["scores"] if {name: kept.get(name) for name in same} == same else {}
    for name, checkpoint in folders.items():
        if name in scores:
            continue
        if not checkpoint.is_dir():
            raise InvalidArgument(f"{str(checkpoint)!r} is gone, so the {name} model cannot be scored on tasks")
        logger.info(f"{name}: tasks {', '.join(harness.tasks)}")
        model, tokenizer = load(str(checkpoint))
        scores[name] = harness.evaluate(model, tokenizer, batch_size=batch_size)
        write_json(path, {**same, "scores": scores})
        del model
        gc.collect()
    return {name: scores[name] for name in folders}
