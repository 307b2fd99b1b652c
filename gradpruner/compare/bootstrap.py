"""How sure the difference between two models is, on the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gradpruner.errors import InvalidArgument

RESAMPLES = 10_000
AT_ONCE = 500  # resamples drawn at a time: a few tens of MB
Standing = Literal["ahead", "level", "behind"]


@dataclass(frozen=True)
class Difference:
    """The mean score of one model minus that of another, with its 95 % interval.

    Args:
        mean: the difference of the means.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    mean: float
    low: float
    high: float

    @property
    def standing(self) -> Standing:
        """Where the first model stands; "level" if the interval holds zero."""
        return "ahead" if self.low > 0 else "behind" if self.high < 0 else "level"


def paired_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], seed: int = 0) -> Difference:
    """Return the difference of two models' means by a paired bootstrap over the examples.

    The runs of a model are averaged first. So the interval says what other examples would have given, not what other
    training seeds would have given.

    Args:
        ours: scores of shape (runs, examples), one run per training seed.
        theirs: the same for the other model, on the same examples. It may have another number of runs.
        seed: of the 10,000 resamples. The interval is made of their percentiles.

    Raises:
        InvalidArgument: there is no run, no example, or a run with another number of examples.
    """
    if not ours or not theirs or len({len(row) for row in (*ours, *theirs)}) != 1 or not len(ours[0]):
        raise InvalidArgument("ours and theirs: expected the scores of the same examples in every run, at least one")
    differences = np.mean(np.asarray(ours, float), axis=0) - np.mean(np.asarray(theirs, float), axis=0)
    source, means = np.random.default_rng(seed), list[np.ndarray]()
    for start in range(0, RESAMPLES, AT_ONCE):
        resample = source.integers(len(differences), size=(min(AT_ONCE, RESAMPLES - start), len(differences)))
        means.append(differences[resample].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Difference(float(differences.mean()), float(low), float(high))
