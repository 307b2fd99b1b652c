"""ratio = "auto": choose how many layers are removed, by trying cuts.

The margins between layer scores propose a handful of counts. The dense model and the cuts that a bisection asks for are
trained for a few steps and scored on held-out examples. The largest count that loses no more of the dense model's score
than the user allows is taken.
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

from gradpruner.data.examples import fingerprints, taken
from gradpruner.distributed.processes import first
from gradpruner.errors import GradPrunerError, InvalidArgument
from gradpruner.probe.selection import lowest_first, margin
from gradpruner.storage.files import read_json, reading, write_json
from gradpruner.storage.provenance import MADE_FROM, is_made
from gradpruner.training.evaluate import Evaluation

AUTO = "auto"
MAX_LOST = 0.01
LEAST, MOST, HANDFUL = Fraction(1, 10), Fraction(6, 10), 5  # shares of the layers, and counts to try between them
CHECK_ROWS, CHECK_SHARE = 200, Fraction(1, 10)  # examples held out for the check: at most, and of all
EXACT, PERPLEXITY = "exact match", "1 / perplexity"

H = TypeVar("H", bound=Hashable)


@dataclass(frozen=True)
class Trial:
    """A cut that was tried, after the steps of the check.

    Args:
        count: how many layers were removed.
        exact_match: share of the held-out examples that were answered exactly, None where there are no answers.
        perplexity: on the held-out examples.
        lost: share of the dense model's score that is lost.
        margin: of the cut, see `gradpruner.probe.selection.margin`.
    """

    count: int
    exact_match: float | None
    perplexity: float
    lost: float
    margin: float


@dataclass(frozen=True)
class Choice:
    """How many layers are removed, and why.

    Args:
        count: how many are removed.
        layers: decoder layers of the dense model.
        candidates: the counts that could be tried.
        bound: share of the dense model's score that may be lost.
        measure: the score that decides, "exact match" or "1 / perplexity".
        dense: what the dense model scored.
        trials: the cuts that were tried, by count.
        steps: training steps of each trial.
        spent: training steps of all trials and of the dense model, beyond those of the job.
    """

    count: int
    layers: int
    candidates: tuple[int, ...]
    bound: float
    measure: str
    dense: Mapping[str, Any]
    trials: tuple[Trial, ...]
    steps: int
    spent: int

    @property
    def reason(self) -> str:
        """One sentence for people."""
        exact, examples = self.dense["exact_match"], self.dense["examples"]
        if self.measure == EXACT:
            unit = f"one example is {1 / (exact * examples):.1%}"
        elif exact is None:
            unit = "there are no answers to match"
        else:
            unit = "exact match cannot decide: the dense model's is 0"
        lost = {t.count: f"{t.lost:.1%} lost" if t.lost > 0 else "nothing lost" for t in self.trials}
        own = lost.pop(self.count)
        others = ", ".join(f"{count}: {how_much}" for count, how_much in lost.items())
        return (
            f"{self.count} of {self.layers} layers are removed, the most of the candidates "
            f"{', '.join(map(str, self.candidates))} with at most {self.bound:.1%} of the dense model's "
            f"{self.measure} ({unit}) lost on {examples} held-out examples after {self.steps} training steps: {own}"
            f"{f' ({others})' if others else ''}; the check took {self.spent} steps beyond those of the run."
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the choice as JSON holds it."""
        content = {**asdict(self), "candidates": list(self.candidates), "trials": [asdict(t) for t in self.trials]}
        return {**content, "reason": self.reason}


def candidates(scores: Sequence[float], protect: Iterable[int] = (0,), *, least: int = 1) -> list[int]:
    """Return the counts to try, ascending.

    The range from 10 % to 60 % of the layers is divided into five parts. Of each part, the count with the largest
    margin is taken, and of equal margins the smaller count. The parts give the bisection small and large cuts to turn
    to, wherever the margins are.

    Args:
        scores: layer scores.
        protect: layers that are never removed. Default: the first.
        least: the smallest count. Default 1.

    Raises:
        InvalidArgument: no count is left.
    """
    protected = set(protect)
    first = max(least, math.ceil(LEAST * len(scores)))
    last = min(math.floor(MOST * len(scores)), len(scores) - max(1, len(protected)))
    counts = range(first, last + 1)
    if not counts:
        raise InvalidArgument(
            f"ratio = 'auto' of {len(scores)} layers: no count is from {first} to {last}"
            f"{f' (merge = {least} needs at least {least})' if least > 1 else ''}; give a ratio or a count"
        )
    parts = min(HANDFUL, len(counts))
    edges = [len(counts) * part // parts for part in range(parts + 1)]
    order = lowest_first(scores, protected)
    return [max(counts[a:b], key=lambda count: margin(scores, order[:count], protected)) for a, b in pairwise(edges)]


def search(counts: Sequence[int], trial_of: Callable[[int], Trial], bound: float) -> tuple[Trial, tuple[Trial, ...]]:
    """Find the largest count that loses at most `bound`, by bisection.

    The lost share is assumed to grow with the count. If it does not, the choice is still within the bound, and the next
    larger candidate was tried and is not within it.

    Args:
        counts: ascending counts.
        trial_of: tries a count.
        bound: share of the dense model's score that may be lost.

    Returns:
        The trial of the chosen count, and all trials by count.

    Raises:
        InvalidArgument: every count that was tried loses more.
    """
    trials: list[Trial] = []
    best: Trial | None = None
    low, high = 0, len(counts)
    while low < high:
        middle = (low + high) // 2
        trials.append(trial_of(counts[middle]))
        if trials[-1].lost <= bound:
            best, low = trials[-1], middle + 1
        else:
            high = middle
    if best is None:
        closest = min(trials, key=lambda trial: trial.lost)
        raise InvalidArgument(
            f"max_lost = {bound}: every cut that was tried loses more of the dense score on the held-out examples, at "
            f"least {closest.lost:.1%} (removing {closest.count}); raise max_lost, with which the same folder "
            "goes on from these trials, or give a ratio in a new one"
        )
    return best, tuple(sorted(trials, key=lambda trial: trial.count))


def choose(
    scores: Sequence[float],
    check: Callable[[int], Evaluation],
    file: str | os.PathLike[str],
    *,
    bound: float,
    steps: int,
    protect: Iterable[int] = (0,),
    least: int = 1,
    made_from: Mapping[str, str] | None = None,
) -> Choice:
    """Try cuts and choose how many layers are removed.

    Args:
        scores: layer scores.
        check: returns what the model with so many layers removed scores on held-out examples after `steps` steps of
            training. 0 is the dense model.
        file: JSON file that keeps every check as soon as it is made. No check is made twice.
        bound: share of the dense model's score that may be lost, 0 to 1.
        steps: training steps of each check.
        protect: layers that are never removed. Default: the first.
        least: the smallest count. Default 1.
        made_from: digests of what the checks are made from, see `gradpruner.storage.provenance`. Default: no record.

    Raises:
        InvalidArgument: no cut is within the bound, or the file was made from something else.
        GradPrunerError: the dense model has no score.
    """
    path, protected = Path(file), set(protect)
    found = first(lambda: _known(path) if _is_there(path, made_from) else {})
    record = {} if made_from is None else {MADE_FROM: dict(made_from)}

    def checked(count: int) -> dict[str, Any]:
        if str(count) not in found:
            found[str(count)] = check(count).to_dict()
            first(lambda: write_json(path, {**record, "checked": found}))
        return found[str(count)]

    counts, order = candidates(scores, protected, least=least), lowest_first(scores, protected)
    measure = EXACT if checked(0)["exact_match"] else PERPLEXITY  # 0 right, or no answers: it cannot decide
    dense = _score(checked(0), measure)
    if not dense > 0:  # NaN too
        raise GradPrunerError(f"ratio = 'auto': the dense model's {measure} on the held-out examples is {dense}")

    def trial_of(count: int) -> Trial:
        result = checked(count)
        score = _score(result, measure)
        # rounded: 1 - 0.99 is within a bound of 0.01
        lost = round(1 - score / dense, 9) if math.isfinite(score) else 1.0
        return Trial(count, result["exact_match"], result["perplexity"], lost, margin(scores, order[:count], protected))

    best, trials = search(counts, trial_of, bound)
    choice = Choice(
        best.count, len(scores), tuple(counts), bound, measure, checked(0), trials, steps, steps * len(found)
    )
    first(lambda: write_json(path, {**record, "checked": found, **choice.to_dict()}))
    return choice


def _is_there(path: Path, made_from: Mapping[str, str] | None) -> bool:
    return path.exists() if made_from is None else is_made(path, made_from)


def _known(path: Path) -> dict[str, dict[str, Any]]:
    """Read the checks of a file. Raises CheckpointError if they are not what `choose` writes."""
    with reading(str(path)):
        found: dict[str, dict[str, Any]] = dict(read_json(path, "auto")["checked"])
        for count, score in found.items():
            exact, perplexity, examples = score["exact_match"], score["perplexity"], score["examples"]
            sound = exact is None or (type(exact) in (int, float) and 0 <= exact <= 1)
            # a model that was cut too far may have a perplexity that is not a number
            sound &= perplexity is None or (type(perplexity) in (int, float) and not perplexity <= 0)
            if str(int(count)) != count or not sound or type(examples) is not int:
                raise ValueError(f"without {count} layers the score is {score}")
        if len({(score["exact_match"] is None, score["perplexity"] is None) for score in found.values()}) > 1:
            raise ValueError("not every check has the same measures")
    return found


def hold_out(examples: Sequence[H], rows: int | None, seed: int) -> tuple[Sequence[H], Sequence[H]]:
    """Hold examples out, each with all its copies.

    Args:
        examples: all examples.
        rows: how many different examples to hold out. Default: 10 %, at most 200.
        seed: of the choice.

    Returns:
        The examples to train on, and those that are held out. Parts of a table are tables, else they are lists.

    Raises:
        InvalidArgument: one of the two would be empty.
    """
    # a table is not decoded: its examples may be more than the memory holds
    keys: list[Any] = fingerprints(examples) if hasattr(examples, "records") else list(examples)  # type: ignore[arg-type]
    firsts: dict[Any, int] = {}
    for place, key in enumerate(keys):
        firsts.setdefault(key, place)
    different = list(firsts.values())
    if rows is None:
        rows = max(1, min(CHECK_ROWS, math.floor(CHECK_SHARE * len(different))))
    if not 0 < rows < len(different):
        raise InvalidArgument(
            f"check_rows = {rows} of {len(different)} different training examples; expected at least one to hold out "
            "and one to train on"
        )
    held = random.Random(seed).sample(different, rows)
    gone = {keys[place] for place in held}
    left = [place for place, key in enumerate(keys) if key not in gone]
    rest: Any = examples  # `taken` is for examples, and needs no more of them than their places
    return taken(rest, left), taken(rest, held)  # type: ignore[return-value]


def trial_rows(choice: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the trials of `Choice.to_dict` as rows of a table, one per cut."""
    return [
        {
            "layers removed": trial["count"],
            "exact match": trial["exact_match"],
            "perplexity": trial["perplexity"],
            "lost": f"{trial['lost']:.1%}",
            "margin at the cut": trial["margin"],
            "": "chosen" if trial["count"] == choice["count"] else "",
        }
        for trial in choice["trials"]
    ]


def _score(result: Mapping[str, Any], measure: str) -> float:
    value = result["exact_match" if measure == EXACT else "perplexity"]
    if value is None:
        return math.nan
    return float(value if measure == EXACT else 1 / value)
