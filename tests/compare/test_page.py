from __future__ import annotations

import base64
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gradpruner.compare.analysis import Comparison, headline
from gradpruner.compare.bootstrap import Difference
from gradpruner.compare.choice_plots import settled
from gradpruner.compare.page import PICTURES, write_comparison
from gradpruner.compare.plots import method_styles
from gradpruner.compare.results import Cost, Result, read_costs, read_results, write_costs, write_results
from gradpruner.errors import CheckpointError, InvalidArgument
from gradpruner.plan import Plan
from gradpruner.report.numbers import duration, quantity
from gradpruner.report.plots import running_mean

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


@pytest.fixture
def figures(monkeypatch):
    """Every figure that is saved while a test runs, by its file's name."""
    from matplotlib.figure import Figure

    seen = {}
    savefig = Figure.savefig

    def save(self, path, **options):
        seen[path.name.split(".png")[0].lstrip(".")] = self
        savefig(self, path, **options, dpi=40)  # soon done

    monkeypatch.setattr(Figure, "savefig", save)
    return seen


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


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a report with everything."""
    folder = tmp_path_factory.mktemp("whole")
    write_comparison(folder, **make_data())
    return folder


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


def test_page_has_everything_and_needs_no_network(whole):
    page = Page(whole / "report.html")
    assert page.headings == [
        "Accuracy",
        "With 12 of 30 layers removed",
        "Which layers go",
        "How soon the choice settles",
        "Training",
        "What it costs",
        "Sensitivity to the settings",
        "What was run",
    ]
    assert sorted(file.name for file in whole.iterdir()) == sorted([*PICTURES, "report.html"])
    assert not re.search(r"https?:|src=\"(?!data:)|@import|url\(|<link|<script", page.raw)
    assert "prefers-color-scheme: dark" in page.raw
    assert len(page.images) == len(PICTURES)
    for image, name in zip(page.images, PICTURES, strict=True):
        assert base64.b64decode(image["src"].partition(",")[2]) == (whole / name).read_bytes()
        assert len(image["alt"]) > 60
    assert all(attributes.get("scope") in ("col", "row") for tag, attributes in page.tags if tag == "th")
    assert "SmolLM2-135M" in page.text and "None" not in page.text and "nan" not in page.text


def test_plots_are_large_enough_for_a_slide(whole):
    from matplotlib.image import imread

    for name in PICTURES:
        height, width, _ = imread(whole / name).shape
        assert width == 1920 and 700 <= height <= 1600, name


def test_main_table_has_means_spreads_relative_values_and_intervals(tmp_path):
    intervals = differences(**{"laco": (0.05, 0.17), "drop-last": (-0.3, -0.2)})
    page = Page(write_comparison(tmp_path, **{**BARE, "results": RESULTS, "differences": intervals}))
    head, *rows = page.tables[0]
    assert head[0] == "method" and "macro F1" not in head
    assert rows == [
        ["dense", "0.800 ± 0.028", "", "", "", "2", "1.7 min"],
        ["gradpruner:merge=0", "0.768", "", "−6.3 %", "", "1", "96 s"],
        ["gradpruner", "0.760 ± 0.028", "1.60", "−5.0 %", "", "2", "96 s"],
        ["laco", "0.650 ± 0.071", "", "−18.8 %", "ahead +0.110 [+0.050, +0.170]", "2", "96 s"],
        ["drop-last", "0.500", "", "−39.0 %", "behind −0.250 [−0.300, −0.200]", "1", "96 s"],
    ]
    assert page.tables[1][0] == ["method", "2 removed20 %", "4 removed40 %"]
    assert page.tables[1][1] == ["gradpruner", "0.790", "0.760 ± 0.028"]
    assert page.tables[1][2] == ["laco", "", "0.650 ± 0.071"]
    assert "scored on 200 examples" in page.text


def test_costs_are_shares_of_the_dense_models(tmp_path, figures):
    page = Page(write_comparison(tmp_path, **{**BARE, "results": RESULTS, "costs": COSTS}))
    table = page.tables[-1]
    assert table[1] == ["training step time", "2 s", "1.3 s", "0.650", "0.624"]
    assert table[2] == ["training memory", "4 kB", "2.8 kB", "0.700", "0.658"]
    assert table[5] == ["checkpoint size", "1 kB", "680 B", "0.680", ""]
    assert table[6] == ["training FLOPs", "1 GFLOP", "600 MFLOP", "0.600", ""]
    (axes,) = figures["costs"].axes
    assert [bar.get_width() for bar in axes.patches] == pytest.approx([0.65, 0.7, 0.7, 0, 0.68, 0.6])
    ticks = [segment[0][0] for segment in axes.collections[0].get_segments()]
    assert ticks == pytest.approx([0.624, 0.658, 0.615, 0.609])
    assert "a training step takes 0.65 of the dense model's time." in page.text


def test_papers_figures_are_left_out_far_from_its_share(tmp_path, figures):
    results = [result("dense", 0, 0, 0.8), result("gradpruner", 2, 0, 0.7)]
    costs = [COSTS[0], Cost(8, 2, 1.6, 3000, 0.8, 1500, 800, 8e8)]
    page = Page(write_comparison(tmp_path, **{**BARE, "results": results, "costs": costs}))
    assert "the paper" not in page.text and not figures["costs"].axes[0].collections


@pytest.mark.parametrize(
    ("intervals", "words"),
    [
        ([(0.01, 0.2), (0.1, 0.3)], ", ahead of 2 of 2 other methods."),
        ([(0.01, 0.2), (-0.1, 0.3)], ", ahead of 1 of 2 other methods, level with drop-last."),
        ([(-0.01, 0.2), (-0.1, 0.3)], ", level with laco and drop-last, ahead of none."),
        ([(-0.2, -0.1), (0.1, 0.3)], ", ahead of 1 of 2 other methods, behind laco."),
        ([(-0.2, -0.1), (0.0, 0.3)], ", behind laco, level with drop-last, ahead of none."),
        ([(0.1, 0.2)], ", ahead of 1 of 2 other methods, without an interval against drop-last."),
        ([], ", without an interval against laco and drop-last."),
    ],
)
def test_headline_claims_what_the_intervals_do(intervals, words):
    known = differences(**dict(zip(["laco", "drop-last"], intervals, strict=False)))
    sentence = headline(Comparison(RESULTS, known))
    assert sentence == f"With 4 of 10 layers removed, gradpruner keeps 0.760 of 0.800 exact match (−5.0 %){words}"


def test_headline_of_other_cases():
    behind, ahead = (differences(**{"gradpruner:merge=0": ends}) for ends in ((-0.2, -0.1), (0.1, 0.2)))
    assert headline(Comparison(RESULTS, behind)).endswith("behind its own variant gradpruner:merge=0.")
    assert "gradpruner:merge=0" not in headline(Comparison(RESULTS, ahead))
    start = "With 4 of 10 layers removed, "
    alone = [result("gradpruner", 4, 0, 0.7)]
    assert headline(Comparison(alone)) == f"{start}gradpruner reaches 0.700 exact match."
    better = [*alone, result("dense", 0, 0, 0.5), result("laco", 4, 0, 0.6)]
    assert headline(Comparison(better, differences(laco=(0.05, 0.15)))) == (
        f"{start}gradpruner reaches 0.700 exact match, the dense model 0.500 (+40.0 %), ahead of laco."
    )
    perplexity = [
        result("dense", 0, 0, None, perplexity=3.0),
        result("laco", 4, 0, None, perplexity=3.3),
    ]
    assert headline(Comparison(perplexity)) == (f"{start}laco reaches 3.30 perplexity, the dense model 3.00 (+10.0 %).")
    assert headline(Comparison([result("laco", 4, 0, None)])) == f"{start}laco was not scored."


def test_main_number_is_the_one_with_most_seeds_then_the_planned_one():
    results = [result("gradpruner", count, 0, 0.7) for count in (2, 3, 5)]
    assert Comparison(results).main == 3
    assert Comparison(results, planned=2).main == 2
    assert Comparison([*results, result("gradpruner", 5, 1, 0.7)], planned=2).main == 5


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ([], "no pruned model"),
        ([result("dense", 0, 0, 0.8)], "no pruned model"),
        ([result("laco", 4, 0, 0.8)] * 2, "two runs of 'laco' with 4 layers removed, seed 0"),
    ],
)
def test_refusals(tmp_path, results, words):
    with pytest.raises(InvalidArgument, match=words):
        write_comparison(tmp_path, **{**BARE, "results": results})
    assert not list(tmp_path.iterdir())


def test_accuracy_plot_shows_means_and_extremes(tmp_path, figures):
    write_comparison(tmp_path, **{**BARE, "results": RESULTS})
    (axes,) = figures["accuracy"].axes
    lines = {line.get_label(): line for line in axes.lines}
    assert list(lines["gradpruner"].get_xdata()) == [0.2, 0.4]
    assert list(lines["gradpruner"].get_ydata()) == pytest.approx([0.79, 0.76])
    assert list(lines["laco"].get_ydata()) == pytest.approx([0.65])
    assert list(lines["dense"].get_ydata()) == pytest.approx([0.8, 0.8])
    bands = {band.get_label(): band.get_paths()[0].get_extents() for band in axes.collections}
    assert set(bands) == {"gradpruner", "laco"}
    assert (bands["gradpruner"].y0, bands["gradpruner"].y1) == pytest.approx((0.74, 0.78))
    assert bands["gradpruner"].x0 > 0.35  # the one seed at 0.2 has no band
    assert (bands["laco"].y0, bands["laco"].y1) == pytest.approx((0.6, 0.7))
    (span,) = axes.patches
    assert (span.get_y(), span.get_y() + span.get_height()) == pytest.approx((0.78, 0.82))
    widths = {name: line.get_linewidth() for name, line in lines.items() if not name.startswith("_")}
    assert max(widths, key=widths.__getitem__) == "gradpruner"
    names = [text.get_text() for text in figures["accuracy"].legends[0].get_texts()]
    assert names == ["dense", "gradpruner:merge=0", "gradpruner", "laco", "drop-last"]  # as the lines end


def test_many_methods_fit_into_the_legend(tmp_path, figures):
    methods = ("gradpruner", *(f"method {n}" for n in range(9)))
    write_comparison(tmp_path, **make_data(methods=methods))
    for name in ("accuracy", "losses"):
        (legend,) = figures[name].legends
        assert sorted(text.get_text() for text in legend.get_texts()) == sorted(["dense", *methods])
        box, whole = legend.get_window_extent(), figures[name].bbox
        assert (
            box.x0 >= figures[name].axes[0].bbox.x1 and box.x1 <= whole.x1 and whole.y0 <= box.y0 < box.y1 <= whole.y1
        )
    styles = method_styles(Comparison(make_data(methods=methods)["results"]))
    looks = {(style["color"], str(style.get("linestyle")), style.get("marker")) for style in styles.values()}
    assert len(looks) == len({style.get("marker") for style in styles.values()}) == 11


def test_layers_plot_fills_what_each_method_removes(tmp_path, figures):
    data = make_data(methods=("gradpruner", "drop-last", "random"))
    write_comparison(tmp_path, **data)
    bars, grid = figures["layers"].axes
    legends = [text.get_text() for text in grid.get_legend().get_texts()]
    assert legends == ["removed (paler: with some seeds only)", "merged"]
    assert bars.get_yscale() == "log" and len(bars.patches) == LAYERS
    filled: dict = {}
    for patch in grid.patches:
        if patch.get_alpha():
            row = round(patch.get_y() + patch.get_height() / 2)
            filled.setdefault(row, {})[round(patch.get_x() + 0.4)] = patch
    assert [label.get_text() for label in grid.get_yticklabels()] == ["gradpruner", "drop-last", "random"]
    assert sorted(filled[0]) == list(PLAN.removed)
    assert sorted(layer for layer, patch in filled[0].items() if patch.get_hatch()) == [7, 12, 18]
    assert sorted(filled[1]) == list(range(18, 30))
    runs = [set(map(int, r.removed.split())) for r in data["results"] if (r.method, r.count) == ("random", 12)]
    shares = {layer: sum(layer in run for run in runs) / 3 for layer in set().union(*runs)}
    assert {layer: patch.get_alpha() for layer, patch in filled[2].items()} == pytest.approx(
        {layer: 0.15 + 0.85 * share for layer, share in shares.items()}
    )


def test_settling(tmp_path, figures):
    page = report(tmp_path)
    stability = make_data()["probe"]["stability"]
    (axes,) = figures["settling"].axes
    assert list(axes.lines[0].get_ydata()) == stability
    assert "Of 28 probe steps, the removed set is the final one from step 17 on." in page.text
    assert (settled([0.5, 1, 0.9, 1, 1]), settled([1, 1]), settled([1, 0.5])) == (4, 1, None)


def test_losses_start_where_the_cut_was(tmp_path, figures):
    losses = {("dense", 0, 0): [2.0] * 40, ("dense", 0, 1): [1.0] * 40, ("laco", 4, 0): [5.0, 4.0] * 15}
    page = Page(write_comparison(tmp_path, **{**BARE, "results": RESULTS, "losses": losses}))
    lines = {line.get_label(): line for line in figures["losses"].axes[0].lines}
    assert figures["losses"].axes[0].get_yscale() == "log"
    assert list(lines["dense"].get_xdata()) == list(range(40))
    assert set(lines["dense"].get_ydata()) == {1.5}
    assert list(lines["laco"].get_xdata()) == list(range(10, 40))
    assert list(lines["laco"].get_ydata()) == [5.0, 4.0] * 15
    assert "gradpruner" not in lines
    assert page.tables[-1][1] == ["dense", "2.000", "0.500", "40"]
    assert running_mean([1, 2, 3, 6], 2) == [1, 1.5, 2.5, 4.5]


def test_losses_that_are_not_numbers(tmp_path):
    losses = {("laco", 4, 0): [2.0, math.nan, math.nan], ("gradpruner", 4, 0): [math.inf]}
    write_comparison(tmp_path, **{**BARE, "results": RESULTS, "losses": losses})
    assert (tmp_path / "losses.png").exists()


def test_sensitivity_marks_the_default(tmp_path, figures):
    page = report(tmp_path)
    panels = figures["sensitivity"].axes
    assert [panel.get_xlabel() for panel in panels] == ["probe steps", "merge", "score", "LoRA rank"]
    points = [line for line in panels[1].lines if line.get_marker() == "o"]
    assert [point.get_ydata()[0] for point in points] == [0.799, 0.815, 0.806]
    assert [point.get_markerfacecolor() != "white" for point in points] == [False, True, False]
    assert "merge auto (default): 0.815" in page.images[-1]["alt"]
    assert len(panels[0].lines) == 4 + 2 and len(panels[1].lines) == 3 + 1  # words are not joined by a line


def test_what_is_missing_is_left_out(tmp_path):
    for name in PICTURES:
        (tmp_path / name).write_bytes(b"of an earlier report")
    removed = [result("gradpruner", 4, 0, 0.7, removed="")]
    page = Page(write_comparison(tmp_path, **{**BARE, "results": removed}))
    assert page.headings == ["Accuracy", "With 4 of 10 layers removed"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["accuracy.png", "report.html"]  # the old are gone
    assert page.tables == [[["method", "exact match", "seeds", "whole run"], ["gradpruner", "0.700", "1", "96 s"]]]
    assert "dense" not in page.text.partition("</style>")[2]


@pytest.mark.parametrize(
    "changes",
    [
        {"costs": []},
        {"costs": COSTS[:1]},
        {"probe": None},
        {"losses": {}},
        {"sensitivity": ()},
        {"differences": {}},
        make_data(dense=False, counts=(12,)),
        make_data(methods=("gradpruner",)),
        make_data(methods=("shortgpt", "laco"), seeds=1, macro_f1=False),
        {"results": [result("gradpruner", 4, 0, None)], "probe": None},
    ],
)
def test_reports_without_something(tmp_path, figures, changes):
    page = report(tmp_path, **changes)
    assert page.text.count("With ") >= 1 and "None" not in page.text
    assert len(page.images) == len(list(tmp_path.glob("*.png"))) == len(figures)


def test_names_are_escaped(tmp_path, figures):
    evil = "<script>'$x$\"&"
    results = [result("dense", 0, 0, 0.8), *(result(evil, count, 0, 0.7) for count in (2, 4))]
    losses = {(evil, 4, 0): [1.0, 0.5]}
    sensitivity = [{"factor": evil, "value": evil, "exact_match": 0.5, "is_default": True, "dense": None}]
    data = {**BARE, "title": evil, "task": evil, "results": results, "losses": losses, "sensitivity": sensitivity}
    page = Page(write_comparison(tmp_path, **data, notes=[evil]))
    assert "script" not in [tag for tag, _ in page.tags]
    assert page.text.count(evil) >= 8
    assert evil in page.images[0]["alt"]
    assert evil in [text.get_text() for text in figures["accuracy"].legends[0].get_texts()]


def test_csv_round_trip(tmp_path):
    results = make_data()["results"] + [result("gradpruner:merge=0", 4, 0, None, merged='6>5,"', last_loss=math.inf)]
    write_results(tmp_path / "results.csv", results)
    assert read_results(tmp_path / "results.csv") == results
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0].startswith("method,count,ratio,seed,exact_match") and len(lines) == len(results) + 1
    assert lines[-1].startswith("gradpruner:merge=0,4,0.4,0,,,,200,")
    write_costs(tmp_path / "costs.csv", COSTS)
    assert read_costs(tmp_path / "costs.csv") == COSTS
    write_results(tmp_path / "results.csv", [])
    assert read_results(tmp_path / "results.csv") == []


HEAD = (
    "layers,count,train_step_seconds,train_peak_bytes,generate_seconds,generate_peak_bytes,checkpoint_bytes,train_flops"
)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "expected the columns layers,count"),
        (b"layers,count\n1,2\n", "expected the columns layers,count"),
        (f"{HEAD}\n1,2\n".encode(), "row 2: 2 cells; expected 8"),
        (f"{HEAD}\n1,2,x,4,5,6,7,8\n".encode(), "row 2: train_step_seconds = 'x'; expected float"),
        (f"{HEAD}\n1,2,3,,5,6,7,8\n".encode(), "row 2: train_peak_bytes = ''; expected int"),
        (b"\xff\xfe", "is not a costs file"),
    ],
)
def test_bad_csv(tmp_path, content, words):
    (tmp_path / "costs.csv").write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(words)) as caught:
        read_costs(tmp_path / "costs.csv")
    assert "costs.csv" in str(caught.value)


def test_missing_csv(tmp_path):
    with pytest.raises(InvalidArgument, match=r"gone\.csv.*No such file"):
        read_results(tmp_path / "gone.csv")


@pytest.mark.parametrize(("seconds", "words"), [(0.5, "0.5 s"), (96, "96 s"), (444, "7.4 min"), (7500, "2 h 05 min")])
def test_durations(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize(("value", "words"), [(0, "0 B"), (999, "999 B"), (999_900, "1 MB"), (3.41e9, "3.41 GB")])
def test_quantities(value, words):
    assert quantity(value, "B") == words


def test_a_model_is_held_against_the_dense_one_of_its_own_seeds():
    dense = [result("dense", 0, 0, 0.8), result("dense", 0, 1, 0.6)]
    found = Comparison([*dense, result("gradpruner", 12, 0, 0.8), result("shortgpt", 12, 7, 0.7)], {}, 12)
    assert found.relative("gradpruner") == pytest.approx(0)
    assert found.relative("shortgpt") == pytest.approx(0)  # no seed in common: against all of them
    assert "0.800 of 0.800" in headline(found, [])
