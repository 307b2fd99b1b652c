"""Method "random": remove layers at random, as a baseline for the other methods."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradpruner.methods.base import Clues, Dropping, register
from gradpruner.model.decoder import Decoder


@register
@dataclass(frozen=True)
class RandomLayers(Dropping):
    """Remove layers in a random order that the seed of the clues fixes.

    With one seed, a plan that removes more layers always contains the plan that removes fewer.

    Args:
        patch: whether gaps are patched, see `Dropping`. Default False.
        adapters: "keep" or "discard", see `Dropping`. Default "discard".
        rank_factor: see `Dropping`. Default 1.
    """

    name: ClassVar[str] = "random"

    def scores(self, clues: Clues) -> Sequence[float]:
        """Score the layers by a shuffled order.

        Args:
            clues: its seed, and the model's number of layers, are used.

        Returns:
            The numbers 0 to layers - 1, shuffled.
        """
        order = [float(j) for j in range(len(Decoder(clues.model).layers))]
        random.Random(clues.seed).shuffle(order)
        return order
