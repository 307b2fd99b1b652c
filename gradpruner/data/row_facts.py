"""One number for each of many rows, from a column where the rows have one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gradpruner.model.loss import IGNORED

Row = Mapping[str, Any]


def length_of(row: Row) -> int:
    """Return how many tokens a row has."""
    return len(row["input_ids"])


def learned_tokens(row: Row) -> int:
    """Return how many tokens of a row are predicted and have a label.

    Nothing predicts the first token.
    """
    return sum(label != IGNORED for label in row["labels"][1:])


def highest_token(row: Row) -> int:
    """Return the highest token id of a row, 0 if it is empty."""
    return int(max(row["input_ids"], default=0))


FACTS = {"length": length_of, "learned": learned_tokens, "highest": highest_token}


def fact(rows: Sequence[Row], name: str) -> np.ndarray[Any, Any]:
    """Return one number for every row.

    Args:
        rows: tokenised rows. Those that have a method `fact`, as rows on disk do, are not read one by one.
        name: "length", "learned" or "highest", see the functions of this module.
    """
    known = getattr(rows, "fact", None)
    if known is not None:
        return np.asarray(known(name))
    return np.fromiter((FACTS[name](row) for row in rows), dtype=np.int64, count=len(rows))
