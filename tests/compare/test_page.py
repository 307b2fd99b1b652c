"""The HTML page of a comparison."""

from __future__ import annotations

import base64
import re

import pytest
from comparison_pages import BARE, COSTS, RESULTS, Page, differences, make_data, report, result
from thinned import IN_CI

from gradpruner.compare.page import PICTURES, write_comparison
from gradpruner.compare.results import Cost
from gradpruner.errors import InvalidArgument


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a report with everything."""
    folder = tmp_path_factory.mktemp("whole")
    write_comparison(folder, **make_data())
    return folder


def test_page_has_everything_and_needs_no_network(whole):
    page = Page(whole / "report.html")
    assert page.headings == [
        "Accuracy",
        "With 12 of 30 layers removed",
        "Which layers are removed",
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


def test_what_is_missing_is_left_out(tmp_path):
    for name in PICTURES:
        (tmp_path / name).write_bytes(b"of an earlier report")
    removed = [result("gradpruner", 4, 0, 0.7, removed="")]
    page = Page(write_comparison(tmp_path, **{**BARE, "results": removed}))
    assert page.headings == ["Accuracy", "With 4 of 10 layers removed"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["accuracy.png", "report.html"]  # the old are gone
    assert page.tables == [[["method", "exact match", "seeds", "whole run"], ["gradpruner", "0.700", "1", "96 s"]]]
    assert "dense" not in page.text.partition("</style>")[2]


NOTHING_OF_ONE_KIND = ({"losses": {}}, {"sensitivity": ()}, {"differences": {}})


@pytest.mark.parametrize(
    "changes",
    [
        {"costs": []},
        {"costs": COSTS[:1]},
        {"probe": None},
        *(pytest.param(changes, marks=IN_CI) for changes in NOTHING_OF_ONE_KIND),
        make_data(dense=False, counts=(12,)),
        pytest.param(make_data(methods=("gradpruner",)), marks=IN_CI),
        pytest.param(
            make_data(methods=("shortgpt", "laco"), seeds=1, macro_f1=False),
            marks=IN_CI,
        ),
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


def test_tasks_of_the_harness_have_a_table_below_the_accuracy(tmp_path):
    rows = [
        {"method": "dense", "layers removed": 0, "letters\nacc": "0.750 ± 0.100", "seeds": 1},
        {"method": "gradpruner", "layers removed": 4, "letters\nacc": "0.375 ± 0.177", "seeds": 2},
    ]
    data = {**BARE, "results": RESULTS, "tasks": rows, "tasks_note": "± is <its> standard error"}
    page = Page(write_comparison(tmp_path, **data))
    assert "Tasks of lm-evaluation-harness" in page.headings and "± is <its> standard error" in page.text
    head, *found = next(table for table in page.tables if table[0][-1] == "seeds" and "lettersacc" in table[0])
    assert head[:2] == ["method", "layers removed"]
    assert found == [["dense", "0", "0.750 ± 0.100", "1"], ["gradpruner", "4", "0.375 ± 0.177", "2"]]
