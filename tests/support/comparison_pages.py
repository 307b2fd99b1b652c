"""Results of comparisons that were never made, and the page that shows them, taken apart."""

from __future__ import annotations

import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

from gradpruner.compare.bootstrap import Difference
from gradpruner.compare.page import write_comparison
from gradpruner.compare.results import Cost, Result
from gradpruner.plan import Plan

LAYERS = 30


METHODS = {  # exact match lost at 40 %, and how steeply it falls
    "gradpruner": 0.018,
    "shortgpt": 0.044,
    "laco": 0.062,
    "drop-last": 0.081,
    "random": 0.148,
    "magnitude": 0.119,
    "taylor": 0.024,
    "block": 0.038,
    "loss": 0.033,
}


PLAN = Plan(LAYERS, drop=[5, 8, 11, 14, 16, 19, 21, 23, 25], merge=[7, 12, 18])


def make_data(methods=tuple(METHODS), counts=(6, 9, 12, 15), seeds=3, macro_f1=True, dense=True):
    """What a comparison of so many methods could have measured: arguments of `write_comparison`."""
    noise = random.Random(0)
    results, losses = [], {}

    def add(method, count, seed, accuracy, removed, merged):
        first = 0.9 if method == "dense" else 0.9 + 25 * (0.84 - accuracy)
        steps = 400 if method == "dense" else 372
        values = [
            0.12 + 0.9 * (0.84 - accuracy) + (first - 0.12) * math.exp(-i / 45) + abs(noise.gauss(0, 0.06))
            for i in range(steps)
        ]
        losses[method, count, seed] = values
        results.append(
            Result(
                method,
                count,
                count / LAYERS,
                seed,
                accuracy,
                accuracy - 0.015 if macro_f1 else None,
                1.1 + 2 * (0.84 - accuracy),
                1200,
                LAYERS - count,
                134_000_000 - 3_540_000 * count,
                " ".join(map(str, sorted(removed))),
                " ".join(f"{donor}>{target}" for donor, target in merged.items()),
                400,
                sum(values[:10]) / 10,
                sum(values[-20:]) / 20,
                612 - 14.5 * count + noise.random() * 9,
            )
        )

    for seed in range(seeds if dense else 0):
        add("dense", 0, seed, 0.833 + 0.004 * (seed - 1), [], {})
    for method in methods:
        lost = METHODS.get(method, 0.03)
        for count in counts:
            for seed in range(seeds if count == 12 else 1):
                accuracy = 0.833 - lost * (count / 12) ** 2.2 + noise.gauss(0, 0.003)
                rank = random.Random(f"{method} {seed if method == 'random' else ''}").sample(range(1, LAYERS), count)
                ours = method == "gradpruner" and count == 12
                removed = range(LAYERS - count, LAYERS) if method == "drop-last" else PLAN.removed if ours else rank
                add(method, count, seed, accuracy, removed, PLAN.merge if ours else {})
    return {
        "title": "Layer pruning while fine-tuning",
        "task": "intents of banking questions, 30-layer model",
        "results": results,
        "losses": losses,
        "costs": [
            Cost(
                LAYERS - count,
                count,
                1.42 * (1 - 0.975 * count / LAYERS),
                round(5.2e9 * (1 - 0.86 * count / LAYERS)),
                0.83 * (1 - 0.96 * count / LAYERS),
                round(1.9e9 * (1 - 0.8 * count / LAYERS)),
                269_000_000 - 7_080_000 * count,
                3.4e12 * (1 - 0.79 * count / LAYERS),
            )
            for count in (0, *counts)
        ],
        "differences": {
            (method, 12): Difference(gap, gap - 0.011, gap + 0.011)
            for method in methods[1:]
            for gap in [METHODS.get(method, 0.03) - METHODS["gradpruner"]]
        },
        "probe": {
            "layer_scores": {"igia": [10 ** noise.gauss(-2.6 + (j not in PLAN.removed), 0.25) for j in range(LAYERS)]},
            "kind": "igia",
            "stability": [min(1, round(12 * (0.35 + 0.04 * step)) / 12) for step in range(28)],
            "plan": PLAN,
        },
        "sensitivity": [
            {"factor": factor, "value": value, "exact_match": em, "is_default": em == 0.815, "dense": 0.825}
            for factor, pairs in {
                "probe steps": [("7", 0.803), ("14", 0.811), ("28", 0.815), ("56", 0.816)],
                "merge": [("none", 0.799), ("auto", 0.815), ("all", 0.806)],
                "score": [("igia", 0.815), ("gradient", 0.801), ("weight", 0.742)],
                "LoRA rank": [("4", 0.807), ("8", 0.815), ("16", 0.812)],
            }.items()
            for value, em in pairs
        ],
        "notes": ["SmolLM2-135M, LoRA rank 8, 400 steps of 8 examples, AdamW at 2e-4", "2 CPU cores, float32"],
    }


class Page(HTMLParser):
    """A page's tags, attributes, text and tables; fails on tags that are not closed in order."""

    VOID = ("meta", "img", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.raw = path.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.tables: list[list[list[str]]] = []
        self.feed(self.raw)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th", "span"):
            self.tables[-1][-1][-1] += data

    @property
    def images(self):
        return [attributes for tag, attributes in self.tags if tag == "img"]

    @property
    def headings(self):
        return re.findall("<h2>(.*?)</h2>", self.raw)


def report(folder, **changes):
    data = {**make_data(counts=(12,), seeds=2, methods=("gradpruner", "taylor", "random")), **changes}
    return Page(write_comparison(folder, **data))


def result(method, count, seed, exact_match, **changes):
    fields = {
        "ratio": count / 10,
        "macro_f1": None,
        "perplexity": None,
        "examples": 200,
        "layers": 10 - count,
        "parameters": 1000 - 80 * count,
        "removed": " ".join(map(str, range(1, count + 1))),
        "merged": "",
        "steps": 40,
        "first_loss": 2.0,
        "last_loss": 0.5,
        "seconds": 100.0 - count,
    }
    return Result(method, count, seed=seed, exact_match=exact_match, **{**fields, **changes})


def differences(**bounds):
    """The default method minus others, by the ends of the intervals, with 4 layers removed."""
    return {(name, 4): Difference((low + high) / 2, low, high) for name, (low, high) in bounds.items()}


RESULTS = [
    result("dense", 0, 0, 0.82),
    result("dense", 0, 1, 0.78),
    result("gradpruner", 2, 0, 0.79),
    result("gradpruner", 4, 0, 0.78, perplexity=1.5),
    result("gradpruner", 4, 1, 0.74, perplexity=1.7),
    result("laco", 4, 0, 0.60),
    result("laco", 4, 1, 0.70),
    result("drop-last", 4, 0, 0.5),
    result("gradpruner:merge=0", 4, 0, 0.768),
]


COSTS = [Cost(10, 0, 2.0, 4000, 1.0, 2000, 1000, 1e9), Cost(6, 4, 1.3, 2800, 0.7, 0, 680, 6e8)]
BARE = {"title": "t", "task": "k", "losses": {}, "costs": [], "differences": {}}
