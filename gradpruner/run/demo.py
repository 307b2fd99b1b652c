"""The main job on an embedded default: no hub, no account, nothing to prepare."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from gradpruner.model.load import DEMO_MODEL
from gradpruner.run.demo_data import demo_examples, majority_share
from gradpruner.run.job import Job
from gradpruner.run.run import Run
from gradpruner.training.recipe import Recipe

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


def demo(
    folder: str | os.PathLike[str], *, say: Callable[[str], None] = lambda line: None, quiet: bool = False
) -> dict[str, Any]:
    """Fine-tune SmolLM2-135M dense and pruned to tell which chapter of the Python reference a paragraph is from.

    Writes what `Run` writes into `folder` and returns its results. Raises InvalidArgument if the model's wheel
    is not installed.
    """
    train_examples, test_examples = demo_examples()
    say(
        f"{len(train_examples)} paragraphs to train on, {len(test_examples)} held out; always naming the largest "
        f"chapter scores {majority_share(test_examples):.3f}"
    )
    return Run(JOB, train_examples, test_examples, folder, say=say, quiet=quiet).everything()
