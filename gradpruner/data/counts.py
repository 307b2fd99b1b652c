"""How many examples and tokens became rows, and how many did not."""

from __future__ import annotations

import logging
from dataclasses import dataclass


@dataclass(frozen=True)
class Counts:
    """What became of the examples that were tokenised.

    Args:
        examples: how many there were.
        rows: how many rows they became.
        tokens: tokens of all rows.
        learned: labelled tokens of all rows.
        cut: examples that lost tokens because they were too long.
        cut_tokens: the tokens that these lost.
        skipped: examples that were left out because they were too long.
        skipped_tokens: their tokens.
        split: examples that became several rows.
    """

    examples: int
    rows: int
    tokens: int
    learned: int
    cut: int = 0
    cut_tokens: int = 0
    skipped: int = 0
    skipped_tokens: int = 0
    split: int = 0

    @property
    def level(self) -> int:
        """The level to log `line` at: a warning if tokens were lost."""
        return logging.WARNING if self.cut or self.skipped else logging.INFO

    def line(self) -> str:
        """Return one line that says it all."""
        parts = [
            f"{self.examples:,} examples became {self.rows:,} rows of {self.tokens:,} tokens, {self.learned:,} of them "
            "learned"
        ]
        if self.split:
            parts.append(f"{self.split:,} too long and split into several rows")
        if self.cut:
            parts.append(f"{self.cut:,} too long and cut by {self.cut_tokens:,} tokens in all")
        if self.skipped:
            parts.append(f"{self.skipped:,} too long and skipped, with {self.skipped_tokens:,} tokens")
        return "; ".join(parts if len(parts) > 1 else [*parts, "none is too long"])
