"""How sure a difference between two models is, judged on the same examples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gradpruner.errors import InvalidArgument

RESAMPLES = 10_000
AT_ONCE = 500  # resamples drawn at a time: a few tens of MB


@dataclass(frozen=True)
class Difference:
    """Mean score of one model minus that of another, and its 95 % interval."""

    mean: float
    low: float
    high: float

    @property
    def ahead(self) -> bool:
        """Whether the interval lies above 0."""
        return self.low > 0

    @property
    def behind(self) -> bool:
        """Whether the interval lies below 0."""
        return self.high < 0


def paired_difference(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]], seed: int = 0) -> Difference:
    """Difference of means by a paired bootstrap over examples (percentiles, 10,000 resamples, seeded).

    ours, theirs: one row of scores a run (seed of training), one score an example, the same examples in both. The
    runs are averaged first: the interval is about other examples, not about other seeds. Raises InvalidArgument.
    """
    if not ours or not theirs or len({len(row) for row in (*ours, *theirs)}) != 1 or not len(ours[0]):
        raise InvalidArgument("ours and theirs: expected the scores of the same examples in every run, at least one")
    differences = np.mean(np.asarray(ours, float), axis=0) - np.mean(np.asarray(theirs, float), axis=0)
    source, means = np.random.default_rng(seed), list[np.ndarray]()
    for start in range(0, RESAMPLES, AT_ONCE):
        chosen = source.integers(len(differences), size=(min(AT_ONCE, RESAMPLES - start), len(differences)))
        means.append(differences[chosen].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Difference(float(differences.mean()), float(low), float(high))
