"""What the results of a comparison say: means, spreads, standings and one sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gradpruner.compare.bootstrap import Difference, Standing
from gradpruner.compare.results import Cost, Result
from gradpruner.errors import InvalidArgument
from gradpruner.report.numbers import percent

DENSE, DEFAULT = "dense", "gradpruner"
USUAL_RATIO = 0.4  # of the layers: the paper's, at which it measured its costs
Differences = Mapping[tuple[str, int], Difference]  # by method and number of removed layers


@dataclass(frozen=True)
class Metric:
    """A measure of quality.

    Args:
        field: its field of a `Result`.
        name: what people call it.
        digits: digits after the point that are worth showing.
    """

    field: str
    name: str
    digits: int

    def shown(self, value: float) -> str:
        """Return a value as text."""
        return f"{value:.{self.digits}f}"


EXACT_MATCH = Metric("exact_match", "exact match", 3)
METRICS = (EXACT_MATCH, Metric("macro_f1", "macro F1", 3), Metric("perplexity", "perplexity", 2))


@dataclass(frozen=True)
class Spread:
    """A figure over the seeds.

    Args:
        mean: the mean.
        low: the lowest value.
        high: the highest value.
        deviation: standard deviation of the sample, None with one seed.
        seeds: how many values there are.
    """

    mean: float
    low: float
    high: float
    deviation: float | None
    seeds: int


@dataclass(frozen=True)
class Measure:
    """A cost.

    Args:
        field: its field of a `Cost`.
        name: what people call it.
        unit: its unit.
        paper: the share of the dense model's cost that the paper reports, None where it reports none.
    """

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

    Its `default` is "gradpruner", or the first method if that was not run. Its `main` is the number of removed layers
    that the tables and sentences are about: the one with which the default was run with the most seeds. Of several, it
    is the planned one, then the one nearest to 40 % of the layers. Its `metric` is the first of `METRICS` that was
    measured.

    Args:
        results: one per run.
        differences: the default method minus another one, in exact match, by method and number of removed layers.
        planned: the number of layers that a plan removes, if there is a plan to show.

    Raises:
        InvalidArgument: no pruned model is among the results, or a run occurs twice.
    """

    def __init__(
        self, results: Sequence[Result], differences: Differences | None = None, planned: int | None = None
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
                -round(abs(self.ratio(count) - USUAL_RATIO), 6),  # of two that are as near, the smaller number
            ),
        )
        self.layers = self.at(self.default)[0].layers + self.main
        self.metric = next((m for m in METRICS if any(getattr(r, m.field) is not None for r in results)), EXACT_MATCH)
        self.differences = dict(differences or {})

    def counts(self, method: str) -> list[int]:
        """Return the numbers of removed layers that the method was run with, ascending."""
        return sorted(count for name, count in self.groups if name == method)

    def at(self, method: str, count: int | None = None) -> list[Result]:
        """Return the runs of a method with one number of removed layers.

        Args:
            method: the method's name, or "dense".
            count: the number of removed layers. Default: the main one, for the dense model 0.
        """
        if count is None:
            count = 0 if method == DENSE else self.main
        return self.groups.get((method, count), [])

    def ratio(self, count: int) -> float:
        """Return which share of all layers `count` layers are."""
        return next(runs[0].ratio for (_, removed), runs in self.groups.items() if removed == count)

    def spread(self, method: str, count: int | None = None, metric: Metric | None = None) -> Spread | None:
        """Return a metric over the seeds, None where it was not measured.

        Args:
            method: the method's name, or "dense".
            count: the number of removed layers, as for `at`.
            metric: default the comparison's own.
        """
        field = (metric or self.metric).field
        return spread(getattr(run, field) for run in self.at(method, count))

    def dense_beside(self, method: str, count: int | None = None) -> Spread | None:
        """Return the dense model's metric over the seeds of a method's runs.

        It is over all seeds where the two have none in common.

        Args:
            method: the method whose runs are compared with the dense model.
            count: the number of removed layers, as for `at`.
        """
        seeds, field = {run.seed for run in self.at(method, count)}, self.metric.field
        alike = [run for run in self.at(DENSE) if run.seed in seeds]
        return spread(getattr(run, field) for run in alike or self.at(DENSE))

    def relative(self, method: str, count: int | None = None) -> float | None:
        """Return the relative change of the metric's mean from the dense model's.

        Both means are over the same seeds.

        Args:
            method: the method's name.
            count: the number of removed layers, as for `at`.

        Returns:
            −0.025 where the method lost 2.5 %. None where one of the two was not measured.
        """
        here, dense = self.spread(method, count), self.dense_beside(method, count)
        return here.mean / dense.mean - 1 if here and dense and dense.mean else None

    def difference(self, method: str) -> Difference | None:
        """Return the default method minus this one at the main number, if it was computed."""
        return self.differences.get((method, self.main))

    def best_first(self) -> list[str]:
        """Return the methods that were scored at the main number, the best first."""
        means = {name: scores.mean for name in self.methods if (scores := self.spread(name))}
        return sorted(means, key=lambda name: means[name], reverse=self.metric.field != "perplexity")

    def others(self, variants: bool) -> list[str]:
        """Return what else was run at the main number: variants, or the other methods.

        A variant is the default method with another setting, such as "gradpruner:merge=0".
        """
        prefix = f"{self.default}:"
        return [name for name in self.methods[1:] if self.at(name) and name.startswith(prefix) == variants]


def spread(values: Iterable[float | None]) -> Spread | None:
    """Return mean, extremes and deviation of the values that are not None, if there are any."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    deviation = None
    if len(known) > 1:  # of a run that diverged, losses and perplexity are not finite
        deviation = statistics.stdev(known) if all(map(math.isfinite, known)) else math.nan
    return Spread(statistics.fmean(known), min(known), max(known), deviation, len(known))


def cost_shares(costs: Sequence[Cost], count: int) -> dict[Measure, float]:
    """Return what a model with layers removed costs, as shares of the dense model's costs.

    Args:
        costs: what was measured, one per number of removed layers.
        count: the number of removed layers.

    Returns:
        A share per measure; nothing where the costs of the dense or of this model are not known.
    """
    by_count = {cost.count: cost for cost in costs}
    dense, pruned = by_count.get(0), by_count.get(count)
    if dense is None or pruned is None or count == 0:
        return {}
    pairs = {measure: (getattr(pruned, measure.field), getattr(dense, measure.field)) for measure in MEASURES}
    return {measure: part / whole for measure, (part, whole) in pairs.items() if whole}


def near_paper(comparison: Comparison) -> bool:
    """Return whether the main number is near the share at which the paper measured costs."""
    return abs(comparison.ratio(comparison.main) - USUAL_RATIO) <= 0.05


def headline(comparison: Comparison, costs: Sequence[Cost] = ()) -> str:
    """Return the outcome at the main number of removed layers, in one sentence.

    The sentence claims no more than the intervals of the differences do.

    Args:
        comparison: the results.
        costs: the measured costs of the models.
    """
    removed = f"With {comparison.main} of {comparison.layers} layers removed, {comparison.default}"
    sentence = f"{removed} {_kept(comparison)}{_standings(comparison)}"
    share = cost_shares(costs, comparison.main).get(MEASURES[0])
    if share is not None:
        sentence += f"; a training step takes {share:.2f} of the dense model's time"
    return f"{sentence}."


def _kept(comparison: Comparison) -> str:
    metric = comparison.metric
    here, dense = comparison.spread(comparison.default), comparison.dense_beside(comparison.default)
    if here is None:
        return "was not scored"
    score = metric.shown(here.mean)
    change = comparison.relative(comparison.default)
    if dense is None or change is None:
        return f"reaches {score} {metric.name}"
    if metric.field != "perplexity" and change <= 0:
        return f"keeps {score} of {metric.shown(dense.mean)} {metric.name} ({percent(change)})"
    return f"reaches {score} {metric.name}, the dense model {metric.shown(dense.mean)} ({percent(change)})"


def _standings(comparison: Comparison) -> str:
    """Return whom the default method is ahead of, level with and behind.

    A variant of the default is named only where it is better.
    """
    others = comparison.others(variants=False)
    words: dict[Standing | None, str] = {
        "ahead": "ahead of",
        "level": "level with",
        "behind": "behind",
        None: "without an interval against",
    }
    names: dict[str, list[str]] = {word: [] for word in words.values()}
    for name in others:
        difference = comparison.difference(name)
        names[words[difference.standing if difference else None]].append(name)
    order = list(names) if names["ahead of"] else ["behind", "level with", "without an interval against"]
    clauses = [f"{word} {_named(names[word], len(others), word != 'ahead of')}" for word in order if names[word]]
    if not names["ahead of"] and (names["behind"] or names["level with"]):
        clauses.append("ahead of none")
    better = [name for name in comparison.others(variants=True) if _is_behind(comparison, name)]
    if better:
        plural = "s" if len(better) > 1 else ""
        clauses.append(f"behind its own variant{plural} {', '.join(better)}")
    return "".join(f", {clause}" for clause in clauses)


def _is_behind(comparison: Comparison, name: str) -> bool:
    difference = comparison.difference(name)
    return difference is not None and difference.standing == "behind"


def _named(names: Sequence[str], total: int, by_name: bool) -> str:
    """Return one or two names as they are if `by_name`, and more names as a count."""
    if total == 1 or (by_name and len(names) <= 2):
        return " and ".join(names)
    return f"{len(names)} of {total} other methods"
