"""Copies of test examples among those to train on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Sequence

from gradpruner.data.examples import Example, fingerprints, records, taken
from gradpruner.errors import InvalidArgument

logger = logging.getLogger(__name__)


def without_copies(train: Sequence[Example], test: Sequence[Example]) -> Sequence[Example]:
    """Return the training examples that are not equal to a test example.

    What was removed is logged. Examples that have the prompt of a test example and another answer stay, with a warning.

    Args:
        train: what is trained on.
        test: what the trained model is tested on.

    Raises:
        InvalidArgument: nothing would be left.
    """
    tested = set(fingerprints(test))
    places = [place for place, print_ in enumerate(fingerprints(train)) if print_ not in tested]
    removed = len(train) - len(places)
    if removed and not places:
        raise InvalidArgument(f"all {removed} training examples are copies of test examples; expected other test data")
    left = taken(train, places) if removed else train
    if removed:
        logger.warning("data: removed %s training examples that are copies of test examples", f"{removed:,}")
    asked = set(_prompts(test))
    if same := sum(prompt in asked for prompt in _prompts(left)):
        logger.warning("data: %s training examples have the prompt of a test example, with another answer", f"{same:,}")
    return left


def _prompts(examples: Iterable[Example]) -> Iterable[bytes]:
    """Return a digest of the prompt of each example that has an answer."""
    for kind, prompt, answer, tools in records(examples):
        if answer:
            yield hashlib.blake2b(json.dumps([kind, prompt, tools]).encode(), digest_size=16).digest()
