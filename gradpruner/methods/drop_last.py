"""drop-last: the layers nearest to the output go. No clue is looked at: what anybody can do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from gradpruner.methods.base import Clues, Dropping, register
from gradpruner.model.decoder import Decoder


@register
@dataclass(frozen=True)
class DropLast(Dropping):
    """Remove the last layers."""

    name: ClassVar[str] = "drop-last"

    def scores(self, clues: Clues) -> Sequence[float]:
        """Falling with depth."""
        return [-float(index) for index in range(len(Decoder(clues.model).layers))]
