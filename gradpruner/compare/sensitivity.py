"""Try the default method with one setting changed at a time, as methods of a comparison."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gradpruner.compare.analysis import DENSE
from gradpruner.compare.results import Result
from gradpruner.compare.sensitivity_factors import FACTORS
from gradpruner.methods import GradPruner, format_method, parse_method
from gradpruner.named_options import value_of


def variants(factors: Mapping[str, Sequence[Any]], defaults: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what to try: one row per value, with factor, value, method and is_default.

    Args:
        factors: the values to try of each factor, by its name in `FACTORS`. Text is read as a command line's.
        defaults: the comparison's own value of the options that the method leaves open: "probe_steps", "rank" and
            "share".
    """
    usual = {**vars(GradPruner().settings), **defaults}
    rows = []
    for factor, values in factors.items():
        option, needed, _ = FACTORS[factor]
        for value in map(value_of, map(str, values)):  # a command line has text
            default = value == usual[option] and not needed
            text = "" if default else ",".join(filter(None, (needed, f"{option}={value}")))
            method = format_method(parse_method(f"gradpruner:{text}"))
            rows.append({"factor": factor, "value": str(value), "method": method, "is_default": default})
    return rows


def scored(tried: Mapping[str, Any], results: Sequence[Result]) -> list[dict[str, Any]]:
    """Return the rows whose models are done, with their exact match and the dense model's.

    Both are means over the seeds.

    Args:
        tried: "rows" of `variants`, with the "count" of removed layers and the "seeds" that they were tried with. A
            folder may hold other runs of the same methods, which would not be comparable.
        results: every run of the folder.
    """
    alike = [r for r in results if r.seed in tried["seeds"] and r.exact_match is not None]
    dense = _mean(r for r in alike if r.method == DENSE)
    rows = []
    for row in tried["rows"]:
        mean = _mean(r for r in alike if (r.method, r.count) == (row["method"], tried["count"]))
        if mean is not None:
            rows.append({**row, "exact_match": mean, "dense": dense})
    return rows


def _mean(results: Iterable[Result]) -> float | None:
    scores = [r.exact_match for r in results if r.exact_match is not None]
    return sum(scores) / len(scores) if scores else None
