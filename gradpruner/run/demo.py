"""The whole run on a model and data that need no hub, no account and no preparation."""

from __future__ import annotations

import logging
import os
from typing import Any

from gradpruner.model.load import DEMO_MODEL
from gradpruner.run.demo_data import demo_examples, majority_share
from gradpruner.run.job import Job
from gradpruner.run.run import Run
from gradpruner.training.recipe import Recipe

logger = logging.getLogger(__name__)

# Sized for less than ten minutes on two cores: SmolLM2-135M, 80 steps of 8 paragraphs of the Python reference.
JOB = Job(
    source=DEMO_MODEL,
    steps=80,
    recipe=Recipe(batch_size=8, learning_rate=1e-3),
    ratio=0.4,
    probe_steps=10,
    max_length=192,
    train_on="answer",
    dtype="bfloat16",
)


def demo(folder: str | os.PathLike[str], *, quiet: bool = False) -> dict[str, Any]:
    """Fine-tune SmolLM2-135M to name the chapter of a paragraph, dense and pruned.

    The paragraphs are from the Python reference.

    Args:
        folder: where everything is written, as by `Run`. Run it again to resume.
        quiet: whether to show no progress bars.

    Returns:
        The results of the run, as `results.json` holds them.

    Raises:
        InvalidArgument: the model's wheel is not installed.
    """
    train_examples, test_examples = demo_examples()
    logger.info(
        f"{len(train_examples)} paragraphs to train on, {len(test_examples)} held out; always naming the largest "
        f"chapter scores {majority_share(test_examples):.3f}"
    )
    return Run(JOB, train_examples, test_examples, folder, quiet=quiet).everything()
