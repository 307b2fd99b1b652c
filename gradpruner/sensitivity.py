"""Sensitivity: the default method with one setting changed at a time, as methods of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gradpruner.factors import FACTORS
from gradpruner.methods import GradPruner, parse_method, spelled
from gradpruner.results import Result
from gradpruner.spelling import value_of


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
            method = spelled(parse_method(f"gradpruner:{text}"))
            rows.append({"factor": factor, "value": str(value), "method": method, "is_default": default})
    return rows


def scored(rows: Sequence[Mapping[str, Any]], results: Sequence[Result]) -> list[dict[str, Any]]:
    """The rows whose models are done, with their exact match, mean over seeds."""
    found = []
    for row in rows:
        scores = [r.exact_match for r in results if r.method == row["method"]]
        known = [score for score in scores if score is not None]
        if known:
            found.append({**row, "exact_match": sum(known) / len(known)})
    return found
