"""Sensitivity: the default method with one setting changed at a time, as methods of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradpruner.compare.analysis import DENSE
from gradpruner.compare.results import Result
from gradpruner.compare.sensitivity_factors import FACTORS
from gradpruner.methods import GradPruner, format_method, parse_method
from gradpruner.named_options import value_of


def variants(factors: Mapping[str, Sequence[Any]], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One row a value: factor, value, method, is_default.

    factors: of FACTORS, the values to try. defaults: what the comparison itself has of each option ("probe_steps",
    "rank", "share"), where the method leaves it open.
    """
    usual = {**vars(GradPruner().settings), **defaults}
    rows = []
    for factor, values in factors.items():
        option, also, _ = FACTORS[factor]
        for value in map(value_of, map(str, values)):  # a command line has text
            default = value == usual[option] and not also
            text = "" if default else ",".join(filter(None, (also, f"{option}={value}")))
            method = format_method(parse_method(f"gradpruner:{text}"))
            rows.append({"factor": factor, "value": str(value), "method": method, "is_default": default})
    return rows


def scored(tried: Mapping[str, Any], results: Sequence[Result]) -> list[dict[str, Any]]:
    """The rows whose models are done, with their exact match and the dense model's, means over seeds.

    tried: rows, and the count of layers removed and the seeds that they were tried with: a comparison's folder holds
    others of the same methods, which would not be alike.
    """
    alike = [r for r in results if r.seed in tried["seeds"] and r.exact_match is not None]
    dense = _mean(r for r in alike if r.method == DENSE)
    found = []
    for row in tried["rows"]:
        mean = _mean(r for r in alike if (r.method, r.count) == (row["method"], tried["count"]))
        if mean is not None:
            found.append({**row, "exact_match": mean, "dense": dense})
    return found


def _mean(results: Iterable[Result]) -> float | None:
    scores = [r.exact_match for r in results if r.exact_match is not None]
    return sum(scores) / len(scores) if scores else None
