"""random: what a choice without any clue is worth."""

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
    """Remove layers by lot, drawn from the clues' seed; more layers are always these and others."""

    name: ClassVar[str] = "random"

    def scores(self, clues: Clues) -> Sequence[float]:
        """A shuffled order."""
        order = [float(j) for j in range(len(Decoder(clues.model).layers))]
        random.Random(clues.seed).shuffle(order)
        return order
