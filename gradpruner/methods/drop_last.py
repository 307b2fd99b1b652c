"""Method "drop-last": remove the layers nearest to the output. It uses no data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradpruner.methods.base import Clues, Dropping, register
from gradpruner.model.decoder import Decoder


@register
@dataclass(frozen=True)
class DropLast(Dropping):
    """Remove the last layers. This is the simplest baseline.

    Args:
        patch: whether gaps are patched, see `Dropping`. Default False.
        adapters: "keep" or "discard", see `Dropping`. Default "discard".
        rank_factor: see `Dropping`. Default 1.
    """

    name: ClassVar[str] = "drop-last"

    def scores(self, clues: Clues) -> Sequence[float]:
        """Score each layer by its distance to the output.

        Args:
            clues: only the model's number of layers is used.

        Returns:
            0, -1, -2 and so on, one per layer.
        """
        return [-float(index) for index in range(len(Decoder(clues.model).layers))]
