"""What the results of a comparison say: means and spreads, who is ahead of whom, and all of it in one sentence."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gradpruner.compare.results import Cost, Result
from gradpruner.errors import InvalidArgument

DENSE, DEFAULT = "dense", "gradpruner"
USUAL_RATIO = 0.4  # of the layers; the source's, and where its costs were measured (P)
Standing = Literal["ahead", "level", "behind"]


@dataclass(frozen=True)
class Metric:
    """A figure of merit: its field of a `Result`, its name, how many digits of it are worth showing."""

    field: str
    name: str
    digits: int

    def shown(self, value: float) -> str:
        """The value as text."""
        return f"{value:.{self.digits}f}"


EXACT_MATCH = Metric("exact_match", "exact match", 3)
METRICS = (EXACT_MATCH, Metric("macro_f1", "macro F1", 3), Metric("perplexity", "perplexity", 2))


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds; `deviation` is the sample's, None with one seed."""

    mean: float
    low: float
    high: float
    deviation: float | None
    seeds: int


@dataclass(frozen=True)
class Difference:
    """The default method minus another, in exact match, with its 95 % interval."""

    difference: float
    low: float
    high: float

    @property
    def standing(self) -> Standing:
        """Where the default method stands; "level" if the interval holds zero."""
        return "ahead" if self.low > 0 else "behind" if self.high < 0 else "level"


@dataclass(frozen=True)
class Measure:
    """A cost: its field of a `Cost`, its name, its unit, and what share of dense the source reports for it (P)."""

    field: str
    name: str
    unit: Literal["s", "B", "FLOP"]
    paper: float | None = None


MEASURES = (
    Measure("train_step_seconds", "training step time", "s", 0.624),
    Measure("train_peak_bytes", "training memory", "B", 0.658),
    Measure("generate_seconds", "generation time", "s", 0.615),
    Measure("generate_peak_bytes", "generation memory", "B", 0.609),
    Measure("checkpoint_bytes", "checkpoint size", "B"),
    Measure("train_flops", "training FLOPs", "FLOP"),
)


class Comparison:
    """Results by method and number of removed layers.

    main: the number of removed layers that was tried with the most seeds; of several, the planned one, then the one
    nearest to 40 %. default: "gradpruner", or the first method where it was not run. metric: the first there is.
    Raises InvalidArgument without a pruned model, or where a run occurs twice.
    """

    def __init__(
        self, results: Sequence[Result], differences: Sequence[Mapping[str, Any]] = (), planned: int | None = None
    ) -> None:
        self.groups: dict[tuple[str, int], list[Result]] = {}
        for result in results:
            group = self.groups.setdefault((result.method, result.count), [])
            if any(other.seed == result.seed for other in group):
                raise InvalidArgument(
                    f"results has two runs of {result.method!r} with {result.count} layers removed, seed {result.seed}"
                )
            group.append(result)
        names = list(dict.fromkeys(result.method for result in results if result.method != DENSE))
        if not names:
            raise InvalidArgument("results has no pruned model; expected at least one beside the dense one")
        self.default = DEFAULT if DEFAULT in names else names[0]
        self.methods = [self.default, *(name for name in names if name != self.default)]
        self.main = max(
            self.counts(self.default),
            key=lambda count: (
                len(self.groups[self.default, count]),
                count == planned,
                -round(abs(self.ratio(count) - USUAL_RATIO), 6),  # of two as near, the fewer
            ),
        )
        self.layers = self.at(self.default)[0].layers + self.main
        self.metric = next((m for m in METRICS if any(getattr(r, m.field) is not None for r in results)), EXACT_MATCH)
        self.differences = {
            (row["method"], row["count"]): Difference(row["difference"], row["low"], row["high"]) for row in differences
        }

    def counts(self, method: str) -> list[int]:
        """The numbers of removed layers that the method was run with, ascending."""
        return sorted(count for name, count in self.groups if name == method)

    def at(self, method: str, count: int | None = None) -> list[Result]:
        """The runs with so many layers removed: the main number, for the dense model none, unless told."""
        if count is None:
            count = 0 if method == DENSE else self.main
        return self.groups.get((method, count), [])

    def ratio(self, count: int) -> float:
        """The share of the layers that so many removed ones are."""
        return next(runs[0].ratio for (_, removed), runs in self.groups.items() if removed == count)

    def spread(self, method: str, count: int | None = None, metric: Metric | None = None) -> Spread | None:
        """A metric over the seeds, at the main number unless told; None where it was not measured."""
        field = (metric or self.metric).field
        return spread(getattr(run, field) for run in self.at(method, count))

    def dense_beside(self, method: str, count: int | None = None) -> Spread | None:
        """The dense model's metric over the seeds that these runs have; over all, where it has none of these."""
        seeds, field = {run.seed for run in self.at(method, count)}, self.metric.field
        alike = [run for run in self.at(DENSE) if run.seed in seeds]
        return spread(getattr(run, field) for run in alike or self.at(DENSE))

    def relative(self, method: str, count: int | None = None) -> float | None:
        """How far the metric's mean is from the dense model's with the same seeds, as a share of that."""
        here, dense = self.spread(method, count), self.dense_beside(method, count)
        return here.mean / dense.mean - 1 if here and dense and dense.mean else None

    def difference(self, method: str) -> Difference | None:
        """The default method minus this one at the main number, where it was computed."""
        return self.differences.get((method, self.main))

    def best_first(self) -> list[str]:
        """The methods that were scored at the main number."""
        means = {name: each.mean for name in self.methods if (each := self.spread(name))}
        return sorted(means, key=lambda name: means[name], reverse=self.metric.field != "perplexity")

    def others(self, variants: bool) -> list[str]:
        """What else was run at the main number: the default's own variants ("gradpruner:merge=0"), or the others."""
        prefix = f"{self.default}:"
        return [name for name in self.methods[1:] if self.at(name) and name.startswith(prefix) == variants]


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean, extremes and deviation of what is not None."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = statistics.stdev(known) if len(known) > 1 else None
    return Spread(statistics.fmean(known), min(known), max(known), deviation, len(known))


def cost_shares(costs: Sequence[Cost], count: int) -> dict[Measure, float]:
    """What a model with so many layers removed costs, as shares of the dense one's costs; {} where unknown."""
    by_count = {cost.count: cost for cost in costs}
    dense, pruned = by_count.get(0), by_count.get(count)
    if dense is None or pruned is None or count == 0:
        return {}
    both = {measure: (getattr(pruned, measure.field), getattr(dense, measure.field)) for measure in MEASURES}
    return {measure: part / whole for measure, (part, whole) in both.items() if whole}


def near_paper(comparison: Comparison) -> bool:
    """Whether the main number of layers is about the share of them that the source measured costs at."""
    return abs(comparison.ratio(comparison.main) - USUAL_RATIO) <= 0.05


def headline(comparison: Comparison, costs: Sequence[Cost] = ()) -> str:
    """The outcome at the main number of removed layers, in one sentence that claims no more than the intervals do."""
    removed = f"With {comparison.main} of {comparison.layers} layers removed, {comparison.default}"
    sentence = f"{removed} {_kept(comparison)}{_standings(comparison)}"
    share = cost_shares(costs, comparison.main).get(MEASURES[0])
    if share is not None:
        sentence += f"; a training step takes {share:.2f} of the dense model's time"
    return f"{sentence}."


def share_text(share: float) -> str:
    """A share as text: "40 %"."""
    return f"{share * 100:.0f} %"


def percent(share: float) -> str:
    """A change as text, with its sign: "−2.5 %"."""
    return f"{signed(share * 100, 1)} %"


def signed(value: float, digits: int) -> str:
    """A number with its sign, a true minus; none for zero."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text[1:] if float(text[1:]) == 0 else text


def _kept(comparison: Comparison) -> str:
    metric = comparison.metric
    here, dense = comparison.spread(comparison.default), comparison.dense_beside(comparison.default)
    if here is None:
        return "was not scored"
    mine = metric.shown(here.mean)
    change = comparison.relative(comparison.default)
    if dense is None or change is None:
        return f"reaches {mine} {metric.name}"
    if metric.field != "perplexity" and change <= 0:
        return f"keeps {mine} of {metric.shown(dense.mean)} {metric.name} ({percent(change)})"
    return f"reaches {mine} {metric.name}, the dense model {metric.shown(dense.mean)} ({percent(change)})"


def _standings(comparison: Comparison) -> str:
    """Whom the default method is ahead of, level with, behind; a variant of its own counts only where it is better."""
    others = comparison.others(variants=False)
    found: dict[str, list[str]] = {"ahead of": [], "level with": [], "behind": [], "without an interval against": []}
    words = {"ahead": "ahead of", "level": "level with", "behind": "behind", None: "without an interval against"}
    for name in others:
        difference = comparison.difference(name)
        found[words[difference.standing if difference else None]].append(name)
    order = list(found) if found["ahead of"] else ["behind", "level with", "without an interval against"]
    clauses = [f"{word} {_named(found[word], len(others), word != 'ahead of')}" for word in order if found[word]]
    if not found["ahead of"] and (found["behind"] or found["level with"]):
        clauses.append("ahead of none")
    better = [name for name in comparison.others(variants=True) if _is_behind(comparison, name)]
    if better:
        clauses.append(f"behind its own variant{'s' * (len(better) > 1)} {', '.join(better)}")
    return "".join(f", {clause}" for clause in clauses)


def _is_behind(comparison: Comparison, name: str) -> bool:
    difference = comparison.difference(name)
    return difference is not None and difference.standing == "behind"


def _named(names: Sequence[str], total: int, by_name: bool) -> str:
    """Few names as they are, where the sentence bears them; many as a count."""
    if total == 1 or (by_name and len(names) <= 2):
        return " and ".join(names)
    return f"{len(names)} of {total} other methods"
